"""Measurements of speed and memory: contestants in turn, their results checked equal, ratios round by round."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .section import Section, Settings

__all__ = ["SECTIONS", "measure_section"]

SECTIONS = {
    "layer": "one layer: RUP-MoF, the dense FFN, mixtures of experts; EWA; AdamW",
    "step": "the whole training step: dense, S2D, reference modules; peak memory",
    "ops": "farthest point sampling and nearest neighbours",
    "data": "the data path against what training consumes",
    "scale": "cost against tokens, experts, width, points, batch and ranks",
    "inference": "evaluation: dense, merged, reference modules",
    "gpu": "on a GPU alone: large batches, CUDA graphs, several seeds side by side",
}
"""What can be measured, in the order of the page."""


def measure_section(name: str, settings: "Settings") -> "Section":
    """Measure one section.

    Args:
        name: one of `SECTIONS`.
        settings: where and how.

    Raises:
        InputError: contestants that should compute the same do not, or a process of theirs dies.

    Example:
        >>> import torch
        >>> from benchmarks.section import Settings
        >>> section = measure_section("layer", Settings(torch.device("cpu"), num_threads=2))  # doctest: +SKIP
        >>> section.comparisons[0].base  # doctest: +SKIP
        'dense FFN'
    """
    return importlib.import_module(f".{name}", __name__).measure(settings)
