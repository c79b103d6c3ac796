"""Families of torch-pointcloud, tiny; Point Transformer V3 has a stub in the place of its sparse convolution."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family


def families() -> list[Family]:
    """List them; torch-pointcloud is imported when one is built."""
    sizes = dict(embed_dim=32, depth=2, num_heads=2, num_groups=8, group_size=8, drop_path=0.0, dropout=0.0)
    return [
        Family(
            "torch-pointcloud", "point_bert", partial(_plain, "point_bert", "PointBERTClassification", sizes), _points
        ),
        Family("torch-pointcloud", "point_mae", partial(_plain, "point_mae", "PointMAEClassification", sizes), _points),
        Family("torch-pointcloud", "point_transformer_v3 (stub of spconv)", _point_transformer_v3, _voxels),
    ]


def _plain(module: str, kind: str, sizes: dict[str, Any]) -> nn.Module:
    return getattr(importlib.import_module(f"torch_pointcloud.models.{module}"), kind)(0, 5, **sizes)


def _points(batch: int) -> dict[str, Any]:
    return {"x": None, "pos": torch.rand(batch * 64, 3), "batch": torch.arange(batch).repeat_interleave(64)}


def _voxels(batch: int) -> dict[str, Any]:
    grid = torch.stack([torch.randperm(512)[:64] for _ in range(batch)]).flatten()
    places = torch.stack([grid // 64, grid // 8 % 8, grid % 8], 1)
    return {
        "x": torch.randn(batch * 64, 4),
        "pos_grid": places,
        "batch": torch.arange(batch).repeat_interleave(64),
    }


class _Sparse:
    """Stands for a sparse tensor of spconv."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def replace_feature(self, features: Tensor) -> "_Sparse":
        return _Sparse(features)


class _Convolution(nn.Module):
    """Stands for a sparse convolution: each voxel by itself."""

    def __init__(self, inputs: int, outputs: int, **_: Any) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, 1, 1, 1, inputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: _Sparse) -> _Sparse:
        return x.replace_feature(x.features @ self.weight.flatten(1).t() + self.bias)


def _point_transformer_v3() -> nn.Module:
    from types import SimpleNamespace

    from torch_pointcloud.layers import spconv_blocks
    from torch_pointcloud.models import point_transformer_v3 as module

    stub = SimpleNamespace(SubMConv3d=_Convolution, SparseConvTensor=_Sparse)
    convert: Callable[..., _Sparse] = lambda features, *_, **__: _Sparse(features)  # noqa: E731
    for part in (module, spconv_blocks):
        part.spconv, part.convert_to_spconv_tensor = stub, convert
    return module.PointTransformerV3Classification(
        4, 5, encoder_depths=(1, 1), encoder_channels=(16, 32), encoder_num_heads=(2, 2), strides=(2,),
        encoder_patch_size=(16, 16), drop_path=0.0, use_flash_attn=False, shuffle_serialization_orders=False,
    )  # fmt: skip
