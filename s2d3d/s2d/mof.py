"""Expert layers: K stacked FFNs in the place of one. RUP-MoF partitions the tokens among them at random, uniformly."""

import copy
import inspect
import numbers
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .dispatch import Partition, combine, dispatch, random_partition
from .linear import StackedLinear, is_linear
from .probe import Layout, probe_ffn
from .sharing import copy_hooks_, drop_hooks_, shared_by
from .state import check_state
from .tokenwise import Watch

_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Plan(NamedTuple):
    """How one call of an expert layer spread its tokens, for the way back."""

    partition: Partition
    weights: Tensor | None
    """(K * capacity,): factor of each slot's output; None means 1."""
    shape: torch.Size
    """Shape of the tokens without channels."""


class ExpertLayer(nn.Module):
    """K experts of one FFN's form and size; what decides which tokens pass which expert is up to `draw`.

    The experts run the forward method of the FFN that they replace, with its linear layers stacked, so any FFN works
    that treats tokens independently: plain, gated, of linear layers or of convolutions of width 1. Linear layers keep
    their names (`mlp.fc1.weight`); norm layers stay single, the experts share them.

    `layout` says how that forward method runs in training. In slots, (K, capacity, C), which costs what the FFN costs,
    where a trial showed that it computes the same there. Else on the tokens as they come, and each linear layer
    spreads them over the slots and takes them back: right for whatever lies between the linear layers, such as
    BatchNorm, whose statistics then are over the tokens, each once.
    """

    averaged_in_eval = True
    num_experts = 1
    layout = Layout()
    name = ""
    """In the model, for messages."""
    plan: Plan | None = None
    """Of the call that is running, where linear layers spread the tokens themselves."""
    running = False
    """As a whole; its parts may run."""
    peer: nn.Module | None = None
    """Another module whose mode counts as well, see `ExitLinear`."""
    watch: Watch | None = None
    """What must stay as it is for tokens in slots."""
    _input = ""
    """The name under which the FFN takes its tokens."""
    _template: nn.Module

    def __init__(self, ffn: nn.Module, num_experts: int, *, layout: Layout | None = None) -> None:
        """Build K copies of `ffn`, which is left untouched.

        Args:
            ffn: maps (..., C) to (..., D), or (B, C, ...) to (B, D, ...), token by token.
            num_experts: K, at least 1.
            layout: what a trial of `ffn` has shown already; default: try it now, see `probe_ffn`.

        Raises:
            ValueError: `num_experts` below 1.
            TypeError: `ffn` cannot become experts, see `check_state` and `probe_ffn`.
        """
        super().__init__()
        if isinstance(num_experts, bool) or not isinstance(num_experts, numbers.Integral):
            raise ValueError(f"num_experts is {num_experts!r}, must be a whole number")
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}, must be at least 1")
        check_state(ffn)
        held = {*vars(ffn), *ffn._modules, *ffn._buffers, *dir(type(ffn))} - set(dir(nn.Identity()))
        taken = sorted(name for name in held & set(dir(type(self))) if not name.startswith("__"))
        if taken:
            raise TypeError(f"{type(ffn).__name__} has {', '.join(taken)}, names that expert layers have: rename them")
        self.num_experts = num_experts
        self.layout = (
            probe_ffn(ffn, num_experts, RUPMoF, routed=not self.averaged_in_eval) if layout is None else layout
        )
        stacked = {id(m): StackedLinear(m, num_experts) for m in ffn.modules() if is_linear(m)}
        template = copy.deepcopy(ffn, shared_by(ffn) | stacked)
        for _, module in template.named_modules():
            if isinstance(module, StackedLinear):
                object.__setattr__(module, "_owner", self)  # not a sub-module
        drop_hooks_(template)  # those of the FFN see tokens, here
        copy_hooks_(self, ffn)
        # The children are registered here, under their own names; the template only lends its forward method.
        object.__setattr__(self, "_template", template)
        for key in ("_modules", "_buffers", "_parameters", "_non_persistent_buffers_set"):
            self.__dict__[key] = template.__dict__[key]  # the same: what is replaced here is replaced there
        named = [p.name for p in inspect.signature(type(ffn).forward).parameters.values() if p.kind not in _ANY]
        self._input = next(iter(named[1:]), "")
        self.training = ffn.training  # each part keeps its own: a norm may be frozen
        if self.layout.in_slots:
            self.watch = Watch(template.modules())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map tokens (..., C) to (..., D), or (B, C, ...) to (B, D, ...) where the FFN does so.

        Raises:
            ValueError: the batch has too few tokens.
            TypeError: the FFN is called in another way than the conversion tried.
        """
        if any(isinstance(value, torch.fx.Proxy) for value in [*args, *kwargs.values()]):
            raise TypeError(f"{self.title()} cannot be traced: merge_experts(model) first")
        if self.uses_mean():
            return self._template(*args, **kwargs)
        x = self._tokens(args, kwargs)
        plan = self.draw(x)
        self.running = True
        try:
            if not torch.compiler.is_compiling():
                self.look_for_changes(x)
            self.plan = None if self.layout.in_slots else plan
            return self._run(x, plan, args, kwargs)
        finally:
            self.running, self.plan = False, None

    def _run(self, x: Tensor, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not self.layout.in_slots:
            return self._template(*args, **kwargs)
        slots = self.spread(x, plan)
        given = ((slots, *args[1:]), kwargs) if args else ((), kwargs | {self._name_of_tokens(kwargs): slots})
        outputs = self.combine(self._template(*given[0], **given[1]), plan)
        return outputs.contiguous() if self.layout.channels_first and x.is_contiguous() else outputs

    def uses_mean(self) -> bool:
        """Tell whether tokens pass the mean of the experts: in evaluation, unless experts are routed."""
        return self.averaged_in_eval and not (self.training and (self.peer is None or self.peer.training))

    def look_for_changes(self, x: Tensor | None = None) -> None:
        """Leave slots for good where something has changed since the conversion: a mask is set, say, or a mode.

        Tokens x of a number of dimensions that no trial had are such a change as well.

        Raises:
            TypeError: a router needs slots.
        """
        if self.watch is None or not self.layout.in_slots:
            return
        untried = x is not None and bool(self.layout.tried) and x.dim() not in self.layout.tried
        if untried or self.watch.sees_change():
            if not self.averaged_in_eval:
                raise TypeError(f"{self.title()} has other attributes or hooks than at its conversion")
            self.layout = self.layout._replace(in_slots=False)

    def draw(self, x: Tensor) -> Plan:
        """Decide which tokens of x, see `forward`, pass which expert."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """Return the tokens of x one by one, (num_tokens, C)."""
        if self.layout.channels_first:
            x = x.movedim(1, -1)
        return x.reshape(-1, x.shape[-1])

    def places(self, x: Tensor) -> torch.Size:
        """Return the shape of x without its channels."""
        return torch.Size([x.shape[0], *x.shape[2:]]) if self.layout.channels_first else x.shape[:-1]

    def spread(self, x: Tensor, plan: Plan) -> Tensor:
        """Spread the tokens of x over the slots of the experts: (K, capacity, C), or (K, C, capacity, 1, ...)."""
        slots = dispatch(self.rows(x), plan.partition)
        if self.layout.channels_first:
            return slots.transpose(1, 2)[(..., *[None] * (x.dim() - 3))]
        return slots

    def combine(self, outputs: Tensor, plan: Plan | None) -> Tensor:
        """Return the outputs of the slots to the places of their tokens; plan None: they are there already."""
        if plan is None:
            return outputs
        if self.layout.channels_first:
            outputs = outputs.flatten(2).transpose(1, 2)
        rows = combine(outputs, plan.partition, plan.weights).view(*plan.shape, outputs.shape[-1])
        return rows.movedim(-1, 1) if self.layout.channels_first else rows

    def averaged_expert(self) -> nn.Module:
        """Return the mean of the experts as an FFN of the original class, with keys as before the conversion."""
        linears = {id(m): m for m in self._template.modules() if is_linear(m)}  # averaged already, see `merge_experts`
        linears |= {id(layer): layer.averaged_linear() for _, layer in self.stacked_layers()}
        ffn = copy.deepcopy(self._template, shared_by(self._template) | linears)
        copy_hooks_(ffn, self)
        return ffn

    def stacked_layers(self) -> Iterator[tuple[str, StackedLinear]]:
        """Iterate over (name, layer) of the stacked linear layers."""
        return ((name, m) for name, m in self.named_modules() if isinstance(m, StackedLinear))

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters that each expert has for itself, stacked: dimension 0 is the expert."""
        return (parameter for _, layer in self.stacked_layers() for parameter in layer.parameters())

    def train(self, mode: bool = True) -> "ExpertLayer":
        """Set the mode here and in the template, whose forward may look at its own `training`."""
        super().train(mode)
        self._template.train(mode)
        self.look_for_changes()
        return self

    def _tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Find the tokens among the arguments of a call, and refuse what the conversion has not tried."""
        x = args[0] if args else kwargs.get(self._name_of_tokens(kwargs))
        others = list(args[1:]) + [value for key, value in kwargs.items() if value is not x]
        alone = all(value is None for value in others)
        if isinstance(x, Tensor) and x.is_nested:
            raise TypeError(f"{self.title()} takes padded tokens, got a nested tensor: call to_padded_tensor first")
        if not isinstance(x, Tensor) or not (alone or self.layout.any_call):
            given = ", ".join(type(value).__name__ for value in [*args, *kwargs.values()])
            raise TypeError(
                f"{self.title()} was tried with one tensor and is called with ({given}): "
                "pass a sample input, convert_to_mof_(model, config, example=inputs)"
            )
        if self.layout.num_dims and x.dim() not in self.layout.num_dims:
            raise TypeError(f"{self.title()} takes (batch, channels, ...), got a tensor of {x.dim()} dimensions")
        return x

    def _name_of_tokens(self, kwargs: dict[str, Any]) -> str:
        return self._input or next(iter(kwargs), "")

    def title(self) -> str:
        """Name the layer in a message."""
        return f"expert layer '{self.name}'" if self.name else type(self).__name__

    def __setattr__(self, name: str, value: Any) -> None:
        template = self.__dict__.get("_template")
        if template is None or not self._is_of_ffn(name) or isinstance(value, (nn.Module, nn.Parameter)):
            super().__setattr__(name, value)
            if template is not None and name == "training":  # its forward may look at its own
                template.training = value
        else:  # read there, and kept by the merge
            setattr(template, name, value)
            self.look_for_changes()

    def __delattr__(self, name: str) -> None:
        if name in self._template.__dict__ and self._is_of_ffn(name):
            delattr(self._template, name)
        else:
            super().__delattr__(name)

    def __getattr__(self, name: str) -> Any:
        template = self.__dict__.get("_template")
        if template is not None and (name in template.__dict__ or hasattr(type(template), name)):
            return getattr(template, name)  # an attribute or a method of the FFN
        return super().__getattr__(name)

    def _is_of_ffn(self, name: str) -> bool:
        """Tell an attribute of the FFN from one of this layer."""
        return not (hasattr(type(self), name) or name in self.__dict__)

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self._template)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._template)  # type: ignore[call-overload]

    def __setitem__(self, index: Any, value: nn.Module) -> None:
        self._template[index] = value  # type: ignore[operator]

    def __delitem__(self, index: Any) -> None:
        del self._template[index]  # type: ignore[operator]
        self.__dict__["_modules"] = self._template._modules  # it is another dict then

    def __getitem__(self, index: Any) -> Any:
        return self._template[index]  # type: ignore[index]

    def __prepare_scriptable__(self) -> "ExpertLayer":
        raise TypeError(f"{self.title()} cannot be scripted: merge_experts(model) first")

    def extra_repr(self) -> str:
        return f"{type(self._template).__name__}, num_experts={self.num_experts}"


class RUPMoF(ExpertLayer):
    """K experts of one FFN's form and size. No router, no balancing loss, no dropped token.

    In training all tokens of the batch are shuffled and cut into K groups whose sizes differ by at most one;
    group i passes expert i. In evaluation every token passes the mean of the experts, which is the dense FFN
    that `averaged_expert` returns and `merge_experts` puts in its place. Both cost the FLOPs of one FFN.

    Source: abstracts of Sparse-to-Dense Training, IEEE TCSVT 2025 (doi 10.1109/TCSVT.2025.3586550), and of arXiv
        2308.06093. Details are from memory of the latter, not checked against its text.

    Example:
        >>> import timm
        >>> layer = RUPMoF(timm.layers.Mlp(8, 32), num_experts=4)
        >>> layer(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])
    """

    def draw(self, x: Tensor) -> Plan:
        """Cut the tokens at random; raises ValueError when there are fewer than experts."""
        shape = self.places(x)
        if shape.numel() < self.num_experts:
            raise ValueError(
                f"{self.title()}: {shape.numel()} tokens cannot be shared among {self.num_experts} experts: "
                "use a larger batch, more tokens per sample or fewer experts"
            )
        return Plan(random_partition(shape.numel(), self.num_experts, x.device), None, shape)
