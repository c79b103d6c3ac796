"""BatchNorm folded into the linear layers before it: the same function for inference, with fewer passes over memory."""

import itertools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..s2d.sharing import copied, has_hooks


@torch.no_grad()
def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy in which every BatchNorm that directly follows a linear layer is part of that layer's weights.

    In eval mode BatchNorm is a fixed scale and shift of each channel, s = gamma / sqrt(var + eps) and
    beta - s * mean, so that BN(W x + b) = (s W) x + (s (b - mean) + beta); computed in float64.
    The copy is for inference: its state dict has other keys, and in train mode it has no BatchNorm any more.

    Pairs are found in every `nn.Sequential` (a linear or 1-wide convolution, then its BatchNorm), and where a module
    names them itself as `foldable_pairs`, (linear, BatchNorm) attribute names. Other BatchNorm layers stay, and those
    of a linear layer that is used or tied elsewhere, or has hooks.

    Args:
        model: dense or merged, in eval mode. Left as it is.

    Raises:
        ValueError: the model is in train mode, where BatchNorm is not a fixed function.

    Example:
        >>> folded = fold_batchnorm(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU()).eval())
        >>> folded
        Sequential(
          (0): Linear(in_features=3, out_features=8, bias=True)
          (1): FoldedNorm()
          (2): ReLU()
        )
    """
    if any(module.training for module in model.modules()):
        raise ValueError("fold_batchnorm needs the model in eval mode: call model.eval() first")
    model = copied(model)
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    for parent in list(model.modules()):
        for linear_name, norm_name in _pairs(parent):
            linear, norm = getattr(parent, linear_name), getattr(parent, norm_name)
            if _folds(linear, norm) and all(uses[id(value)] == 1 for value in linear.parameters()):
                _fold_(linear, norm)
                setattr(parent, norm_name, FoldedNorm() if isinstance(linear, nn.Linear) else nn.Identity())
    return model


class FoldedNorm(nn.Identity):
    """Stands where a BatchNorm was folded into the linear layer before it."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input (N, C); raise ValueError for more dimensions: BatchNorm takes channels from dimension 1."""
        if input.dim() != 2:
            raise ValueError(
                f"BatchNorm1d was folded for inputs (N, C), got {input.dim()} dimensions: do not fold this model"
            )
        return input


def _pairs(parent: nn.Module) -> Iterator[tuple[str, str]]:
    yield from getattr(parent, "foldable_pairs", ())
    if isinstance(parent, nn.Sequential):
        names = list(parent._modules)
        yield from itertools.pairwise(names)


def _folds(linear: nn.Module, norm: nn.Module) -> bool:
    """Tell whether the two are a linear layer and a BatchNorm of its outputs with fixed statistics."""
    if not (type(linear) is nn.Linear or type(linear) is nn.Conv1d):
        return False
    if type(norm) is not nn.BatchNorm1d or norm.running_mean is None:
        return False
    if has_hooks(linear) or has_hooks(norm):  # pruning computes the weight in one
        return False
    return linear.weight.shape[0] == norm.num_features


def _fold_(linear: nn.Linear | nn.Conv1d, norm: nn.BatchNorm1d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    weight = linear.weight.double()
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    if linear.bias is not None:
        shift = shift + linear.bias.double() * scale
    linear.weight.copy_(weight * scale.view(-1, *[1] * (weight.dim() - 1)))
    linear.bias = nn.Parameter(shift.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
