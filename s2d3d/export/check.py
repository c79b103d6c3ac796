"""Comparison of an exported file with PyTorch for each cloud, with detection of ties between two points."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

TOLERANCE = 1e-4
"""Largest difference of a logit that counts as equal."""
LAST_BIT = 2.0**-23
"""Standard deviation of the noise that breaks ties: the last bit of a coordinate near 1."""
JITTERS = 32
BATCH_SIZE = 32


@dataclass(frozen=True)
class Agreement:
    """Comparison of an exported file with PyTorch on some clouds.

    A file and PyTorch round differently. If two points are equally far from a third one up to rounding, the file and
    PyTorch may choose different neighbours, and the logits differ by more than rounding. Such a cloud is a tie: PyTorch
    gives the file's logits if the last bit of the coordinates is changed.

    Attributes:
        error: (n,) largest difference of a logit of each cloud.
        same_class: (n,) bool, both predict the same class.
        tie: (n,) bool, the difference exceeds `TOLERANCE` and a tie explains it.
    """

    error: Tensor
    same_class: Tensor
    tie: Tensor

    @property
    def wrong(self) -> int:
        """Number of clouds beyond the tolerance that no tie explains."""
        return int((~(self.error <= TOLERANCE) & ~self.tie).sum())

    def worst(self) -> float:
        """Return the largest difference over clouds without a tie, infinite if an output is not finite."""
        others = self.error[~self.tie]
        return float(others.nan_to_num(nan=torch.inf).max()) if len(others) else 0.0

    def summary(self) -> str:
        """Return the result as one or two lines of text.

        Example:
            >>> same_class, tie = torch.tensor([True, True]), torch.tensor([False, True])
            >>> print(Agreement(torch.tensor([1e-6, 3e-3]), same_class, tie).summary())
            largest difference of a logit 1.0e-06; the same class for 2 of 2
            1 of these clouds holds a tie between points, left out above: there the difference is up to 3.0e-03
        """
        lines = [
            f"largest difference of a logit {self.worst():.1e}; the same class for {int(self.same_class.sum())} of "
            f"{len(self.error)}"
        ]
        if count := int(self.tie.sum()):
            holds = "cloud holds" if len(self.error) == 1 else f"clouds {'holds' if count == 1 else 'hold'}"
            lines.append(
                f"{count} of these {holds} a tie between points, left out above: there the difference is up to "
                f"{float(self.error[self.tie].max()):.1e}"
            )
        return "\n".join(lines)


@torch.no_grad()
def compare_exported(model: nn.Module, exported: Callable[[Tensor], Tensor], points: Tensor) -> Agreement:
    """Compare an exported file with its model.

    Args:
        model: on the CPU, in eval mode.
        exported: the file, from `load_exported`, or another function from points to logits.
        points: (n, N, C) float32, n at least 1.

    Raises:
        InputError: the file does not accept this number of points or channels.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from s2d3d import create_model, export_model
        >>> from s2d3d.export.write import load_exported
        >>> model = create_model("point_bert_tiny", num_classes=3, depth=1, num_group=4).eval()
        >>> path = export_model(model, Path(tempfile.mkdtemp(), "model.pt"), format="torchscript", num_points=64)
        >>> compare_exported(model, load_exported(path), torch.rand(5, 64, 3)).wrong
        0
    """
    expected, found = [], []
    for batch in tqdm(points.split(BATCH_SIZE), desc="compare", leave=False, disable=None):
        expected.append(model(batch))
        found.append(exported(batch))
    ours, theirs = torch.cat(expected), torch.cat(found)
    error = (ours - theirs).abs().amax(1)
    tie = torch.zeros(len(points), dtype=torch.bool)
    for index in torch.nonzero(~(error <= TOLERANCE)).flatten().tolist():
        tie[index] = _is_tie(model, points[index], theirs[index])
    return Agreement(error, ours.argmax(1) == theirs.argmax(1), tie)


def _is_tie(model: nn.Module, cloud: Tensor, logits: Tensor) -> bool:
    """Return whether PyTorch gives these logits for a cloud (N, C) with changes in the last bit of its coordinates."""
    generator = torch.Generator().manual_seed(0)
    jitter = torch.randn(JITTERS, len(cloud), 3, generator=generator) * LAST_BIT
    changed = cloud.repeat(JITTERS, 1, 1)
    changed[..., :3] += jitter
    return bool((model(changed) - logits).abs().amax(1).min() <= TOLERANCE)
