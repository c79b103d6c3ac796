"""Trying out an FFN before its conversion: does its training pass with identical experts equal the dense one?

A conversion is right only if that holds; evaluation and merge are right even where training is wrong. So the trial
runs what training will run, on a copy with random weights (a branch that starts at zero would hide its faults).
"""

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .linear import HOOKS, StackedLinear, check_linear, drop_hooks_, is_linear, linear_features

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a module may raise that is run on something it does not expect."""

_EXAMPLE = "; pass a sample input of the model, example=, where it is called in another way"
_ADAPTERS = ("lora", "adapter", "base_layer")
_PARAMETRIZED = ("parametrizations", "weight_g", "weight_v", "weight_orig", "weight_u", "_mask")


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


class Call(NamedTuple):
    """How a module is called: its tokens come first, or by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tokens(self) -> Any:
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def with_tokens(self, tokens: Tensor) -> "Call":
        if self.args:
            return Call((tokens, *self.args[1:]), self.kwargs)
        return Call((), self.kwargs | {next(iter(self.kwargs)): tokens})

    def on(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)


Make = Callable[..., nn.Module]
"""Builds the expert layer of an FFN: `make(ffn, num_experts, layout=layout)`."""
Convert = Callable[[nn.Module, Layout], None]
"""Puts experts of a layout into a module, in place."""


def check_state(ffn: nn.Module) -> None:
    """Refuse an FFN with state that experts cannot have, or whose forward method is not that of its class.

    Raises:
        TypeError: it has no linear layer, a linear layer that is more than its weight and bias (parametrized,
            quantized, with an adapter), or parameters or buffers that belong neither to a linear layer nor to a norm;
            or `forward` was replaced on the instance. The message names the part and the way out.
    """
    kind, linears = (
        getattr(ffn, "shown_as", type(ffn).__name__),
        {name: m for name, m in ffn.named_modules() if is_linear(m)},
    )
    if not linears or is_linear(ffn):
        raise TypeError(f"{kind} is not an FFN with nn.Linear layers inside")
    for name, module in ffn.named_modules():
        if "forward" in vars(module):
            place = f"forward of '{name}'" if name else "forward"
            raise TypeError(
                f"the {place} was replaced on the instance of {kind}, and would go on using the dense weights: "
                "convert before torch.compile, accelerate or other wrappers patch the model"
            )
    owned: list[Any] = [m._parameters.get(key) for m in linears.values() for key in ("weight", "bias")]
    shallow = all(
        any(m is child for child in ffn.children()) for m in linears.values()
    )  # deeper ones may be attention's
    norms = [m for m in ffn.modules() if (_is_norm(m) if shallow else isinstance(m, nn.modules.batchnorm._BatchNorm))]
    owned += [tensor for m in norms for tensor in [*m._parameters.values(), *m._buffers.values()]]
    known = {id(tensor) for tensor in owned}
    foreign = [name for name, tensor in [*ffn.named_parameters(), *ffn.named_buffers()] if id(tensor) not in known]
    adapters = [name for name, _ in ffn.named_modules() if any(word in name.lower() for word in _ADAPTERS)]
    if foreign or adapters:
        way = ""
        if any(word in name for name in foreign for word in _PARAMETRIZED):
            way = ": remove the parametrization (weight norm, spectral norm, pruning), convert, and train without it"
        elif adapters or any(word in name.lower() for name in foreign for word in _ADAPTERS):
            way = ": merge or remove the adapters (LoRA), convert, and add adapters to the merged model"
        raise TypeError(f"{kind} holds state outside its linear layers ({', '.join(foreign or adapters)}){way}")
    uses = [id(parameter) for m in set(linears.values()) for parameter in m.parameters()]
    if len(set(uses)) < len(uses):
        raise TypeError(f"{kind} has linear layers that share a parameter, experts would untie them")
    for name, linear in linears.items():
        try:
            check_linear(linear, name)
        except TypeError as error:
            raise TypeError(f"{kind} {error}") from None


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
        dense = randomised(ffn)
        trials, channels_first, same_width = _runs(dense, kind, num_experts, list(calls))
        for call in trials:
            if _mixes(dense.eval(), call, channels_first):
                shape = (
                    "" if calls else f" (tried on {tuple(call.tokens.shape)}; if the model gives others, pass example=)"
                )
                raise TypeError(f"{kind} mixes tokens; an FFN treats each of them by itself{shape}")
        num_dims = tuple(sorted({call.tokens.dim() for call in trials})) if channels_first else ()
        problem = ""
        for in_slots in (True, False)[: 1 if routed else 2]:
            layout = Layout(in_slots, channels_first, num_dims, bool(calls) and not in_slots, same_width)
            if in_slots and (any(_extras(call) for call in trials) or _has_hooks(ffn)):
                problem = "it is called with more than one tensor, or has hooks inside"
                continue
            problem = _difference(dense, make(dense.train(), num_experts, layout=layout), trials, in_slots)
            if not problem:
                return layout
    raise TypeError(f"{kind} with identical experts does not train as the dense FFN: {problem}")


def probe_pair(layer: nn.Module, convert_: Convert, calls: Sequence[Call], routed: bool) -> Layout:
    """Find the layout for an FFN that is spread over its transformer layer, by running copies of the whole layer.

    Without `calls` the layer is tried on random tokens. Where it does not run on them the tokens stay in their order
    between the two linear layers, which is right whatever lies there.

    Args:
        layer: the transformer layer.
        convert_: puts experts into a copy of it, in place, in the layout that it is given.
        calls: what the model gives it.
        routed: a router chooses experts: only slots are possible.

    Raises:
        TypeError: its training pass is another one in every layout.
    """
    kind = type(layer).__name__
    with quiet(layer):
        dense = randomised(layer)
        trials = list(calls) or [Call((x,), {}) for x in _pair_tokens(dense)]
        try:
            with pinned():
                for call in trials:
                    copied_call(call).on(dense.train())
        except FAILURES as error:
            if calls or routed:
                raise TypeError(f"{kind} does not run in training: {first_line(error)}") from None
            return Layout(in_slots=False)
        problem = ""
        for in_slots in (True, False)[: 1 if routed else 2]:
            sparse, layout = copy.deepcopy(dense), Layout(in_slots)
            if in_slots and _has_hooks(layer):
                problem = "it has hooks inside"
                continue
            convert_(sparse, layout)
            problem = _difference(dense, sparse, trials, in_slots)
            if not problem:
                return layout
    raise TypeError(f"{kind} with identical experts does not train as the dense layer: {problem}")


@contextlib.contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Keep random states, and what is compiled or cast around the trial, as they are."""
    devices = sorted({tensor.device.index for tensor in module.parameters() if tensor.is_cuda})
    state, kinds = random.getstate(), {tensor.device.type for tensor in module.parameters()}
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, state)
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        for kind in kinds - {"meta"} or {"cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "meta" in kinds:  # it is tried with memory, whatever the caller builds in
            stack.enter_context(torch.device("cpu"))
        yield


class pinned(TorchDispatchMode):
    """Draw equal random numbers in equal shapes, keep everything in dropout, and note the shapes of all draws."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[torch.Size] = []
        random.seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        if operation == "randperm":
            return func(*args, **(kwargs or {}))
        if operation == "bernoulli_":
            self.draws.append(args[0].shape)
            return args[0].fill_(1)
        if operation == "native_dropout":
            self.draws.append(args[0].shape)
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        torch.manual_seed(0)
        drawn = func(*args, **(kwargs or {}))
        self.draws += [tensor.shape for tensor in tree_leaves(drawn)[:1]]
        return drawn


class Trials:
    """The results of trials, so that blocks of one form are tried once."""

    def __init__(self, num_experts: int, make: Make, routed: bool = False) -> None:
        self.num_experts, self.make, self.routed = num_experts, make, routed
        self._results: dict[Any, Layout | str] = {}

    def layout(self, ffn: nn.Module, calls: Sequence[Call] = ()) -> Layout:
        """As `check_state` and `probe_ffn`."""
        check_state(ffn)
        return self._once(ffn, calls, lambda: probe_ffn(ffn, self.num_experts, self.make, calls, self.routed), "ffn")

    def pair_layout(self, layer: nn.Module, convert_: Convert, calls: Sequence[Call] = ()) -> Layout:
        """As `probe_pair`."""
        return self._once(layer, calls, lambda: probe_pair(layer, convert_, calls, self.routed), "pair")

    def _once(self, module: nn.Module, calls: Sequence[Call], trial: Callable[[], Layout], kind: str) -> Layout:
        key = kind, signature(module), repr([[tensor.shape for tensor in tensors_of(call)] for call in calls])
        if key not in self._results:
            try:
                self._results[key] = trial()
            except TypeError as error:
                self._results[key] = str(error)
        result = self._results[key]
        if isinstance(result, str):
            raise TypeError(result)
        return result


def signature(module: nn.Module) -> Any:
    """Return a key that two modules share only if a trial of one tells about the other."""
    state = [
        (name, key, value if isinstance(value, (bool, int, float, str, type(None))) else id(value))
        for name, m in module.named_modules()
        for key, value in vars(m).items()
        if key not in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set") and not _is_empty(value)
    ]
    shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()]
    return type(module), repr(module), repr(state), repr(shapes)


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def tensors_of(value: Any, depth: int = 4) -> list[Tensor]:
    """List the tensors in whatever a model takes or returns."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module) or not depth:
        return []
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        value = list(getattr(value, "__dict__", {}).values())
    return [tensor for item in value for tensor in tensors_of(item, depth - 1)]


def copied_call(call: Call) -> Call:
    """Copy the tensors of a call: some modules change their input in place."""
    return tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, call)


def differ(first: Any, second: Any) -> float:
    """Return the largest difference of two outputs over the allowed one: above 1 they differ."""
    ours, theirs = tensors_of(first), tensors_of(second)
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return float("inf")
    worst = 0.0
    for one, other in zip(ours, theirs):
        one, other = one.detach().double(), other.detach().double()
        if one.numel():
            allowed = _tolerance(ours) * float(other.nan_to_num().abs().max()) + 1e-12
            gap = (one - other).abs()
            worst = max(worst, float(gap.nan_to_num(0 if one.isnan().equal(other.isnan()) else 1e9).max()) / allowed)
    return worst


def _tolerance(tensors: list[Tensor]) -> float:
    """Rounding, which on a GPU may be that of TF32; other tokens change an output by far more."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    coarse = max((torch.finfo(tensor.dtype).eps for tensor in floats), default=1e-7)
    return max(coarse**0.5, 5e-3 if any(tensor.is_cuda for tensor in floats) else 0)


def randomised(module: nn.Module) -> nn.Module:
    """Copy a module without its hooks, with random weights in float32 at least, off the meta device."""
    made: dict[int, Any] = {}
    for parameter in module.parameters():
        shape, wide = parameter.shape, torch.promote_types(parameter.dtype, torch.float32)
        scale = (shape[1:].numel() or 1) ** -0.5 if len(shape) > 1 else 0.5
        generator = torch.Generator().manual_seed(len(made))
        value = torch.randn(shape, generator=generator).mul_(scale).add_(0.0 if len(shape) > 1 else 0.5)
        device = "cpu" if parameter.is_meta else parameter.device
        made[id(parameter)] = nn.Parameter(value.to(device, wide)) if parameter.is_floating_point() else parameter
    for buffer in module.buffers():
        if buffer.is_meta:
            made[id(buffer)] = torch.ones(buffer.shape, dtype=buffer.dtype)
        elif buffer.is_floating_point():
            made[id(buffer)] = buffer.to(torch.promote_types(buffer.dtype, torch.float32), copy=True)
    copied = copy.deepcopy(module, made)
    for part in copied.modules():
        drop_hooks_(part)
    return copied


def _runs(dense: nn.Module, kind: str, num_experts: int, calls: list[Call]) -> tuple[list[Call], bool, bool]:
    """Return the calls on which an FFN returns one vector for each token, if channels come first, and if they stay."""
    problem, returns, same_width = "", False, False
    widths = dict.fromkeys(linear_features(m)[0] for m in dense.modules() if is_linear(m))  # the first need not read x
    if calls:
        calls = [tree_map(_widened, call) for call in calls]
    for channels_first in (False, True):
        for width in list(widths)[: 1 if calls else None]:
            fitting = []
            for call in calls or _random_calls(dense, width, channels_first, num_experts):
                x = call.tokens
                if not isinstance(x, Tensor) or x.dim() < 2:
                    problem = f"it is called with {type(x).__name__}, not with a tensor of tokens"
                    continue
                try:
                    output = copied_call(call).on(dense.eval())
                    copied_call(call).on(dense.train())
                except FAILURES as error:
                    problem = problem or first_line(error)
                    continue
                returns = True
                if isinstance(output, Tensor) and _places(output, channels_first) == _places(x, channels_first):
                    same_width = output.shape == x.shape
                    fitting.append(call)
            if fitting and len(fitting) >= len(calls):
                return fitting, channels_first, same_width
    if returns:
        raise TypeError(f"{kind} does not return one vector for each token")
    hint = "" if calls else _EXAMPLE
    raise TypeError(f"{kind} does not run on tokens (groups, tokens, channels): {problem}{hint}")


def _random_calls(dense: nn.Module, width: int, channels_first: bool, num_experts: int) -> Iterator[Call]:
    """Make tokens in several shapes: as many groups as experts, numbers that K does not divide, two to four dims."""
    k = num_experts
    few = next(
        n
        for n in range(3, 99)
        if n not in {size for m in dense.modules() if is_linear(m) for size in linear_features(m)}
    )
    odd = few if few % k or k == 1 else next(n for n in range(few + 1, 99) if n % k)
    shapes = [(k, few), (k + 1, odd), (k, 2, few), (k + 1, odd, 1)] + ([] if channels_first else [(2 * k + 1,)])
    for index, shape in enumerate(shapes):
        x = _noise((*shape, width), index, next(dense.parameters()))
        yield Call((x.movedim(-1, 1) if channels_first else x,), {})


def _pair_tokens(layer: nn.Module) -> list[Tensor]:
    first = next(m for m in layer.modules() if is_linear(m))
    width = linear_features(first)[0]
    return [_noise((*shape, width), 0, next(layer.parameters())) for shape in ((5, 7), (4, 6))]


def _noise(shape: Sequence[int], seed: int, like: Tensor) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.promote_types(value.dtype, torch.float32))
    return value


def _places(x: Tensor, channels_first: bool) -> list[int]:
    return [x.shape[0], *x.shape[2:]] if channels_first else list(x.shape[:-1])


def _extras(call: Call) -> bool:
    return any(value is not None for value in [*call.args, *call.kwargs.values()][1:])


def _mixes(dense: nn.Module, call: Call, channels_first: bool) -> bool:
    """Replace some of the tokens: do outputs of the others change? In halves, such that each pair is parted once."""
    x = call.tokens.movedim(1, -1) if channels_first else call.tokens
    others = _noise(x.shape, 7, x) - 3 * x  # far away, and of the other sign, for what goes by a sum or a maximum

    def run(tokens: Tensor) -> Tensor:
        torch.manual_seed(0)
        output = call.with_tokens((tokens.movedim(-1, 1) if channels_first else tokens).clone()).on(dense)
        return (output.movedim(1, -1) if channels_first else output).flatten(0, -2)

    number = torch.arange(x.shape[:-1].numel(), device=x.device)
    here, there = run(x), run(others)
    for bit in range(max(1, int(number[-1]).bit_length())):
        chosen = number >> bit & 1 == 1
        mixed = run(torch.where(chosen.view(*x.shape[:-1], 1), others, x))
        if differ(mixed, torch.where(chosen.unsqueeze(1), there, here)) > 1:
            return True
    return False


def _difference(dense: nn.Module, sparse: nn.Module, calls: list[Call], in_slots: bool) -> str:
    """Say how the training pass of experts, or the evaluation, is another one than that of `dense`; "": it is not."""
    for mode in (True, False):
        dense.train(mode), sparse.train(mode)
        for index, call in enumerate(calls):
            ours, theirs = copied_call(call), copied_call(call)
            try:
                with torch.enable_grad():
                    with pinned() as expected:
                        wanted = theirs.on(dense)
                    with pinned() as actual:
                        found = ours.on(sparse)
                    unused = _unused(found, sparse) if mode and not index else []
            except FAILURES as error:
                return first_line(error)
            if mode and in_slots and not _drawn_by_slot(expected.draws, actual.draws, call, sparse):
                return "it draws random numbers for several tokens at once"
            if differ([found, ours.tokens], [wanted, theirs.tokens]) > 1:
                return f"other outputs in {'training' if mode else 'evaluation'}"
            if differ(*([b for b in m.buffers() if b.is_floating_point()] for m in (sparse, dense))) > 1:
                return "other statistics"
            if unused:
                return f"its forward method does not use the weights of {', '.join(unused)}"
    return ""


def _unused(output: Any, sparse: nn.Module) -> list[str]:
    """Name the stacked layers that an output does not depend on, for instance because a closure holds others."""
    weights = {name: m.weight for name, m in sparse.named_modules() if isinstance(m, StackedLinear)}
    outputs = [tensor.float().square().sum() for tensor in tensors_of(output) if tensor.requires_grad]
    if not outputs:
        return list(weights)
    gradients = torch.autograd.grad(torch.stack(outputs).sum(), list(weights.values()), allow_unused=True)
    return [name for name, gradient in zip(weights, gradients) if gradient is None]


def _drawn_by_slot(expected: list[torch.Size], actual: list[torch.Size], call: Call, sparse: nn.Module) -> bool:
    """Tell whether all random numbers in slots are drawn as for tokens: for each by itself, or for none of them.

    Not so, for instance, stochastic depth inside an FFN: one draw a sample would become one draw an expert.
    """
    experts = next(m.num_experts for m in sparse.modules() if isinstance(m, StackedLinear))
    width = call.tokens.shape[1 if getattr(sparse, "layout", Layout()).channels_first else -1]
    tokens = call.tokens.numel() // width
    capacity = -(-tokens // experts)
    if len(expected) != len(actual):
        return False
    for one, other in zip(expected, actual):
        if one == other and other[:1] != (experts,):
            continue
        by_slot = (experts, capacity) in (other[:2], (*other[:1], *other[2:3])) or other[:1] == (experts * capacity,)
        if not by_slot or other.numel() * tokens != one.numel() * experts * capacity:
            return False
    return True


def _has_hooks(module: nn.Module) -> bool:
    return any(m.__dict__[key] for m in list(module.modules())[1:] for key in HOOKS)


def _is_norm(module: nn.Module) -> bool:
    """Tell a norm layer, of torch or with the form of one: its state is shared by the experts."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)):
        return True
    if "norm" not in type(module).__name__.lower() or any(True for _ in module.children()):
        return False
    return all(parameter.dim() < 2 for parameter in module.parameters())


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
