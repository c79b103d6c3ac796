"""Whether two splits of a data set have the same vertical axis, told from their shapes."""

import torch
from torch import Tensor

from .base import PointCloudDataset
from .labelled import LabelledDataset

MAX_SHAPES = 400
"""Shapes of each split that are compared, evenly spaced."""
CERTAIN = 3.0
"""Standard errors by which a split must look turned."""


def look_turned(first: LabelledDataset, second: LabelledDataset) -> bool:
    """Tell whether the vertical of one split lies along the depth of the other, y for z, as after a wrong `up_axis`.

    The shapes of a class are, on average, higher than deep or deeper than high, and so in both splits. If the classes
    disagree about this between the splits more than chance allows, one split is turned. Splits that are read from
    their files batch by batch, or hold no clouds, are not compared.

    Args:
        first: a split.
        second: another one, with the same classes.
    """
    if not (isinstance(first, PointCloudDataset) and isinstance(second, PointCloudDataset)):
        return False
    if not all(isinstance(split.points, Tensor) for split in (first, second)):
        return False
    ours, theirs = (_heights(split) for split in (first, second))
    product = (ours[0] * theirs[0]).sum()
    error = (ours[0] ** 2 * theirs[1] + theirs[0] ** 2 * ours[1]).sum().sqrt()
    return bool(product < 0 and product < -CERTAIN * error)


def _heights(split: PointCloudDataset) -> tuple[Tensor, Tensor]:
    """Return for each class the mean of log(height / depth) and its squared standard error; 0 for absent classes."""
    chosen = torch.linspace(0, len(split) - 1, min(len(split), MAX_SHAPES)).long().unique()
    spread = split.points[chosen].double().std(dim=1).clamp(min=1e-12)
    ratios, labels = (spread[:, 2] / spread[:, 1]).log(), split.labels[chosen]
    counts = torch.bincount(labels, minlength=len(split.class_names)).double()
    means = torch.zeros_like(counts).index_add_(0, labels, ratios) / counts.clamp(min=1)
    variance = ((ratios - means[labels]) ** 2).sum() / max(1, len(ratios) - int((counts > 0).sum()))
    return means, torch.where(counts > 0, variance / counts.clamp(min=1), 0.0)
