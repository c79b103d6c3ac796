"""Where a transformer keeps its FFNs, found by structure: as modules of their own, or as two layers of a larger one."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from .linear import StackedLinear, is_linear, linear_features
from .mof import ExpertLayer, Plan, RUPMoF
from .probe import Layout, Trials, signature
from .sharing import copy_hooks_, take_hooks_
from .trial import noise, quiet, randomised

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
IsBlock = Callable[[str], bool]
_GATES = (nn.Sigmoid, nn.Hardsigmoid)
_MIXERS = ("attention", "attn", "mixer", "mixing", "fourier", "fft", "shift")


class FFN(NamedTuple):
    """Where an FFN is: the name of the module that holds it, and those of its parts in the model.

    One part is a module of its own. Two parts are the linear layers of an FFN that is spread over its transformer
    layer, such as `fc1` and `fc2` of OPT; `name` is that layer's.
    """

    name: str
    parts: tuple[str, ...]


class LinearPair(nn.Module):
    """The two linear layers of an FFN that is spread over its transformer layer; holds them and is never called."""

    shown_as = "its FFN"

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


class PairPart(nn.Module):
    """Stands where a linear layer of such an FFN stood; one of its two weights is what `experts` calls `part`."""

    experts: ExpertLayer
    part: str

    @property
    def stacked(self) -> StackedLinear:
        """The experts of this linear layer."""
        layer = getattr(self.experts, self.part)
        assert isinstance(layer, StackedLinear)
        return layer

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze the experts of this linear layer alone, or let them train."""
        self.stacked.requires_grad_(requires_grad)
        return self

    def averaged_expert(self) -> nn.Module:
        """Return the mean of the experts of this linear layer, of the original class."""
        layer = getattr(self.experts, self.part)  # the mean itself, in the copy that `merge_experts` makes
        linear = layer.averaged_linear() if isinstance(layer, StackedLinear) else layer
        copy_hooks_(linear, self)
        return linear

    @property
    def weight(self) -> Tensor:
        """The weight of `averaged_expert`: `nn.TransformerEncoderLayer` reads it in evaluation and skips `forward`."""
        return self._averaged()[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias of `averaged_expert`."""
        return self._averaged()[1]

    def _averaged(self) -> tuple[Tensor, Tensor | None]:
        if not self.experts.averaged_in_eval:
            raise RuntimeError(
                "routed experts have no single weight: in a torch.nn.TransformerEncoder, "
                "call torch.backends.mha.set_fastpath_enabled(False) before evaluation"
            )
        return self.stacked.averaged()


class EntryLinear(PairPart):
    """Stands where such an FFN's first linear layer stood; owns the expert layer of both.

    In training its result is in slots, (K, capacity, hidden), where a trial of the transformer layer showed that this
    is right; else tokens are back in their places between the two. `ExitLinear`, in the place of the second one,
    returns them at last. The experts are used where both are in training mode, their mean where one is not.
    """

    part = "first"

    def __init__(self, experts: ExpertLayer) -> None:
        """Take over `experts`, made from a `LinearPair`."""
        super().__init__()
        self.experts = experts
        experts.running = True  # its parts are never called but from here
        take_hooks_(self, experts.first)
        take_hooks_(experts.first, nn.Identity())
        self.plan: Plan | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x (..., C) to (K, capacity, hidden) or (..., hidden)."""
        self.plan = None
        if self.experts.uses_mean():
            return self.stacked(x)
        if not torch.compiler.is_compiling():
            self.experts.look_for_changes()
        self.plan = self.experts.draw(x)
        if self.experts.layout.in_slots:
            return self.stacked(self.experts.spread(x, self.plan))
        return self.stacked.on_tokens(x, self.plan)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"plan": None}  # of a call that was given up


class ExitLinear(PairPart):
    """Stands where the second linear layer of an FFN stood that is spread over its transformer layer."""

    part = "second"
    _entry: EntryLinear

    def __init__(self, entry: EntryLinear) -> None:
        super().__init__()
        object.__setattr__(self, "_entry", entry)  # not a sub-module: its parameters are registered once, over there
        object.__setattr__(entry.experts, "peer", self)
        take_hooks_(self, entry.experts.second)
        take_hooks_(entry.experts.second, nn.Identity())

    @property
    def experts(self) -> ExpertLayer:  # type: ignore[override]
        """The expert layer of both parts."""
        return self._entry.experts

    def forward(self, hidden: Tensor) -> Tensor:
        """Map what `EntryLinear` returned to tokens (..., D)."""
        plan, self._entry.plan = self._entry.plan, None
        if self.experts.uses_mean():
            return self.stacked(hidden)
        if self.experts.layout.in_slots and plan is not None:
            return self.experts.combine(self.stacked(hidden), plan)
        return self.stacked.on_tokens(hidden, plan)


def find_ffn(module: nn.Module, trials: Trials | None = None) -> tuple[str, ...]:
    """Find the FFN that a conversion target means.

    Returns:
        Names below `module`: `("",)` when it is an FFN itself; `(name,)` of the only one inside; `(first, second)` of
        two linear layers which are the FFN of this transformer layer, such as `("fc1", "fc2")` of OPT.

    Raises:
        TypeError: there is no FFN, or more than one.
    """
    trials = trials or Trials(2, RUPMoF)
    try:
        trials.layout(module)
        return ("",)
    except TypeError:
        found = find_ffns(module, trials)
        if not found:
            raise
    if len(found) > 1:
        names = ", ".join(ffn.name for ffn in found[:4]) + (", ..." if len(found) > 4 else "")
        raise TypeError(f"{type(module).__name__} holds {len(found)} FFNs ({names}): name each")
    return found[0].parts


def find_ffns(model: nn.Module, trials: Trials | None = None) -> list[FFN]:
    """Find all FFNs inside a model, in module order; a model that is one linear pair itself has the name ""."""
    trials = trials or Trials(2, RUPMoF)
    seen: set[str] = set()  # modules that were tried, and all around them
    whole: list[str] = []
    modules = dict(model.named_modules())
    for name in sorted(modules, key=lambda name: -name.count(".") if name else 1):  # children first
        module = modules[name]
        linears = sum(is_linear(m) for m in module.modules())
        if not name or name in seen or linears < 2 or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        seen |= set(_ancestors(name))
        if not _is_block_ffn(module, trials):
            continue
        parent, _, child = name.rpartition(".")
        alone = parent and sum(is_linear(m) for m in modules[parent].modules()) == linears
        if alone and _is_block_ffn(modules[parent], trials) and not _calls(modules[parent], child, trials):
            name = parent
        whole.append(name)
    found = [FFN(name, (name,)) for name in whole]
    for name in modules:
        pair = _linear_pair(name, modules, whole)
        if pair:
            found.append(FFN(name, pair))
    order = {name: index for index, name in enumerate(modules)}
    return sorted(found, key=lambda ffn: order.get(ffn.parts[0], order[ffn.name]))


def find_block_ffns(model: nn.Module, trials: Trials | None = None) -> list[FFN]:
    """Find the FFN of each transformer block: of repeated blocks that hold an attention or another mixer of tokens.

    An FFN inside such a mixer (a position bias, say), in a head or in a pooling is left out: it sees no tokens, or
    others.
    """
    modules, found = dict(model.named_modules()), find_ffns(model, trials)
    modules |= {part: model.get_submodule(part) for ffn in found for part in ffn.parts}  # one may have other names
    inside = {id(m) for ffn in found for part in ffn.parts for m in modules[part].modules()}
    kinds = [type(m) for name, m in modules.items() if _is_item(name, modules)]

    def repeated(name: str) -> bool:
        return _is_item(name, modules) and kinds.count(type(modules[name])) > 1

    def has_sibling(name: str) -> bool:
        parent = modules[name.rpartition(".")[0]]
        return sum(type(m) is type(modules[name]) for m in parent.children()) > 1

    def single(name: str) -> bool:
        return _is_item(name, modules)

    for is_block in (repeated, has_sibling, single):
        blocks = {ffn: block for ffn in found if (block := _block_of(ffn, modules, inside, is_block))}
        if blocks:
            return _without_gates(blocks, modules)
    return []


def _without_gates(blocks: dict[FFN, str], modules: dict[str, nn.Module]) -> list[FFN]:
    """Where a block holds several FFNs, leave out those that see other tokens than it: of a gate, or of positions."""
    numbers: dict[Any, list[int]] = {}
    chosen = []
    for ffn, block in blocks.items():
        rivals = [other for other, around in blocks.items() if around == block]
        kinds = [signature(modules[other.name]) for other in rivals]
        if any(kind != kinds[0] for kind in kinds):
            key = signature(modules[block])
            if key not in numbers:
                places = [rival.parts[0][len(block) + 1 :] for rival in rivals]
                numbers[key] = _tokens_seen(modules[block], places)
            seen = dict(zip(rivals, numbers[key]))
            if seen and 4 * seen[ffn] < max(seen.values()):  # one after a convolution with stride 2 gets a quarter
                continue
        chosen.append(ffn)
    return chosen


def _tokens_seen(block: nn.Module, places: list[str]) -> list[int]:
    """Run a copy of a block on random tokens; return how many each of its FFNs gets. [] where it does not run on them.

    An FFN that ends in a sigmoid is a gate: it counts as one that gets none.
    """
    widths = dict.fromkeys(linear_features(m)[0] for m in block.modules() if is_linear(m))
    with quiet(block):
        made = randomised(block)
        for width, shape in itertools.product(widths, ((5, 7), (5, 6, 7))):
            x, seen = noise((*shape, width), 0, next(made.parameters())), dict.fromkeys(places, 0)

            def note(module: nn.Module, args: Any, seen: dict[str, int] = seen) -> None:
                for place in places:
                    if made.get_submodule(place) is module and isinstance(args[0], Tensor):
                        seen[place] = args[0].numel()

            for tokens in (x, x.movedim(-1, 1)):
                try:
                    with register_module_forward_pre_hook(note):
                        made(tokens)
                except Exception:  # of any kind: it is given what it may not expect
                    continue
                wide = {place: next(m for m in made.get_submodule(place).modules() if is_linear(m)) for place in places}
                gates = [place for place in places if isinstance([*made.get_submodule(place).modules()][-1], _GATES)]
                seen.update(dict.fromkeys(gates, 0))
                return [seen[place] // linear_features(wide[place])[0] for place in places]
    return []


def _block_of(ffn: FFN, modules: dict[str, nn.Module], inside: set[int], is_block: IsBlock) -> str:
    """Return the innermost block around an FFN; "" where this takes it for a part of its mixer, or there is none."""
    own = {id(m) for part in ffn.parts for m in modules[part].modules()}
    is_pair = len(ffn.parts) == 2
    for block in [*([ffn.name] if is_pair else []), *_ancestors(ffn.name)]:
        if not block or not is_block(block):
            continue
        if not any(_mixes(m) for m in modules[block].modules() if id(m) not in inside):
            continue
        arms = [name for name in [ffn.name, *_ancestors(ffn.name)] if name.startswith(f"{block}.")]
        arm = next((name for name in reversed(arms) if not isinstance(modules[name], _CONTAINERS)), ffn.name)
        if arm != ffn.name and _routes(modules[arm], inside):
            return ""
        return block if is_pair or not any(_mixes(m) for m in modules[arm].modules() if id(m) not in own) else ""
    return ""


def _routes(module: nn.Module, inside: set[int]) -> bool:
    """Tell a mixture of experts of the model's own, FFNs in a list and a router: each FFN sees some of the tokens."""
    lists = [m for m in module.modules() if isinstance(m, _CONTAINERS[::2]) and len(m) > 1]
    several = any(all(any(id(part) in inside for part in m.modules()) for m in item.children()) for item in lists)
    return several and any(_mixes(m) for m in module.modules() if id(m) not in inside)


def _mixes(module: nn.Module) -> bool:
    """Tell what may mix tokens, or is part of that: weights of two and more dimensions, pooling, or so it is called."""
    kind = type(module).__name__.lower()
    return (
        any(p is not None and (is_lazy(p) or p.dim() > 1) for p in module._parameters.values())
        or "pool" in kind
        or any(word in kind for word in _MIXERS)
    )


def _is_item(name: str, modules: dict[str, nn.Module]) -> bool:
    return bool(name) and isinstance(modules[name.rpartition(".")[0]], _CONTAINERS)


def _ancestors(name: str) -> Iterator[str]:
    """Iterate over the names of the modules around one, from inside to outside, the model itself ("") last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_block_ffn(module: nn.Module, trials: Trials) -> bool:
    try:
        return trials.layout(module).same_width
    except TypeError:
        return False


def _calls(parent: nn.Module, child: str, trials: Trials) -> bool:
    """Tell whether an FFN calls its child as a whole; some go over the layers of one, which experts have none of."""

    def convert_(module: nn.Module, layout: Layout) -> None:
        module.set_submodule(child, RUPMoF(module.get_submodule(child), trials.num_experts))

    try:
        trials.pair_layout(parent, convert_)
    except TypeError:
        return False
    return True


def _linear_pair(name: str, modules: dict[str, nn.Module], whole: list[str]) -> tuple[str, ...]:
    """Find the two linear layers, widening and narrowing, that are the FFN of a transformer layer.

    They are neighbours without a third one beside them, and no smaller module than the layer holds both. What mixes the
    tokens of the block is not between them alone, as in a state space model.
    """
    prefix = f"{name}." if name else ""
    if any(other == name or other.startswith(prefix) for other in whole):
        return ()
    layer = modules[name]
    linears = [(child, m) for child, m in layer.named_modules() if child and isinstance(m, nn.Linear)]
    parents = [child.rpartition(".")[0] for child, _ in linears]
    pairs = []
    for index in range(len(linears) - 1):
        (first, up), (second, down) = linears[index : index + 2]
        narrow, wide = linear_features(up)
        siblings = {parents.count(parent) for parent in parents[index : index + 2]}
        alone = siblings == ({2} if parents[index] == parents[index + 1] else {1})
        apart = first.split(".")[0] != second.split(".")[0]
        if alone and apart and wide > narrow and linear_features(down) == (wide, narrow):
            pairs.append((f"{prefix}{first}", f"{prefix}{second}"))
    if len(pairs) != 1:
        return ()
    inner = list(layer.modules())
    start, end = (inner.index(layer.get_submodule(part.removeprefix(prefix))) for part in pairs[0])
    mixers = [place for place, m in enumerate(inner) if place not in (0, start, end) and _mixes(m)]
    block = next((outer for outer in [name, *_ancestors(name)] if _is_item(outer, modules)), name)
    around = not name or any(_mixes(m) for m in modules[block].modules() if m not in inner)  # "": it was named as one
    return pairs[0] if mixers and (around or not all(start < place < end for place in mixers)) else ()
