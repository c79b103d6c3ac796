"""From a dense transformer to a sparse one: `convert_to_mof_`, before training."""

import copy
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import FFN, EntryLinear, ExitLinear, LinearPair, find_block_ffns, find_ffn, find_ffns
from .linear import StackedLinear, is_linear, linear_parameters
from .merge import is_sparse, mark_no_weight_decay_, replace_
from .moe import TopKMoE, check_top_k
from .mof import ExpertLayer, Plan, RUPMoF
from .probe import Layout, Trials
from .sharing import HOOKS, OF_EVERY_MODULE, Reach, copied, drop_hooks_, own_ids, take_hooks_
from .state import check_state
from .tokenwise import Watch
from .trial import Call, copied_call, differ, first_line, pinned, quiet

KINDS = ("rup", "topk")
_NAMED = ("*.mlp",)
INITS = ("copy", "independent")
FilterFn = Callable[[nn.Module, str], bool]
Initialiser = Callable[[nn.Module], None]


@dataclass(frozen=True)
class MoFConfig:
    """Which FFNs become expert layers, of which kind, and how their experts start.

    Attributes:
        num_experts: K, at least 1.
        targets: None takes the FFN of each transformer block, found by structure: repeated blocks that hold an FFN
            beside an attention or another mixer of tokens; where there are none, `"*.mlp"`. Otherwise glob patterns
            over module names (`*` matches dots too, `*.mlp` a top-level `mlp` as well); a module matches if any of
            them does, but what lies inside another match of the same pattern does not count. A match is an FFN
            (`"*.mlp"` in timm, GPT-2, LLaMA), or a transformer layer that holds one, be it as two separate layers
            (`"*.layer.*"` for BERT, `"*.layers.*"` for OPT and `torch.nn.TransformerEncoder`).
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
    targets: tuple[str, ...] | None = None
    every: int = 2
    init: str = "copy"
    init_noise: float = 0.0
    kind: str = "rup"
    top_k: int = 2
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise ValueError(f"targets is '{self.targets}', must be a sequence of patterns such as ('*.mlp',)")
        if self.targets is not None:
            targets = tuple(self.targets) if isinstance(self.targets, Iterable) else (self.targets,)
            if not all(isinstance(target, str) for target in targets):
                raise ValueError(f"targets is {self.targets!r}, must be patterns such as '*.mlp'")
            object.__setattr__(self, "targets", targets)
        for key in ("num_experts", "every", "top_k"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise ValueError(f"{key} is {value!r}, must be a whole number")
            object.__setattr__(self, key, int(value))
        if isinstance(self.init_noise, bool) or not isinstance(self.init_noise, numbers.Real):
            raise ValueError(f"init_noise is {self.init_noise!r}, must be a number")
        if self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}, must be at least 1")
        if self.targets == ():
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


def convert_to_mof_(
    model: nn.Module, config: MoFConfig = MoFConfig(), filter_fn: FilterFn | None = None, *, example: Any = None
) -> list[str]:
    """Replace FFNs of a transformer by expert layers, RUP-MoF by default, in place.

    Call it before the optimizer, DDP and `torch.compile` take hold of the parameters. An FFN that the model uses in
    several places is replaced in all of them and counts as one match. The model itself is never a match.

    Each FFN is tried first, on a copy: with identical experts its training pass must equal the dense one. It is tried
    on random tokens, or on what the model passes to it where `example` is given.

    Args:
        model: any model whose FFNs are sub-modules; unchanged when an error is raised.
        config: which FFNs, how many experts, how they start.
        filter_fn: `filter_fn(module, name) -> bool` narrows the matches further.
        example: a sample input of the model: a tensor, a tuple of positional or a dict of keyword arguments. Copies of
            the model run on it in training mode, dense and converted. Needed where an FFN is called with more than one
            tensor (a mask, say); it also finds what no trial of an FFN by itself can.

    Returns:
        The names of the matches whose FFNs were replaced, in module order.

    Raises:
        ValueError: nothing matches (the message lists candidates), one of several targets matches nothing, the model
            has experts already, a match lies inside another, or shares a parameter with another module.
        TypeError: a match neither is nor holds an FFN that can become experts, or holds several; or the converted
            model does not train as the dense one.

    Source: abstract of Sparse-to-Dense Training, IEEE TCSVT 2025 (doi 10.1109/TCSVT.2025.3586550).

    Example:
        >>> import timm
        >>> convert_to_mof_(timm.create_model("vit_tiny_patch16_224", depth=4))
        ['blocks.1.mlp', 'blocks.3.mlp']
    """
    if not isinstance(config, MoFConfig):
        raise TypeError(f"config is a {type(config).__name__}, must be a MoFConfig")
    if is_sparse(model):
        raise ValueError("the model has experts already: convert the dense model, or merge it first")
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "parameters that are made under torch.inference_mode() cannot be trained: convert outside of it"
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(f"the model is inside {type(model).__name__}: convert model.module, and wrap it afterwards")
    trials = Trials(config.num_experts, RUPMoF, routed=config.kind == "topk")
    matches = _matches(model, config, filter_fn, trials)
    chosen = matches[config.every - 1 :: config.every]
    if not chosen:
        if not matches and filter_fn is not None and (rejected := _matches(model, config, None, trials)):
            raise ValueError(f"filter_fn rejects all {len(rejected)} matches, such as '{rejected[0].name}'")
        raise ValueError(_nothing_to_convert(model, config, len(matches), trials))
    _check_apart(model, chosen)
    call = None if example is None else _as_call(example)
    ffns = [_located(model, ffn, trials, tried=call is not None) for ffn in chosen]
    _check_untied(model, ffns)
    _check_references(model, ffns)
    dense, calls = (None, {}) if call is None else _run_dense(model, ffns, call)
    layouts = [_layout(model, ffn, trials, calls.get(ffn, ())) for ffn in ffns]
    if call is not None:
        _check_training(model, ffns, layouts, config.num_experts, call, dense)
    layers: dict[nn.Module, nn.Module] = {}
    for ffn, layout in zip(ffns, layouts):
        layers |= _expert_layers(model, ffn, partial(_to_experts, config, _initialiser(model, ffn.name), layout))
    replace_(model, layers)
    _watch_pairs_(model, ffns)
    mark_no_weight_decay_(model)
    return [ffn.name for ffn in ffns]


def _matches(model: nn.Module, config: MoFConfig, filter_fn: FilterFn | None, trials: Trials) -> list[FFN]:
    """List what the config means; of a glob pattern's matches the parts are not known yet."""
    if config.targets is None:
        found = find_block_ffns(model, trials)
        chosen = [ffn for ffn in found if filter_fn is None or filter_fn(model.get_submodule(ffn.name), ffn.name)]
        if chosen:
            return chosen
    targets = config.targets or _NAMED

    def fits(name: str, target: str) -> bool:
        return fnmatchcase(name, target) or fnmatchcase(f".{name}", target)

    matches: dict[nn.Module, str] = {}
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    for name, module in named:
        outer = [match for match in matches.values() if name.startswith(f"{match}.")]
        wanted = any(fits(name, target) and not any(fits(match, target) for match in outer) for target in targets)
        if wanted and module not in matches and (filter_fn is None or filter_fn(module, name)):
            matches[module] = name
    idle = [target for target in config.targets or () if not any(fits(name, target) for name, _ in named)]
    if matches and idle:
        raise ValueError(f"no module matches the target '{idle[0]}': correct it, or leave it out of targets")
    return [FFN(name, ()) for name in matches.values()]


def _located(model: nn.Module, ffn: FFN, trials: Trials, tried: bool) -> FFN:
    """Fill in the parts of a match. Where the model is tried on a sample input, that tells whether it is an FFN."""
    if ffn.parts:
        return ffn
    match = model.get_submodule(ffn.name)
    try:
        if tried:
            try:
                check_state(match)
                return FFN(ffn.name, (ffn.name,))
            except TypeError:
                pass  # it may hold one
        parts = find_ffn(match, trials)
    except TypeError as error:
        raise _refused(model, ffn, error, trials) from None
    return FFN(ffn.name, tuple(f"{ffn.name}.{part}".rstrip(".") for part in parts))


def _layout(model: nn.Module, ffn: FFN, trials: Trials, calls: Sequence[Call]) -> Layout:
    try:
        if len(ffn.parts) == 1:
            return trials.layout(model.get_submodule(ffn.parts[0]), calls)
        layer, prefix = model.get_submodule(ffn.name), len(ffn.name) + 1 if ffn.name else 0
        inner = FFN("", tuple(part[prefix:] for part in ffn.parts))
        for part in ffn.parts:
            check_state(LinearPair(model.get_submodule(part), nn.Identity()))
        return trials.pair_layout(layer, partial(_put_identical_, inner, trials.num_experts), calls, inner.parts)
    except TypeError as error:
        raise _refused(model, ffn, error, trials) from None


def _put_identical_(ffn: FFN, num_experts: int, model: nn.Module, layout: Layout) -> None:
    replace_(model, _expert_layers(model, ffn, lambda part: RUPMoF(part, num_experts, layout=layout)))
    _watch_pairs_(model, [ffn])


def _watch_pairs_(model: nn.Module, ffns: list[FFN]) -> None:
    """Watch what stands around and between the two linear layers of an FFN, and the hooks of all."""
    for ffn in ffns:
        if len(ffn.parts) == 2:
            entry, exit_ = (model.get_submodule(part) for part in ffn.parts)
            experts, layer = entry.experts, model.get_submodule(ffn.name)
            assert isinstance(experts, ExpertLayer)
            between = [layer.get_submodule(name) for name in experts.layout.watched]
            experts.watch = Watch(between, [entry, exit_, *between])


def _expert_layers(
    model: nn.Module, ffn: FFN, to_experts: Callable[[nn.Module], ExpertLayer]
) -> dict[nn.Module, nn.Module]:
    """Return what stands in the place of which module of `model`."""
    parts = [model.get_submodule(name) for name in ffn.parts]
    experts = to_experts(parts[0] if len(parts) == 1 else LinearPair(*parts))
    experts.name = ffn.name
    if len(parts) == 1:
        return {parts[0]: experts}
    entry = EntryLinear(experts)
    return {parts[0]: entry, parts[1]: ExitLinear(entry)}


def _to_experts(config: MoFConfig, initialise: Initialiser | None, layout: Layout, ffn: nn.Module) -> ExpertLayer:
    experts: ExpertLayer
    if config.kind == "topk":
        capacity = config.capacity_factor
        experts = TopKMoE(ffn, config.num_experts, config.top_k, capacity_factor=capacity, layout=layout)
    else:
        experts = RUPMoF(ffn, config.num_experts, layout=layout)
    stacked = dict(experts.stacked_layers())
    for module, source in ((experts, ffn), *((layer, ffn.get_submodule(name)) for name, layer in stacked.items())):
        take_hooks_(module, source)  # whoever holds a handle goes on removing his hook
    if config.init == "independent":

        def redraw(module: nn.Module) -> None:
            if is_linear(module) and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
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


def _initialiser(model: nn.Module, name: str) -> Initialiser | None:
    parts = name.split(".")
    owners = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    own = (getattr(owner, "_init_weights", None) for owner in owners)
    return next((initialise for initialise in own if callable(initialise)), None)


def _as_call(example: Any) -> Call:
    if isinstance(example, Mapping):
        return Call((), dict(example))
    return Call(tuple(example) if isinstance(example, (tuple, list)) else (example,), {})


def _run_dense(model: nn.Module, ffns: list[FFN], call: Call) -> tuple[Any, dict[FFN, list[Call]]]:
    """Run a copy of the model on a sample input; return its output, and how each FFN, or its layer, was called."""
    dense = _copied(model)
    calls: dict[FFN, list[Call]] = {ffn: [] for ffn in ffns}
    for ffn in ffns:

        def note(module: nn.Module, args: Any, kwargs: Any, seen: list[Call] = calls[ffn]) -> None:
            call = Call(args, kwargs)
            if all(call.form != other.form for other in seen):  # an FFN may be used in several places
                seen.append(copied_call(call))

        place = ffn.parts[0] if len(ffn.parts) == 1 else ffn.name
        dense.get_submodule(place).register_forward_pre_hook(note, with_kwargs=True)
    output = _run(dense, call, "")
    missed = [ffn.name for ffn in ffns if not calls[ffn]]
    if missed:
        raise TypeError(f"module '{missed[0]}' is not called when the model runs on example=: its experts would idle")
    return output, calls


def _check_training(
    model: nn.Module, ffns: list[FFN], layouts: list[Layout], num_experts: int, call: Call, wanted: Any
) -> None:
    """Refuse a conversion unless the whole model with identical experts trains on a sample input as the dense one."""
    sparse, called = _copied(model), set[str]()
    for ffn, layout in zip(ffns, layouts):
        _put_identical_(ffn, num_experts, sparse, layout)
    for layer in sparse.modules():
        if isinstance(layer, ExpertLayer):  # a hook would make tokens leave their slots
            layer.draw = partial(_noted_draw, called, layer.name, layer.draw)  # type: ignore[method-assign]
    found = _run(sparse, call, " with experts")
    if differ(found, wanted) > 10:  # rounding grows with depth
        raise TypeError("with identical experts the model does not train as the dense one on example=")
    missed = [ffn.name for ffn in ffns if ffn.name not in called]
    if missed:
        raise TypeError(f"the experts of '{missed[0]}' are not used when the model runs on example=")


def _noted_draw(called: set[str], name: str, draw: Callable[[Tensor], Plan], x: Tensor) -> Plan:
    called.add(name)
    return draw(x)


def _run(model: nn.Module, call: Call, what: str) -> Any:
    with quiet(model):
        try:
            with pinned():
                return copied_call(call).on(model.train())
        except Exception as error:
            raise TypeError(f"the model{what} does not run on example=: {first_line(error)}") from error


def _copied(model: nn.Module) -> nn.Module:
    """Copy a model without its hooks."""
    made = copied(model)
    for module in made.modules():
        drop_hooks_(module)
    return made


def _refused(model: nn.Module, ffn: FFN, error: TypeError, trials: Trials) -> TypeError:
    kind = type(model.get_submodule(ffn.name))  # others of this class would be refused as well
    others = [name for name in _candidates(model, trials) if type(model.get_submodule(name)) is not kind]
    hint = f"; modules that could become experts: {_listed(others)}" if others and "name each" not in str(error) else ""
    return TypeError(f"module '{ffn.name}' cannot become experts: {error}{hint}")


def _check_apart(model: nn.Module, chosen: list[FFN]) -> None:
    names = {model.get_submodule(ffn.name): ffn.name for ffn in chosen}
    for ffn in chosen:
        module = model.get_submodule(ffn.name)
        for other in module.modules():
            if other is not module and other in names:
                raise ValueError(f"module '{names[other]}' lies inside '{ffn.name}', which matches too: narrow targets")


def _check_untied(model: nn.Module, ffns: list[FFN]) -> None:
    """Refuse FFNs, or linear layers of one, whose weights another module has too."""
    uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for ffn in ffns:
        match, tied = model.get_submodule(ffn.name), []
        for part in ffn.parts:
            named = model.get_submodule(part).named_parameters(part[len(ffn.name) :].lstrip("."))
            tied += [key for key, parameter in named if uses[parameter] > places[match]]
        if tied:
            raise ValueError(
                f"module '{ffn.name}' shares {', '.join(tied)} with another module, experts would untie them"
            )


def _check_references(model: nn.Module, ffns: list[FFN]) -> None:
    """Refuse FFNs that another module holds outside the module tree as well: those would go on being used there."""
    places = {key: part for ffn in ffns for part in ffn.parts for key in own_ids(model.get_submodule(part))}
    reach = Reach(places)
    for name, module in model.named_modules():
        if id(module) in places:
            continue
        for key, value in vars(module).items():
            found = None if key in OF_EVERY_MODULE and key not in HOOKS else reach.find(value)
            if found is not None:
                raise TypeError(
                    f"module '{places[found]}' cannot become experts: '{name}.{key}' holds it as well, or a part of "
                    "it, outside the module tree, and would go on using the dense weights: set it after the conversion "
                    "(convert before torch.compile)"
                )


def _candidates(model: nn.Module, trials: Trials) -> list[str]:
    return [ffn.name for ffn in find_ffns(model, trials) if ffn.name]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _nothing_to_convert(model: nn.Module, config: MoFConfig, num_matches: int, trials: Trials) -> str:
    wanted = ", ".join(f"'{target}'" for target in config.targets or _NAMED)
    if num_matches:
        return (
            f"every={config.every} takes none of the {num_matches} modules that match {wanted}: "
            f"use every <= {num_matches}"
        )
    candidates = _candidates(model, trials)
    if not candidates:
        return (
            f"no module matches {wanted}, and the model has no FFN to convert "
            "(one that is called with more than its tokens: name it in targets and pass a sample input, example=)"
        )
    return f"no module matches {wanted}; modules that could become experts: {_listed(candidates)}"
