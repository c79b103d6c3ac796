"""EWA after each update of an optimizer, whoever calls its `step`."""

import sys
from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from ..s2d import EWA, TopKMoE

UPDATES_IN_BACKWARD = ("Lomo", "AdaLomo")
"""Optimizers that change the weights in the backward pass, and nothing in `step`."""


def average_after_updates(ewa: EWA, optimizer: Optimizer) -> RemovableHandle:
    """Call `ewa.step()` after each update that an optimizer makes from now on.

    A call of `step` is not an update, and EWA is left out, where a gradient scaler skips it because of infinite
    gradients, where accelerate still accumulates gradients, and where no parameter has a gradient. Fused optimizers,
    which skip an update on the device, are asked as well; accelerate's `optimizer_step_was_skipped` misses these.

    Args:
        ewa: of the converted model.
        optimizer: holds all experts that are trained. One that accelerate or Lightning wrapped works too.

    Returns:
        A handle; its `remove()` ends the averaging.

    Raises:
        InputError: an expert that requires a gradient is not in the optimizer, no expert requires one, the experts are
            sharded, the optimizer has no hook after its step, or its scheduler was built before it had one.

    Example:
        >>> import torch
        >>> from timm.layers import Mlp
        >>> from s2d3d import EWA, RUPMoF
        >>> layer = RUPMoF(Mlp(8, 32), num_experts=4)
        >>> ewa, optimizer = EWA(layer, share_rate=0.3, total_steps=10), torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> handle = average_after_updates(ewa, optimizer)
        >>> layer(torch.randn(2, 6, 8)).sum().backward()
        >>> optimizer.step()
        >>> ewa.num_steps
        1
    """
    inner = innermost(optimizer)
    name = type(inner).__name__
    if name in UPDATES_IN_BACKWARD or not hasattr(inner, "_optimizer_step_post_hooks"):
        raise InputError(f"{name} makes its updates outside of a step with hooks: call ewa.step() after each of them")
    _check_experts(ewa, inner)
    inner._patch_step_function()  # which timm's Lookahead does not do when it is built
    if getattr(inner.step, "_wrapped_by_lr_sched", False) and not getattr(inner.step, "hooked", False):
        raise InputError(
            f"{name} got its scheduler before its hooks: call its zero_grad() before you build the scheduler"
        )

    def average(stepped: Optimizer, *_: object) -> None:
        if _is_nested(stepped):
            return
        found_inf = getattr(stepped, "found_inf", None)  # set by the scaler while a fused optimizer steps
        if not (found_inf is not None and bool(found_inf)) and _has_gradient(stepped):
            ewa.step()

    return inner.register_step_post_hook(average)


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that accelerate or Lightning wrapped."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = wrapped
    return optimizer


class Averaging:
    """What a callback holds: the settings of EWA until the training begins, then EWA and its hook."""

    def __init__(self, *, share_rate: float, schedule: str | Callable[[int], float], stop_fraction: float) -> None:
        """Keep the settings; see `EWA`, which checks them when the training begins."""
        self.share_rate, self.schedule, self.stop_fraction = share_rate, schedule, stop_fraction
        self.ewa: EWA | None = None
        self._handle: RemovableHandle | None = None

    @property
    def num_steps(self) -> int:
        """Updates that EWA followed so far, those before a resume included."""
        return 0 if self.ewa is None else self.ewa.num_steps

    def start(self, model: nn.Module, optimizers: Sequence[Optimizer], *, total_steps: int, num_steps: int) -> None:
        """Average after each update from now on, from a position of the schedule.

        Args:
            model: converted before its optimizer was built.
            optimizers: those of the training. One of them holds all experts.
            total_steps: updates of the whole training.
            num_steps: updates that EWA followed already, before a resume.

        Raises:
            InputError: the model is dense or has top-k experts, a setting of EWA is wrong; see `average_after_updates`.
        """
        self.stop()
        try:
            ewa = EWA(
                model,
                share_rate=self.share_rate,
                schedule=self.schedule,
                stop_fraction=self.stop_fraction,
                total_steps=total_steps,
            )
        except ValueError as error:
            raise InputError(f"S2DCallback: {error}") from error
        if any(isinstance(layer, TopKMoE) for layer in ewa.layers):
            raise InputError("S2DCallback: top-k experts cannot be merged to a dense model; convert with kind='rup'")
        experts = {id(parameter) for layer in ewa.layers for parameter in layer.expert_parameters()}
        holders = [one for one in optimizers if experts & _parameters(innermost(one))]
        self._handle = average_after_updates(ewa, (holders or [*optimizers])[0])
        ewa.load_state_dict({"num_steps": num_steps})
        self.ewa = ewa

    def stop(self) -> None:
        """Remove the hook from the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _check_experts(ewa: EWA, optimizer: Optimizer) -> None:
    held, trained = _parameters(optimizer), 0
    for layer in ewa.layers:
        for parameter in layer.expert_parameters():
            if hasattr(parameter, "placements") or parameter.shape[:1] != (layer.num_experts,):
                raise InputError("experts are sharded; average_after_updates works on one device and under DDP")
            if parameter.requires_grad and id(parameter) not in held:
                raise InputError(
                    "the optimizer lacks experts that require a gradient: "
                    "convert the model before the optimizer is built, and give all experts to one optimizer"
                )
            trained += parameter.requires_grad
    if not trained:
        raise InputError("no expert requires a gradient, so that there is nothing to average: train the converted FFNs")


def _is_nested(optimizer: Optimizer) -> bool:
    """Tell whether a `step` calls that of its parent class, which runs the hooks as well: the update goes on."""
    around = sys._getframe(2)  # torch's function around the step of a class
    outer = around.f_back
    while outer is not None:
        if outer.f_code is around.f_code and any(value is optimizer for value in outer.f_locals.values()):
            return True
        outer = outer.f_back
    return False


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
