"""Does a forward method treat each token by itself, whatever their number? Shown by reading its code, not by trying.

A trial sees some shapes, and the state of today. So code of others than some packages must be straight, without a
branch, read nothing but its parts, and its trace must show calls alone that treat each token by itself. What then may
still change, such as a part that is replaced, is watched in training, see `Watch`.
"""

import dis
import operator
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as of_all_modules

from .linear import CONVOLUTIONS, StackedLinear, is_linear
from .sharing import OF_EVERY_MODULE, has_hooks

PACKAGES = ("torch", "timm", "transformers", "torchvision", "vit_pytorch", "s2d3d")
"""Their modules were tried in many shapes, see docs/compatibility.md: a trial is enough."""
_NAMES = """
abs add addcmul alpha_dropout bfloat16 celu clamp clamp_max clamp_min clip clone contiguous cos detach div dropout
double elu erf exp expm1 float gelu half hardshrink hardsigmoid hardswish hardtanh leaky_relu lerp log log1p logsigmoid
maximum minimum mish mul neg pos pow reciprocal relu relu6 rsqrt selu sigmoid sign silu sin softplus softshrink softsign
sqrt square sub tanh tanhshrink threshold to truediv type type_as add_ mul_ sub_ div_ clamp_ dropout_ elu_ leaky_relu_
relu_ selu_ sigmoid_ tanh_ iadd imul isub itruediv
"""
_POINTWISE = frozenset(_NAMES.split())
_REDUCTIONS = frozenset(("mean", "sum", "var", "std", "amax", "amin", "norm", "logsumexp"))
_OF_CHANNELS = _REDUCTIONS | {"chunk", "split", "softmax", "log_softmax", "glu", "normalize", "cat"}
"""With the dimension of the channels given; what reduces it keeps it."""
_OF_TENSORS = frozenset(("dtype", "device", "weight", "bias", "float16", "float32", "float64", "bfloat16"))
_SPACES = (torch, nn, F)
_OF_SPACES = frozenset(("nn", "functional", "layer_norm"))
_MODULES = frozenset(
    (
        *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
        *(nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink),
        *(nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold, nn.Identity, nn.Dropout),
    )
)
_GLOBAL_HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
_BY_ATTRIBUTES = frozenset((nn.LayerNorm, nn.RMSNorm, nn.GLU, nn.Softmax, nn.LogSoftmax))


def _functions(names: Iterable[str]) -> dict[Callable[..., Any], str]:
    spaces = (torch, F, operator)
    return {getattr(space, name): name for space in spaces for name in names if hasattr(space, name)}


_FUNCTIONS = _functions(_POINTWISE | _OF_CHANNELS)


class Watch:
    """What a trace, or a trial, of some modules depends on: their attributes, parts, classes, methods and hooks."""

    def __init__(self, modules: Iterable[nn.Module], hooked: Iterable[nn.Module] | None = None) -> None:
        """Note the state of `modules`; see that `hooked`, or these, get no hooks and no other methods."""
        modules = list(modules)
        self.states = [(m, _attributes(m)) for m in modules if not isinstance(m, StackedLinear)]
        self.kinds = [(m, type(m), type(m).forward) for m in (modules if hooked is None else hooked)]

    def sees_change(self) -> bool:
        """Tell whether anything is another one than at the conversion, or has got hooks."""
        return (
            has_global_hooks()
            or any(
                type(m) is not kind or kind.forward is not forward or "forward" in vars(m) or has_hooks(m)
                for m, kind, forward in self.kinds
            )
            or any(_differ(_attributes(m), then) for m, then in self.states)
        )

    def __getstate__(self) -> dict[str, Any]:  # a method may be one that cannot be pickled
        return self.__dict__ | {"kinds": [(m, kind) for m, kind, _ in self.kinds]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"kinds": [(m, kind, kind.forward) for m, kind in state["kinds"]]})


def has_global_hooks() -> bool:
    """Tell whether hooks are set on all modules, such as those of a profiler."""
    return any(getattr(of_all_modules, f"_global_{kind}") for kind in _GLOBAL_HOOKS)


def is_of_packages(module: nn.Module) -> bool:
    """Tell whether the code of a module is of `PACKAGES`, with the functions and objects that it holds."""
    kind = type(module)
    held = [value for key, value in vars(module).items() if key not in OF_EVERY_MODULE]
    return all(_package(code) in PACKAGES for code in (kind, kind.forward, *_codes(held)))


def _codes(values: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the functions and classes whose code may run where some values are used."""
    for value in values:
        if isinstance(value, types.MethodType):  # of a class, or of an object
            yield from (value.__func__, value.__self__ if isinstance(value.__self__, type) else type(value.__self__))
        elif isinstance(value, types.BuiltinFunctionType):
            if isinstance(value.__self__, type):  # such as the apply of an autograd function
                yield value.__self__
        elif isinstance(value, torch.jit.ScriptFunction):
            yield None
        elif isinstance(value, partial):
            yield from _codes((value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, (tuple, list)):
            yield from _codes(value)
        elif isinstance(value, (types.FunctionType, type)):
            yield value
        elif not isinstance(value, (*_FIXED, Tensor, nn.Module, dict, set)):
            yield type(value)


def is_tokenwise(module: nn.Module, channels_first: bool = False) -> bool:
    """Tell whether a trace in the present mode shows that each token passes by itself.

    Args:
        module: a copy: tracing runs its forward method.
        channels_first: channels are in dimension 1, not in the last.

    Raises:
        TypeError: it uses the weight of a linear layer outside that layer.
    """
    if not all(is_of_packages(m) or _is_straight(m) for m in module.modules()):
        return False
    graph = _traced(module, _Whole())
    return graph is not None and _Reading(module, channels_first).is_tokenwise(graph)


def tokenwise_between(layer: nn.Module, first: str, second: str) -> tuple[str, ...]:
    """Trace a transformer layer: does each token pass by itself between two of its linear layers?

    Args:
        layer: a copy: tracing runs its forward method.
        first, second: their names in it.

    Returns:
        The names of the modules to watch, around and between the two; () where the trace does not show it.
    """
    parts = {layer.get_submodule(first), layer.get_submodule(second)}
    around = {name: m for name, m in layer.named_modules() if m not in parts and not parts.isdisjoint(m.modules())}
    if not all(is_of_packages(m) or _is_straight(m) for m in around.values()):
        return ()
    graph = _traced(layer, _Around(parts))
    nodes = list(graph.nodes) if graph is not None else []
    calls = [[node for node in nodes if (node.op, node.target) == ("call_module", name)] for name in (first, second)]
    if [len(found) for found in calls] != [1, 1]:
        return ()
    (start,), (end,) = calls
    reading, watched = _Reading(layer, channels_first=False), list(around)
    reading.tokens.add(start)
    for node in nodes[nodes.index(start) + 1 :]:
        own = reading.tokens | reading.parts
        if own.isdisjoint(node.all_input_nodes):
            if node.op == "get_attr" and not reading.keeps(node):
                return ()
        elif node is end:
            fits = len(node.args) == 1 and node.args[0] in reading.tokens and not node.kwargs
            later = nodes[nodes.index(end) + 1 :]
            return tuple(watched) if fits and all(own.isdisjoint(other.all_input_nodes) for other in later) else ()
        elif not reading.keeps(node):
            return ()
        elif node.op == "call_module":
            watched += [name for name, m in layer.named_modules() if m is layer.get_submodule(str(node.target))]
    return ()


class _Whole(fx.Tracer):
    """Goes into all modules but linear layers and those that need no look inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_linear(m) or type(m) in _MODULES | _BY_ATTRIBUTES


class _Around(fx.Tracer):
    """Goes into the modules around two linear layers alone."""

    def __init__(self, parts: set[nn.Module]) -> None:
        super().__init__()
        self.inner = parts

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.inner or self.inner.isdisjoint(m.modules())


def _traced(module: nn.Module, tracer: fx.Tracer) -> fx.Graph | None:
    try:
        return tracer.trace(module)
    except Exception:  # of any kind: code that is given a symbol in the place of a tensor
        return None


class _Reading:
    """Goes through a traced graph: which nodes hold tokens, one vector for each, in their places."""

    def __init__(self, root: nn.Module, channels_first: bool) -> None:
        self.root, self.channels_first = root, channels_first
        self.tokens: set[fx.Node] = set()
        self.parts: set[fx.Node] = set()
        """Tuples of tokens, from `chunk`."""
        self.constants: set[fx.Node] = set()

    def is_tokenwise(self, graph: fx.Graph) -> bool:
        first = True
        for node in graph.nodes:
            if node.op == "placeholder":
                if first:
                    self.tokens.add(node)
                first = False
            elif node.op == "output":
                return isinstance(node.args[0], fx.Node) and node.args[0] in self.tokens
            elif not self.keeps(node):
                return False
        return False

    def keeps(self, node: fx.Node) -> bool:
        """Tell whether a node makes tokens of tokens; notes what it makes."""
        if node.op == "get_attr":
            return self._reads(node)
        known = self.tokens | self.parts | self.constants
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            fits = len(node.args) == 1 and not node.kwargs and node.args[0] in self.tokens and self._is_fine(module)
            self.tokens.add(node)
            return fits
        if not all(other in known for other in node.all_input_nodes):
            return False
        if node.op == "call_method":
            name = str(node.target)
        elif node.target is getattr:
            self.constants.add(node)
            return node.args[1] in ("dtype", "device")
        elif node.target is operator.getitem:
            return self._picks(node)
        else:
            name = _FUNCTIONS.get(node.target, "")  # type: ignore[arg-type]
        if name in _POINTWISE:
            self.tokens.add(node)
            return not any(other in self.parts for other in node.all_input_nodes)
        if name in _OF_CHANNELS and self._is_along_channels(node, name):
            (self.parts if name in ("chunk", "split") else self.tokens).add(node)
            return True
        return False

    def _reads(self, node: fx.Node) -> bool:
        owner, _, key = str(node.target).rpartition(".")
        module = self.root.get_submodule(owner)
        value = getattr(module, key)
        if is_linear(module):
            if any(user.target is not getattr for user in node.users):
                kind = type(self.root).__name__
                raise TypeError(
                    f"{kind} uses '{node.target}' outside its linear layer, and each expert has another one"
                )
        elif not isinstance(value, Tensor) or not (
            value.numel() == 1 or (value.dim() == 1 and not self.channels_first)
        ):
            return False
        self.constants.add(node)
        return True

    def _picks(self, node: fx.Node) -> bool:
        source, index = node.args
        self.tokens.add(node)
        if source in self.parts:
            return isinstance(index, int)
        if source not in self.tokens or self.channels_first or not isinstance(index, tuple) or len(index) != 2:
            return False
        return index[0] is Ellipsis and isinstance(index[1], slice)

    def _is_along_channels(self, node: fx.Node, name: str) -> bool:
        place = {"chunk": 2, "split": 2, "var": 1, "std": 1, "norm": 2, "normalize": 2}.get(name, 1)
        dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else None)
        dims = [dim] if isinstance(dim, int) else dim
        if not isinstance(dims, (list, tuple)) or list(dims) != [1 if self.channels_first else -1]:
            return False
        if name in _REDUCTIONS:
            if name in ("var", "std") and len(node.args) > place + 1:  # may be `unbiased`
                return False
            return node.kwargs.get("keepdim") is True or node.args[place + 1 :][:1] == (True,)
        return True

    def _is_fine(self, module: nn.Module) -> bool:
        if has_hooks(module):
            return False
        if is_linear(module):
            return isinstance(module, CONVOLUTIONS) == self.channels_first
        if type(module) in _MODULES:
            return True
        if type(module) in (nn.LayerNorm, nn.RMSNorm):
            return not self.channels_first and len(module.normalized_shape) == 1  # type: ignore[arg-type]
        if type(module) in (nn.GLU, nn.Softmax, nn.LogSoftmax):
            return bool(module.dim == (1 if self.channels_first else -1))
        return is_tokenwise(module, self.channels_first)


_FIXED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_STEPS = """
RESUME NOP CACHE PRECALL PUSH_NULL KW_NAMES POP_TOP COPY SWAP LOAD_FAST STORE_FAST LOAD_CONST LOAD_ATTR LOAD_METHOD
LOAD_GLOBAL CALL CALL_KW BINARY_OP BINARY_SUBSCR BINARY_SLICE BUILD_SLICE BUILD_TUPLE BUILD_LIST UNPACK_SEQUENCE
UNARY_NEGATIVE RETURN_VALUE LOAD_SMALL_INT LOAD_FAST_LOAD_FAST STORE_FAST_STORE_FAST STORE_FAST_LOAD_FAST
LOAD_FAST_BORROW LOAD_FAST_BORROW_LOAD_FAST_BORROW
"""
_STRAIGHT = frozenset(_STEPS.split())
"""Bytecode without branches, loops, closures, and without writing anything but local names. Others may be straight too,
in later versions of Python: then tokens keep their order, which is slower and right."""


def _is_straight(module: nn.Module) -> bool:
    """Tell whether a forward method is one line of calls of the module's parts and of torch, without a branch.

    So it does the same whatever it is given, and depends on nothing but the parts and numbers of the module.
    """
    kind = type(module)
    if any(getattr(kind, name) is not getattr(nn.Module, name) for name in ("__call__", "__getattr__", "_call_impl")):
        return False
    code = kind.forward
    if kind.__getattribute__ is not object.__getattribute__ or not isinstance(code, types.FunctionType):
        return False
    if code.__closure__ or hasattr(code, "__wrapped__"):
        return False
    for step in dis.get_instructions(code):
        if step.opname not in _STRAIGHT:
            return False
        name = str(step.argval)
        if step.opname == "LOAD_GLOBAL" and not any(code.__globals__.get(name) is space for space in _SPACES):
            return False
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and not _is_part(module, name):
            return False
    return True


def _is_of_torch(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType)) and value in _FUNCTIONS


def _is_part(module: nn.Module, name: str) -> bool:
    """Tell whether a name that a forward method reads is a part or a number of the module, or of a tensor or torch."""
    if name in module._parameters or any(name in m._modules for m in module.modules()):
        return True
    if name in OF_EVERY_MODULE or name in module._buffers:
        return False
    if name in vars(module):
        return isinstance(vars(module)[name], _FIXED) or _is_of_torch(vars(module)[name])
    kinds = {type(m) for m in module.modules() if not is_of_packages(m)}
    if any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for kind in kinds):
        return False
    return name in _POINTWISE | _OF_CHANNELS | _OF_TENSORS | _OF_SPACES


def _attributes(module: nn.Module) -> dict[str, Any]:
    own = vars(module)
    found = {key: own[key] for key in own if key not in OF_EVERY_MODULE and key != "_compiled_call_impl"}
    if isinstance(module, nn.Dropout):  # whatever its share is
        del found["p"]
    found.update(module._modules)
    if not is_linear(module):
        found.update((key, None if value is None else value.shape) for key, value in module._parameters.items())
    return found


def _differ(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Tell whether attributes are others; a new private one may be that of a tool, and no straight code reads it."""
    new = any(key not in then and not key.startswith("_") for key in now)
    return new or any(key not in now or not _same(now[key], value) for key, value in then.items())


def _same(one: Any, other: Any) -> bool:
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, _FIXED) and one == other


def _package(code: Any) -> str:
    return str(getattr(code, "__module__", "") or "").partition(".")[0]
