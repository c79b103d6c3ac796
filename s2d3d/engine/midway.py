"""Merging experts in the middle of a training: the model goes on dense, its optimizer with averaged state."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..s2d import merge_experts
from ..s2d.mof import ExpertLayer


@torch.no_grad()
def merge_midway_(
    model: nn.Module, optimizer: torch.optim.Optimizer, build: Callable[[nn.Module], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """Merge the experts of a model in place and return an optimizer that goes on where the old one was.

    What the old one keeps for the experts (moments of Adam, momentum) becomes the mean over them, in the layout of the
    merged layers; its count of updates stays. What it keeps for all other parameters is carried over as it is.

    Args:
        model: with RUP-MoF layers, no wrapper around it.
        optimizer: of its parameters. Every tensor of its state has the shape of its parameter, or is a count.
        build: makes an optimizer of the same kind for the merged model.

    Raises:
        ValueError: the model has no expert layer, one with a router, or merged weights that are not finite.

    Example:
        >>> import timm
        >>> from s2d3d import RUPMoF
        >>> model = nn.Sequential(RUPMoF(timm.layers.Mlp(8, 32), num_experts=4))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> merged = merge_midway_(model, optimizer, lambda dense: torch.optim.AdamW(dense.parameters()))
        >>> type(model[0]).__name__, len(merged.param_groups[0]["params"])
        ('Mlp', 4)
    """
    experts = [p for layer in model.modules() if isinstance(layer, ExpertLayer) for p in layer.expert_parameters()]
    if not experts:
        raise ValueError("the model has no RUP-MoF layer to merge")
    keys = {key: None for p in experts for key, value in optimizer.state.get(p, {}).items() if _is_like(value, p)}
    averaged = {key: _merged_state(model, optimizer, key) for key in keys}
    first = optimizer.state.get(experts[0], {})
    rest = {key: value for key, value in first.items() if key not in keys}
    state = dict(optimizer.state)
    merge_experts(model, inplace=True)
    result = build(model)
    for name, parameter in model.named_parameters():
        if parameter in state:
            result.state[parameter] = state[parameter]
        elif keys:
            result.state[parameter] = copy.deepcopy(rest) | {key: values[name] for key, values in averaged.items()}
    return result


def _merged_state(model: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> dict[str, Tensor]:
    """Merge a copy of the model that holds the optimizer's state in the place of weights; return it by dense name."""
    twin = copy.deepcopy(model)
    for parameter, place in zip(model.parameters(), twin.parameters()):
        value = optimizer.state.get(parameter, {}).get(key)
        place.copy_(value if _is_like(value, parameter) else torch.zeros_like(place))
    merge_experts(twin, inplace=True)
    return {name: parameter.detach() for name, parameter in twin.named_parameters()}


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
