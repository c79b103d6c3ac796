"""RUP-MoF: a mixture of FFNs in which every token passes exactly one expert, chosen by random uniform partition."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import combine, dispatch, random_partition


class StackedLinear(nn.Module):
    """The same linear layer of K experts, stacked: `weight` (K, in, out), `bias` (K, out) or None.

    (K, in, out) feeds `baddbmm` without a transposed copy. The names end in `.weight` and `.bias` like those
    of `nn.Linear`, so that optimizer helpers which go by name do not decay the biases.
    """

    def __init__(self, linear: nn.Linear, num_experts: int) -> None:
        """Stack `num_experts` copies of `linear`, in its dtype and on its device."""
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, linear.in_features, linear.out_features
        self.weight = _stack(linear.weight, num_experts, transpose=True)
        self.bias = None if linear.bias is None else _stack(linear.bias, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Training: x (K, capacity, in), one slice for each expert. Evaluation: x (..., in) through the mean expert."""
        if not self.training:
            weight, bias = self.averaged()
            return F.linear(x, weight, bias)
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)

    def averaged(self) -> tuple[Tensor, Tensor | None]:
        """Return the mean over experts in `nn.Linear` layout: weight (out, in), bias (out,) or None."""
        # One contiguous copy here and in `averaged_linear`: equal layout, hence equal bits before and after a merge.
        weight = mean_over_experts(self.weight).t().contiguous()
        return weight, None if self.bias is None else mean_over_experts(self.bias)

    @torch.no_grad()
    def averaged_linear(self) -> nn.Linear:
        """Build the `nn.Linear` that holds the mean of the experts; keeps dtype, device, requires_grad and mode."""
        weight, bias = self.averaged()
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=bias is not None, device="cpu")
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    @torch.no_grad()
    def load_expert_(self, expert: int, linear: nn.Linear) -> None:
        """Overwrite one expert with the weights of `linear`."""
        self.weight[expert].copy_(linear.weight.t())
        if self.bias is not None:
            self.bias[expert].copy_(linear.bias)

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features} -> {self.out_features}), bias={self.bias is not None}"


class RUPMoF(nn.Module):
    """K experts of one FFN's form and size. No router, no balancing loss, no dropped token.

    In training all tokens of the batch are shuffled and cut into K groups whose sizes differ by at most one;
    group i passes expert i. In evaluation every token passes the mean of the experts, which is the dense FFN
    that `averaged_expert` returns and `merge_experts` leaves behind. Both cost the FLOPs of one FFN.

    The experts run the forward method of the FFN that they replace, on (K, capacity, C) tensors with its linear
    layers stacked, so any FFN works that treats tokens independently through `nn.Linear` layers, activations
    and dropout: plain, gated, or with several activations. Linear layers keep their names (`mlp.fc1.weight`).

    Source: Sparse-to-Dense Training, IEEE TCSVT 2025 (doi 10.1109/TCSVT.2025.3586550); arXiv 2308.06093, section 3.

    Example:
        >>> import timm
        >>> layer = RUPMoF(timm.layers.Mlp(8, 32), num_experts=4)
        >>> layer(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])
    """

    def __init__(self, ffn: nn.Module, num_experts: int) -> None:
        """Build K copies of `ffn`, which is left untouched.

        Args:
            ffn: maps (..., C) to (..., D) token by token.
            num_experts: K, at least 1.

        Raises:
            ValueError: `num_experts` below 1.
            TypeError: `ffn` has no linear layer, or parameters or buffers outside its linear layers.
        """
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}, must be at least 1")
        check_ffn(ffn)
        self.num_experts = num_experts
        template = copy.deepcopy(ffn, {id(m): StackedLinear(m, num_experts) for m in ffn.modules() if isinstance(m, nn.Linear)})
        # The children are registered here, under their own names; the template only lends its forward method.
        object.__setattr__(self, "_template", template)
        self._modules.update(template._modules)
        self.train(ffn.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x (..., C) to (..., D).

        Raises:
            ValueError: in training, when the batch has fewer tokens than experts.
        """
        if not self.training:
            return self._template(x)
        tokens = x.reshape(-1, x.shape[-1])
        partition = random_partition(tokens.shape[0], self.num_experts, x.device)
        outputs = self._template(dispatch(tokens, partition))
        return combine(outputs, partition).view(*x.shape[:-1], outputs.shape[-1])

    def averaged_expert(self) -> nn.Module:
        """Return the mean of the experts as an FFN of the original class, with keys as before the conversion."""
        return copy.deepcopy(self._template, {id(layer): layer.averaged_linear() for _, layer in self.stacked_layers()})

    def stacked_layers(self) -> Iterator[tuple[str, StackedLinear]]:
        """Iterate over (name, layer) of the stacked linear layers."""
        return ((name, m) for name, m in self.named_modules() if isinstance(m, StackedLinear))

    def train(self, mode: bool = True) -> "RUPMoF":
        """Set the mode here and in the template, whose forward may look at its own `training`."""
        super().train(mode)
        self._template.train(mode)
        return self

    def extra_repr(self) -> str:
        return f"{type(self._template).__name__}, num_experts={self.num_experts}"


def check_ffn(ffn: nn.Module) -> None:
    """Refuse a module that cannot become experts.

    Raises:
        TypeError: it has no linear layer, or parameters or buffers that do not belong to a linear layer.
    """
    owned = [m for m in ffn.modules() if isinstance(m, nn.Linear)]
    if not owned or isinstance(ffn, nn.Linear):
        raise TypeError(f"{type(ffn).__name__} is not an FFN with nn.Linear layers inside")
    known = {id(tensor) for m in owned for tensor in m.parameters(recurse=False)}
    state = [*ffn.named_parameters(), *ffn.named_buffers()]
    foreign = [name for name, tensor in state if id(tensor) not in known]
    if foreign:
        raise TypeError(f"{type(ffn).__name__} holds state outside its linear layers ({', '.join(foreign)})")


def mean_over_experts(stacked: Tensor) -> Tensor:
    """Mean over dimension 0, computed in float32 for lower precision and returned in the dtype of `stacked`."""
    return stacked.mean(0, dtype=torch.promote_types(stacked.dtype, torch.float32)).to(stacked.dtype)


def _stack(parameter: nn.Parameter, num_experts: int, transpose: bool = False) -> nn.Parameter:
    dense = parameter.detach().t() if transpose else parameter.detach()
    stacked = dense.unsqueeze(0).repeat(num_experts, *[1] * dense.dim())
    return nn.Parameter(stacked.contiguous(), requires_grad=parameter.requires_grad)
