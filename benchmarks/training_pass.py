"""The oracle of a conversion: the training pass of identical experts against that of the dense model."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from s2d3d.s2d import MoFConfig, convert_to_mof_
from s2d3d.s2d.adapters import PairPart
from s2d3d.s2d.linear import StackedLinear
from s2d3d.s2d.trial import tensors_of

EXACT = 1e-5
"""Largest relative error that is rounding in float32, in models of a few layers."""


class Residual(nn.Module):
    """A block of one FFN named `mlp`."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        return x + self.mlp(x, *args, **kwargs)


def run_model(model: nn.Module, x: Any) -> Any:
    """Call a model with a dict of keywords, a tuple of arguments, or one argument."""
    torch.manual_seed(0)
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if type(x) is tuple else model(x)


def outputs_of(output: Any) -> list[Tensor]:
    """List the tensors of numbers in what a model returns."""
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


def training_error(
    model: nn.Module,
    inputs: list[Any],
    config: MoFConfig,
    *,
    run: Callable[[nn.Module, Any], Any] = run_model,
    **how: Any,
) -> float:
    """Return the largest relative difference of outputs, gradients and BatchNorm statistics over inputs.

    The model draws no random numbers. Raises what the conversion raises.

    Args:
        model: dense; it is not changed.
        inputs: one after the other, see `run_model`.
        config: of the conversion.
        run: calls a model on an input.
        how: further keywords of `convert_to_mof_`.
    """
    dense, sparse = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    assert convert_to_mof_(sparse, config, **how)
    return pass_error(dense, sparse, inputs, run=run)


def pass_error(
    dense: nn.Module, sparse: nn.Module, inputs: list[Any], *, run: Callable[[nn.Module, Any], Any] = run_model
) -> float:
    """Return the error of `training_error` for a sparse model with identical experts and its dense one."""
    worst = 0.0
    for x in inputs:
        wanted, found = outputs_of(run(dense, x)), outputs_of(run(sparse, x))
        assert len(wanted) == len(found) > 0
        worst = max([worst, *(relative(ours, theirs) for ours, theirs in zip(found, wanted))])
        for network, outputs in ((dense, wanted), (sparse, found)):
            network.zero_grad()
            weighted = [
                (out * torch.arange(out.numel()).sin().view_as(out)).sum().double()
                for out in outputs
                if out.requires_grad
            ]
            torch.stack(weighted).sum().backward()
        pairs = list(_gradients(dense, sparse))
        scale = max([float(gradient.abs().max()) for _, gradient in pairs], default=0.0)
        for ours, theirs in pairs:
            worst = max(worst, float((ours - theirs).abs().max()) / max(scale, 1e-9))
        for (name, buffer), (other_name, other) in zip(dense.named_buffers(), sparse.named_buffers(), strict=True):
            assert name == other_name
            if buffer.is_floating_point() and buffer.numel():
                worst = max(worst, relative(other, buffer))
    return worst


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the largest value; infinite where shapes or missing values differ."""
    if ours.shape != theirs.shape or not torch.equal(ours.isfinite(), theirs.isfinite()):
        return float("inf")
    if not theirs.numel():
        return 0.0
    ours, theirs = (tensor.detach().double().nan_to_num(0, 0, 0) for tensor in (ours, theirs))
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-9))


def _gradients(dense: nn.Module, sparse: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the gradients of both, those of experts summed and in the layout of the dense weight."""
    for name, module in dense.named_modules():
        other = sparse.get_submodule(name)
        other = other.stacked if isinstance(other, PairPart) else other
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.grad is None or not parameter.numel():
                continue
            gradient = getattr(other, key).grad
            assert gradient is not None, f"{name}.{key} is not used"
            if isinstance(other, StackedLinear):
                gradient = gradient.sum(0)
                gradient = gradient if key == "bias" or other.input_first else gradient.t()
            yield gradient.reshape(parameter.shape), parameter.grad
