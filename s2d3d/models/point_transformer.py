"""Point Transformer classifiers: vector attention among neighbours, fewer points at each stage, an FFN in every block.

State-dict keys and shapes are those of the public classifiers (encoder of S3DIS segmentation with a classification
head); the FFN, which they lack, adds `norm` and `mlp` to each block.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.linear import narrow_linear
from ..ops.points import farthest_point_sample, gather_points
from .layers import check_channels, max_over_group
from .vector_attention import Neighbourhood, VectorAttention, find_neighbours, gather_sum

MAX_DEPTH, MAX_STAGES = 1000, 16
"""Far beyond any model; a config or checkpoint with larger numbers would be built for hours before it is refused."""


class PointTransformer(nn.Module):
    """Point Transformer classifier (Zhao et al. 2021, arXiv 2012.09164) with an FFN in every block.

    Each stage keeps the farthest points, one in `stride`, pools the neighbourhood of each, and lets every point attend
    to its nearest neighbours; the head reads the mean over the points of the last stage.

    The public classifier is `depths=(0, 1, 2, 4, 1), mlp_ratio=0`: 8 attention blocks, 3,262,776 parameters with 40
    classes and 3 channels (its code counts the transition as a block of its stage: 1, 2, 3, 5, 2). The
    default has these numbers of blocks beside the transitions, as the published segmentation encoder, and FFNs.

    Attributes:
        keeps_a_share: it selects a share of the points of a cloud, not a fixed number of them.
    """

    keeps_a_share = True

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        depths: Sequence[int] = (1, 2, 3, 5, 2),
        strides: Sequence[int] = (1, 4, 4, 4, 4),
        num_neighbors: Sequence[int] = (8, 16, 16, 16, 16),
        share_planes: int = 8,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        head_dims: Sequence[int] = (256, 128),
        head_dropout: float = 0.5,
    ) -> None:
        """Build the classifier.

        Args:
            num_classes: outputs of the head.
            in_channels: channels of a point; the first three are its coordinates.
            channels: width of each stage, multiples of `share_planes`.
            depths: blocks of each stage, at least 0 and not all 0.
            strides: of the points that come in, a stage keeps one in so many, at least one point.
            num_neighbors: size of the neighbourhoods of each stage, or all points where a cloud has fewer.
            share_planes: channels that share one attention weight.
            mlp_ratio: hidden width of an FFN over the width of its stage; 0 builds blocks without FFN, as published.
            drop_path_rate: of the last block, growing linearly from 0; in [0, 1).
            head_dims: hidden widths of the head.
            head_dropout: in the classification head, in [0, 1).

        Raises:
            ValueError: a value out of range.
        """
        super().__init__()
        stages = dict(channels=channels, depths=depths, strides=strides, num_neighbors=num_neighbors)
        _check_stages(stages, share_planes)
        _check_head(num_classes, head_dims)
        _check_fractions(drop_path_rate=drop_path_rate, head_dropout=head_dropout)
        if in_channels < 3:
            raise ValueError(f"in_channels is {in_channels}, must be at least 3 (x, y, z)")
        if mlp_ratio and int(min(channels) * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio is {mlp_ratio}, must be 0 (no FFN) or at least 1 / {min(channels)} channels")
        self.in_channels = in_channels
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.num_stages, width = len(channels), in_channels
        for index, (out, depth, stride, neighbors) in enumerate(zip(*stages.values()), start=1):
            down = TransitionDown(width, out, stride, neighbors)
            blocks = (Block(out, share_planes, mlp_ratio, next(rates)) for _ in range(depth))
            self.add_module(f"enc{index}", Stage(neighbors, down, *blocks))
            width = out
        searching = [k for k, stride, depth in zip(num_neighbors, strides, depths) if stride > 1 or depth]
        self.min_points = searching[0]
        self.cls = _head(width, head_dims, num_classes, head_dropout)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beside biases and norms (timm's convention): none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Describe the order of the layers (timm's convention): transitions and blocks of the stages, the head."""
        return {"blocks": [(r"^enc(\d+)" if coarse else r"^enc(\d+)\.(\d+)", None)]}

    @torch.jit.ignore
    def coordinate_weights(self) -> dict[str, tuple[int, ...]]:
        """Names of the weights that read x, y, z, and the columns at which each of these triples begins."""
        columns: dict[str, tuple[int, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, TransitionDown):
                relative = (0,) if module.stride > 1 else ()
                absolute = (3 * len(relative),) if name == "enc1.0" else ()  # the features there are the points
                if relative or absolute:
                    columns[f"{name}.linear.weight"] = (*relative, *absolute)
            elif isinstance(module, VectorAttention):
                columns[f"{name}.linear_p.0.weight"] = (0,)
        return columns

    @torch.jit.ignore
    def token_positions(self, points: Tensor, layer: str) -> Tensor:
        """Return where the tokens of a layer, such as "enc2.1.mlp", lie in clouds (B, N, C): (B, M, 3).

        They are the points that the stage of the layer keeps.
        """
        xyz, last = points[..., :3], int(layer.partition(".")[0].removeprefix("enc"))
        for index in range(1, last + 1):
            down = self.get_submodule(f"enc{index}.0")
            assert isinstance(down, TransitionDown)
            xyz = down.keep_points(xyz)
        return xyz

    @torch.jit.ignore
    def fewest_points(self) -> int:
        """Return how many points a cloud needs in an exported program that takes any number of points.

        Two points must be left in the last stage, because exporters treat a dimension of one element as a special case.
        """
        strides = (module.stride for module in self.modules() if isinstance(module, TransitionDown))
        return max(self.min_points, 2 * math.prod(strides))

    def forward_features(self, points: Tensor) -> Tensor:
        """Map points (B, N, C) to the features (B, M, C') of the points of the last stage.

        Raises:
            ValueError: fewer points than the first neighbourhood takes.
        """
        if points.shape[1] < self.min_points:
            raise ValueError(
                f"{points.shape[1]} points per cloud are too few for neighbourhoods of num_neighbors={self.min_points}"
            )
        xyz, x = points[..., :3], points
        for index in range(1, self.num_stages + 1):
            xyz, x = self.get_submodule(f"enc{index}")(xyz, x)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        """Map features (B, M, C') to logits (B, num_classes)."""
        return self.cls(x.mean(1))

    def forward(self, points: Tensor) -> Tensor:
        """Map points (B, N, in_channels) to logits (B, num_classes)."""
        check_channels(points, self.in_channels)
        return self.forward_head(self.forward_features(points))


class Stage(nn.Sequential):
    """A transition down, and blocks that share one neighbour search."""

    def __init__(self, num_neighbors: int, *layers: nn.Module) -> None:
        """Stack a `TransitionDown` and any number of blocks."""
        super().__init__(*layers)
        self.num_neighbors = num_neighbors

    # A stack of layers for its keys and its iteration; its input is a pair, which `Sequential` does not know.
    def forward(self, xyz: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Map coordinates (B, N, 3) and features (B, N, C) to those of the stage, (B, M, 3) and (B, M, C')."""
        down, *blocks = self
        xyz, x = down(xyz, x)
        if blocks:
            neighbourhood = find_neighbours(xyz, xyz, self.num_neighbors)
            for block in blocks:
                x = block(x, neighbourhood)
        return xyz, x


class TransitionDown(nn.Module):
    """Keep the farthest points, one in `stride`, each with the maximum over its neighbours' features.

    The linear layer reads coordinates relative to the centre and features. Being linear, it is applied to the points
    before they are gathered, W [p_j - p_i, x_j] = W [p_j, x_j] - W [p_i, 0], and not to each of their copies. With
    stride 1 no point is dropped or gathered, and the layer reads only the features.
    """

    foldable_pairs = (("linear", "bn"),)

    def __init__(self, in_channels: int, channels: int, stride: int, num_neighbors: int) -> None:
        """Build it from `in_channels` to `channels`."""
        super().__init__()
        self.stride, self.num_neighbors = stride, num_neighbors
        self.linear = nn.Linear(in_channels + (3 if stride > 1 else 0), channels, bias=False)
        self.bn = nn.BatchNorm1d(channels)

    def keep_points(self, xyz: Tensor) -> Tensor:
        """Return the farthest points (B, M, 3) of xyz (B, N, 3), M = max(1, N // stride); all with stride 1."""
        if self.stride == 1:
            return xyz
        return gather_points(xyz, farthest_point_sample(xyz, max(1, xyz.shape[1] // self.stride)))

    def forward(self, xyz: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map coordinates (B, N, 3) and features (B, N, C) to (B, M, 3) and (B, M, C'), M = max(1, N // stride)."""
        if self.stride == 1:
            features = self.bn(narrow_linear(x.flatten(0, 1), self.linear.weight, self.linear.bias))
            return xyz, F.relu(features, inplace=True).view(*x.shape[:2], -1)
        centers = self.keep_points(xyz)
        neighbourhood = find_neighbours(centers, xyz, self.num_neighbors)
        weight = self.linear.weight
        of_points, bias = F.linear(x.flatten(0, 1), weight[:, 3:]), self.linear.bias
        if torch.is_autocast_enabled(x.device.type):  # the difference first: that of two rounded products is coarse
            pairs = gather_sum(
                neighbourhood, of_points, None, narrow_linear(neighbourhood.offsets, weight[:, :3], bias)
            )
        else:
            of_points = of_points + narrow_linear(xyz.flatten(0, 1), weight[:, :3])
            pairs = gather_sum(neighbourhood, of_points, narrow_linear(-centers.flatten(0, 1), weight[:, :3], bias))
        grouped = self.bn(pairs)
        # The maximum first: ReLU does not change which is largest, and has less to do.
        pooled = max_over_group(grouped.unflatten(0, (-1, neighbourhood.size)))
        return centers, F.relu(pooled).view(*centers.shape[:2], -1)


class Block(nn.Module):
    """Attention between two linear layers on a residual path, then a pre-norm FFN on another."""

    foldable_pairs = (("linear1", "bn1"), ("linear3", "bn3"))

    def __init__(self, channels: int, share_planes: int, mlp_ratio: float, drop_path: float) -> None:
        """Build it; `drop_path` in [0, 1) is the probability to drop a residual path for a sample."""
        super().__init__()
        self.linear1 = nn.Linear(channels, channels, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.transformer2 = VectorAttention(channels, share_planes)
        self.bn2 = nn.BatchNorm1d(channels)
        self.linear3 = nn.Linear(channels, channels, bias=False)
        self.bn3 = nn.BatchNorm1d(channels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm = nn.LayerNorm(channels) if mlp_ratio else None
        self.mlp = Mlp(channels, int(channels * mlp_ratio)) if mlp_ratio else None

    def forward(self, x: Tensor, neighbourhood: Neighbourhood) -> Tensor:
        """Map features x (B, N, C) to (B, N, C)."""
        rows = F.relu(self.bn1(self.linear1(x.flatten(0, 1))), inplace=True)
        rows = F.relu(self.bn2(self.transformer2(rows, neighbourhood)), inplace=True)
        x = F.relu(x + self.drop_path(self.bn3(self.linear3(rows)).view_as(x)), inplace=True)
        if self.mlp is None or self.norm is None:  # both or neither
            return x
        return x + self.drop_path(self.mlp(self.norm(x)))


def _head(width: int, head_dims: Sequence[int], num_classes: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for dim in head_dims:
        layers += [nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        width = dim
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def _check_stages(stages: dict[str, Sequence[int]], share_planes: int) -> None:
    lengths = {name: len(values) for name, values in stages.items()}
    if len(set(lengths.values())) > 1 or not lengths["channels"]:
        counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"channels, depths, strides and num_neighbors need one value for each stage: {counts}")
    for name, values in stages.items():
        least = 0 if name == "depths" else 1
        for value in values:
            if value < least:
                raise ValueError(f"{name} holds {value}, must be at least {least}")
    if sum(stages["depths"]) > MAX_DEPTH or lengths["channels"] > MAX_STAGES:
        raise ValueError(f"depths holds more than {MAX_DEPTH} blocks, or more than {MAX_STAGES} stages")
    if not any(stages["depths"]):
        raise ValueError("depths holds only zeros, must give at least one block")
    if share_planes < 1:
        raise ValueError(f"share_planes is {share_planes}, must be at least 1")
    for width in stages["channels"]:
        if width % share_planes:
            raise ValueError(f"channels holds {width}, must be a multiple of share_planes {share_planes}")


def _check_head(num_classes: int, head_dims: Sequence[int]) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, must be at least 1")
    for dim in head_dims:
        if dim < 1:
            raise ValueError(f"head_dims holds {dim}, must be at least 1")


def _check_fractions(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}, must be in [0, 1)")
