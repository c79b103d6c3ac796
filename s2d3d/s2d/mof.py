"""Expert layers: K stacked FFNs in the place of one. RUP-MoF partitions the tokens among them at random, uniformly."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import Partition, combine, dispatch, random_partition


class StackedLinear(nn.Module):
    """The same linear layer of K experts, stacked: `weight` (K, in, out), `bias` (K, out) or None.

    (K, in, out) feeds `baddbmm` without a transposed copy. The names end in `.weight` and `.bias` like those
    of `nn.Linear`, so that optimizer helpers which go by name do not decay the biases.
    """

    _shell: nn.Module

    def __init__(self, linear: nn.Module, num_experts: int, averaged_in_eval: bool = True) -> None:
        """Stack `num_experts` copies of `linear`, in its dtype and on its device.

        Args:
            linear: see `is_linear`.
            num_experts: K.
            averaged_in_eval: in evaluation use the mean of the experts; otherwise the experts as in training.
        """
        super().__init__()
        self.num_experts, self.averaged_in_eval = num_experts, averaged_in_eval
        self.input_first = not isinstance(linear, nn.Linear)
        self.in_features, self.out_features = linear_features(linear)
        weight, bias = linear_parameters(linear)
        self.weight = _stack(weight, num_experts, transpose=not self.input_first)
        self.bias = None if bias is None else _stack(bias, num_experts)
        # The linear layer without its weights: what `averaged_linear` fills again.
        without_weights = {id(parameter): None for parameter in linear.parameters()}
        object.__setattr__(self, "_shell", copy.deepcopy(linear, without_weights))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (K, capacity, in), one slice for each expert; in evaluation x (..., in) through the mean expert."""
        if self.averaged_in_eval and not self.training:
            weight, bias = self.averaged()
            return F.linear(x, weight.t() if self.input_first else weight, bias)
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)

    def averaged(self) -> tuple[Tensor, Tensor | None]:
        """Return the mean over experts in the layout of the linear layer: weight (out, in), bias (out,) or None."""
        # One contiguous copy here and in `averaged_linear`: equal layout, hence equal bits before and after a merge.
        weight = mean_over_experts(self.weight)
        weight = weight if self.input_first else weight.t().contiguous()
        return weight, None if self.bias is None else mean_over_experts(self.bias)

    @torch.no_grad()
    def averaged_linear(self) -> nn.Module:
        """Build the linear layer with the mean of the experts; keeps class, dtype, device, requires_grad and mode."""
        weight, bias = self.averaged()
        linear = copy.deepcopy(self._shell)
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if bias is not None and self.bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    @torch.no_grad()
    def load_expert_(self, expert: int, linear: nn.Module) -> None:
        """Overwrite one expert with the weights of `linear`."""
        weight, bias = linear_parameters(linear)
        self.weight[expert].copy_(weight if self.input_first else weight.t())
        if self.bias is not None and bias is not None:
            self.bias[expert].copy_(bias)

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features} -> {self.out_features}), bias={self.bias is not None}"


class Plan(NamedTuple):
    """How one call of an expert layer spread its tokens, for the way back."""

    partition: Partition
    weights: Tensor | None
    """(K * capacity,): factor of each slot's output; None means 1."""
    shape: torch.Size
    """Shape of the tokens without channels."""


class ExpertLayer(nn.Module):
    """K experts of one FFN's form and size; what decides which tokens pass which expert is up to `dispatch`.

    The experts run the forward method of the FFN that they replace, on (K, capacity, C) tensors with its linear
    layers stacked, so any FFN works that treats tokens independently through linear layers, activations and dropout:
    plain, gated, or with several activations. Linear layers keep their names (`mlp.fc1.weight`); norm layers over the
    channels between them stay single, the experts share them.
    """

    averaged_in_eval = True
    _template: nn.Module

    def __init__(self, ffn: nn.Module, num_experts: int) -> None:
        """Build K copies of `ffn`, which is left untouched.

        Args:
            ffn: maps (..., C) to (..., D) token by token.
            num_experts: K, at least 1.

        Raises:
            ValueError: `num_experts` below 1.
            TypeError: `ffn` has no linear layer, or state that experts cannot have, see `check_ffn`.
        """
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}, must be at least 1")
        check_ffn(ffn)
        self.num_experts = num_experts
        linears = [m for m in ffn.modules() if is_linear(m)]
        template = copy.deepcopy(ffn, {id(m): StackedLinear(m, num_experts, self.averaged_in_eval) for m in linears})
        # The children are registered here, under their own names; the template only lends its forward method.
        object.__setattr__(self, "_template", template)
        self._modules.update(template._modules)
        self.train(ffn.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x (..., C) to (..., D).

        Raises:
            ValueError: the batch has too few tokens.
        """
        slots, plan = self.dispatch(x)
        return self.combine(self._template(slots), plan)

    def dispatch(self, x: Tensor) -> tuple[Tensor, Plan | None]:
        """Spread tokens x (..., C) over the slots (K, capacity, C) of the experts; plan None: x goes on as it is."""
        raise NotImplementedError

    def combine(self, outputs: Tensor, plan: Plan | None) -> Tensor:
        """Return the outputs (K, capacity, D) of the slots to the places of their tokens: (..., D)."""
        if plan is None:
            return outputs
        return combine(outputs, plan.partition, plan.weights).view(*plan.shape, outputs.shape[-1])

    def averaged_expert(self) -> nn.Module:
        """Return the mean of the experts as an FFN of the original class, with keys as before the conversion."""
        return copy.deepcopy(self._template, {id(layer): layer.averaged_linear() for _, layer in self.stacked_layers()})

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
        return self

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        super().__setattr__(name, value)
        template = self.__dict__.get("_template")
        if template is not None and name in template._modules:  # a child that is replaced here is replaced there
            template._modules[name] = self._modules[name]

    def extra_repr(self) -> str:
        return f"{type(self._template).__name__}, num_experts={self.num_experts}"


class RUPMoF(ExpertLayer):
    """K experts of one FFN's form and size. No router, no balancing loss, no dropped token.

    In training all tokens of the batch are shuffled and cut into K groups whose sizes differ by at most one;
    group i passes expert i. In evaluation every token passes the mean of the experts, which is the dense FFN
    that `averaged_expert` returns and `merge_experts` leaves behind. Both cost the FLOPs of one FFN.

    Source: abstracts of Sparse-to-Dense Training, IEEE TCSVT 2025 (doi 10.1109/TCSVT.2025.3586550), and of arXiv
        2308.06093. Details are from memory of the latter, not checked against its text.

    Example:
        >>> import timm
        >>> layer = RUPMoF(timm.layers.Mlp(8, 32), num_experts=4)
        >>> layer(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])
    """

    def dispatch(self, x: Tensor) -> tuple[Tensor, Plan | None]:
        """Cut the tokens at random; raises ValueError when there are fewer than experts. Evaluation has no plan."""
        if not self.training:
            return x, None
        tokens = x.reshape(-1, x.shape[-1])
        partition = random_partition(tokens.shape[0], self.num_experts, x.device)
        return dispatch(tokens, partition), Plan(partition, None, x.shape[:-1])


def check_ffn(ffn: nn.Module) -> None:
    """Refuse a module that cannot become experts.

    Raises:
        TypeError: it has no linear layer, a linear layer with a forward method of its own, or parameters or buffers
            that belong neither to a linear layer nor to a norm layer between the linear layers; or it does not map
            each token to a vector by itself (not checked on the meta device).
    """
    linears = [m for m in ffn.modules() if is_linear(m)]
    if not linears or is_linear(ffn):
        raise TypeError(f"{type(ffn).__name__} is not an FFN with nn.Linear layers inside")
    for linear in linears:
        if isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward:
            raise TypeError(f"{type(ffn).__name__} holds a {type(linear).__name__}, which is more than an nn.Linear")
    owners = list(linears)
    if len(linears) > 1 and all(any(linear is child for child in ffn.children()) for linear in linears):
        # Norms over the channels treat tokens one by one. Deeper linear layers might be those of an attention.
        owners += [m for m in ffn.children() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    known = {id(parameter) for m in owners for parameter in (m.weight, getattr(m, "bias", None))}
    state = [*ffn.named_parameters(), *ffn.named_buffers()]
    foreign = [name for name, tensor in state if id(tensor) not in known]
    if foreign:
        raise TypeError(f"{type(ffn).__name__} holds state outside its linear layers ({', '.join(foreign)})")
    if type(ffn).forward is not nn.Module.forward and not any(tensor.is_meta for _, tensor in state):
        _check_token_by_token(ffn, linears)


@torch.no_grad()
def _check_token_by_token(ffn: nn.Module, linears: list[nn.Module]) -> None:
    """Run a copy of `ffn` on a few tokens and on one of them alone: attention, for one, gives another result."""
    probe, device = copy.deepcopy(ffn).float().eval(), linear_parameters(linears[0])[0].device
    problems: list[str] = []
    for width in dict.fromkeys(linear_features(m)[0] for m in linears):  # the first one need not read the input
        tokens = torch.arange(6.0 * width, device=device).sin().view(2, 3, width)
        try:
            together, alone = probe(tokens), probe(tokens[:1, :1])
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            problems.append(str(error).partition("\n")[0])
            continue
        if not isinstance(together, Tensor) or together.shape[:-1] != tokens.shape[:-1]:
            raise TypeError(f"{type(ffn).__name__} does not return one vector for each token")
        # Loose, for autocast; other tokens change an output by far more.
        if not torch.allclose(together[:1, :1], alone, rtol=0, atol=0.01 * float(together.abs().max()), equal_nan=True):
            raise TypeError(f"{type(ffn).__name__} mixes tokens; an FFN treats each of them by itself")
        return
    raise TypeError(f"{type(ffn).__name__} does not run on tokens (groups, tokens, channels): {problems[0]}")


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is `nn.Linear`, or GPT-2's form of it: weight (in, out), its output features as `nf`."""
    if isinstance(module, nn.Linear):
        return True
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or bias is None or len(list(module.parameters())) > 2:
        return False
    return weight.dim() == 2 and weight.shape[1:] == bias.shape == (getattr(module, "nf", None),)


def linear_features(linear: nn.Module) -> tuple[int, int]:
    """Return the input and output features of a linear layer."""
    shape = linear_parameters(linear)[0].shape
    return (shape[1], shape[0]) if isinstance(linear, nn.Linear) else (shape[0], shape[1])


def linear_parameters(linear: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return the weight and the bias, None without one, of a linear layer, see `is_linear`."""
    return linear.get_parameter("weight"), linear._parameters.get("bias")


def mean_over_experts(stacked: Tensor) -> Tensor:
    """Mean over dimension 0, computed in float32 for lower precision and returned in the dtype of `stacked`."""
    return stacked.mean(0, dtype=torch.promote_types(stacked.dtype, torch.float32)).to(stacked.dtype)


def _stack(parameter: nn.Parameter, num_experts: int, transpose: bool = False) -> nn.Parameter:
    dense = parameter.detach().t() if transpose else parameter.detach()
    stacked = dense.unsqueeze(0).repeat(num_experts, *[1] * dense.dim())
    return nn.Parameter(stacked.contiguous(), requires_grad=parameter.requires_grad)
