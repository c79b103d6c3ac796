"""Clouds to try a trained model on, also where its data set is not at hand."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .trained import TrainedModel


def sample_clouds(trained: TrainedModel, count: int, *, required: bool = False) -> tuple[Tensor, str]:
    """Take clouds spread over the test set of a trained model, procedural ones where no data set is here.

    Args:
        trained: its config says which data set, and how many points a cloud has.
        count: of clouds, at least 1; at most those of the test set are returned.
        required: the data set must be there.

    Returns:
        (n, N, C) float32, and what they are, such as "test clouds of shapes".

    Raises:
        InputError: the data set cannot be read, or has other classes than the checkpoint.
    """
    data, channels = trained.config.data, trained.payload["model"]["in_channels"]
    if required or Path(data.root).exists():
        dataset = trained.dataset()
        chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
        return dataset.batch(chosen, augment=False)[0], f"test clouds of {data.name}"

    from ..prepare.shapes import make_shape

    shapes = np.stack([make_shape(0, "test", index, data.num_points) for index in range(count)])
    points = torch.from_numpy(shapes).float()
    more = torch.rand(*points.shape[:2], channels - 3, generator=torch.Generator().manual_seed(0))
    return torch.cat([points, more], dim=-1), f"procedural clouds ({data.root} is not here; name it by data.root=DIR)"
