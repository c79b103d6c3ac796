"""Linear layers over very many rows on a CPU: the same product by the faster library, or in the faster shape."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:

    class _TallContext(FunctionCtx):
        """What `_TallLinear` passes from forward to backward."""

        saved_tensors: tuple[Tensor, Tensor]
        needs_input_grad: tuple[bool, bool]


MIN_ROWS = 2048
MIN_COLUMNS = 16
"""Below these sizes the two libraries are equal, or the product is a small part of the time."""
PART = 1024
"""Rows of one product in `narrow_linear`."""


def tall_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Map x (N, I) to x @ weight.T (N, O), as `F.linear` without bias, faster for many rows of float32 on a CPU.

    torch multiplies float32 matrices by MKL; for thousands of rows of a few hundred columns oneDNN, which torch ships
    as well, takes 0.8 to 0.9 of its time (AMD EPYC, AVX2) in the forward pass and for the gradient of x. The gradient
    of the weight stays with MKL, which is the faster one there. Everything else (GPUs, autocast, other types, few rows,
    compiled, traced and exported graphs, `torch.backends.mkldnn` switched off) is `F.linear`. The
    transforms of torch.func do not pass through the fast way.

    Args:
        x: (N, I).
        weight: (O, I).

    Returns:
        (N, O); differs from `F.linear` by rounding.

    Example:
        >>> tall_linear(torch.ones(4096, 32), torch.ones(64, 32)).shape
        torch.Size([4096, 64])
    """
    if not _pays(x, weight):
        return F.linear(x, weight)
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _TallLinear.apply(x, weight) if needs_gradient else _onednn(x, weight)


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` for many rows of a few channels, such as coordinates.

    The weight's gradient sums over all rows, which MKL does slowly for so few columns: as a product of each
    `PART` rows, added up, forward and backward take a third of the time. The transposed copy of the weight
    gives its gradient the layout that is faster where rows do not divide.

    Args:
        x: (N, I).
        weight: (O, I).
        bias: (O,) or None.

    Returns:
        (N, O).

    Example:
        >>> narrow_linear(torch.ones(2048, 3), torch.ones(8, 3)).shape
        torch.Size([2048, 8])
    """
    columns = weight.t().contiguous()
    if _is_eager() and x.device.type == "cpu" and len(x) > PART and len(x) % PART == 0:
        parts = x.view(-1, PART, x.shape[1])
        columns = columns.expand(len(parts), -1, -1)
        product = torch.bmm(parts, columns) if bias is None else torch.baddbmm(bias, parts, columns)
        return product.view(len(x), -1)
    return torch.mm(x, columns) if bias is None else torch.addmm(bias, x, columns)


class _TallLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: "_TallContext", x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: "_TallContext", gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # In operations that have gradients of their own, so that second derivatives work too.
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        return (
            tall_linear(gradient, weight.t()) if for_x else None,
            gradient.t() @ x if for_weight else None,
        )


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    # For rows that lie apart, as those of a slice, oneDNN has no fast kernel.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), None, "none", [], "")


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

if _HAS_ONEDNN:  # torch's counter of operations knows nothing of this one

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: torch.Size, weight: torch.Size, *args: object, **kwargs: object) -> int:
        return 2 * x[0] * weight[0] * weight[1]


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        _is_eager()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[0] >= MIN_ROWS
        and min(weight.shape) >= MIN_COLUMNS
        and _HAS_ONEDNN
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def _is_eager() -> bool:
    return not (torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling())
