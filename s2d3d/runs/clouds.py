"""Sample clouds for a trained model, even if its data set is missing."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..channels import columns
from .trained import TrainedModel


def sample_clouds(trained: TrainedModel, count: int, *, required: bool = False) -> tuple[Tensor, str]:
    """Return clouds spread over the test set of a trained model, or procedural clouds if the data set is missing.

    Args:
        trained: the model; its config names the data set and the number of points.
        count: number of clouds, at least 1; at most the size of the test set is returned.
        required: raise an error if the data set is missing.

    Returns:
        Clouds (n, N, C) float32, and a description of them, such as "test clouds of shapes".

    Raises:
        InputError: the data set cannot be read, or has other classes than the checkpoint.
    """
    data, further = trained.config.data, trained.payload["model"]["in_channels"] - 3
    if required or Path(data.root).exists():
        dataset = trained.dataset(scored=False)
        chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
        return dataset.batch(chosen, augment=False)[0], f"test clouds of {data.name}"

    from ..prepare.shapes import make_shape

    shapes = np.stack([make_shape(0, "test", index, data.num_points) for index in range(count)])
    points = torch.from_numpy(shapes).float()
    more = torch.rand(*points.shape[:2], further, generator=torch.Generator().manual_seed(0))
    if columns(trained.channels, "normal"):
        more[..., :3] = torch.nn.functional.normalize(more[..., :3] - 0.5, dim=-1)
    what = f"procedural clouds{' with random normals or colours' if further else ''}"
    return torch.cat([points, more], dim=-1), f"{what} ({data.root} is not here; name it by data.root=DIR)"
