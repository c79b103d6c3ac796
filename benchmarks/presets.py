"""The models that are measured, at their full size and in the tiny one of the quick form."""

from typing import NamedTuple

from .section import Settings
from .training import ModelSpec


class Preset(NamedTuple):
    """A model at two sizes."""

    full: ModelSpec
    quick: ModelSpec


_TINY_TRANSFORMER = dict(
    channels=(8, 16), depths=(0, 2), strides=(1, 4), num_neighbors=(4, 4), share_planes=4, head_dims=(8,)
)

PUBLIC_BERT = Preset(
    ModelSpec("point_bert"),
    ModelSpec(
        "point_bert", dict(trans_dim=12, depth=2, num_heads=2, num_group=4, group_size=4, encoder_dims=8),
        batch=2, points=32,
    ),
)  # fmt: skip
"""The published Point-BERT classifier of ViT-S size, batch 32 of 1024 points."""

PUBLIC_TRANSFORMER = Preset(
    ModelSpec("point_transformer", dict(depths=(0, 1, 2, 4, 1), mlp_ratio=0.0), batch=8),
    ModelSpec("point_transformer", {**_TINY_TRANSFORMER, "mlp_ratio": 0.0}, batch=2, points=32),
)
"""The published Point Transformer classifier: 8 attention blocks, no FFN; batch 8 of 1024 points."""

SMALL_BERT = Preset(
    ModelSpec("point_bert_small"),
    ModelSpec("point_bert_tiny", dict(trans_dim=12, depth=2, num_group=4, group_size=4), batch=2, points=32),
)
"""What this repository trains on a CPU."""

SPARSE_TRANSFORMER = Preset(
    ModelSpec("point_transformer", batch=8),
    ModelSpec("point_transformer", _TINY_TRANSFORMER, batch=2, points=32),
)
"""The Point Transformer with an FFN in every block, which S2D needs."""


def spec_for(preset: Preset, settings: Settings) -> ModelSpec:
    """Return a preset at the size and on the device of the settings."""
    return settings.pick(preset.full, preset.quick).but(device=str(settings.device), seed=settings.seed)
