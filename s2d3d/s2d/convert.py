"""From a dense transformer to a sparse one and back: `convert_to_mof_` before training, `merge_experts` after."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from .mof import RUPMoF, StackedLinear, check_ffn

INITS = ("copy", "independent")
FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class MoFConfig:
    """Which FFNs become RUP-MoF layers, and how their experts start.

    Attributes:
        num_experts: K, at least 1.
        targets: glob patterns over module names (`*` matches dots too); a module matches if any of them does.
        every: take every n-th match in module order: matches n, 2n, 3n, ... (12 blocks, n = 2: blocks 1, 3, ..., 11).
        init: "copy" starts all experts as the dense FFN; "independent" keeps it as expert 0 and draws the others with
            the model's own initialiser: the `_init_weights(module)` of the outermost module around the FFN that has
            one (as in timm and Hugging Face), that of `nn.Linear` where none has.
        init_noise: standard deviation of Gaussian noise added to every expert, relative to that of each tensor, >= 0.

    Raises:
        ValueError: a value out of range.
    """

    num_experts: int = 4
    targets: tuple[str, ...] = ("*.mlp",)
    every: int = 2
    init: str = "copy"
    init_noise: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise ValueError(f"targets is '{self.targets}', must be a sequence of patterns such as ('*.mlp',)")
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}, must be at least 1")
        if not self.targets:
            raise ValueError("targets is empty, must name at least one pattern such as '*.mlp'")
        if self.every < 1:
            raise ValueError(f"every is {self.every}, must be at least 1")
        if self.init not in INITS:
            raise ValueError(f"init is '{self.init}', must be one of {', '.join(INITS)}")
        if not (math.isfinite(self.init_noise) and self.init_noise >= 0):
            raise ValueError(f"init_noise is {self.init_noise}, must be finite and at least 0")


def convert_to_mof_(model: nn.Module, config: MoFConfig = MoFConfig(), filter_fn: FilterFn | None = None) -> list[str]:
    """Replace FFNs of a transformer by RUP-MoF layers, in place.

    Call it before the optimizer, DDP and `torch.compile` take hold of the parameters. An FFN that the model uses in
    several places is replaced in all of them and counts as one match. The model itself is never a match.

    Args:
        model: any model whose FFNs are sub-modules; unchanged when an error is raised.
        config: which FFNs, how many experts, how they start.
        filter_fn: `filter_fn(module, name) -> bool` narrows the matches further.

    Returns:
        The names of the replaced modules, in module order.

    Raises:
        ValueError: nothing matches (the message lists candidates), the model has experts already, a match lies inside
            another, or shares a parameter with another module.
        TypeError: a match is not an FFN that can become experts.

    Source: Sparse-to-Dense Training, IEEE TCSVT 2025 (doi 10.1109/TCSVT.2025.3586550).

    Example:
        >>> import timm
        >>> convert_to_mof_(timm.create_model("vit_tiny_patch16_224", depth=4))
        ['blocks.1.mlp', 'blocks.3.mlp']
    """
    if is_sparse(model):
        raise ValueError("the model has experts already: convert the dense model, or merge it first")
    matches = {}
    for name, module in model.named_modules(remove_duplicate=False):
        wanted = name and any(fnmatchcase(name, target) for target in config.targets)
        if wanted and module not in matches and (filter_fn is None or filter_fn(module, name)):
            matches[module] = name
    chosen = dict(list(matches.items())[config.every - 1 :: config.every])
    if not chosen:
        raise ValueError(_nothing_to_convert(model, config, len(matches)))
    _check_apart(model, chosen)
    layers = {}
    for ffn, name in chosen.items():
        try:
            layers[ffn] = _to_experts(ffn, config, _initialiser(model, name))
        except TypeError as error:
            raise TypeError(f"module '{name}' cannot become experts: {error}") from None
    _replace_(model, layers)
    return list(chosen.values())


def merge_experts(model: nn.Module, *, inplace: bool = False, check_finite: bool = True) -> nn.Module:
    """Turn every RUP-MoF layer into one FFN, the mean of its experts.

    The result has the architecture and the state-dict keys of the model before its conversion, and keeps dtype, device,
    `requires_grad` and train/eval mode. Merging a dense model changes nothing.

    Args:
        model: a model with or without RUP-MoF layers.
        inplace: change `model` itself; otherwise a deep copy is changed and `model` stays as it is.
        check_finite: refuse to produce NaN or infinite weights; the model is then unchanged.

    Returns:
        The dense model.

    Raises:
        ValueError: merged weights are not finite (the message names the layer), or `model` is itself a RUP-MoF layer
            and `inplace` is set.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> keys = model.state_dict().keys()
        >>> _ = convert_to_mof_(model)
        >>> merge_experts(model).state_dict().keys() == keys
        True
    """
    if inplace and isinstance(model, RUPMoF):
        raise ValueError("a RUP-MoF layer cannot turn into its FFN in place: use the result of inplace=False")
    merged = {}
    for name, layer in model.named_modules():
        if isinstance(layer, RUPMoF):
            merged[layer] = layer.averaged_expert()
            if check_finite:
                _check_finite(merged[layer], name)
    if inplace:
        _replace_(model, merged)
        return model
    # The memo hands deepcopy the dense layers instead of the experts, which are thus never copied.
    return copy.deepcopy(model, {id(layer): ffn for layer, ffn in merged.items()})


def is_sparse(model: nn.Module) -> bool:
    """Tell whether a model still has experts."""
    return any(isinstance(m, RUPMoF) for m in model.modules())


def _to_experts(ffn: nn.Module, config: MoFConfig, initialise: Callable[[nn.Module], None] | None) -> RUPMoF:
    experts = RUPMoF(ffn, config.num_experts)
    stacked = dict(experts.stacked_layers())
    if config.init == "independent":

        def redraw(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            if initialise is not None:
                initialise(module)

        for expert in range(1, config.num_experts):
            # Children first, as everywhere in torch: a gated FFN's own initialiser changes what its layers' have drawn.
            drawn = copy.deepcopy(ffn).apply(redraw)
            for name, layer in stacked.items():
                layer.load_expert_(expert, drawn.get_submodule(name))
    if config.init_noise:
        for layer in stacked.values():
            _add_noise_(layer, config.init_noise)
    return experts


@torch.no_grad()
def _add_noise_(layer: StackedLinear, init_noise: float) -> None:
    for parameter in layer.parameters():
        deviation = parameter.flatten(1).float().std(1, correction=0).to(parameter.dtype)
        parameter.add_(torch.randn_like(parameter) * (init_noise * deviation).view(-1, *[1] * (parameter.dim() - 1)))


def _check_finite(ffn: nn.Module, name: str) -> None:
    bad = [key for key, tensor in ffn.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"merging '{name}' gives non-finite weights in {', '.join(bad)}: the training has diverged")


def _initialiser(model: nn.Module, name: str) -> Callable[[nn.Module], None] | None:
    parts = name.split(".")
    owners = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    return next((owner._init_weights for owner in owners if hasattr(owner, "_init_weights")), None)


def _replace_(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in layers:
            model.set_submodule(name, layers[module])


def _check_apart(model: nn.Module, chosen: dict[nn.Module, str]) -> None:
    uses = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    for ffn, name in chosen.items():
        for other in ffn.modules():
            if other is not ffn and other in chosen:
                raise ValueError(f"module '{chosen[other]}' lies inside '{name}', which matches too: narrow targets")
        tied = [key for key, parameter in ffn.named_parameters() if uses[parameter] > 1]
        if tied:
            raise ValueError(f"module '{name}' shares {', '.join(tied)} with another module, experts would untie them")


def _nothing_to_convert(model: nn.Module, config: MoFConfig, num_matches: int) -> str:
    wanted = ", ".join(f"'{target}'" for target in config.targets)
    if num_matches:
        return (
            f"every={config.every} takes none of the {num_matches} modules that match {wanted}: "
            f"use every <= {num_matches}"
        )
    candidates = [name for name, module in model.named_modules() if name and _is_ffn_like(module)]
    if not candidates:
        return f"no module matches {wanted}, and the model has no FFN to convert"
    shown = ", ".join(candidates[:8]) + (", ..." if len(candidates) > 8 else "")
    return f"no module matches {wanted}; modules that could become experts: {shown}"


def _is_ffn_like(module: nn.Module) -> bool:
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    if len(linears) < 2:
        return False
    try:
        check_ffn(module)
    except TypeError:
        return False
    return linears[0].in_features == linears[-1].out_features
