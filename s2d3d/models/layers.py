"""Building blocks of the Point-BERT family: attention, transformer block and the mini-PointNet group encoder."""

from typing import TYPE_CHECKING

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import InputError
from ..ops.linear import narrow_linear, tall_linear
from ..ops.points import is_exporting

if TYPE_CHECKING:

    class _GroupMaxContext(torch.autograd.function.FunctionCtx):
        """What `_GroupMax` passes from forward to backward."""

        saved_tensors: tuple[Tensor, Tensor]

    class _AddToGroupsContext(torch.autograd.function.FunctionCtx):
        """What `_AddToGroups` passes from forward to backward."""

        num_groups: int


def check_channels(points: Tensor, in_channels: int) -> None:
    """Raise InputError unless points are (B, N, in_channels).

    Example:
        >>> check_channels(torch.rand(2, 8, 6), 3)
        Traceback (most recent call last):
        s2d3d.errors.InputError: points have shape (2, 8, 6), the model takes (B, N, 3): 3 channels
    """
    if torch.jit.is_tracing():  # sizes are tensors then
        return
    if points.dim() != 3 or points.shape[2] != in_channels:
        shape = tuple(points.shape)
        raise InputError(f"points have shape {shape}, the model takes (B, N, {in_channels}): {in_channels} channels")


class Attention(nn.Module):
    """Multi-head self-attention; `qkv` has no bias, as in Point-BERT and Point-MAE."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Build it for tokens of `dim` channels, which `num_heads` must divide."""
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, must divide trans_dim {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x (B, T, C) to (B, T, C)."""
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        # Taken apart before they are transposed, so that their gradients are joined where `qkv` needs them.
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attend = _attend_by_products if _products_pay(query) else _attend
        return self.proj(attend(query, key, value).transpose(1, 2).reshape(batch, tokens, channels))


WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Fused attention on a GPU. The gradients of cuDNN's, torch's first choice for bf16 on Hopper, can be NaN."""


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Map (B, H, T, D) each to (B, H, T, D)."""
    if query.is_cuda and query.dtype != torch.float32:  # of float32 cuDNN's does nothing
        with sdpa_kernel(WITHOUT_CUDNN):
            return F.scaled_dot_product_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def _products_pay(query: Tensor) -> bool:
    """Return whether whole attention matrices (B, H, T, T) are faster, and small enough to be kept.

    torch's fused attention is slow in bf16 on a CPU: 4 to 6 times the time of the products, backward pass included.
    Its own products, `SDPBackend.MATH`, take 2.5 times as long as these.
    """
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= 512


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Map (B, H, T, D) each to (B, H, T, D), as `F.scaled_dot_product_attention`."""
    batch, heads, tokens, channels = query.shape
    query, key, value = (part.reshape(batch * heads, tokens, channels) for part in (query, key, value))
    scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=channels**-0.5)
    return torch.bmm(scores.softmax(-1), value).view(batch, heads, tokens, channels)


class Block(nn.Module):
    """Pre-norm transformer block: attention and FFN, each behind a LayerNorm and on a residual path."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        """Build it; `drop_path` in [0, 1) is the probability to drop a residual path for a sample."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x (B, T, C) to (B, T, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TransformerEncoder(nn.Module):
    """A stack of blocks; the position embedding is added before each block.

    Source: Yu et al. 2022, Point-BERT.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float, drop_path_rate: float) -> None:
        """Build `depth` blocks; drop path grows linearly from 0 to `drop_path_rate` over them."""
        super().__init__()
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, rate) for rate in rates)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """Map tokens x (B, T, C) with positions pos (B, T, C) to (B, T, C)."""
        for block in self.blocks:
            x = block(x + pos)
        return x


class GroupEncoder(nn.Module):
    """Mini-PointNet: one token for each group of points.

    The weights are those of 1x1 convolutions, for compatibility with published checkpoints; the arithmetic is that of
    linear layers on (points, channels) rows. The layer after the first pooling reads [group maximum, point feature];
    its product is split, W [g, f] = W_g g + W_f f, so that the group's half is computed once per group instead of
    once per point: the same result with about half the arithmetic of the largest layer. Biases before a pooling
    are added after it, max(x + b) = max(x) + b, and never to the rows, which saves a pass over memory.

    Source: Yu et al. 2022, Point-BERT; Qi et al. 2017, PointNet.
    """

    def __init__(self, in_channels: int, encoder_dims: int, encoder_width: int = 128) -> None:
        """Build it with layers of width w, 2w, 4w and `encoder_dims`, where w is `encoder_width` (128 as published)."""
        super().__init__()
        width = encoder_width
        self.first_conv = nn.Sequential(
            nn.Conv1d(in_channels, width, 1),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, 2 * width, 1),
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(4 * width, 4 * width, 1),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(inplace=True),
            nn.Conv1d(4 * width, encoder_dims, 1),
        )

    def forward(self, groups: Tensor) -> Tensor:
        """Map groups (B, G, S, C) to tokens (B, G, encoder_dims)."""
        batch, num_group, group_size, channels = groups.shape
        (weight1, bias1), norm1, relu1, (weight2, bias2) = _layers(self.first_conv)
        (weight3, bias3), norm2, relu2, (weight4, bias4) = _layers(self.second_conv)
        points = groups.reshape(-1, channels)
        points = tall_linear(relu1(norm1(narrow_linear(points, weight1, bias1))), weight2)
        width = points.shape[-1]
        pooled = max_over_group(points.view(-1, group_size, width)) + bias2
        of_group, of_point = weight3[:, :width], weight3[:, width:]
        shift = F.linear(pooled, of_group, F.linear(bias2, of_point, bias3))
        points = relu2(norm2(_add_to_groups(tall_linear(points, of_point), shift)))
        points = tall_linear(points, weight4).view(-1, group_size, weight4.shape[0])
        tokens = max_over_group(points) + bias4
        return tokens.view(batch, num_group, -1)


def max_over_group(x: Tensor) -> Tensor:
    """Map x (G, S, C) to the maximum over S, (G, C); equal maxima share the gradient, as with `amax`.

    In a compiled graph, one position gets the whole gradient. The graph may recompute its input, such as a norm layer,
    for the backward pass with other rounding. Then no value equals the maximum, and sharing would give 0 / 0.
    """
    if torch.compiler.is_compiling() and not is_exporting():
        return x.gather(1, x.detach().argmax(1, keepdim=True)).squeeze(1)
    return _GroupMax.apply(x) if torch.is_grad_enabled() and x.requires_grad else x.amax(1)


class _GroupMax(torch.autograd.Function):
    """`amax` over dimension 1. Its own backward counts equal maxima in int64, which costs several times the rest."""

    @staticmethod
    def forward(ctx: "_GroupMaxContext", x: Tensor) -> Tensor:
        largest = x.amax(1)
        ctx.save_for_backward(x, largest)
        return largest

    @staticmethod
    def backward(ctx: "_GroupMaxContext", gradient: Tensor) -> Tensor:
        x, largest = ctx.saved_tensors
        # Written as numbers at once: by way of a bool it takes three times as long.
        is_largest = torch.eq(x, largest.unsqueeze(1), out=torch.empty_like(x, dtype=gradient.dtype))
        return is_largest.mul_((gradient / is_largest.sum(1)).unsqueeze(1))


def _add_to_groups(rows: Tensor, shift: Tensor) -> Tensor:
    """Add (G, C) to the rows (G S, C) of each group, in place: they are the largest tensor of the model."""
    if torch.is_grad_enabled() and rows.requires_grad and not torch.compiler.is_compiling():
        return _AddToGroups.apply(rows, shift)
    rows.view(shift.shape[0], -1, shift.shape[1]).add_(shift.unsqueeze(1))
    return rows


class _AddToGroups(torch.autograd.Function):
    """In place in a view, autograd would copy the gradient of the rows three times."""

    @staticmethod
    def forward(ctx: "_AddToGroupsContext", rows: Tensor, shift: Tensor) -> Tensor:
        ctx.num_groups = shift.shape[0]
        ctx.mark_dirty(rows)
        rows.view(shift.shape[0], -1, shift.shape[1]).add_(shift.unsqueeze(1))
        return rows

    @staticmethod
    def backward(ctx: "_AddToGroupsContext", gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.reshape(ctx.num_groups, -1, gradient.shape[1]).sum(1)


def _layers(stack: nn.Sequential) -> tuple[tuple[Tensor, Tensor], nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    first, norm, activation, last = stack
    return _linear_form(first), norm, activation, _linear_form(last)


def _linear_form(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight (out, in) and bias (out,) of a 1x1 convolution."""
    assert isinstance(conv, nn.Conv1d) and conv.bias is not None
    return conv.weight.squeeze(-1), conv.bias
