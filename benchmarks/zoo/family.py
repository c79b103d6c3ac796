"""What the compatibility page tries: a family of models, and how to build and call a tiny one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        source: the package it comes from.
        name: there.
        build: makes a tiny model with random weights; the same one after the same seed.
        inputs: makes an input of a batch size, see `benchmarks.training_pass.run_model`.
        targets: of `MoFConfig`; None is the default.
    """

    source: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    targets: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        """`source:name`."""
        return f"{self.source}:{self.name}"


def images(size: int = 32, *, key: str = "", frames: int = 0) -> Callable[[int], Any]:
    """Return a maker of images (B, 3, size, size) or videos (B, frames, 3, size, size), under a keyword or alone."""

    def make(batch: int) -> Any:
        shape = (batch, frames, 3, size, size) if frames else (batch, 3, size, size)
        return {key: torch.randn(shape)} if key else torch.randn(shape)

    return make


def words(batch: int, *, length: int = 7, vocabulary: int = 99, decoder: bool = False) -> dict[str, Tensor]:
    """Make sentences of token numbers as the keywords `input_ids` and, for a decoder, `decoder_input_ids`."""
    keys = ("input_ids", "decoder_input_ids") if decoder else ("input_ids",)
    return {key: torch.randint(3, vocabulary - 1, (batch, length)) for key in keys}


def quieten_(model: nn.Module) -> nn.Module:
    """Set all dropout and stochastic depth of a model to 0: random numbers would differ between dense and sparse."""
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and (isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in key):
                setattr(module, key, 0.0)
    return model
