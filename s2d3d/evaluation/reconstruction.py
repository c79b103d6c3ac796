"""Reconstruction loss of a masked autoencoder on a loader, under masks that are the same in every evaluation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..datasets import BatchLoader
from ..errors import InputError
from ..models.mode import eval_mode
from ..random_state import derived_generator
from .accuracy import ClassificationReport
from .probe import ProbeReport

if TYPE_CHECKING:
    from ..models import PointMAEPretrain


@dataclass(frozen=True)
class ReconstructionReport:
    """How well a masked autoencoder predicts hidden groups.

    Attributes:
        loss: mean Chamfer distance over the clouds, see `chamfer_distance`.
        norm: its kind, "l2" or "l1".
        num_samples: clouds evaluated.
        probe: a linear probe of the features of visible clouds, where `eval.probe` asks for one.
    """

    loss: float
    norm: str
    num_samples: int
    probe: ProbeReport | None = None

    def to_dict(self) -> dict[str, object]:
        """Return plain types for JSON; accuracies of the probe have the names that those of a classifier have."""
        values: dict[str, object] = {"loss": self.loss, "norm": self.norm, "num_samples": self.num_samples}
        if self.probe is None:
            return values
        details = self.probe.to_dict()
        scores = {key: details.pop(key) for key in ("oa", "macc", "correct")}
        return values | scores | {"probe": details}

    def summary(self) -> str:
        """Return one line: the loss, what it was measured on, and the accuracy of the probe."""
        line = f"reconstruction loss {self.loss:.6f} ({self.norm}, {self.num_samples} samples)"
        return line if self.probe is None else f"{line}; linear probe {self.probe.summary()}"


Report = ClassificationReport | ReconstructionReport
"""The evaluation of a model, whatever its task."""


def pinned_masks(model: "PointMAEPretrain", count: int) -> Tensor:
    """Return the masks under which clouds 0, 1, ... of a set are evaluated: (count, num_group) bool.

    They depend on the numbers of groups only, so models of one study see the same masks.

    Example:
        >>> from s2d3d import create_model
        >>> model = create_model("point_mae_pretrain_tiny")
        >>> torch.equal(pinned_masks(model, 3), pinned_masks(model, 3))
        True
    """
    return model.draw_mask(count, generator=derived_generator(0, "masks"))


@torch.no_grad()
def evaluate_reconstruction(
    model: "PointMAEPretrain",
    loader: BatchLoader,
    *,
    device: torch.device | str,
    progress: bool = True,
) -> ReconstructionReport:
    """Reconstruct every cloud of a loader in eval mode; the model's mode is restored afterwards.

    Args:
        model: the masked autoencoder, on `device`.
        loader: yields clouds in the order of its set. When it is one rank's part (`loader.world_size` > 1), the losses
            of all ranks are added up.
        device: where to compute.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: an empty loader, or a loss that is not finite.
    """
    masks = pinned_masks(model, len(loader.dataset))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with eval_mode(model):
        batches = tqdm(loader, desc="reconstruct", leave=False, total=len(loader), disable=None if progress else True)
        for step, (points, _) in enumerate(batches):
            loss = model(points.to(device), masks[loader.indices(0, step)])
            sums += torch.stack([loss.double() * len(points), sums.new_tensor(len(points))])
    if loader.world_size > 1:
        dist.all_reduce(sums)
    total, count = sums.tolist()
    if not count:
        raise InputError("the loader yields no batch to reconstruct")
    if not total < float("inf"):
        raise InputError("the model's output is not finite; its training has diverged, or the checkpoint is damaged")
    return ReconstructionReport(total / count, model.loss, int(count))
