"""Measurements of speed and memory. Contestants run in turn, equal results are checked, ratios are taken per round."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .section import Section, Settings

__all__ = ["ONLY_ON", "SECTIONS", "measure_section"]

SECTIONS = {
    "layer": "one layer: RUP-MoF, the dense FFN, mixtures of experts; EWA; AdamW",
    "step": "the whole training step: dense, S2D, reference modules; peak memory",
    "profile": "where a training step spends its time, and its own matrix products beside",
    "ops": "farthest point sampling and nearest neighbours",
    "data": "the data path against what training consumes",
    "scale": "cost against tokens, experts, width, points, batch and ranks",
    "inference": "evaluation: dense, merged, reference modules",
    "pretraining": "the step of masked pre-training: reference module, dense, S2D",
    "files": "reading files of points, beside plyfile, pandas and NumPy",
    "gpu": "on a GPU alone: large batches, CUDA graphs, several seeds side by side",
}
"""What can be measured, in the order of the page."""
ONLY_ON = {"gpu": "cuda", "profile": "cpu"}
"""Sections that measure one kind of device."""


def measure_section(name: str, settings: "Settings") -> "Section":
    """Measure one section.

    Args:
        name: one of `SECTIONS`.
        settings: device, threads and extent of the measurement.

    Raises:
        InputError: contestants that should compute the same results do not, or one of their processes ends.

    Example:
        >>> import torch
        >>> from benchmarks.section import Settings
        >>> section = measure_section("layer", Settings(torch.device("cpu"), num_threads=2))  # doctest: +SKIP
        >>> section.comparisons[0].base  # doctest: +SKIP
        'dense FFN'
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(settings.num_threads)  # of this process; each of the others sets its own
    try:
        return importlib.import_module(f".{name}", __name__).measure(settings)
    finally:
        torch.set_num_threads(threads)
