"""Linear layers of K experts, stacked: the only part of an FFN that experts have for themselves."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import combine, dispatch
from .sharing import OF_EVERY_MODULE, copy_hooks_, shared_by

if TYPE_CHECKING:
    from .mof import ExpertLayer, Plan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class StackedLinear(nn.Module):
    """The same linear layer of K experts, stacked: `weight` (K, in, out), `bias` (K, out) or None.

    (K, in, out) feeds `baddbmm` without a transposed copy. The names end in `.weight` and `.bias` like those
    of `nn.Linear`, so that optimizer helpers which go by name do not decay the biases. Its `ExpertLayer` decides
    whether it uses the experts or their mean, and whether it gets tokens in slots or in their own order.
    """

    _shell: nn.Module
    _owner: "ExpertLayer"

    def __init__(self, linear: nn.Module, num_experts: int) -> None:
        """Stack `num_experts` copies of `linear`, in its dtype and on its device, with its hooks.

        Args:
            linear: see `is_linear`.
            num_experts: K.
        """
        super().__init__()
        self.num_experts = num_experts
        self.input_first = not isinstance(linear, (nn.Linear, *CONVOLUTIONS))
        self.channels_first = isinstance(linear, CONVOLUTIONS)
        self.in_features, self.out_features = linear_features(linear)
        weight, bias = linear_parameters(linear)
        self.weight = self._stack(weight)
        self.bias = None if bias is None else self._stack(bias)
        # The linear layer without its weights: what `averaged_linear` fills again.
        without_weights = {id(parameter): None for parameter in linear.parameters()}
        object.__setattr__(self, "_shell", copy.deepcopy(linear, shared_by(linear) | without_weights))
        copy_hooks_(self, linear)
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        """Map x through the experts, or through their mean, as the owning `ExpertLayer` says.

        Args:
            x: in slots (K, capacity, in), one slice for each expert; otherwise tokens (..., in). Convolutions have
                the channels in dimension 1.
        """
        owner = self._owner
        if owner.uses_mean():
            weight, bias = self.averaged()
            if self.channels_first:
                return self._shell._conv_forward(x, weight, bias)  # type: ignore[operator]
            return F.linear(x, weight.t() if self.input_first else weight, bias)
        if not owner.running and (torch.compiler.is_compiling() or not _is_in_backward()):
            raise TypeError(
                f"{owner.title()}: a part of it is called, not the whole, so that its tokens cannot be spread: "
                "leave it out of targets"
            )
        if owner.layout.in_slots:
            return self.multiply(x)
        return self.on_tokens(x, owner.plan)

    def on_tokens(self, x: Tensor, plan: "Plan | None") -> Tensor:
        """Map tokens x (..., in), each through the expert that the plan says, and return them to their places."""
        title = self._owner.title()
        if plan is None:
            raise RuntimeError(
                f"{title} runs a part outside its whole: under activation checkpointing, recompute the FFN or the block"
            )
        place = -1
        if self.channels_first:  # a convolution takes one sample without a batch as well
            place = 1 if x.dim() == len(self._shell.kernel_size) + 2 else 0  # type: ignore[arg-type]
        tokens = x.movedim(place, -1)
        rows, partition = tokens.reshape(-1, self.in_features), plan.partition
        if rows.shape[0] != partition.num_tokens:
            raise ValueError(f"{title} has {partition.num_tokens} tokens, but a part of it gets {rows.shape[0]}")
        outputs = combine(self.multiply(dispatch(rows, partition), False), partition)
        outputs = outputs.view(*tokens.shape[:-1], self.out_features)
        if not self.channels_first:
            return outputs
        return outputs.movedim(-1, place).contiguous() if x.is_contiguous() else outputs.movedim(-1, place)

    def multiply(self, x: Tensor, channels_first: bool | None = None) -> Tensor:
        """Map slots x (K, ..., in), with the channels in dimension 1 if so asked or a convolution, by their experts."""
        if self.channels_first if channels_first is None else channels_first:
            slots = x.flatten(2)
            weight = self.weight.transpose(1, 2)
            if self.bias is None:
                return torch.bmm(weight, slots).view(x.shape[0], -1, *x.shape[2:])
            return torch.baddbmm(self.bias.unsqueeze(2), weight, slots).view(x.shape[0], -1, *x.shape[2:])
        if x.dim() > 3:
            return self.multiply(x.flatten(1, -2), False).view(*x.shape[:-1], -1)
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)

    def averaged(self) -> tuple[Tensor, Tensor | None]:
        """Return the mean over experts in the layout of the linear layer: weight (out, in), bias (out,) or None."""
        # One contiguous copy here and in `averaged_linear`: equal layout, hence equal bits before and after a merge.
        weight = mean_over_experts(self.weight)
        weight = weight if self.input_first else weight.t().contiguous()
        if self.channels_first:
            weight = weight[(..., *[None] * len(self._shell.kernel_size))]  # type: ignore[arg-type]
        return weight, None if self.bias is None else mean_over_experts(self.bias)

    @torch.no_grad()
    def averaged_linear(self) -> nn.Module:
        """Build the linear layer with the mean of the experts; keeps class, dtype, device, requires_grad and mode."""
        self.check_plain()
        weight, bias = self.averaged()
        linear = copy.deepcopy(self._shell, shared_by(self._shell))
        linear.weight = _like(self.weight, weight)
        if bias is not None and self.bias is not None:
            linear.bias = _like(self.bias, bias)
        copy_hooks_(linear, self)
        linear.__dict__.update((key, value) for key, value in vars(self).items() if key not in _OWN)
        return linear.train(self.training)

    def check_plain(self) -> None:
        """Refuse weights that are computed from others, since the conversion: their mean is not that of the others.

        Raises:
            ValueError: a parametrization, a norm of the weights or pruning was put on this layer.
        """
        own = self._parameters
        if "weight" not in own or self._modules or ("bias" not in own and self.__dict__.get("bias", self) is not None):
            raise ValueError(
                f"{self._owner.title()} computes weights from others since its conversion (pruning, weight norm, "
                "spectral norm, a parametrization): remove that first, as torch.nn.utils.prune.remove does"
            )

    @torch.no_grad()
    def load_expert_(self, expert: int, linear: nn.Module) -> None:
        """Overwrite one expert with the weights of `linear`."""
        weight, bias = linear_parameters(linear)
        flat = weight.flatten(1)
        self.weight[expert].copy_(flat if self.input_first else flat.t())
        if self.bias is not None and bias is not None:
            self.bias[expert].copy_(bias)

    def _stack(self, parameter: nn.Parameter) -> nn.Parameter:
        dense = parameter.detach()
        if dense.dim() > 1:
            dense = dense.flatten(1) if self.input_first else dense.flatten(1).t()
        return _like(parameter, dense.unsqueeze(0).repeat(self.num_experts, *[1] * dense.dim()).contiguous())

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features} -> {self.out_features}), bias={self.bias is not None}"


_OWN = OF_EVERY_MODULE | {"num_experts", "input_first", "channels_first", "in_features", "out_features"}
_OWN |= {"_shell", "_owner", "bias"}


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is an `nn.Linear`, a convolution of width 1, or GPT-2's form of a linear layer.

    That form has a weight (in, out) and tells its output features as `nf`. A convolution has stride 1, no padding and
    one group: it maps each position by itself.
    """
    if isinstance(module, nn.Linear):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, CONVOLUTIONS):
        unpadded = isinstance(module.padding, str) or not any(module.padding)
        return {*module.kernel_size, *module.stride, module.groups} == {1} and unpadded
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or bias is None or len(list(module.parameters())) > 2:
        return False
    return weight.dim() == 2 and weight.shape[1:] == bias.shape == (getattr(module, "nf", None),)


def linear_features(linear: nn.Module) -> tuple[int, int]:
    """Return the input and output features of a linear layer."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    if isinstance(linear, CONVOLUTIONS):
        return linear.in_channels, linear.out_channels
    rows, columns = linear_parameters(linear)[0].shape
    return rows, columns


def linear_parameters(linear: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return the weight and the bias, None without one, of a linear layer, see `is_linear`."""
    return linear.get_parameter("weight"), linear._parameters.get("bias")


def mean_over_experts(stacked: Tensor) -> Tensor:
    """Mean over dimension 0, computed in float32 for lower precision and returned in the dtype of `stacked`."""
    return stacked.mean(0, dtype=torch.promote_types(stacked.dtype, torch.float32)).to(stacked.dtype)


def _is_in_backward() -> bool:
    """Tell whether a backward pass is running: activation checkpointing may recompute a part there."""
    return bool(torch._C._current_graph_task_id() != -1)


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Make a parameter of `value` with the attributes of another one, such as a library's marks for its optimizer."""
    made = nn.Parameter(value, requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made
