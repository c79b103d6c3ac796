"""Point-BERT and Point-MAE style classifiers: point groups become tokens of a plain transformer.

State-dict keys and shapes are those of the published classifiers, so that their checkpoints load.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.points import farthest_point_sample, gather_points, group_points, nearest_neighbours
from .layers import GroupEncoder, TransformerEncoder, check_channels, max_over_group

VARIANTS = ("bert", "mae")
MAX_DEPTH = 1000
"""Far beyond any model; a config or checkpoint with a larger number would be built for hours before it is refused."""


class PointBERT(nn.Module):
    """Point-BERT classifier (Yu et al. 2022, arXiv 2111.14819), and Point-MAE's (Pang et al. 2022, arXiv 2203.06604).

    Farthest-point centres and their neighbours form groups; a mini-PointNet makes a token of each; a transformer with
    a class token follows; the head reads the class token concatenated with the maximum over the others.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        trans_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_group: int = 64,
        group_size: int = 32,
        encoder_dims: int = 256,
        encoder_width: int = 128,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        head_dropout: float = 0.5,
        init_std: float = 0.02,
        fps_skip_origin: bool = True,
        variant: str = "bert",
    ) -> None:
        """Build the classifier; the defaults are the published Point-BERT of ViT-S size.

        Args:
            num_classes: outputs of the head.
            in_channels: channels of a point; the first three are its coordinates.
            trans_dim: width of the transformer.
            depth: number of blocks, at most 1000.
            num_heads: attention heads, a divisor of `trans_dim`.
            num_group: groups per cloud, each one token.
            group_size: points per group.
            encoder_dims: output width of the group encoder.
            encoder_width: width of the group encoder's first layer; the others are 2x and 4x of it.
            mlp_ratio: hidden width of an FFN over `trans_dim`.
            drop_path_rate: of the last block, growing linearly from 0; in [0, 1).
            head_dropout: in the classification head, in [0, 1).
            init_std: deviation of the linear layers' initial weights, above 0. The published 0.02 suits 384 channels
                and long trainings; narrow models in short ones learn faster with 0.1.
            fps_skip_origin: farthest point sampling never picks points within sqrt(1e-3) of the origin, as published.
            variant: "bert", or "mae": tokens straight from the group encoder, without `reduce_dim` between; a deeper
                head with BatchNorm; class token and position drawn from a truncated normal of deviation 0.02.

        Raises:
            ValueError: a value out of range.
        """
        super().__init__()
        check_ranges(
            at_least_one=dict(
                num_classes=num_classes,
                trans_dim=trans_dim,
                depth=depth,
                num_group=num_group,
                group_size=group_size,
                encoder_dims=encoder_dims,
                encoder_width=encoder_width,
            ),
            fractions=dict(drop_path_rate=drop_path_rate, head_dropout=head_dropout),
        )
        check_backbone(in_channels, trans_dim, mlp_ratio, depth, init_std)
        if variant not in VARIANTS:
            raise ValueError(f"variant is '{variant}', must be one of {', '.join(VARIANTS)}")
        if variant == "mae" and encoder_dims != trans_dim:
            raise ValueError(f"encoder_dims is {encoder_dims}, must equal trans_dim {trans_dim} in variant 'mae'")
        self.in_channels = in_channels
        self.num_group, self.group_size, self.fps_skip_origin = num_group, group_size, fps_skip_origin
        self.min_points = max(num_group, group_size)
        self.encoder = GroupEncoder(in_channels, encoder_dims, encoder_width)
        self.reduce_dim = nn.Linear(encoder_dims, trans_dim) if variant == "bert" else nn.Identity()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, trans_dim))
        self.cls_pos = nn.Parameter(torch.randn(1, 1, trans_dim))
        self.pos_embed = position_embedding(trans_dim)
        self.blocks = TransformerEncoder(trans_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        self.norm = nn.LayerNorm(trans_dim, eps=1e-5)
        self.cls_head_finetune = _head(variant, 2 * trans_dim, num_classes, head_dropout)
        self.init_std = init_std
        self.apply(self._init_weights)
        if variant == "mae":
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            nn.init.trunc_normal_(self.cls_pos, std=0.02)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beside biases and norms (timm's convention)."""
        return {"cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Describe the order of the layers (timm's convention): the input and the blocks; last norm and head follow."""
        stem = r"^encoder|^reduce_dim|^pos_embed|^cls_token|^cls_pos"
        return {"stem": stem, "blocks": [(r"^blocks\.blocks\.(\d+)", None)]}

    @torch.jit.ignore
    def coordinate_weights(self) -> dict[str, tuple[int, ...]]:
        """Names of the weights that read x, y, z, and the columns at which each of these triples begins."""
        return {"encoder.first_conv.0.weight": (0,), "pos_embed.0.weight": (0,)}

    @torch.jit.ignore
    def find_groups(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the groups that become tokens: the indices of their points (B, G, S) and their centres (B, G, 3)."""
        xyz = points[..., :3]
        centers = self.token_positions(points)
        return nearest_neighbours(centers, xyz, self.group_size), centers

    @torch.jit.ignore
    def token_positions(self, points: Tensor, layer: str = "") -> Tensor:
        """Return where the tokens of a layer lie in clouds (B, N, C): the centres of the groups (B, G, 3).

        The class token, which comes first, has no place.
        """
        xyz = points[..., :3]
        return gather_points(xyz, farthest_point_sample(xyz, self.num_group, skip_origin=self.fps_skip_origin))

    @torch.jit.ignore
    def fewest_points(self) -> int:
        """Return how many points a cloud needs in an exported program that takes any number of points."""
        return self.min_points

    def forward_features(self, points: Tensor) -> Tensor:
        """Map points (B, N, C) to normalised tokens (B, 1 + num_group, trans_dim), the class token first.

        Raises:
            ValueError: fewer points than `num_group` or `group_size`.
        """
        check_points(points, self.num_group, self.group_size)
        groups, centers = group_points(points, self.num_group, self.group_size, skip_origin=self.fps_skip_origin)
        tokens = self.reduce_dim(self.encoder(groups))
        batch = points.shape[0]
        x = torch.cat([self.cls_token.expand(batch, -1, -1).to(tokens.dtype), tokens], dim=1)
        position = self.pos_embed(centers)
        pos = torch.cat([self.cls_pos.expand(batch, -1, -1).to(position.dtype), position], dim=1)
        return self.norm(self.blocks(x, pos))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, 1 + G, trans_dim) to logits (B, num_classes)."""
        return self.cls_head_finetune(torch.cat([tokens[:, 0], max_over_group(tokens[:, 1:])], dim=-1))

    def forward(self, points: Tensor) -> Tensor:
        """Map points (B, N, in_channels) to logits (B, num_classes)."""
        check_channels(points, self.in_channels)
        return self.forward_head(self.forward_features(points))


def _head(variant: str, in_features: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Build the classification head; the indices of its layers are part of the state-dict keys."""

    def hidden(inputs: int) -> list[nn.Module]:
        norm = [nn.BatchNorm1d(256)] if variant == "mae" else []
        return [nn.Linear(inputs, 256), *norm, nn.ReLU(inplace=True), nn.Dropout(dropout)]

    layers = hidden(in_features) + (hidden(256) if variant == "mae" else [])
    return nn.Sequential(*layers, nn.Linear(256, num_classes))


def check_backbone(in_channels: int, trans_dim: int, mlp_ratio: float, depth: int, init_std: float) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"depth is {depth}, must be at most {MAX_DEPTH}")
    if not 1 <= trans_dim * mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio is {mlp_ratio}, must be at least 1 / {trans_dim} channels")
    if in_channels < 3:
        raise ValueError(f"in_channels is {in_channels}, must be at least 3 (x, y, z)")
    if not 0 < init_std < math.inf:
        raise ValueError(f"init_std is {init_std}, must be above 0")


def check_points(points: Tensor, num_group: int, group_size: int) -> None:
    if points.shape[1] < max(num_group, group_size):
        raise ValueError(
            f"{points.shape[1]} points per cloud are too few for num_group={num_group} and group_size={group_size}"
        )


def position_embedding(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))


def check_ranges(at_least_one: dict[str, int], fractions: dict[str, float]) -> None:
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} is {fraction}, must be in [0, 1)")
