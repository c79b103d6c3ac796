"""What the experts of a model look like: how far they are from each other, and what lies between them.

docs/why.md derives the formulas.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .ewa import expert_layers
from .merge import merge_experts


@torch.no_grad()
def expert_divergence(model: nn.Module) -> dict[str, float]:
    """Measure how far the experts of each expert layer are from their mean.

    Returns:
        For each layer by name: the root mean square over experts of `|W_i - mean|`, relative to `|mean|`, over all
        weights and biases of its experts. 0 means identical experts. EWA multiplies it by `|1 - b * K / (K - 1)|`.

    Raises:
        ValueError: the model has no expert layer.
    """
    names = {id(module): name for name, module in model.named_modules()}
    result = {}
    for layer in expert_layers(model):
        apart = size = 0.0
        for parameter in layer.expert_parameters():
            stacked = parameter.double()
            mean = stacked.mean(0)
            apart += float((stacked - mean).square().sum()) / layer.num_experts
            size += float(mean.square().sum())
        result[names[id(layer)]] = (apart / size) ** 0.5 if size else 0.0
    return result


@torch.no_grad()
def expert_model(model: nn.Module, index: int) -> nn.Module:
    """Return a dense copy of a model in which expert `index` of every expert layer stands in the place of the mean.

    Args:
        model: a model with expert layers; it is not changed.
        index: which expert, in [0, K) of every layer.

    Raises:
        ValueError: the model has no expert layer, or one without that expert.

    Example:
        >>> import timm
        >>> from s2d3d import convert_to_mof_, is_sparse
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> _ = convert_to_mof_(model)
        >>> is_sparse(expert_model(model, 3))
        False
    """
    alone = copy.deepcopy(model)
    for layer in expert_layers(alone):
        if not 0 <= index < layer.num_experts:
            raise ValueError(f"expert {index} of a layer with {layer.num_experts} experts")
        for parameter in layer.expert_parameters():
            parameter.data = parameter.data[index : index + 1].clone()  # the mean of one expert is that expert
    return merge_experts(alone, allow_average=True)


@torch.no_grad()
def interpolate(first: nn.Module, second: nn.Module, position: float) -> nn.Module:
    """Return a copy of `first` whose parameters and buffers are `(1 - position) * first + position * second`.

    Buffers of whole numbers come from the nearer model. At 0 and 1 the weights are exactly those of the ends.

    Raises:
        ValueError: the two have different state-dict keys or shapes.
    """
    ours, theirs = first.state_dict(), second.state_dict()
    if ours.keys() != theirs.keys() or any(ours[key].shape != theirs[key].shape for key in ours):
        raise ValueError("the models differ in their weights' names or shapes: there is no line between them")
    between = copy.deepcopy(first)
    state = {
        key: torch.lerp(tensor, theirs[key].to(tensor), position) if tensor.is_floating_point()
        else (tensor if position < 0.5 else theirs[key])
        for key, tensor in ours.items()
    }  # fmt: skip
    between.load_state_dict(state)
    return between


@dataclass(frozen=True)
class Barrier:
    """Losses along the line between two models.

    Attributes:
        positions: from 0 (first model) to 1 (second).
        losses: at the positions.
        height: the largest excess over the straight line between the losses of the ends, at least 0. 0 means that the
            line never rises above it: the two lie in one convex part of a basin.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    height: float


def barrier(
    first: nn.Module,
    second: nn.Module,
    loss: Callable[[nn.Module], float],
    *,
    num_positions: int = 11,
    ends: tuple[float, float] | None = None,
) -> Barrier:
    """Measure the loss along the straight line between two models.

    Args:
        first: a model.
        second: another one with the same state-dict keys and shapes.
        loss: of a model.
        num_positions: equidistant positions with both ends, at least 3.
        ends: the losses of the two models, where they are known.

    Raises:
        ValueError: the models do not fit each other, or there are too few positions.

    Source: Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671; the
        excess over the interpolated end losses as in Entezari et al. 2022, arXiv 2110.06296.

    Example:
        >>> ends = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> for end, value in zip(ends, (-1.0, 1.0)):
        ...     _ = nn.init.constant_(end.weight, value)
        >>> barrier(*ends, lambda model: -model.weight.item() ** 2).height  # -1 at the ends, 0 between them
        1.0
    """
    if num_positions < 3:
        raise ValueError(f"num_positions is {num_positions}, must be at least 3")
    positions = [index / (num_positions - 1) for index in range(num_positions)]
    inner = positions if ends is None else positions[1:-1]
    losses = [float(loss(interpolate(first, second, position))) for position in inner]
    if ends is not None:
        losses = [ends[0], *losses, ends[1]]
    straight = [losses[0] + position * (losses[-1] - losses[0]) for position in positions]
    height = max(0.0, max(own - line for own, line in zip(losses, straight)))
    return Barrier(tuple(positions), tuple(losses), height)


def contraction(share_rate: float, num_experts: int) -> float:
    """Return `1 - b K / (K - 1)`, by which EWA multiplies the experts' deviations from their mean; 1 for one expert.

    Example:
        >>> round(contraction(0.3, 4), 6)
        0.6
    """
    return 1.0 if num_experts == 1 else 1 - share_rate * num_experts / (num_experts - 1)


def stationary_divergence(spread: float, share_rate: float, num_experts: int, *, correlation: float = 0.0) -> float:
    """Predict how far experts stay from their mean under EWA at a constant rate, when their updates are random.

    Args:
        spread: root mean square over experts of the distance of an expert's update from the mean update.
        share_rate: b.
        num_experts: K.
        correlation: c in [0, 1); updates t and t + n of an expert correlate by c^n, as momentum makes them.

    Returns:
        Root mean square over experts of the distance to their mean, right after EWA. With r = 1 - b K / (K - 1) it is
        `spread * |r| * sqrt((1 + r c) / ((1 - r c) (1 - r^2)))`; infinite for |r| >= 1.

    Example:
        >>> round(stationary_divergence(1.0, 0.375, 4), 6)  # r = 1/2
        0.57735
    """
    rate = contraction(share_rate, num_experts)
    if abs(rate) >= 1:
        return math.inf
    return spread * abs(rate) * math.sqrt((1 + rate * correlation) / ((1 - rate * correlation) * (1 - rate**2)))


def predict_divergence(
    spreads: Sequence[float],
    share_rates: Sequence[float],
    num_experts: int,
    *,
    correlation: float = 0.0,
    initial: float = 0.0,
) -> list[float]:
    """Predict the divergence after each update, when spread and share rate change over training.

    Args:
        spreads: of each update, see `stationary_divergence`.
        share_rates: of the EWA behind each update.
        num_experts: K.
        correlation: as there.
        initial: divergence before the first update; 0 for experts that start as copies.

    Returns:
        Root mean square distance to the mean after each update and its EWA; it tends to `stationary_divergence` when
        spread and share rate are constant.
    """
    squared, shared, result = initial**2, 0.0, []  # E|d|^2, and E<d, u> of the deviation and the coming unit update
    for spread, share_rate in zip(spreads, share_rates, strict=True):
        rate = contraction(share_rate, num_experts)
        squared = rate**2 * (squared + spread**2 + 2 * spread * shared)
        shared = rate * correlation * (shared + spread)
        result.append(math.sqrt(squared))
    return result
