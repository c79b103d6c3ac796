"""The oracle of a conversion: the training pass of identical experts against that of the dense model."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from s2d3d.s2d import MoFConfig, convert_to_mof_

EXACT = 1e-5


class Residual(nn.Module):
    """A block of one FFN named `mlp`."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        return x + self.mlp(x, *args, **kwargs)


def tensor_of(output: Any) -> Tensor:
    """The first floating tensor of what a model returns."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def training_error(
    model: nn.Module,
    inputs: list[Any],
    config: MoFConfig,
    *,
    run: Callable[[nn.Module, Any], Any] | None = None,
    **how: Any,
) -> float:
    """The largest relative difference of output, gradient of the input's loss and BatchNorm statistics over inputs.

    The model has no dropout. Raises what the conversion raises.
    """
    run = run or (lambda module, x: module(**x) if isinstance(x, dict) else module(x))
    dense, sparse = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    assert convert_to_mof_(sparse, config, **how)
    worst = 0.0

    def relative(ours: Tensor, theirs: Tensor) -> float:
        return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp_min(1e-9))

    for x in inputs:
        wanted, found = tensor_of(run(dense, x)), tensor_of(run(sparse, x))
        worst = max(worst, relative(found, wanted))
        for network, output in ((dense, wanted), (sparse, found)):
            network.zero_grad()
            (output * torch.arange(output.numel()).sin().view_as(output)).sum().backward()
        for name, parameter in dense.named_parameters():
            other = dict(sparse.named_parameters()).get(name)
            if other is None or parameter.grad is None:
                continue  # of a pair, whose parameters have other names
            assert other.grad is not None, f"{name} is not used"
            if other.shape == parameter.shape:
                gradient = other.grad
            else:
                gradient = other.grad.sum(0)
                gradient = gradient.t().reshape(parameter.shape) if parameter.dim() > 1 else gradient
                gradient = gradient if gradient.shape == parameter.shape else gradient.t()
            scale = max(float(p.grad.abs().max()) for p in dense.parameters() if p.grad is not None)
            worst = max(worst, float((gradient - parameter.grad).abs().max()) / scale)
        for (name, buffer), (other_name, other) in zip(dense.named_buffers(), sparse.named_buffers(), strict=True):
            assert name == other_name
            if buffer.is_floating_point():
                worst = max(worst, relative(other, buffer))
    return worst
