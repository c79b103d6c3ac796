"""Point-MAE's masked autoencoder (Pang et al. 2022, arXiv 2203.06604), in plain torch."""

import torch
from torch import nn

from .point_bert import Block, Encoder, Group


class Blocks(nn.Module):
    def __init__(self, dim, depth, heads, mlp_ratio, rate):
        super().__init__()
        rates = [rate * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, r) for r in rates])

    def forward(self, x, pos):
        for block in self.blocks:
            x = block(x + pos)
        return x


class MaskTransformer(nn.Module):
    def __init__(self, dim, depth, heads, mlp_ratio, rate, width):
        super().__init__()
        self.encoder = Encoder(dim, width)
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))
        self.blocks = Blocks(dim, depth, heads, mlp_ratio, rate)
        self.norm = nn.LayerNorm(dim)

    def forward(self, neighborhood, center, mask):
        tokens = self.encoder(neighborhood)
        batch, _, dim = tokens.shape
        visible = tokens[~mask].reshape(batch, -1, dim)
        pos = self.pos_embed(center[~mask].reshape(batch, -1, 3))
        return self.norm(self.blocks(visible, pos))


class Decoder(nn.Module):
    def __init__(self, dim, depth, heads, mlp_ratio, rate):
        super().__init__()
        rates = [rate * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, r) for r in rates])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, pos, count):
        for block in self.blocks:
            x = block(x + pos)
        return self.norm(x[:, -count:])


def chamfer(first, second, norm="l2"):
    """Clouds (P, N, 3) and (P, M, 3): every difference at once, then the minimum each way."""
    squared = ((first.unsqueeze(2) - second.unsqueeze(1)) ** 2).sum(-1)
    there, back = squared.min(2)[0], squared.min(1)[0]
    if norm == "l2":
        return there.mean() + back.mean()
    return (there.sqrt().mean() + back.sqrt().mean()) / 2


class PointMAEPretrain(nn.Module):
    """Clouds (B, N, 3) and a mask (B, G) to the loss."""

    def __init__(
        self,
        trans_dim=384,
        depth=12,
        num_heads=6,
        decoder_depth=4,
        decoder_num_heads=6,
        num_group=64,
        group_size=32,
        mlp_ratio=4.0,
        drop_path_rate=0.1,
        loss="l2",
        encoder_width=128,
    ):
        super().__init__()
        self.group_size = group_size
        self.loss = loss
        self.group_divider = Group(num_group, group_size)
        self.MAE_encoder = MaskTransformer(trans_dim, depth, num_heads, mlp_ratio, drop_path_rate, encoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, trans_dim))
        self.decoder_pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, trans_dim))
        self.MAE_decoder = Decoder(trans_dim, decoder_depth, decoder_num_heads, mlp_ratio, drop_path_rate)
        self.increase_dim = nn.Sequential(nn.Conv1d(trans_dim, 3 * group_size, 1))

    def reconstruct(self, points, mask):
        neighborhood, center = self.group_divider(points)
        visible = self.MAE_encoder(neighborhood, center, mask)
        batch, _, dim = visible.shape
        pos_visible = self.decoder_pos_embed(center[~mask]).reshape(batch, -1, dim)
        pos_masked = self.decoder_pos_embed(center[mask]).reshape(batch, -1, dim)
        count = pos_masked.shape[1]
        x = torch.cat([visible, self.mask_token.expand(batch, count, -1)], dim=1)
        decoded = self.MAE_decoder(x, torch.cat([pos_visible, pos_masked], dim=1), count)
        rebuilt = self.increase_dim(decoded.transpose(1, 2)).transpose(1, 2).reshape(batch * count, -1, 3)
        target = neighborhood[mask].reshape(batch * count, -1, 3)
        return rebuilt, target, visible

    def forward(self, points, mask):
        rebuilt, target, _ = self.reconstruct(points, mask)
        return chamfer(rebuilt, target, self.loss)
