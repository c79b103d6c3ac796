"""What a copy of a module shares with the rest of its model: all that it holds and that is not its own."""

import copy
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = (
    *(bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size),
    *(type, types.BuiltinFunctionType, types.ModuleType),
)
OF_EVERY_MODULE = frozenset(vars(nn.Identity()))
"""Attributes that `nn.Module` itself has."""
HOOKS = tuple(key for key in vars(nn.Identity()) if "hook" in key and "state_dict" not in key)
"""Where `nn.Module` keeps its forward and backward hooks."""


class Reach:
    """Looks for some objects in plain attributes: in containers, bound methods and objects with attributes, nested."""

    def __init__(self, wanted: Collection[int]) -> None:
        """Look for the objects whose `id` is in `wanted`."""
        self.wanted = wanted
        self.without: dict[int, Any] = {}
        """What was seen that leads to none of them, by its id."""
        self.fixed: list[Any] = []
        """Functions and weak references that lead to one of them: a copy would not lead to its copy."""
        self._seen: dict[int, int | None] = {}

    def find(self, value: Any, depth: int = 5) -> int | None:
        """Return the id of a wanted object that `value` is or leads to; other modules are not searched."""
        key = id(value)
        if key in self.wanted:
            return key
        if isinstance(value, _ATOMS) or not depth:
            return None
        if key not in self._seen:
            self._seen[key] = None  # where it leads to itself
            found = [self.find(part, depth - 1) for part in _parts(value)]
            self._seen[key] = next((one for one in found if one is not None), None)
            if self._seen[key] is None:
                self.without[key] = value
            elif isinstance(value, (types.FunctionType, weakref.ref)):
                self.fixed.append(value)
        return self._seen[key]


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, (nn.Module, Tensor)):
        return ()
    if isinstance(value, (dict, list, tuple, set, frozenset, deque)):
        if len(value) > 10_000:  # data
            return ()
        return list(value.values()) if isinstance(value, dict) else list(value)
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    slots = [slot for kind in type(value).__mro__ for slot in (getattr(kind, "__slots__", ()) or ())]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, slot, None) for slot in slots)]


def own_ids(module: nn.Module) -> set[int]:
    """Return the ids of all modules, parameters and buffers of a module."""
    return {id(value) for value in [*module.modules(), *module.parameters(), *module.buffers()]}


def shared_by(module: nn.Module) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy` with which the copy has modules, parameters and buffers of its own alone.

    All else is the same object in both: another module or a parameter of the model, a dict or namespace that others
    hold too, a generator. What leads back to the module, such as one of its bound methods, is copied. Results of the
    last forward pass are kept without their graph.
    """
    return reach_of(module).without | results_of(module)


def reach_of(module: nn.Module) -> Reach:
    """Look for what a module holds of its own in its attributes and hooks."""
    reach = Reach(own_ids(module))
    for m in module.modules():
        for key, value in vars(m).items():
            if key not in OF_EVERY_MODULE or (key in HOOKS and value):
                reach.find(value)
    return reach


def results_of(module: nn.Module) -> dict[int, Tensor]:
    """Return a memo for `copy.deepcopy`, which refuses what a forward pass left in attributes: without their graph."""
    reach = Reach(())
    lent = [m.__dict__["_template"] for m in module.modules() if "_template" in m.__dict__]  # of an expert layer
    for m in [*module.modules(), *lent]:
        for key, value in vars(m).items():
            if key not in OF_EVERY_MODULE:
                reach.find(value, depth=3)
    return {
        key: value.detach()
        for key, value in reach.without.items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has forward or backward hooks, itself."""
    return any(module.__dict__[key] for key in HOOKS)


def copy_hooks_(module: nn.Module, source: nn.Module) -> None:
    """Give `module` the forward and backward hooks that `source` has now."""
    for key in HOOKS:
        module.__dict__[key] = copy.copy(source.__dict__[key])


def take_hooks_(module: nn.Module, source: nn.Module) -> None:
    """Put `module` in the place of `source`, whose hooks are its own from now on: their handles remove them there."""
    for key in HOOKS:
        module.__dict__[key] = source.__dict__[key]


def drop_hooks_(module: nn.Module) -> None:
    """Take a module's own forward and backward hooks off, and leave those of its children."""
    take_hooks_(module, nn.Identity())


def copied(module: nn.Module, memo: Mapping[int, Any] = types.MappingProxyType({})) -> nn.Module:
    """Copy a module with all that it holds.

    Raises:
        TypeError: it holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(module, {**memo, **results_of(module)})
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__} holds something that cannot be copied ({error}): take it out"
        ) from error
