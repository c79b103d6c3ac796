"""The Point-BERT classifier (Yu et al. 2022, arXiv 2111.14819), as published, in plain torch."""

import torch
from torch import nn


def farthest_point_sample(xyz, number):
    """Select `number` of the points xyz (B, N, 3), index 0 first; points within 1e-3 squared of the origin never."""
    batch, count, _ = xyz.shape
    rows = torch.arange(batch, device=xyz.device)
    selected = torch.zeros(batch, number, dtype=torch.long, device=xyz.device)
    distance = torch.full((batch, count), 1e10, device=xyz.device)
    refused = (xyz**2).sum(-1) <= 1e-3
    farthest = torch.zeros(batch, dtype=torch.long, device=xyz.device)
    for step in range(number):
        selected[:, step] = farthest
        newest = xyz[rows, farthest].unsqueeze(1)
        distance = torch.minimum(distance, ((xyz - newest) ** 2).sum(-1))
        farthest = distance.masked_fill(refused, -1).argmax(-1)
    return selected


def gather(points, index):
    """Pick rows of points (B, N, C) by index (B, ...)."""
    rows = torch.arange(points.shape[0], device=points.device).view(-1, *[1] * (index.dim() - 1))
    return points[rows, index]


class Group(nn.Module):
    """Cut clouds (B, N, 3) into neighbourhoods (B, G, S, 3), relative to their centres (B, G, 3)."""

    def __init__(self, num_group, group_size):
        super().__init__()
        self.num_group = num_group
        self.group_size = group_size

    def forward(self, xyz):
        center = gather(xyz, farthest_point_sample(xyz, self.num_group))
        # Exact differences, as the CUDA operator of the public code computes them.
        distance = torch.cdist(center, xyz, compute_mode="donot_use_mm_for_euclid_dist")
        index = distance.topk(self.group_size, dim=-1, largest=False).indices
        neighborhood = gather(xyz, index) - center.unsqueeze(2)
        return neighborhood, center


class Encoder(nn.Module):
    """Mini-PointNet: neighbourhoods (B, G, S, 3) to tokens (B, G, C)."""

    def __init__(self, encoder_channel, width=128):
        super().__init__()
        self.encoder_channel = encoder_channel
        self.first_conv = nn.Sequential(
            nn.Conv1d(3, width, 1),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, 2 * width, 1),
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(4 * width, 4 * width, 1),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(inplace=True),
            nn.Conv1d(4 * width, encoder_channel, 1),
        )

    def forward(self, neighborhood):
        batch, groups, size, _ = neighborhood.shape
        points = neighborhood.reshape(batch * groups, size, 3)
        feature = self.first_conv(points.transpose(2, 1))
        feature_global = feature.max(dim=2, keepdim=True)[0]
        feature = torch.cat([feature_global.expand(-1, -1, size), feature], dim=1)
        feature = self.second_conv(feature)
        return feature.max(dim=2)[0].reshape(batch, groups, self.encoder_channel)


class DropPath(nn.Module):
    """Drop a residual path for a sample, with probability `rate`."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = torch.rand(x.shape[0], 1, 1, device=x.device) < keep
        return x / keep * mask


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1)) * self.scale
        weights = weights.softmax(dim=-1)
        x = (weights @ v).transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class TransformerEncoder(nn.Module):
    """Blocks that each see the position embedding anew."""

    def __init__(self, dim, depth, num_heads, mlp_ratio, drop_path_rate):
        super().__init__()
        rates = [drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList([Block(dim, num_heads, mlp_ratio, rate) for rate in rates])

    def forward(self, x, pos):
        for block in self.blocks:
            x = block(x + pos)
        return x


class PointBERT(nn.Module):
    """Clouds (B, N, 3) to logits (B, num_classes)."""

    def __init__(
        self,
        num_classes,
        trans_dim=384,
        depth=12,
        num_heads=6,
        num_group=64,
        group_size=32,
        encoder_dims=256,
        mlp_ratio=4.0,
        drop_path_rate=0.1,
        head_dropout=0.5,
    ):
        super().__init__()
        self.group_divider = Group(num_group, group_size)
        self.encoder = Encoder(encoder_dims)
        self.reduce_dim = nn.Linear(encoder_dims, trans_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, trans_dim))
        self.cls_pos = nn.Parameter(torch.randn(1, 1, trans_dim))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, trans_dim))
        self.blocks = TransformerEncoder(trans_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        self.norm = nn.LayerNorm(trans_dim)
        self.cls_head_finetune = nn.Sequential(
            nn.Linear(trans_dim * 2, 256),
            nn.ReLU(inplace=True),
            nn.Dropout(head_dropout),
            nn.Linear(256, num_classes),
        )

    def forward(self, points):
        neighborhood, center = self.group_divider(points)
        tokens = self.reduce_dim(self.encoder(neighborhood))
        cls_tokens = self.cls_token.expand(tokens.shape[0], -1, -1)
        cls_pos = self.cls_pos.expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls_tokens, tokens], dim=1)
        pos = torch.cat([cls_pos, self.pos_embed(center)], dim=1)
        x = self.norm(self.blocks(x, pos))
        feature = torch.cat([x[:, 0], x[:, 1:].max(1)[0]], dim=-1)
        return self.cls_head_finetune(feature)
