"""Random state: the global generators, and generators that are functions of their keys."""

import hashlib
import random

import numpy as np
import torch
from numpy.random import Generator as NumpyGenerator
from torch import Generator


def derived_generator(*keys: int | str) -> Generator:
    """Make a CPU generator that depends only on the keys, not on the machine or the process.

    Example:
        >>> derived_generator(0, "epoch", 3).initial_seed() == derived_generator(0, "epoch", 3).initial_seed()
        True
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def derived_rng(*keys: int | str) -> NumpyGenerator:
    """Make a generator that depends only on the keys."""
    return np.random.default_rng(
        int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=16).digest(), "little")
    )


def rng_state(device: torch.device) -> dict[str, object]:
    """Return the state of every global generator: Python, NumPy, torch on the CPU and on `device`."""
    legacy = np.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)
    name, keys, *rest = legacy
    state: dict[str, object] = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
