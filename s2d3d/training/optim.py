"""Optimizer and learning-rate schedule: timm's, with the package's rule for weight decay."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from ..errors import InputError, first_line
from ..models.freeze import layer_scales
from ..s2d.mof import ExpertLayer

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def no_decay_names(model: nn.Module) -> set[str]:
    """Return the names of parameters without weight decay: biases, norm layers, and those of `model.no_weight_decay()`.

    The name and the owning module decide. The number of dimensions does not: stacked expert biases are (K, d).
    """
    names = {name for name, _ in model.named_parameters() if name.endswith(".bias") or name == "bias"}
    for prefix, module in model.named_modules():
        if isinstance(module, _NORMS) or "norm" in type(module).__name__.lower():  # of torch, timm or a plugin
            names |= {
                f"{prefix}.{name}" if prefix else name
                for name, p in module.named_parameters(recurse=False)
                if p.dim() < 2
            }
    listed: Iterable[str] = getattr(model, "no_weight_decay", set)()
    return names | (set(listed) & dict(model.named_parameters()).keys())


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    lr_multiplier: float = 1.0,
    scaled: Collection[nn.Parameter] | None = None,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """Build timm's optimizer `name` with two groups of parameters for each rate: with and without weight decay.

    AdamW and Adam use the fused implementation. The default one is several times slower on stacked weights.

    Args:
        model: dense, or with experts.
        name: optimizer name of timm.
        lr: peak learning rate, greater than 0.
        weight_decay: at least 0. AdamW multiplies it by the learning rate of the group, so `lr_multiplier` scales it.
        lr_multiplier: factor on the learning rate of the `scaled` parameters, greater than 0. A value other than 1
            splits both groups in two; the scaled groups come last. It is stored as the `lr_scale` of timm's schedulers
            and therefore applies to every update, including warm-up and the end.
        scaled: parameters to which the factor applies. None: those of the experts, without routers.
        layer_decay: factor from each layer to the one before it, in (0, 1], see `layer_scales`; it multiplies
            `lr_multiplier`, and is stored likewise.

    Raises:
        InputError: the model does not describe its layers, or the optimizer needs a GPU or a package that is not there.

    Example:
        >>> len(build_optimizer(nn.Linear(3, 2), name="adamw", lr=1e-3, weight_decay=0.05).param_groups)
        2
    """
    skip = no_decay_names(model)
    chosen: set[nn.Parameter] = set()
    if lr_multiplier != 1:
        stacks = (layer for layer in model.modules() if isinstance(layer, ExpertLayer))
        experts = (parameter for stack in stacks for parameter in stack.expert_parameters())
        chosen = set(experts if scaled is None else scaled)
    layers = layer_scales(model, layer_decay) if layer_decay != 1 else {}
    scales = {
        key: layers.get(key, 1.0) * (lr_multiplier if p in chosen else 1.0)
        for key, p in model.named_parameters()
        if p.requires_grad
    }
    groups = []
    for value in sorted(set(scales.values()), key=lambda value: (value != 1, value)):
        trainable = [(key, p) for key, p in model.named_parameters() if scales.get(key) == value]
        scale = {"lr": lr * value, "initial_lr": lr, "lr_scale": value} if value != 1 else {}
        groups += [
            {"params": [p for key, p in trainable if key not in skip], "weight_decay": weight_decay, **scale},
            {"params": [p for key, p in trainable if key in skip], "weight_decay": 0.0, **scale},
        ]
    options: dict[str, Any] = {"fused": True} if name in ("adam", "adamw") else {}
    if name == "lamb":
        options["max_grad_norm"] = None  # timm's would clip once more, whatever `optim.clip_grad` says
    groups = [group for group in groups if group["params"]]
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **options)
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:  # without a GPU, or without its package
        raise InputError(f"optimizer '{name}' cannot be made here ({first_line(error)}); choose another") from error


def base_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the current learning rate of parameters whose rate is not scaled, also if there are none."""
    first = optimizer.param_groups[0]
    return first["lr"] / first.get("lr_scale", 1.0)


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    schedule: str,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    total_steps: int,
) -> CosineLRScheduler:
    """Build the learning-rate schedule; `step_update(n)` sets the rate of update n = 0, 1, ....

    The rate rises linearly from `warmup_lr`. Then it falls to `min_lr` ("cosine") or stays ("constant"). It depends
    only on n.
    """
    first = optimizer.param_groups[0]
    lr = first.get("initial_lr", first["lr"])
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, total_steps),  # of one update timm says that the schedule has no effect
        lr_min=min_lr if schedule == "cosine" else lr,
        warmup_t=warmup_steps,
        warmup_lr_init=warmup_lr,
        cycle_limit=1,
        t_in_epochs=False,
    )
