"""Point-MAE's masked autoencoder: hide most groups of a cloud, and predict their points from the others.

State-dict keys and shapes are those of the published pre-training files. The encoder's keys are those of the classifier
behind `MAE_encoder.`, so that `load_pretrained_` reads such a file into `point_mae`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.chamfer import NORMS, chamfer_distance
from ..ops.points import group_points
from .layers import GroupEncoder, TransformerEncoder, check_channels
from .point_bert import check_backbone, check_points, check_ranges, position_embedding


class Reconstruction(NamedTuple):
    """What a pass of the masked autoencoder returns.

    B clouds of G groups of S points, M of the groups masked; groups are in ascending order of their index.

    Attributes:
        loss: Chamfer distance between `rebuilt` and `target`, 0-d.
        rebuilt: (B, M, S, 3), the predicted points of the masked groups, relative to the groups' centres.
        target: (B, M, S, 3), the true points, also relative to the centres; the points of a group have no order.
        visible: (B, G - M, C), the encoder's tokens of the visible groups.
        mask: (B, G) bool, true where a group was masked.
    """

    loss: Tensor
    rebuilt: Tensor
    target: Tensor
    visible: Tensor
    mask: Tensor


class MaskedEncoder(nn.Module):
    """Patch encoder and transformer; only the visible groups enter the transformer."""

    def __init__(
        self, in_channels: int, trans_dim: int, encoder_dims: int, encoder_width: int, init_std: float
    ) -> None:
        """Build everything except the blocks, which the owner sets."""
        super().__init__()
        self.init_std = init_std
        self.encoder = GroupEncoder(in_channels, encoder_dims, encoder_width)
        self.pos_embed = position_embedding(trans_dim)
        self.blocks: nn.Module
        self.norm = nn.LayerNorm(trans_dim, eps=1e-5)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.trunc_normal_(module.weight, std=self.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, groups: Tensor, centers: Tensor, visible: Tensor | None) -> Tensor:
        """Map groups (B, G, S, C) and centres (B, G, 3) to tokens (B, V, trans_dim) of the visible groups.

        Args:
            groups: all of them: BatchNorm of the patch encoder sees the masked ones too.
            centers: likewise.
            visible: (B, V) int64 indices; None: all groups.
        """
        tokens = self.encoder(groups)
        if visible is not None:
            tokens, centers = _choose(tokens, visible), _choose(centers, visible)
        return self.norm(self.blocks(tokens, self.pos_embed(centers)))


class MaskedDecoder(TransformerEncoder):
    """Blocks over visible and mask tokens, and a norm over the last of them."""

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float, drop_path_rate: float) -> None:
        """Build `depth` blocks, see `TransformerEncoder`."""
        super().__init__(dim, depth, num_heads, mlp_ratio, drop_path_rate)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, pos: Tensor, count: int | None = None) -> Tensor:
        """Map tokens (B, T, C) with positions to the last `count` of them, normalised; None: all."""
        x = super().forward(x, pos)
        return self.norm(x if count is None else x[:, -count:])


class PointMAEPretrain(nn.Module):
    """Masked autoencoder of point groups, after Point-MAE (Pang et al. 2022, arXiv 2203.06604).

    `model(points)` returns the loss; `model.reconstruct(points)` also returns the predicted points.

    Example:
        >>> model = PointMAEPretrain(trans_dim=24, encoder_dims=24, depth=2, num_heads=2, decoder_depth=1,
        ...                          decoder_num_heads=2, num_group=8, group_size=4, encoder_width=8)
        >>> result = model.reconstruct(torch.rand(2, 64, 3))
        >>> result.rebuilt.shape, result.visible.shape
        (torch.Size([2, 4, 4, 3]), torch.Size([2, 4, 24]))
    """

    task = "pretrain"

    def __init__(
        self,
        in_channels: int = 3,
        *,
        trans_dim: int = 384,
        encoder_dims: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        mask_ratio: float = 0.6,
        num_group: int = 64,
        group_size: int = 32,
        encoder_width: int = 128,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        init_std: float = 0.02,
        fps_skip_origin: bool = True,
        loss: str = "l2",
    ) -> None:
        """Build the autoencoder; the defaults are those of the published recipe.

        Args:
            in_channels: channels of a point; the first three are its coordinates, and only they are predicted.
            trans_dim: width of encoder and decoder.
            encoder_dims: output width of the patch encoder; equals `trans_dim`.
            depth: blocks of the encoder, at most 1000.
            num_heads: attention heads of the encoder, a divisor of `trans_dim`.
            decoder_depth: blocks of the decoder, at most 1000.
            decoder_num_heads: attention heads of the decoder, a divisor of `trans_dim`.
            mask_ratio: share of the groups that are masked, in (0, 1); int(mask_ratio * num_group) of them.
            num_group: groups per cloud, at least 2.
            group_size: points per group.
            encoder_width: width of the patch encoder's first layer; the others are 2x and 4x of it.
            mlp_ratio: hidden width of an FFN over `trans_dim`.
            drop_path_rate: of the last block of encoder and decoder, growing linearly from 0; in [0, 1).
            init_std: deviation of the initial weights of the encoder's linear layers and of the mask token, above 0.
            fps_skip_origin: farthest point sampling never picks points within sqrt(1e-3) of the origin, as published.
            loss: Chamfer distance, "l2" or "l1".

        Raises:
            ValueError: a value out of range; the ratio masks no group, or all.
        """
        super().__init__()
        check_ranges(
            at_least_one=dict(
                trans_dim=trans_dim, depth=depth, decoder_depth=decoder_depth, group_size=group_size,
                encoder_width=encoder_width,
            ),
            fractions=dict(drop_path_rate=drop_path_rate),
        )  # fmt: skip
        check_backbone(in_channels, trans_dim, mlp_ratio, max(depth, decoder_depth), init_std)
        if encoder_dims != trans_dim:
            raise ValueError(f"encoder_dims is {encoder_dims}, must equal trans_dim {trans_dim}")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}, must be in (0, 1)")
        self.num_masked = int(mask_ratio * num_group)
        if not 0 < self.num_masked < num_group:
            text = f"mask_ratio {mask_ratio} of num_group {num_group} masks {self.num_masked} groups"
            raise ValueError(f"{text}, must mask at least one and leave at least one")
        if loss not in NORMS:
            raise ValueError(f"loss is '{loss}', must be one of {', '.join(NORMS)}")
        self.in_channels = in_channels
        self.num_group, self.group_size, self.fps_skip_origin = num_group, group_size, fps_skip_origin
        self.mask_ratio, self.init_std, self.loss = mask_ratio, init_std, loss
        self.MAE_encoder = MaskedEncoder(in_channels, trans_dim, encoder_dims, encoder_width, init_std)
        self.MAE_encoder.blocks = TransformerEncoder(trans_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, trans_dim))
        self.decoder_pos_embed = position_embedding(trans_dim)
        self.MAE_decoder = MaskedDecoder(trans_dim, decoder_depth, decoder_num_heads, mlp_ratio, drop_path_rate)
        self.increase_dim = nn.Sequential(nn.Conv1d(trans_dim, 3 * group_size, 1))
        for part in (self.MAE_encoder, self.MAE_decoder):
            for layer in part.modules():
                part._init_weights(layer)
        nn.init.trunc_normal_(self.mask_token, std=init_std)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beside biases and norms (timm's convention)."""
        return {"mask_token"}

    @torch.jit.ignore
    def coordinate_weights(self) -> dict[str, tuple[int, ...]]:
        """Names of the weights that read x, y, z, and the columns at which each of these triples begins."""
        keys = (
            "MAE_encoder.encoder.first_conv.0.weight",
            "MAE_encoder.pos_embed.0.weight",
            "decoder_pos_embed.0.weight",
        )
        return dict.fromkeys(keys, (0,))

    def draw_mask(
        self, clouds: int, device: torch.device | str = "cpu", *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw which groups are masked: (clouds, num_group) bool, `num_masked` true in each row.

        Args:
            clouds: number of rows.
            device: of the mask.
            generator: where random numbers come from, on `device`; None: torch's global generator of the device.
        """
        order = torch.rand(clouds, self.num_group, device=device, generator=generator).argsort(1)
        return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, : self.num_masked], True)

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of clouds (B, N, in_channels), 0-d; see `reconstruct`."""
        return self.reconstruct(points, mask).loss

    def reconstruct(self, points: Tensor, mask: Tensor | None = None) -> Reconstruction:
        """Mask groups of clouds, and predict their points.

        Args:
            points: (B, N, in_channels).
            mask: (B, num_group) bool, true: masked; the same number in each row, not all and not none. None: drawn.

        Raises:
            ValueError: fewer points than `num_group` or `group_size`, or a mask of another kind.
        """
        groups, centers = self.group(points)
        if mask is None:
            mask, count = self.draw_mask(len(points), points.device), self.num_masked
        else:
            mask, count = self._checked(mask.to(points.device), len(points))
        hidden, visible = _places(mask, count), _places(~mask, self.num_group - count)
        tokens = self.MAE_encoder(groups, centers, visible)
        position = self.decoder_pos_embed(torch.cat([_choose(centers, visible), _choose(centers, hidden)], 1))
        mask_tokens = self.mask_token.to(tokens.dtype).expand(len(points), hidden.shape[1], -1)
        decoded = self.MAE_decoder(torch.cat([tokens, mask_tokens], 1), position, hidden.shape[1])
        rebuilt = self.increase_dim(decoded.transpose(1, 2)).transpose(1, 2)
        rebuilt = rebuilt.reshape(*hidden.shape, self.group_size, 3)
        target = _choose(groups[..., :3].flatten(2), hidden).view_as(rebuilt)
        loss = chamfer_distance(rebuilt.flatten(0, 1), target.flatten(0, 1), norm=self.loss)
        return Reconstruction(loss, rebuilt, target, tokens, mask)

    def complete(self, points: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return visible, predicted and true hidden points of clouds, in the coordinates of the clouds.

        Args:
            points: (B, N, in_channels).
            mask: see `reconstruct`.

        Returns:
            (B, V * S, 3), (B, M * S, 3) and (B, M * S, 3): groups overlap, so that points occur more than once.
        """
        result = self.reconstruct(points, mask)
        groups, centers = self.group(points)
        hidden = _places(result.mask, result.rebuilt.shape[1])
        visible = _places(~result.mask, self.num_group - hidden.shape[1])
        around = _choose(centers, hidden).unsqueeze(2)
        seen = _choose(groups[..., :3].flatten(2), visible).view(*visible.shape, self.group_size, 3)
        parts = (seen + _choose(centers, visible).unsqueeze(2), result.rebuilt.float() + around, result.target + around)
        return parts[0].flatten(1, 2), parts[1].flatten(1, 2), parts[2].flatten(1, 2)

    def forward_features(self, points: Tensor) -> Tensor:
        """Map clouds (B, N, in_channels), nothing masked, to normalised tokens (B, num_group, trans_dim)."""
        groups, centers = self.group(points)
        return self.MAE_encoder(groups, centers, None)

    def group(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Cut clouds (B, N, C) into groups (B, G, S, C), relative to their centres (B, G, 3).

        Raises:
            ValueError: points of another shape, no cloud, or fewer points than `num_group` or `group_size`.
        """
        check_channels(points, self.in_channels)
        if not len(points):
            raise ValueError("there is no cloud in the batch")
        check_points(points, self.num_group, self.group_size)
        return group_points(points, self.num_group, self.group_size, skip_origin=self.fps_skip_origin)

    def _checked(self, mask: Tensor, clouds: int) -> tuple[Tensor, int]:
        """Return a mask of the caller, and how many groups it hides in each cloud."""
        wanted = (clouds, self.num_group)
        if mask.shape != wanted or mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}, must be bool of shape {wanted}")
        counts = mask.sum(1)
        if bool((counts != counts[0]).any()) or not 0 < int(counts[0]) < self.num_group:
            raise ValueError(
                f"mask hides {int(counts.min())} to {int(counts.max())} of {self.num_group} groups of a cloud; "
                "it must hide the same number in each, at least one and not all"
            )
        return mask, int(counts[0])


def _places(mask: Tensor, count: int) -> Tensor:
    """Return the columns that are true, (B, count) int64, ascending; each row has `count` of them.

    By sorting, as `nonzero` synchronises with the device.
    """
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def _choose(rows: Tensor, index: Tensor) -> Tensor:
    """Return `rows[b, index[b, i]]` of rows (B, G, ...)."""
    return rows[torch.arange(len(rows), device=rows.device).unsqueeze(1), index]
