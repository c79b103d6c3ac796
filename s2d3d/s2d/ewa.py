"""Experts Weights Averaging: after each optimizer update, pull the experts towards their mean."""

import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .mof import ExpertLayer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SCHEDULES = ("linear", "constant")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHED_WEIGHTS = 2**16
"""Weights of each expert that a CPU averages at once."""
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def apply_ewa_(model: nn.Module, share_rate: float | Tensor) -> int:
    """Average the experts' weights once, in place: `W_i <- (1 - b) W_i + b * mean_{j != i} W_j`.

    Computed as `lerp(W_i, mean_j W_j, b * K / (K - 1))`, which is the same. The mean of the experts stays, deviations
    from it shrink by `1 - b * K / (K - 1)`. A single expert is left alone. b = (K - 1) / K makes the experts equal;
    above it they overshoot their mean. Frozen experts are averaged like others. Under DDP each rank computes the same
    result without communication.

    Args:
        model: any module with expert layers inside: RUPMoF, or TopKMoE, whose routers are left alone.
        share_rate: b, in [0, 1]. A 0-d tensor on the device of the experts, best float64, is read there when the
            update runs: a CUDA graph that recorded the update follows its value. That value is not checked.

    Returns:
        The number of expert layers that were averaged.

    Raises:
        ValueError: `share_rate` outside [0, 1] or a tensor of other than 0 dimensions, no expert layer in the model,
            experts sharded one from another, or their weights are computed from others (pruning, weight norm).

    Source: abstracts of Sparse-to-Dense Training, IEEE TCSVT 2025, and arXiv 2308.06093. The formula is from memory of
        the latter, not checked against its text.

    Example:
        >>> from timm.layers import Mlp
        >>> from s2d3d import RUPMoF
        >>> apply_ewa_(RUPMoF(Mlp(8, 32), num_experts=4), share_rate=0.3)
        1
    """
    _check_share_rate(share_rate)
    return _average_layers_(expert_layers(model), share_rate)


class EWA:
    """Applies `apply_ewa_` with a scheduled share rate; call `step()` after every `optimizer.step()`.

    With `schedule="linear"` update t of T (t = 0 .. T-1) uses `share_rate * t / (T - 1)`, from 0 to `share_rate`;
    with "constant" each uses `share_rate`. Updates past T keep the last value. Early EWA, `stop_fraction` below 1,
    follows the same schedule for the first `round(stop_fraction * T)` updates and leaves the experts alone after them.
    Skip `step()` when the optimizer's own step was skipped (gradient scaler found infinities).

    Example:
        >>> import timm
        >>> from s2d3d import convert_to_mof_
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> _ = convert_to_mof_(model)
        >>> ewa = EWA(model, share_rate=0.3, total_steps=3)
        >>> [round(ewa.step(), 2) for _ in range(3)]
        [0.0, 0.15, 0.3]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        share_rate: float,
        schedule: str | Callable[[int], float] = "linear",
        total_steps: int,
        stop_fraction: float = 1.0,
    ) -> None:
        """Prepare averaging for all expert layers that `model` has now.

        Args:
            model: the converted model; a DDP or compiled wrapper around it works too.
            share_rate: b at the end of the schedule, in [0, (K - 1) / K] for K experts (any of [0, 1] for K = 1).
            schedule: "linear", "constant", or a function that returns the factor on `share_rate`, in [0, 1], of update
                t = 0, 1, ....
            total_steps: optimizer updates of the whole training, at least 1.
            stop_fraction: share of the training after which averaging stops, in (0, 1]; 1 never stops.

        Raises:
            ValueError: an argument out of range, or no expert layer in the model.
        """
        _check_share_rate(share_rate)
        if not callable(schedule) and schedule not in SCHEDULES:
            raise ValueError(f"schedule is '{schedule}', must be a function or one of {', '.join(SCHEDULES)}")
        whole = not isinstance(total_steps, bool) and math.isfinite(total_steps) and total_steps == int(total_steps)
        if not whole or total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}, must be a whole number and at least 1")
        if not 0 < stop_fraction <= 1:
            raise ValueError(f"stop_fraction is {stop_fraction}, must be in (0, 1]")
        self.layers = expert_layers(model)
        for num_experts in {layer.num_experts for layer in self.layers}:
            bound = max_share_rate(num_experts)
            if share_rate > bound:
                raise ValueError(
                    f"share_rate is {share_rate}: above (K-1)/K = {bound:.4g} "
                    f"the {num_experts} experts overshoot their mean"
                )
        self.share_rate, self.schedule, self.total_steps = share_rate, schedule, total_steps
        self.stop_step = math.inf if stop_fraction == 1 else round(stop_fraction * total_steps)
        self.num_steps = 0

    def current_share_rate(self) -> float:
        """Return the share rate of the next step."""
        return self._share_rate_of(self.num_steps)

    def last_share_rate(self) -> float:
        """Return the share rate of the last step, 0 before the first."""
        return self._share_rate_of(self.num_steps - 1) if self.num_steps else 0.0

    def _share_rate_of(self, step: int) -> float:
        if step >= self.stop_step:
            return 0.0
        if callable(self.schedule):
            factor = self.schedule(step)
            if not 0 <= factor <= 1:
                raise ValueError(f"schedule({step}) is {factor}, must be in [0, 1]")
            return self.share_rate * factor
        if self.schedule == "constant":
            return self.share_rate
        return self.share_rate * min(1.0, step / max(1, self.total_steps - 1))

    def step(self) -> float:
        """Average the experts once; return the share rate used."""
        share_rate = self.current_share_rate()
        self.average_(share_rate)
        self.num_steps += 1
        return share_rate

    def average_(self, share_rate: float | Tensor) -> None:
        """Average once at a rate of the caller's choice, without a step of the schedule.

        A 0-d tensor is allowed as in `apply_ewa_`: work for a CUDA graph, whose host part sets the tensor to
        `current_share_rate()` and counts `num_steps` up before each replay.
        """
        _average_layers_(self.layers, share_rate)

    def state_dict(self) -> dict[str, int]:
        """Return the position in the schedule; rate, schedule and length come from the constructor."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position in `state`; raises ValueError where it is negative."""
        if state["num_steps"] < 0:
            raise ValueError(f"num_steps is {state['num_steps']}, must be at least 0")
        self.num_steps = int(state["num_steps"])


def max_share_rate(num_experts: int) -> float:
    """Return (K - 1) / K, the share rate that makes K experts identical; 1 for a single expert, which never moves."""
    return 1.0 if num_experts == 1 else (num_experts - 1) / num_experts


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Return the expert layers of a model.

    Raises:
        ValueError: there is none.
    """
    layers = [m for m in model.modules() if isinstance(m, ExpertLayer)]
    if not layers:
        raise ValueError("the model has no RUP-MoF layer to average: call convert_to_mof_ first")
    return layers


@torch.no_grad()
def _average_layers_(layers: list[ExpertLayer], share_rate: float | Tensor) -> int:
    for layer in layers:
        for _, stacked in layer.stacked_layers():
            stacked.check_plain()
        for parameter in layer.expert_parameters():
            _average_(parameter, share_rate)
    return len(layers)


def _average_(stacked: Tensor, share_rate: float | Tensor) -> None:
    num_experts = stacked.shape[0]
    if num_experts == 1 or (not isinstance(share_rate, Tensor) and share_rate == 0):
        return
    weight = share_rate * num_experts / (num_experts - 1)
    if hasattr(stacked, "placements"):  # sharded by FSDP2, with a part of every expert here: `expert_placement`
        sharded = cast("DTensor", stacked)
        _check_placements(sharded)
        stacked = sharded.to_local()
    if _HAS_TRITON and stacked.is_cuda and stacked.is_contiguous() and stacked.dtype in _KERNEL_DTYPES:
        from .ewa_triton import average_experts_

        average_experts_(stacked, weight)
        return
    exact = stacked if stacked.dtype in (torch.float32, torch.float64) else stacked.float()
    if isinstance(weight, Tensor):
        weight = weight.to(exact.dtype)
    if exact is stacked:
        for part in _parts(stacked):
            experts = part.unbind(0)  # on a CPU twice as fast as mean(0), and as a lerp that repeats the mean
            mean = torch.add(experts[0], experts[1])
            for expert in experts[2:]:
                mean.add_(expert)
            mean.div_(num_experts)
            for expert in experts:
                expert.lerp_(mean, weight)
    else:
        stacked.copy_(exact.lerp_(exact.mean(0, keepdim=True), weight))


def _parts(stacked: Tensor) -> Iterable[Tensor]:
    """Return (K, ...) in views (K, n), of which a CPU reads each from memory once and then from its cache."""
    if stacked.device.type != "cpu" or not stacked.is_contiguous():
        return [stacked]
    return stacked.view(stacked.shape[0], -1).split(CACHED_WEIGHTS, dim=1)


def _check_placements(stacked: "DTensor") -> None:
    if any(placement.is_shard(0) or placement.is_partial() for placement in stacked.placements):
        raise ValueError(
            "experts are sharded one from another, so that their mean is not at hand: "
            "call fully_shard with shard_placement_fn=expert_placement(model)"
        )


def _check_share_rate(share_rate: float | Tensor) -> None:
    if isinstance(share_rate, Tensor):  # its value stays on its device
        if share_rate.dim():
            raise ValueError(f"share_rate is a tensor of shape {tuple(share_rate.shape)}, must be a number or 0-d")
    elif not (math.isfinite(share_rate) and 0 <= share_rate <= 1):
        raise ValueError(f"share_rate is {share_rate}, must be in [0, 1]")
