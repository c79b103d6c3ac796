"""Trying out an FFN before its conversion: does its training pass with identical experts equal the dense one?

A conversion is right only if that holds; evaluation and merge are right even where training is wrong. So the trial
runs what training will run, on a copy with random weights (a branch that starts at zero would hide its faults).
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .linear import is_linear, linear_features
from .passes import LEAVE, check_pair, difference, meets_several_experts
from .sharing import copied, has_hooks
from .state import check_state
from .tokenwise import has_global_hooks, is_of_packages, is_tokenwise, tokenwise_between
from .trial import (
    Call,
    copied_call,
    differ,
    first_line,
    noise,
    pinned,
    quiet,
    randomised,
    seed_generators,
    widened,
)

_EXAMPLE = "; pass a sample input of the model, example=, where it is called in another way"


class Layout(NamedTuple):
    """How the forward method of an FFN runs in training, see `ExpertLayer`."""

    in_slots: bool = True
    channels_first: bool = False
    num_dims: tuple[int, ...] = ()
    """Dimensions that its input may have; () for any."""
    any_call: bool = False
    """Whether calls with more than one tensor were tried."""
    same_width: bool = True
    """Whether it returns as many channels as it takes, as the FFN of a block does."""
    tried: tuple[int, ...] = ()
    """Dimensions of the input for which tokens may be in slots, where that was tried and not shown; () for any."""
    watched: tuple[str, ...] = ()
    """Modules of a transformer layer on which it depends that tokens may be in slots between its linear layers."""


Make = Callable[..., nn.Module]
"""Builds the expert layer of an FFN: `make(ffn, num_experts, layout=layout)`."""
Convert = Callable[[nn.Module, Layout], None]
"""Puts experts of a layout into a module, in place."""


def probe_ffn(ffn: nn.Module, num_experts: int, make: Make, calls: Sequence[Call] = (), routed: bool = False) -> Layout:
    """Find the layout in which the training pass of identical experts equals that of an FFN, by trying it.

    Args:
        ffn: passed `check_state`.
        num_experts: K.
        make: builds the expert layer.
        calls: what the model gives it; default: random tokens in several shapes, as many as it takes.
        routed: a router chooses experts: only slots are possible.

    Raises:
        TypeError: it does not run, does not return one vector for each token, mixes tokens, or its training pass is
            another one in every layout.
    """
    kind = type(ffn).__name__
    if not calls:
        try:
            inspect.signature(type(ffn).forward).bind(ffn, None)
        except TypeError as error:
            raise TypeError(f"{kind} does not run on tokens (groups, tokens, channels): {error}{_EXAMPLE}") from None
    with quiet(ffn):
        dense, (trials, channels_first, same_width, shown) = _first_run(ffn, kind, num_experts, calls)
        if calls:
            trials = [*trials, *_other_sizes(dense, trials, channels_first, num_experts)]
        num_dims = tuple(sorted({call.tokens.dim() for call in trials})) if channels_first else ()
        problem, unused = "", copied(dense.train())  # what the experts keep is their own
        trusted = routed or all(map(is_of_packages, ffn.modules()))
        for in_slots in (True, False)[: 1 if routed else 2]:
            tried_dims = () if shown else tuple(sorted({call.tokens.dim() for call in trials}))
            layout = Layout(in_slots, channels_first, num_dims, bool(calls) and not in_slots, same_width, tried_dims)
            if in_slots and (any(_extras(call) for call in trials) or any(map(has_hooks, list(ffn.modules())[1:]))):
                problem = "it is called with more than one tensor, or has hooks inside"
                continue
            if in_slots and not (shown or trusted):
                continue
            pristine, tried = copied(unused), copied(unused)
            sparse = make(pristine, num_experts, layout=layout)
            problem = difference(tried, sparse, trials, in_slots) or _left_slots(sparse, in_slots)
            if not (problem or in_slots) and any(
                meets_several_experts(sparse, call, channels_first) for call in trials[: len(calls) or 1]
            ):
                raise TypeError(f"{kind} gives its linear layers other tokens, or in another order: {LEAVE}")
            if not problem:
                return layout
    raise TypeError(
        f"{kind} with identical experts does not train as the dense FFN: {problem}; leave it out of targets"
    )


def probe_pair(
    layer: nn.Module,
    num_experts: int,
    convert_: Convert,
    calls: Sequence[Call],
    routed: bool,
    parts: tuple[str, ...] = (),
) -> Layout:
    """Find the layout for an FFN that is spread over its transformer layer, by running copies of the whole layer.

    Without `calls` the layer is tried on random tokens. Where it does not run on them the tokens stay in their order
    between the two linear layers, which is right whatever lies there.

    Args:
        layer: the transformer layer.
        num_experts: K.
        convert_: puts experts into a copy of it, in place, in the layout that it is given.
        calls: what the model gives it.
        routed: a router chooses experts: only slots are possible.
        parts: the names of the two linear layers, for a look at what lies between them.

    Raises:
        TypeError: its training pass is another one in every layout.
    """
    kind = type(layer).__name__
    with quiet(layer):
        problem = ""
        for dtype in _precisions(layer):
            dense = randomised(layer, dtype)
            trials = [widened(call, dtype) for call in calls] or [
                Call((x,), {}) for x in _pair_tokens(dense, num_experts)
            ]
            try:
                with pinned():
                    for call in trials:
                        copied_call(call).on(dense.train())
                break
            except Exception as error:
                problem = first_line(error)
        else:
            if calls or routed:
                raise TypeError(f"{kind} does not run in training: {problem}")
            return Layout(in_slots=False)
        problem, unused = "", copied(dense)
        trusted = routed or not parts or all(map(is_of_packages, layer.modules()))
        watched = tokenwise_between(copied(unused), *parts) if parts and not trusted else _to_watch(layer, parts)
        for in_slots in (True, False)[: 1 if routed else 2]:
            tried, sparse, layout = copied(unused), copied(unused), Layout(in_slots, watched=watched)
            if in_slots and any(map(has_hooks, list(layer.modules())[1:])):
                problem = "it has hooks inside"
                continue
            if in_slots and not (trusted or watched):
                continue
            convert_(sparse, layout)
            problem = difference(tried, sparse, trials, in_slots) or _left_slots(sparse, in_slots)
            if not problem and parts:
                for call in trials[: len(calls) or 1]:
                    check_pair(copied(sparse), call, parts, in_slots)
            if not problem:
                return layout
    raise TypeError(
        f"{kind} with identical experts does not train as the dense layer: {problem}; leave it out of targets"
    )


def _left_slots(sparse: nn.Module, in_slots: bool) -> str:
    """Say that a trial in slots was none: hooks on all modules, such as a profiler's, make experts leave them."""
    layouts = [layout for m in sparse.modules() if isinstance(layout := getattr(m, "layout", None), Layout)]
    return "hooks are set on all modules" if in_slots and not all(layout.in_slots for layout in layouts) else ""


def _to_watch(layer: nn.Module, parts: tuple[str, ...]) -> tuple[str, ...]:
    """List the modules around two linear layers, and all without weights: what may run between the two."""
    own = {layer.get_submodule(part) for part in parts}
    return tuple(
        name
        for name, m in layer.named_modules()
        if own and m not in own and (not own.isdisjoint(m.modules()) or all(p.dim() < 2 for p in m.parameters()))
    )


class _MixesTokensError(TypeError):
    """An FFN lets a token see others."""


class Trials:
    """The results of trials, so that blocks of one form are tried once."""

    def __init__(self, num_experts: int, make: Make, routed: bool = False) -> None:
        self.num_experts, self.make, self.routed = num_experts, make, routed
        self._results: dict[Any, Layout | str] = {}

    def layout(self, ffn: nn.Module, calls: Sequence[Call] = ()) -> Layout:
        """As `check_state` and `probe_ffn`."""
        check_state(ffn)
        return self._once(ffn, calls, lambda: probe_ffn(ffn, self.num_experts, self.make, calls, self.routed), "ffn")

    def pair_layout(
        self, layer: nn.Module, convert_: Convert, calls: Sequence[Call] = (), parts: tuple[str, ...] = ()
    ) -> Layout:
        """As `probe_pair`."""
        trial = partial(probe_pair, layer, self.num_experts, convert_, calls, self.routed, parts)
        return self._once(layer, calls, trial, f"pair {parts}")

    def _once(self, module: nn.Module, calls: Sequence[Call], trial: Callable[[], Layout], kind: str) -> Layout:
        key: Any = kind, signature(module), tuple(call.form for call in calls)
        results: dict[Any, Any] = self._results
        if kind == "ffn" and not calls and _is_stock(module):
            key = *key, self.num_experts, self.make, self.routed, _forwards(module), has_global_hooks()
            results = _STOCK
        if key not in results and key not in self._results:
            try:
                results[key] = trial()
            except TypeError as error:  # of this conversion alone: the next one may run under other conditions
                self._results[key] = str(error)
        result = results[key] if key in results else self._results[key]
        if isinstance(result, str):
            raise TypeError(result)
        return result


_STOCK: dict[Any, Layout] = {}
"""The results of trials of FFNs whose code does not change while a process runs; shared by all conversions."""
_STOCK_PACKAGES = ("torch", "timm", "s2d3d")


def _is_stock(module: nn.Module) -> bool:
    """Tell whether all of an FFN is of installed packages, with plain attributes, so that a name tells its code."""
    for m in module.modules():
        kept = [value for key, value in vars(m).items() if key not in _OWN and not _is_empty(value)]
        if type(m).__module__.partition(".")[0] not in _STOCK_PACKAGES or not all(map(_is_plain, kept)):
            return False
    return True


def _forwards(module: nn.Module) -> tuple[Any, ...]:
    """Return the forward methods of an FFN: another one may be put into a class."""
    return tuple(type(m).forward for m in module.modules())


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def signature(module: nn.Module) -> Any:
    """Return a key that two modules share only if a trial of one tells about the other."""
    state = [
        (name, key, value if _is_plain(value) else id(value))
        for name, m in module.named_modules()
        for key, value in vars(m).items()
        if key not in _OWN and not _is_empty(value)
    ]
    shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()]
    return tuple(map(type, module.modules())), repr(module), repr(state), repr(shapes)


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _precisions(module: nn.Module) -> tuple[torch.dtype, ...]:
    """Return in which precisions to try a module; float64 tells small faults from rounding, but not all run in it."""
    size = sum(parameter.numel() for parameter in module.parameters())
    devices = {parameter.device.type for parameter in module.parameters()}
    return (torch.float64, torch.float32) if size < 2**25 and devices <= {"cpu", "cuda", "meta"} else (torch.float32,)


def _first_run(
    ffn: nn.Module, kind: str, num_experts: int, calls: Sequence[Call]
) -> tuple[nn.Module, tuple[list[Call], bool, bool, bool]]:
    problem = TypeError(kind)
    for dtype in _precisions(ffn):
        dense = randomised(ffn, dtype)
        try:
            return dense, _runs(dense, kind, num_experts, [widened(call, dtype) for call in calls])
        except _MixesTokensError:
            raise
        except TypeError as error:
            problem = error
    raise problem


def _runs(dense: nn.Module, kind: str, num_experts: int, calls: list[Call]) -> tuple[list[Call], bool, bool, bool]:
    """Return the calls on which an FFN returns one vector for each token, if channels come first, if they stay, and
    if a trace shows that each token passes by itself.
    """
    problem, mixing, returns, same_width = "", "", False, False
    widths = dict.fromkeys(linear_features(m)[0] for m in dense.modules() if is_linear(m))  # the first need not read x
    for channels_first in (False, True):
        shown = is_tokenwise(copied(dense.train()), channels_first)
        for width in list(widths)[: 1 if calls else None]:
            fitting = []
            made = calls or list(_random_calls(dense, width, channels_first, num_experts))
            for call in made[:3] if shown and not channels_first else made:
                x = call.tokens
                if not isinstance(x, Tensor) or x.dim() < 2:
                    problem = f"it is called with {type(x).__name__}, not with a tensor of tokens"
                    continue
                try:
                    output = copied_call(call).on(dense.eval())
                    copied_call(call).on(dense.train())
                except Exception as error:
                    problem = problem or first_line(error)
                    continue
                returns = True
                if isinstance(output, Tensor) and _places(output, channels_first) == _places(x, channels_first):
                    same_width = output.shape == x.shape
                    fitting.append(call)
            if not fitting or len(fitting) < len(calls):
                continue
            mixed = [] if shown else [call for call in fitting if _mixes(dense.eval(), call, channels_first)]
            if not mixed:
                return fitting, channels_first, same_width, shown
            if not mixing:
                shape = tuple(mixed[0].tokens.shape)
                mixing = "" if calls else f" (tried on {shape}; if the model gives others, pass example=)"
                mixing = f"{kind} mixes tokens; an FFN treats each of them by itself: leave it out of targets{mixing}"
    if mixing:
        raise _MixesTokensError(mixing)
    if returns:
        raise TypeError(f"{kind} does not return one vector for each token")
    hint = "" if calls else _EXAMPLE
    raise TypeError(f"{kind} does not run on tokens (groups, tokens, channels): {problem}{hint}")


def _random_calls(dense: nn.Module, width: int, channels_first: bool, num_experts: int) -> Iterator[Call]:
    """Make tokens in several shapes: as many groups as experts, numbers that K does not divide, two to four dims."""
    k = num_experts
    widths = {size for m in dense.modules() if is_linear(m) for size in linear_features(m)}
    few = next(n for n in range(3, 99) if n not in widths)
    odd = few if few % k or k == 1 else next(n for n in range(few + 1, 99) if n % k)
    many = next(n for n in range(33, 999) if n not in widths and (n % k or k == 1))
    side = next(n for n in range(6, 99) if n not in widths)
    shapes = [(k, few), (k + 1, odd), (k, 2, few), (k + 1, odd, 1)] + ([] if channels_first else [(2 * k + 1,)])
    more = [(1, many), (1, side, side), (1, 2, few, 2)]  # for windows, and what is kept of long sequences
    shapes += [shape for shape in more if math.prod(shape) >= k]
    for index, shape in enumerate(shapes):
        x = noise((*shape, width), index, next(dense.parameters()))
        yield Call((x.movedim(-1, 1) if channels_first else x,), {})


def _other_sizes(dense: nn.Module, calls: list[Call], channels_first: bool, num_experts: int) -> list[Call]:
    """Vary the sizes of calls with tokens alone: where K divides their number, no slot idles, which hides faults."""
    found: list[Call] = []
    for call in calls:
        if _extras(call):
            continue
        x = call.tokens.movedim(1, -1) if channels_first else call.tokens
        made = 0
        for more, fewer in ((1, 0), (0, 1), (1, 1), (2, 1), (1, 2), (2, 0)):
            other = torch.cat([x, *[x[:1]] * more])
            for dim in range(1, x.dim() - 1):
                other = other.narrow(dim, 0, max(1, x.shape[dim] - fewer))
            count = other.shape[:-1].numel()
            if made == 2 or count < num_experts or count % num_experts == 0:
                continue
            variant = call.with_tokens((other.movedim(-1, 1) if channels_first else other).contiguous())
            try:
                with pinned():
                    copied_call(variant).on(dense.train())
            except Exception:
                continue
            made += 1
            found.append(variant)
    return found


def _pair_tokens(layer: nn.Module, num_experts: int) -> list[Tensor]:
    first = next(m for m in layer.modules() if is_linear(m))
    width = linear_features(first)[0]
    times = -(-num_experts // 24)
    return [noise((groups * times, size, width), 0, next(layer.parameters())) for groups, size in ((5, 7), (4, 6))]


def _places(x: Tensor, channels_first: bool) -> list[int]:
    return [x.shape[0], *x.shape[2:]] if channels_first else list(x.shape[:-1])


def _extras(call: Call) -> bool:
    return any(value is not None for value in [*call.args, *call.kwargs.values()][1:])


def _mixes(dense: nn.Module, call: Call, channels_first: bool) -> bool:
    """Replace some of the tokens: do outputs of the others change? In halves, such that each pair is parted once."""
    x = call.tokens.movedim(1, -1) if channels_first else call.tokens
    others = noise(x.shape, 7, x) - 3 * x  # far away, and of the other sign, for what goes by a sum or a maximum

    def run(tokens: Tensor) -> Tensor:
        seed_generators()
        output = call.with_tokens((tokens.movedim(-1, 1) if channels_first else tokens).clone()).on(dense)
        return (output.movedim(1, -1) if channels_first else output).flatten(0, -2)

    number = torch.arange(x.shape[:-1].numel(), device=x.device)
    here, there = run(x), run(others)
    halves = [number >> bit & 1 == 1 for bit in range(max(1, int(number[-1]).bit_length()))]
    if len(number) > 30:  # what mixes so many tokens mixes most pairs
        halves = [noise((len(number),), seed, x) > 0 for seed in range(2)]
    for chosen in halves:
        mixed = run(torch.where(chosen.view(*x.shape[:-1], 1), others, x))
        if differ(mixed, torch.where(chosen.unsqueeze(1), there, here)) > 1:
            return True
    return False
