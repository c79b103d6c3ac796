"""Plain implementations of the published Point-BERT and Point-MAE classifiers, independent of the package.

They have the structure of the public models with plain torch in place of their CUDA operators, and serve twice: as
oracle of the tests, and as the baseline "public model in plain torch" of the benchmarks. Neither tuned nor slowed.
"""

import torch
from torch import nn

from .point_bert import PointBERT
from .point_mae import PointMAE

__all__ = ["PointBERT", "PointMAE", "draw_weights_"]


@torch.no_grad()
def draw_weights_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor of the state dict, BatchNorm statistics included, a seeded value as a trained model could have.

    Matrices are scaled by their inputs, so that signals keep their size through the layers and an error shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point():
            tensor.fill_(100)
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("running_var"):
            tensor.copy_(0.5 + 1.5 * torch.rand(tensor.shape, generator=generator))
        elif tensor.dim() == 1:
            tensor.copy_(0.2 * noise + (1.0 if key.endswith("weight") else 0.0))
        elif key in ("cls_token", "cls_pos"):
            tensor.copy_(noise)
        else:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model
