"""Does a forward method treat each token by itself, whatever their number? Shown by tracing it, not by trying.

A trial sees some shapes and the attributes of today. A trace has no shapes: code that asks for one cannot be traced.
What is traced may still change with attributes, so these are watched in training, see `Watch`.
"""

import dis
import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .linear import CONVOLUTIONS, StackedLinear, is_linear
from .sharing import HOOKS, OF_EVERY_MODULE

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
_MODULES = frozenset(
    (
        *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
        *(nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink),
        *(nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold, nn.Identity, nn.Dropout),
    )
)
_BY_ATTRIBUTES = frozenset((nn.LayerNorm, nn.RMSNorm, nn.GLU, nn.Softmax, nn.LogSoftmax))


def _functions(names: Iterable[str]) -> dict[Callable[..., Any], str]:
    spaces = (torch, F, operator)
    return {getattr(space, name): name for space in spaces for name in names if hasattr(space, name)}


_FUNCTIONS = _functions(_POINTWISE | _OF_CHANNELS)


class Watch:
    """The attributes on which a trace depends: of some modules, of their classes, and numbers of their source files."""

    def __init__(self, modules: Iterable[nn.Module], hooked: Iterable[nn.Module] | None = None) -> None:
        """Note the attributes of `modules`; see that `hooked`, or these, get no hooks."""
        modules = list(modules)
        self.hooked = modules if hooked is None else list(hooked)
        self.modules = [(m, _attributes(m)) for m in modules if type(m) not in _MODULES | {StackedLinear}]
        self.names = [
            (holder, name, value)
            for m, _ in self.modules
            if not is_of_packages(m)
            for holder, name, value in _reads(m)
            if holder is not None and isinstance(value, (int, float, str, type(None)))
        ]

    def sees_change(self) -> bool:
        """Tell whether anything is another one than at the conversion, or has got hooks."""
        return (
            any(_differ(_attributes(m), then) for m, then in self.modules)
            or any(m.__dict__[key] for m in self.hooked for key in HOOKS)
            or any(not _same(_value(holder, name), value) for holder, name, value in self.names)
        )


def is_of_packages(module: nn.Module) -> bool:
    """Tell whether the code of a module is of `PACKAGES`, with the functions that it holds."""
    kind = type(module)
    held = [value for key, value in vars(module).items() if key not in OF_EVERY_MODULE]
    functions = [getattr(value, "__func__", value) for value in held]
    codes = [
        value if isinstance(value, types.FunctionType) else type(value)
        for value in functions
        if isinstance(value, types.FunctionType) or not (_is_fixed(value) or isinstance(value, (Tensor, nn.Module)))
    ]
    return all(_package(code) in (*PACKAGES, "builtins", "collections", "functools") for code in codes) and all(
        _package(code) in PACKAGES for code in (kind, kind.forward)
    )


def is_tokenwise(module: nn.Module, channels_first: bool = False) -> bool:
    """Tell whether a trace in the present mode shows that each token passes by itself.

    Args:
        module: a copy: tracing runs its forward method.
        channels_first: channels are in dimension 1, not in the last.

    Raises:
        TypeError: it uses the weight of a linear layer outside that layer.
    """
    if not _is_closed(module):
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
    if not all(_is_closed(m, deep=False) for m in around.values()):
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
            return node.kwargs.get("keepdim") is True or node.args[place + 1 :][:1] == (True,)
        return True

    def _is_fine(self, module: nn.Module) -> bool:
        if any(module.__dict__[key] for key in HOOKS):
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


def _is_closed(module: nn.Module, deep: bool = True) -> bool:
    """Tell whether a module reads nothing that others change without a trace: containers, other objects, lists."""
    for m in module.modules() if deep else (module,):
        if is_of_packages(m):
            continue
        kept = [value for key, value in vars(m).items() if key not in OF_EVERY_MODULE]
        if not all(_is_fixed(value) or isinstance(value, (Tensor, nn.Module)) for value in kept):
            return False
        if not all(_is_fixed(value) or isinstance(value, property) for _, _, value in _reads(m)):
            return False
    return True


def _is_fixed(value: Any) -> bool:
    """Tell what cannot be changed, only replaced."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_fixed, value))
    if isinstance(value, partial):
        return all(map(_is_fixed, (value.func, *value.args, *value.keywords.values())))
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):  # has a backward of its own
        return False
    fixed = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, torch.dtype, torch.device)
    return isinstance(value, (*fixed, types.FunctionType, types.BuiltinFunctionType, staticmethod, classmethod)) or (
        type(value).__name__ in ("ufunc", "_OpNamespace", "OpOverloadPacket", "OpOverload")
    )


def _reads(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Iterate over (holder, name, value) of what the code of a module reads from its class and its source file."""
    kind = type(module)
    todo, seen = [inspect.getattr_static(kind, "forward", None)], set()
    todo += [value for value in vars(module).values() if isinstance(value, types.FunctionType)]
    while todo:
        code = todo.pop()
        code = code.fget if isinstance(code, property) else getattr(code, "__func__", code)
        code = inspect.unwrap(code) if callable(code) else code
        if not isinstance(code, types.FunctionType) or code in seen or _package(code) in PACKAGES:
            continue
        seen.add(code)
        for cell in code.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            if value is kind or isinstance(value, type):
                continue
            todo.append(value)
            yield None, "", value
        for name, is_global in _names(code.__code__):
            holder: Any = code.__module__ if is_global else kind
            value = _value(holder, name)
            if value is _MISSING or (not is_global and name in OF_EVERY_MODULE):
                continue
            if not is_global and hasattr(nn.Module, name):
                continue
            todo.append(value)
            yield holder, name, value


def _names(code: types.CodeType) -> Iterator[tuple[str, bool]]:
    """Iterate over (name, whether it is a global one) that a function and those inside it read."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(step.argval), True
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            yield str(step.argval), False
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


_MISSING = object()


def _value(holder: Any, name: str) -> Any:
    if holder is None:
        return _MISSING
    if isinstance(holder, str):
        return vars(sys.modules[holder]).get(name, _MISSING) if holder in sys.modules else _MISSING
    return inspect.getattr_static(holder, name, _MISSING)


def _attributes(module: nn.Module) -> dict[str, Any]:
    own = vars(module)
    found = {key: own[key] for key in own if key not in OF_EVERY_MODULE and key != "_compiled_call_impl"}
    if not isinstance(module, StackedLinear):
        found.update(module._modules)
    return found


def _differ(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return now.keys() != then.keys() or any(not _same(now[key], value) for key, value in then.items())


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, (int, float, str, tuple)) and one == other)


def _package(code: Any) -> str:
    return str(getattr(code, "__module__", "") or "").partition(".")[0]
