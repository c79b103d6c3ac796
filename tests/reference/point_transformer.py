"""The Point Transformer classifier (Zhao et al. 2021, arXiv 2012.09164), as published, in plain torch.

One addition: with `mlp_ratio` above 0 a pre-norm FFN follows the attention in every block.
Neighbours are gathered first, and every layer behind runs on (B, M, k, C) tensors.
"""

import torch
from torch import nn

from .point_bert import DropPath, Mlp, gather


def farthest_points(xyz, number):
    """Select `number` of the points xyz (B, N, 3), index 0 first."""
    rows = torch.arange(xyz.shape[0], device=xyz.device)
    selected = [torch.zeros_like(rows)]
    distance = torch.full(xyz.shape[:2], float("inf"), dtype=xyz.dtype, device=xyz.device)
    while len(selected) < number:
        newest = xyz[rows, selected[-1]].unsqueeze(1)
        distance = torch.minimum(distance, ((xyz - newest) ** 2).sum(-1))
        selected.append(distance.argmax(-1))
    return torch.stack(selected, dim=1)


def nearest(center, xyz, number):
    """Indices (B, M, k) of the points xyz (B, N, 3) nearest to each center (B, M, 3)."""
    distance = torch.cdist(center, xyz, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(min(number, xyz.shape[1]), dim=-1, largest=False).indices


def over_channels(norm, x):
    """Apply a BatchNorm1d to the last dimension of x, whatever the others are."""
    return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class TransitionDown(nn.Module):
    def __init__(self, in_channels, channels, stride, neighbors):
        super().__init__()
        self.stride = stride
        self.neighbors = neighbors
        self.linear = nn.Linear(in_channels if stride == 1 else 3 + in_channels, channels, bias=False)
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, xyz, x):
        if self.stride == 1:
            return xyz, torch.relu(over_channels(self.bn, self.linear(x)))
        center = gather(xyz, farthest_points(xyz, max(xyz.shape[1] // self.stride, 1)))
        index = nearest(center, xyz, self.neighbors)
        relative = gather(xyz, index) - center.unsqueeze(2)
        grouped = torch.cat([relative, gather(x, index)], dim=-1)
        grouped = torch.relu(over_channels(self.bn, self.linear(grouped)))
        return center, grouped.amax(dim=2)


class PointTransformerLayer(nn.Module):
    def __init__(self, channels, share_planes, neighbors):
        super().__init__()
        self.share_planes = share_planes
        self.neighbors = neighbors
        self.linear_q = nn.Linear(channels, channels)
        self.linear_k = nn.Linear(channels, channels)
        self.linear_v = nn.Linear(channels, channels)
        self.linear_p = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, channels))
        self.linear_w = nn.Sequential(
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Linear(channels, channels // share_planes),
            nn.BatchNorm1d(channels // share_planes),
            nn.ReLU(),
            nn.Linear(channels // share_planes, channels // share_planes),
        )

    def forward(self, xyz, x):
        index = nearest(xyz, xyz, self.neighbors)
        neighbors = gather(x, index)
        query = self.linear_q(x).unsqueeze(2)
        key = self.linear_k(neighbors)
        value = self.linear_v(neighbors)
        position = gather(xyz, index) - xyz.unsqueeze(2)
        for layer in self.linear_p:
            position = over_channels(layer, position) if isinstance(layer, nn.BatchNorm1d) else layer(position)
        weights = key - query + position
        for layer in self.linear_w:
            weights = over_channels(layer, weights) if isinstance(layer, nn.BatchNorm1d) else layer(weights)
        weights = weights.softmax(dim=2)
        # Channel c has the weight of group c modulo the number of groups.
        weights = torch.cat([weights] * self.share_planes, dim=-1)
        return ((value + position) * weights).sum(dim=2)


class Block(nn.Module):
    def __init__(self, channels, share_planes, neighbors, mlp_ratio, drop_path):
        super().__init__()
        self.linear1 = nn.Linear(channels, channels, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.transformer2 = PointTransformerLayer(channels, share_planes, neighbors)
        self.bn2 = nn.BatchNorm1d(channels)
        self.linear3 = nn.Linear(channels, channels, bias=False)
        self.bn3 = nn.BatchNorm1d(channels)
        self.drop_path = DropPath(drop_path)
        self.has_mlp = mlp_ratio > 0
        if self.has_mlp:
            self.norm = nn.LayerNorm(channels)
            self.mlp = Mlp(channels, int(channels * mlp_ratio))

    def forward(self, xyz, x):
        y = torch.relu(over_channels(self.bn1, self.linear1(x)))
        y = torch.relu(over_channels(self.bn2, self.transformer2(xyz, y)))
        y = over_channels(self.bn3, self.linear3(y))
        x = torch.relu(x + self.drop_path(y))
        if self.has_mlp:
            x = x + self.drop_path(self.mlp(self.norm(x)))
        return x


class PointTransformer(nn.Module):
    """Clouds (B, N, C) to logits (B, num_classes)."""

    def __init__(
        self,
        num_classes,
        in_channels=3,
        channels=(32, 64, 128, 256, 512),
        depths=(1, 2, 3, 5, 2),
        strides=(1, 4, 4, 4, 4),
        num_neighbors=(8, 16, 16, 16, 16),
        share_planes=8,
        mlp_ratio=4.0,
        drop_path_rate=0.1,
        head_dims=(256, 128),
        head_dropout=0.5,
    ):
        super().__init__()
        count, built = sum(depths), 0
        self.stages = []
        for stage, width in enumerate(channels):
            layers = [TransitionDown(in_channels, width, strides[stage], num_neighbors[stage])]
            for _ in range(depths[stage]):
                rate = drop_path_rate * built / max(count - 1, 1)
                layers.append(Block(width, share_planes, num_neighbors[stage], mlp_ratio, rate))
                built += 1
            self.stages.append(f"enc{stage + 1}")
            self.add_module(self.stages[-1], nn.ModuleList(layers))
            in_channels = width
        head = []
        for dim in head_dims:
            head += [nn.Linear(in_channels, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Dropout(head_dropout)]
            in_channels = dim
        self.cls = nn.Sequential(*head, nn.Linear(in_channels, num_classes))

    def forward(self, points):
        xyz, x = points[:, :, :3], points
        for name in self.stages:
            down, *blocks = getattr(self, name)
            xyz, x = down(xyz, x)
            for block in blocks:
                x = block(xyz, x)
        return self.cls(x.mean(dim=1))
