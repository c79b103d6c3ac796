"""Tools for trying out a module, which stays as it is: copies with random weights, equal random numbers, comparison."""

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from .linear import is_linear
from .sharing import OF_EVERY_MODULE, copied, drop_hooks_


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

    @property
    def form(self) -> str:
        """Tells calls apart by all but the values of their tensors."""
        leaves, structure = tree_flatten(tuple(self))
        forms = [
            (leaf.shape, leaf.dtype)
            if isinstance(leaf, Tensor)
            else leaf
            if isinstance(leaf, (bool, int, float, str, type(None)))
            else (id(leaf), [tensor.shape for tensor in tensors_of(leaf)])
            for leaf in leaves
        ]
        return repr((forms, structure))

    def on(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)


@contextlib.contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Keep random states, and what is compiled or cast around the trial, as they are."""
    devices = sorted({tensor.device.index for tensor in module.parameters() if tensor.is_cuda})
    state, kinds = random.getstate(), {tensor.device.type for tensor in module.parameters()}
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, state)
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        for kind in kinds - {"meta"} or {"cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "meta" in kinds | {
            torch.get_default_device().type
        }:  # it is tried with memory, whatever the caller builds in
            stack.enter_context(torch.device("cpu"))
        yield


class pinned(TorchDispatchMode):
    """Draw equal random numbers in equal shapes, keep everything in dropout, and note the shapes of all draws."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[torch.Size] = []
        random.seed(0)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        if operation == "randperm":
            return func(*args, **(kwargs or {}))
        if operation == "bernoulli_":
            self.draws.append(args[0].shape)
            return args[0].fill_(1)
        if operation in ("rrelu_with_noise", "rrelu_with_noise_"):  # it draws for negative numbers alone
            x, slopes, lower, upper, training = (*args, *(1 / 8, 1 / 3, False)[len(args) - 2 :])[:5]
            slopes.copy_(torch.where(x > 0, 1.0, (lower + upper) / 2))
            self.draws += [x.shape] if training else []
            return x.mul_(slopes) if operation.endswith("_") else x * slopes
        if operation == "native_dropout":
            self.draws.append(args[0].shape)
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        seed_generators()
        drawn = func(*args, **(kwargs or {}))
        self.draws += [tensor.shape for tensor in tree_leaves(drawn)[:1]]
        return drawn


def seed_generators() -> None:
    """Seed torch's generators with 0; where no GPU is in use, without what `torch.manual_seed` notes for one."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


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
    """Rounding, which on a GPU may be that of TF32. A module may cast float64 to float32 inside."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    coarse = max((torch.finfo(tensor.dtype).eps for tensor in floats), default=1e-12)
    on_gpu = any(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in floats)
    return max(coarse**0.5, 5e-3 if on_gpu else 1e-6)


def randomised(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Copy a module without its hooks, with random weights in `dtype` at least, off the meta device."""
    made: dict[int, Any] = {}
    for parameter in module.parameters():
        shape, wide = parameter.shape, torch.promote_types(parameter.dtype, dtype)
        scale = (shape[1:].numel() or 1) ** -0.5 if len(shape) > 1 else 0.5
        generator = torch.Generator().manual_seed(len(made))
        value = torch.randn(shape, generator=generator).mul_(scale).add_(0.0 if len(shape) > 1 else 0.5)
        device = "cpu" if parameter.is_meta else parameter.device
        made[id(parameter)] = nn.Parameter(value.to(device, wide)) if parameter.is_floating_point() else parameter
    for buffer in module.buffers():
        if buffer.is_meta:
            wide = torch.promote_types(buffer.dtype, dtype) if buffer.is_floating_point() else buffer.dtype
            made[id(buffer)] = torch.ones(buffer.shape, dtype=wide)
        elif buffer.is_floating_point():
            made[id(buffer)] = buffer.to(torch.promote_types(buffer.dtype, dtype), copy=True)
    random_copy = copied(module, made)
    for part in random_copy.modules():
        drop_hooks_(part)
    return random_copy


def left_behind(module: nn.Module) -> dict[str, list[Any]]:
    """List what a module keeps in plain attributes, such as a loss beside its output, by the name of the attribute."""
    module = getattr(module, "_template", module)
    return {
        f"{name}.{key}".lstrip("."): [value] if isinstance(value, (bool, int, float)) else tensors_of(value)
        for name, m in module.named_modules()
        if not is_linear(m)
        for key, value in vars(m).items()
        if key not in OF_EVERY_MODULE
    }


def noise(shape: Sequence[int], seed: int, like: Tensor) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def widened(call: Call, dtype: torch.dtype) -> Call:
    """Cast the numbers of a call to what `randomised` made of the weights."""

    def cast(value: Any) -> Any:
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().to(torch.promote_types(value.dtype, dtype)) if is_number else value

    return tree_map(cast, call)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
