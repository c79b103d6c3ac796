"""From a dense transformer to a sparse one and back: `convert_to_mof_` before training, `merge_experts` after."""

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from .adapters import EntryLinear, ExitLinear, LinearPair, ffn_name, find_ffn, find_ffns
from .moe import TopKMoE, check_top_k
from .mof import ExpertLayer, RUPMoF, StackedLinear, is_linear, linear_parameters

logger = logging.getLogger(__name__)

KINDS = ("rup", "topk")
INITS = ("copy", "independent")
FilterFn = Callable[[nn.Module, str], bool]
Initialiser = Callable[[nn.Module], None]


@dataclass(frozen=True)
class MoFConfig:
    """Which FFNs become expert layers, of which kind, and how their experts start.

    Attributes:
        num_experts: K, at least 1.
        targets: glob patterns over module names (`*` matches dots too); a module matches if any of them does, but what
            lies inside another match of the same pattern does not count. A match is an FFN (`"*.mlp"` in timm, GPT-2,
            LLaMA), or a transformer layer that holds one, be it as two separate layers (`"*.layer.*"` for BERT,
            `"*.layers.*"` for OPT and `torch.nn.TransformerEncoder`).
        every: take every n-th match in module order: matches n, 2n, 3n, ... (12 blocks, n = 2: blocks 1, 3, ..., 11).
        init: "copy" starts all experts as the dense FFN; "independent" keeps it as expert 0 and draws the others with
            the model's own initialiser: the `_init_weights(module)` of the outermost module around the FFN that has
            one (as in timm and Hugging Face), that of `nn.Linear` where none has.
        init_noise: standard deviation of Gaussian noise added to every expert, relative to that of each tensor, >= 0.
        kind: "rup" makes `RUPMoF` layers, "topk" `TopKMoE` layers; the next two keys are for the latter.
        top_k: experts of a token, in [1, num_experts].
        capacity_factor: see `TopKMoE`; None drops no token.

    Raises:
        ValueError: a value out of range.
    """

    num_experts: int = 4
    targets: tuple[str, ...] = ("*.mlp",)
    every: int = 2
    init: str = "copy"
    init_noise: float = 0.0
    kind: str = "rup"
    top_k: int = 2
    capacity_factor: float | None = None

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
        if self.kind not in KINDS:
            raise ValueError(f"kind is '{self.kind}', must be one of {', '.join(KINDS)}")
        if self.kind == "topk":
            check_top_k(self.num_experts, self.top_k, self.capacity_factor)


def convert_to_mof_(model: nn.Module, config: MoFConfig = MoFConfig(), filter_fn: FilterFn | None = None) -> list[str]:
    """Replace FFNs of a transformer by expert layers, RUP-MoF by default, in place.

    Call it before the optimizer, DDP and `torch.compile` take hold of the parameters. An FFN that the model uses in
    several places is replaced in all of them and counts as one match. The model itself is never a match.

    Args:
        model: any model whose FFNs are sub-modules; unchanged when an error is raised.
        config: which FFNs, how many experts, how they start.
        filter_fn: `filter_fn(module, name) -> bool` narrows the matches further.

    Returns:
        The names of the matches whose FFNs were replaced, in module order.

    Raises:
        ValueError: nothing matches (the message lists candidates), the model has experts already, a match lies inside
            another, or shares a parameter with another module.
        TypeError: a match neither is nor holds an FFN that can become experts, or holds several.

    Source: abstract of Sparse-to-Dense Training, IEEE TCSVT 2025 (doi 10.1109/TCSVT.2025.3586550).

    Example:
        >>> import timm
        >>> convert_to_mof_(timm.create_model("vit_tiny_patch16_224", depth=4))
        ['blocks.1.mlp', 'blocks.3.mlp']
    """
    if is_sparse(model):
        raise ValueError("the model has experts already: convert the dense model, or merge it first")
    matches: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        outer = [match for match in matches.values() if name.startswith(f"{match}.")]
        wanted = name and any(
            fnmatchcase(name, target) and not any(fnmatchcase(match, target) for match in outer)
            for target in config.targets
        )
        if wanted and module not in matches and (filter_fn is None or filter_fn(module, name)):
            matches[module] = name
    chosen = dict(list(matches.items())[config.every - 1 :: config.every])
    if not chosen:
        raise ValueError(_nothing_to_convert(model, config, len(matches)))
    _check_apart(model, chosen)
    layers: dict[nn.Module, nn.Module] = {}
    for match, name in chosen.items():
        try:
            layers |= _expert_layers_for(match, config, _initialiser(model, name))
        except TypeError as error:
            raise TypeError(f"module '{name}' cannot become experts: {error}") from None
    _replace_(model, layers)
    return list(chosen.values())


def merge_experts(
    model: nn.Module, *, inplace: bool = False, check_finite: bool = True, allow_average: bool = False
) -> nn.Module:
    """Turn every RUP-MoF layer into one FFN, the mean of its experts.

    The result has the architecture and the state-dict keys of the model before its conversion, and keeps dtype, device,
    `requires_grad` and train/eval mode. Merging a dense model changes nothing.

    Args:
        model: a model with or without RUP-MoF layers.
        inplace: change `model` itself; otherwise a deep copy is changed and `model` stays as it is.
        check_finite: refuse to produce NaN or infinite weights; the model is then unchanged.
        allow_average: merge TopKMoE layers as well, to the mean of their experts. This is an approximation, and a
            warning says so: the model with its routers computes something else.

    Returns:
        The dense model.

    Raises:
        ValueError: merged weights are not finite, a layer is a TopKMoE and `allow_average` is not set (the messages
            name the layer), or `model` is itself an expert layer and `inplace` is set.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> keys = model.state_dict().keys()
        >>> _ = convert_to_mof_(model)
        >>> merge_experts(model).state_dict().keys() == keys
        True
    """
    if inplace and isinstance(model, ExpertLayer):
        raise ValueError("an expert layer cannot turn into its FFN in place: use the result of inplace=False")
    merged: dict[nn.Module, nn.Module] = {}
    owned = {module.experts for module in model.modules() if isinstance(module, EntryLinear)}
    for name, layer in model.named_modules():
        if isinstance(layer, TopKMoE):
            _check_average(name, allow_average)
        if isinstance(layer, (ExpertLayer, EntryLinear, ExitLinear)) and layer not in owned:
            merged[layer] = layer.averaged_expert()
            if check_finite:
                _check_finite(merged[layer], name)
    if inplace:
        _replace_(model, merged)
        return model
    # The memo hands deepcopy the dense layers instead of the experts, which are thus never copied.
    return copy.deepcopy(model, {id(layer): ffn for layer, ffn in merged.items()})


def is_sparse(model: nn.Module) -> bool:
    """Tell whether a model still has experts.

    Example:
        >>> is_sparse(nn.Linear(2, 2))
        False
    """
    return any(isinstance(m, ExpertLayer) for m in model.modules())


def _expert_layers_for(
    match: nn.Module, config: MoFConfig, initialise: Initialiser | None
) -> dict[nn.Module, nn.Module]:
    """Return what stands in the place of which module of `match`."""
    parts = [match.get_submodule(name) for name in find_ffn(match)]
    if len(parts) == 1:
        return {parts[0]: _to_experts(parts[0], config, initialise)}
    entry = EntryLinear(_to_experts(LinearPair(*parts), config, initialise))
    return {parts[0]: entry, parts[1]: ExitLinear(entry)}


def _to_experts(ffn: nn.Module, config: MoFConfig, initialise: Initialiser | None) -> ExpertLayer:
    experts: ExpertLayer
    if config.kind == "topk":
        experts = TopKMoE(ffn, config.num_experts, config.top_k, capacity_factor=config.capacity_factor)
    else:
        experts = RUPMoF(ffn, config.num_experts)
    stacked = dict(experts.stacked_layers())
    if config.init == "independent":

        def redraw(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            elif is_linear(module):
                nn.init.normal_(linear_parameters(module)[0], std=0.02)
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


def _check_average(name: str, allowed: bool) -> None:
    if not allowed:
        raise ValueError(
            f"module '{name}' is a TopKMoE, whose router chooses experts for each token: no FFN equals it. "
            "Evaluate it as it is, or pass allow_average=True for the mean of its experts, an approximation"
        )
    logger.warning("the mean of the experts of '%s' only approximates it: it is a TopKMoE with a router", name)


def _initialiser(model: nn.Module, name: str) -> Initialiser | None:
    parts = name.split(".")
    owners = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    own = (getattr(owner, "_init_weights", None) for owner in owners)
    return next((initialise for initialise in own if callable(initialise)), None)


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
    candidates = [ffn_name(ffn) for ffn in find_ffns(model) if ffn_name(ffn)]
    if not candidates:
        return f"no module matches {wanted}, and the model has no FFN to convert"
    shown = ", ".join(candidates[:8]) + (", ..." if len(candidates) > 8 else "")
    return f"no module matches {wanted}; modules that could become experts: {shown}"
