"""The training state that a checkpoint holds in addition to the model, gathered from all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..machine import Runtime
from ..random_state import rng_state


def gather_states(runtime: Runtime, sums: Tensor) -> tuple[list[Any], list[Tensor]]:
    """Return the random state (see `rng_state`) and the `sums` of every rank; all `sums` have the same shape."""
    own = rng_state(runtime.device)
    if not runtime.is_distributed:
        return [own], [sums]
    states: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(states, own)
    all_sums = [torch.zeros_like(sums) for _ in states]
    dist.all_gather(all_sums, sums)
    return states, all_sums
