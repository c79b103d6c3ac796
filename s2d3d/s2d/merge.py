"""From a sparse transformer to a dense one: `merge_experts`, after training."""

import logging
from collections.abc import Callable, Collection

import torch
from torch import nn

from .adapters import EntryLinear, PairPart
from .linear import StackedLinear
from .moe import TopKMoE
from .mof import ExpertLayer
from .sharing import copied, take_hooks_

logger = logging.getLogger(__name__)


class NoWeightDecay:
    """Stands in the place of a model's `no_weight_decay()`, which timm asks: adds the stacked biases to its names.

    timm's layer decay goes by the number of dimensions, which stacked biases have two of.
    """

    of_instance = False
    """Whether the model had it as an attribute of its own."""

    def __init__(self, own: Callable[[], Collection[str]] | None, names: list[str], *, of_instance: bool) -> None:
        self.own, self.names, self.of_instance = own, names, of_instance

    def __call__(self) -> set[str]:
        own = self.own() if self.own is not None else ()
        return {*own, *self.names, *(f"_orig_mod.{name}" for name in self.names)}  # as they are in a compiled model


def mark_no_weight_decay_(model: nn.Module) -> None:
    """Let `no_weight_decay()` of a model, and of those inside it that hold all experts, name the stacked biases too."""
    stacked = {name: m for name, m in model.named_modules() if isinstance(m, StackedLinear) and m.bias is not None}
    for owner, module in model.named_modules():
        prefix = f"{owner}." if owner else ""
        own = getattr(module, "no_weight_decay", None)
        holds_all = stacked and all(name.startswith(prefix) for name in stacked)
        if (
            holds_all
            and not isinstance(module, (ExpertLayer, PairPart, StackedLinear))
            and (own is None or callable(own))
        ):
            biases = [f"{name.removeprefix(prefix)}.bias" for name in stacked]
            of_instance = "no_weight_decay" in module.__dict__
            module.__dict__["no_weight_decay"] = NoWeightDecay(own, biases, of_instance=of_instance)


def merge_experts(
    model: nn.Module, *, inplace: bool = False, check_finite: bool = True, allow_average: bool = False
) -> nn.Module:
    """Turn every RUP-MoF layer into one FFN, the mean of its experts.

    The result has the architecture and the state-dict keys of the model before its conversion, and keeps dtype, device,
    `requires_grad` and train/eval mode. Merging a dense model changes nothing.

    Args:
        model: a model with or without RUP-MoF layers. Of a wrapper (DDP, DataParallel, `torch.compile`,
            `AveragedModel`, timm's ModelEma) the model inside is merged and returned.
        inplace: change `model` itself; otherwise a deep copy is changed and `model` stays as it is.
        check_finite: refuse to produce NaN or infinite weights; the model is then unchanged.
        allow_average: merge TopKMoE layers as well, to the mean of their experts. This is an approximation, and a
            warning says so: the model with its routers computes something else.

    Returns:
        The dense model.

    Raises:
        ValueError: merged weights are not finite, a layer is a TopKMoE and `allow_average` is not set (the messages
            name the layer), `model` is itself an expert layer and `inplace` is set, its weights are sharded, or
            pruning or a norm of the weights was put on experts.

    Example:
        >>> import timm
        >>> from s2d3d import convert_to_mof_
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> keys = model.state_dict().keys()
        >>> _ = convert_to_mof_(model)
        >>> merge_experts(model).state_dict().keys() == keys
        True
    """
    model = unwrapped(model)
    if inplace and isinstance(model, ExpertLayer):
        raise ValueError("an expert layer cannot turn into its FFN in place: use the result of inplace=False")
    for name, layer in model.named_modules():
        if isinstance(layer, TopKMoE):
            _check_average(name, allow_average)
    if not inplace:  # the memo hands deepcopy the dense linear layers: stacked ones are never copied
        stacked = [module for module in model.modules() if isinstance(module, StackedLinear)]
        model = copied(model, {id(layer): layer.averaged_linear() for layer in stacked})
    owned = {module.experts for module in model.modules() if isinstance(module, EntryLinear)}
    merged: dict[nn.Module, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (ExpertLayer, PairPart)) and layer not in owned:
            merged[layer] = layer.averaged_expert()
            if inplace:
                take_hooks_(merged[layer], layer)
                for part, linear in layer.stacked_layers() if isinstance(layer, ExpertLayer) else ():
                    take_hooks_(merged[layer].get_submodule(part), linear)
            if check_finite:
                _check_finite(merged[layer], name)
    if isinstance(model, ExpertLayer):
        return merged[model]
    replace_(model, merged)
    for module in model.modules():
        replaced = module.__dict__.get("no_weight_decay")
        if isinstance(replaced, NoWeightDecay):
            del module.__dict__["no_weight_decay"]
            if replaced.of_instance:
                module.__dict__["no_weight_decay"] = replaced.own
    return model


def is_sparse(model: nn.Module) -> bool:
    """Tell whether a model still has experts.

    Example:
        >>> is_sparse(nn.Linear(2, 2))
        False
    """
    return any(isinstance(m, ExpertLayer) for m in model.modules())


def linears_with_experts(model: nn.Module) -> list[str]:
    """Name the linear layers that experts have for themselves, as they are called in the dense model."""
    parts = [name for name, m in model.named_modules() if isinstance(m, PairPart)]
    inside = tuple(f"{name}." for name in parts)
    stacked = [name for name, m in model.named_modules() if isinstance(m, StackedLinear)]
    return parts + [name for name in stacked if not name.startswith(inside)]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that are no part of it.

    Raises:
        ValueError: it is sharded, so that its weights are not at hand.
    """
    kinds = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        kind = type(model)
        if isinstance(model, kinds) or (kind.__module__.startswith("timm.") and kind.__name__.startswith("ModelEma")):
            model = model.get_submodule("module")
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            break
    sharded = [name for name, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"]
    if sharded or any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise ValueError(
            "the model is sharded (FSDP): gather a full state dict (torch.distributed.checkpoint.state_dict."
            "get_model_state_dict with full_state_dict=True), load it into an unsharded converted model and merge that"
        )
    return model


def _check_finite(ffn: nn.Module, name: str) -> None:
    bad = [key for key, tensor in ffn.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"merging '{name}' gives non-finite weights in {', '.join(bad)}: the training has diverged")


def _check_average(name: str, allowed: bool) -> None:
    if not allowed:
        raise ValueError(
            f"module '{name}' is a TopKMoE, whose router chooses experts for each token: no FFN equals it. "
            "Evaluate it as it is, or pass allow_average=True for the mean of its experts, an approximation"
        )
    logger.warning("the mean of the experts of '%s' only approximates it: it is a TopKMoE with a router", name)


def replace_(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, wherever these stand."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in layers:
            model.set_submodule(name, layers[module])
