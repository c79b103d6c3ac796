"""The expert and the position in space of each token of a cloud."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError, did_you_mean
from ..models.mode import eval_mode
from ..s2d.dispatch import Partition
from ..s2d.mof import ExpertLayer, Plan


@dataclass(frozen=True)
class TokenExperts:
    """The experts of the tokens of one layer in one training pass.

    Attributes:
        layer: name of the layer.
        experts: (B, T) int64, the expert of each token; with several, the one with the largest weight; -1: dropped.
        positions: (B, T, 3), positions of the tokens; tokens without one, such as the class token, are left out.
        num_experts: K.
    """

    layer: str
    experts: Tensor
    positions: Tensor
    num_experts: int


def trace_experts(
    model: nn.Module, points: Tensor, *, layer: str | None = None, passes: int = 1, seed: int = 0
) -> list[TokenExperts]:
    """Run clouds through a sparse model and record the expert of each token.

    The expert layers are in training mode, so that they partition the tokens of the whole batch. Everything else is in
    evaluation mode, and no weight or statistic changes. The model's modes and the random state are restored.

    Args:
        model: a model with expert layers and a method `token_positions(points, layer)`, such as `PointBERT`.
        points: (B, N, C), on the model's device.
        layer: name of an expert layer; default: the first.
        passes: number of passes, at least 1; each draws its own partition.
        seed: of the partitions.

    Returns:
        One entry for each pass, on the CPU.

    Raises:
        InputError: there is no expert layer, the named one does not exist, or the model has no token positions.

    Example:
        >>> from s2d3d import MoFConfig, convert_to_mof_, create_model
        >>> model = create_model("point_bert_tiny", num_classes=2)
        >>> _ = convert_to_mof_(model, MoFConfig(num_experts=4))
        >>> trace_experts(model, torch.rand(2, 256, 3), passes=3)[0].experts.shape
        torch.Size([2, 32])
    """
    if passes < 1:
        raise InputError(f"passes is {passes}, must be at least 1")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ExpertLayer)}
    if not layers:
        raise InputError("the model has no expert layer to draw; it needs a sparse model, such as checkpoints/last.pt")
    if layer is not None and layer not in layers:
        raise InputError(f"no expert layer '{layer}'{did_you_mean(layer, layers)} (there are: {', '.join(layers)})")
    name = layer or next(iter(layers))
    devices = [points.device] if points.is_cuda else []
    experts = []
    with eval_mode(model):
        for expert_layer in layers.values():
            expert_layer.train()
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for _ in range(passes):
                with _plans(layers[name]) as plans:
                    model(points)
                experts.append(token_experts(plans[0]).view(plans[0].shape))
    positions = _token_positions(model, points, name)
    skipped = experts[0].shape[1] - positions.shape[1]  # the class token comes first
    return [TokenExperts(name, of_pass[:, skipped:], positions, layers[name].num_experts) for of_pass in experts]


def token_experts(plan: Plan) -> Tensor:
    """Return the expert of each token (num_tokens,) on the CPU; with several, that of the largest weight; -1: none.

    Example:
        >>> from s2d3d.s2d.dispatch import random_partition
        >>> token_experts(Plan(random_partition(6, 4), None, torch.Size([6]))).bincount().tolist()
        [2, 2, 1, 1]
    """
    partition: Partition = plan.partition
    target = partition.target.cpu()
    expert = torch.arange(len(target)) // (len(target) // partition.num_experts)
    weights = torch.ones(len(target)) if plan.weights is None else plan.weights.cpu()
    # Written from the smallest to the greatest weight, so that the greatest stays; idle slots write into a spare row.
    result = torch.full((partition.num_tokens + 1,), -1)
    for slot in weights.argsort(stable=True).tolist():
        result[target[slot]] = expert[slot]
    return result[:-1]


@contextlib.contextmanager
def _plans(layer: ExpertLayer) -> Iterator[list[Plan]]:
    """Record the plans of a layer's calls."""
    plans: list[Plan] = []
    original = layer.draw

    def draw(x: Tensor) -> Plan:
        plans.append(original(x))
        return plans[-1]

    layer.draw = draw  # type: ignore[method-assign]  # of this layer alone, until the end of the block
    try:
        yield plans
    finally:
        del layer.draw


def _token_positions(model: nn.Module, points: Tensor, layer: str) -> Tensor:
    """Return the positions (B, T, 3) of a layer's tokens, on the CPU."""
    positions = getattr(model, "token_positions", None)
    if positions is None:
        raise InputError(
            f"{type(model).__name__}: where its tokens lie is not known; give the model a method token_positions"
        )
    return positions(points, layer).cpu()
