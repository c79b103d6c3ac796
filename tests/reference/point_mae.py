"""The Point-MAE classifier (Pang et al. 2022, arXiv 2203.06604), as published, in plain torch."""

import torch
from torch import nn

from .point_bert import Encoder, Group, TransformerEncoder


class PointMAE(nn.Module):
    """Clouds (B, N, 3) to logits (B, num_classes)."""

    def __init__(
        self,
        num_classes,
        trans_dim=384,
        depth=12,
        num_heads=6,
        num_group=64,
        group_size=32,
        encoder_dims=384,
        mlp_ratio=4.0,
        drop_path_rate=0.1,
        head_dropout=0.5,
    ):
        super().__init__()
        self.group_divider = Group(num_group, group_size)
        self.encoder = Encoder(encoder_dims)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, trans_dim))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, trans_dim))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, trans_dim))
        self.blocks = TransformerEncoder(trans_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        self.norm = nn.LayerNorm(trans_dim)
        self.cls_head_finetune = nn.Sequential(
            nn.Linear(trans_dim * 2, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(inplace=True),
            nn.Dropout(head_dropout),
            nn.Linear(256, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(inplace=True),
            nn.Dropout(head_dropout),
            nn.Linear(256, num_classes),
        )
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.cls_pos, std=0.02)

    def forward(self, points):
        neighborhood, center = self.group_divider(points)
        tokens = self.encoder(neighborhood)
        cls_tokens = self.cls_token.expand(tokens.shape[0], -1, -1)
        cls_pos = self.cls_pos.expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls_tokens, tokens], dim=1)
        pos = torch.cat([cls_pos, self.pos_embed(center)], dim=1)
        x = self.norm(self.blocks(x, pos))
        feature = torch.cat([x[:, 0], x[:, 1:].max(1)[0]], dim=-1)
        return self.cls_head_finetune(feature)
