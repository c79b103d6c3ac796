"""Vector attention among neighbours, the neighbour search, and sums over pairs of a centre and a neighbour."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.linear import narrow_linear
from ..ops.points import gather_points, is_exporting, nearest_neighbours

if TYPE_CHECKING:

    class _GatherSumContext(torch.autograd.function.FunctionCtx):
        """The state that `_GatherSum` passes from forward to backward."""

        saved_tensors: tuple[Tensor]
        needs_input_grad: tuple[bool, bool, bool, bool, bool]
        size: int
        num_points: int


class Neighbourhood(NamedTuple):
    """The k nearest points of each centre of B clouds, the centre itself included where it is one of the points."""

    rows: Tensor
    """(B * M * k,) int64: neighbours as rows of the (B * N, C) features of all clouds, centre by centre."""
    offsets: Tensor
    """(B * M * k, 3): their coordinates relative to the centre."""
    size: int
    """k."""


def find_neighbours(centers: Tensor, xyz: Tensor, num_neighbors: int) -> Neighbourhood:
    """Find the `num_neighbors` points of xyz (B, N, 3) that are nearest to each of centers (B, M, 3), or all N."""
    batch, num_points, _ = xyz.shape
    size = min(num_neighbors, num_points)
    index = nearest_neighbours(centers, xyz, size)
    offsets = gather_points(xyz, index) - centers.unsqueeze(2)
    first = torch.arange(batch, device=index.device).view(-1, 1, 1) * num_points
    return Neighbourhood((index + first).flatten(), offsets.flatten(0, 2), size)


class VectorAttention(nn.Module):
    """Attention among neighbours with a weight for each group of channels.

    Weights are softmax_j(MLP(k_j - q_i + p_ij)), the output is sum_j w_ij (v_j + p_ij), where p_ij = MLP(x_j - x_i)
    encodes the position of neighbour j relative to point i. Channels c, c + C / s, c + 2 C / s, ... share a weight.

    Queries, keys and values are made of the N points and then gathered, and BatchNorm sees rows (B N k, C).

    Source: Zhao et al. 2021, Point Transformer.
    """

    def __init__(self, channels: int, share_planes: int) -> None:
        """Build it for `channels`, of which `share_planes` share a weight."""
        super().__init__()
        groups = channels // share_planes
        self.share_planes = share_planes
        self.linear_q = nn.Linear(channels, channels)
        self.linear_k = nn.Linear(channels, channels)
        self.linear_v = nn.Linear(channels, channels)
        self.linear_p = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Linear(3, channels))
        self.linear_w = nn.Sequential(
            nn.BatchNorm1d(channels), nn.ReLU(inplace=True), nn.Linear(channels, groups),
            nn.BatchNorm1d(groups), nn.ReLU(inplace=True), nn.Linear(groups, groups),
        )  # fmt: skip

    def forward(self, x: Tensor, neighbourhood: Neighbourhood) -> Tensor:
        """Map rows x (B N, C) to (B N, C)."""
        *hidden, last = self.linear_p
        assert isinstance(last, nn.Linear)
        position = neighbourhood.offsets
        for layer in hidden:
            position = layer(position)
        position = narrow_linear(position, last.weight)
        # Its bias joins keys and values before they are gathered: N rows instead of N k.
        relation = gather_sum(neighbourhood, self.linear_k(x) + last.bias, -self.linear_q(x), position)
        values = gather_sum(neighbourhood, self.linear_v(x) + last.bias, None, position)
        weights = self.linear_w(relation).view(x.shape[0], neighbourhood.size, 1, -1).softmax(1)
        values = values.view(x.shape[0], neighbourhood.size, self.share_planes, -1)
        return (values * weights).sum(1).flatten(1)


def gather_sum(
    neighbourhood: Neighbourhood, of_points: Tensor, of_centers: Tensor | None = None, of_pairs: Tensor | None = None
) -> Tensor:
    """Add the values of the neighbour, of the centre and of the pair, for each pair of a centre and a neighbour.

    Args:
        neighbourhood: the pairs.
        of_points: (B N, C).
        of_centers: (B M, C); None adds nothing.
        of_pairs: (B M k, C); None adds nothing.

    Returns:
        (B M k, C) in the dtype of `of_points`.
    """
    others = (other if other is None else other.to(of_points.dtype) for other in (of_centers, of_pairs))
    if torch.jit.is_tracing() or is_exporting():  # these have no place for a Python function
        return _gather_sum(neighbourhood.rows, neighbourhood.size, of_points, *others)
    return _GatherSum.apply(neighbourhood.rows, neighbourhood.size, of_points, *others)


def _gather_sum(
    rows: Tensor, size: int, of_points: Tensor, of_centers: Tensor | None, of_pairs: Tensor | None
) -> Tensor:
    result = of_points.index_select(0, rows)
    if of_centers is not None:
        result.view(-1, size, result.shape[1]).add_(of_centers.unsqueeze(1))
    return result if of_pairs is None else result.add_(of_pairs)


class _GatherSum(torch.autograd.Function):
    """See `gather_sum`. In place where autograd would copy, because memory traffic is the whole cost."""

    @staticmethod
    def forward(
        ctx: "_GatherSumContext",
        rows: Tensor, size: int, of_points: Tensor, of_centers: Tensor | None, of_pairs: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(rows)
        ctx.size, ctx.num_points = size, of_points.shape[0]
        return _gather_sum(rows, size, of_points, of_centers, of_pairs)

    @staticmethod
    def backward(ctx: "_GatherSumContext", gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        gradient, (_, _, _, has_centers, has_pairs) = gradient.contiguous(), ctx.needs_input_grad
        channels = gradient.shape[1]
        # With an expanded index this is sorted and runs in parallel on a CPU; `index_add_` does neither.
        index = rows.unsqueeze(1).expand(-1, channels)
        of_points = gradient.new_zeros(ctx.num_points, channels).scatter_add_(0, index, gradient)
        of_centers = gradient.view(-1, ctx.size, channels).sum(1) if has_centers else None
        return None, None, of_points, of_centers, gradient if has_pairs else None
