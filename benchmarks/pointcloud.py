"""torch-pointcloud as a contestant: its Point-BERT, Point Transformer and attention, with our weights.

Its models sample and search by operators of pyg-lib and start sampling at a random point while they train. Ours stand
in their place, from index 0: the models run where pyg-lib does not, and compute what ours compute, which is checked.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from s2d3d.models import model_kwargs
from s2d3d.ops.points import farthest_point_sample, gather_points, nearest_neighbours

from .interleave import Skip
from .packages import require

NAME = "torch-pointcloud"
NOTE = "same weights; its sampling and neighbour search, which need pyg-lib, replaced by ours"

_BERT = (
    (r"^encoder\.encoder\.local_mlp\.(lins|norms)", r"encoder.first_conv.\1"),
    (r"^encoder\.encoder\.global_mlp\.(lins|norms)", r"encoder.second_conv.\1"),
    (r"_conv\.lins\.0", "_conv.0"), (r"_conv\.norms\.0\.module", "_conv.1"), (r"_conv\.lins\.1", "_conv.3"),
    (r"^encoder\.pos_embed\.lins\.0", "pos_embed.0"), (r"^encoder\.pos_embed\.lins\.1", "pos_embed.2"),
    (r"^encoder\.blocks\.", "blocks.blocks."), (r"mlp\.lins\.0", "mlp.fc1"), (r"mlp\.lins\.1", "mlp.fc2"),
    (r"^head\.lins\.0", "cls_head_finetune.0"), (r"^head\.lins\.1", "cls_head_finetune.3"),
    (r"^encoder\.(?!first_conv|second_conv)", ""),
)  # fmt: skip
_ATTENTION = (
    (r"\.?pos_nn\.lins\.0", "linear_p.0"), (r"pos_nn\.norms\.0\.module", "linear_p.1"),
    (r"pos_nn\.lins\.1", "linear_p.3"), (r"attn_nn\.0\.module", "linear_w.0"),
    (r"attn_nn\.2\.lins\.0", "linear_w.2"), (r"attn_nn\.2\.norms\.0\.module", "linear_w.3"),
    (r"attn_nn\.2\.lins\.1", "linear_w.5"), (r"\blin_src\b", "linear_k"), (r"\blin_dst\b", "linear_q"),
    (r"\blin\b", "linear_v"),
)  # fmt: skip
_TRANSFORMER = (
    (r"^embeddings\.", "enc1.0."), (r"^head\.", "cls."),
    (r"^encoder\.blocks\.(\d+)\.downsample\.mlp\.", lambda match: f"enc{int(match[1]) + 1}.0."),
    (r"^encoder\.blocks\.(\d+)\.blocks\.(\d+)\.", lambda match: f"enc{int(match[1]) + 1}.{int(match[2]) + 1}."),
    (r"^(enc\d+\.0)\.lins\.0", r"\1.linear"), (r"^(enc\d+\.0)\.norms\.0\.module", r"\1.bn"),
    (r"\.lin([13])\.", r".linear\1."), (r"\.norm([123])\.module", r".bn\1"),
    (r"\.transformer\.", ".transformer2."), *_ATTENTION, (r"transformer2(?=linear)", "transformer2."),
)  # fmt: skip
_NEGATIVE = re.compile(r"lin_src\.|lin_dst\.|pos_nn\.lins\.0\.weight")
"""It attends by q - k + p(x_i - x_j), we by k - q + p(x_j - x_i): the same with these turned."""


class Packed(nn.Module):
    """A model of packed clouds behind the interface of ours: (B, N, 3) points to logits (B, num_classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, points: Tensor) -> Tensor:
        batch, count, _ = points.shape
        of_cloud = torch.arange(batch, device=points.device).repeat_interleave(count)
        return self.model(None, points.flatten(0, 1), of_cloud)


def pointcloud_model(name: str, num_classes: int, kwargs: dict[str, Any], ours: nn.Module) -> nn.Module:
    """Build the package's form of a model of ours.

    Args:
        name: of `create_model`: "point_bert" or "point_transformer".
        num_classes: outputs of the head.
        kwargs: keywords that differ from the defaults of `name`.
        ours: the model that lends its weights.

    Raises:
        Skip: the package is missing or has no such model.
    """
    options = model_kwargs(name) | kwargs
    if name == "point_bert":
        return Packed(_point_bert(num_classes, options, ours))
    if name == "point_transformer" and not options["mlp_ratio"]:
        return Packed(_point_transformer(num_classes, options, ours))
    raise Skip(f"{NAME} has no {name} of this kind")


def point_transformer_conv(ours: nn.Module, channels: int, share_planes: int) -> nn.Module:
    """Build the package's attention layer with the weights of a `VectorAttention`; maps (x, xyz, edges) to x.

    Raises:
        Skip: the package is missing.
    """
    models = require("torch_pointcloud.models.point_transformer", NAME)
    block = models.PointTransformerBlock(channels, channels, num_groups=share_planes)
    load_weights_(block.transformer, ours.state_dict(), _ATTENTION)
    return block.transformer


def load_weights_(theirs: nn.Module, weights: dict[str, Tensor], names: tuple[tuple[str, Any], ...]) -> None:
    """Give a module of the package our weights.

    Args:
        theirs: the module.
        weights: our state dict, of which every tensor must find its place.
        names: patterns and replacements, applied in order, that make our names of theirs. Biases that ours do without
            are set to 0.
    """
    used, loaded = set(), {}
    for key, tensor in theirs.state_dict().items():
        name = key
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if name not in weights and name.endswith("bias"):
            loaded[key] = torch.zeros_like(tensor)
            continue
        used.add(name)
        loaded[key] = weights[name].reshape(tensor.shape) * (-1 if _NEGATIVE.search(key) else 1)
    assert used == weights.keys(), f"no place for {sorted(weights.keys() - used)}"
    theirs.load_state_dict(loaded)


def _point_bert(num_classes: int, options: dict[str, Any], ours: nn.Module) -> nn.Module:
    package = require("torch_pointcloud.models.point_bert", NAME)
    width = options["encoder_width"]
    model = package.PointBERTClassification(
        0, num_classes, embed_dim=options["trans_dim"], depth=options["depth"], num_heads=options["num_heads"],
        num_groups=options["num_group"], group_size=options["group_size"], encoder_dims=options["encoder_dims"],
        token_local_channels=(width, 2 * width), token_global_channels=(4 * width,),
        drop_path=options["drop_path_rate"], dropout=options["head_dropout"],
    )  # fmt: skip
    load_weights_(model, ours.state_dict(), _BERT)

    def group(pos: Tensor, batch: Tensor, num_groups: int, group_size: int, **_: object) -> tuple[Tensor, Tensor]:
        xyz = _unpack(pos, batch)
        center = gather_points(xyz, farthest_point_sample(xyz, num_groups, skip_origin=True))
        return gather_points(xyz, nearest_neighbours(center, xyz, group_size)) - center.unsqueeze(2), center

    vars(package)["group"] = group
    return model


def _point_transformer(num_classes: int, options: dict[str, Any], ours: nn.Module) -> nn.Module:
    package = require("torch_pointcloud.models.point_transformer", NAME)
    stages = len(options["channels"])
    model = package.PointTransformerClassification(
        0, num_classes, encoder_channels=options["channels"], encoder_depths=options["depths"],
        encoder_attention_groups=(options["share_planes"],) * stages,
        encoder_num_neighbors=options["num_neighbors"], ratios=[1 / stride for stride in options["strides"][1:]],
        global_pool="mean",
    )  # fmt: skip
    model.head = copy.deepcopy(ours.cls)  # in place of its single linear layer
    load_weights_(model, ours.state_dict(), _TRANSFORMER)
    vars(package).update(fps=_fps, knn=_knn, knn_graph=_knn_graph)
    return model


def _unpack(pos: Tensor, batch: Tensor) -> Tensor:
    """Turn packed clouds of one size (B * N, C) into (B, N, C)."""
    return pos.view(int(batch[-1]) + 1, -1, pos.shape[-1])


def _first(xyz: Tensor) -> Tensor:
    """Return the packed index of the first point of each cloud, (B, 1)."""
    return torch.arange(len(xyz), device=xyz.device).unsqueeze(1) * xyz.shape[1]


def _fps(pos: Tensor, batch: Tensor, ratio: float, **_: object) -> Tensor:
    xyz = _unpack(pos, batch)
    return (farthest_point_sample(xyz, max(1, round(xyz.shape[1] * ratio))) + _first(xyz)).flatten()


def _knn(x: Tensor, y: Tensor, k: int, batch_x: Tensor, batch_y: Tensor) -> tuple[Tensor, Tensor]:
    points, queries = _unpack(x, batch_x), _unpack(y, batch_y)
    size = min(k, points.shape[1])
    found = nearest_neighbours(queries, points, size) + _first(points).unsqueeze(2)
    return torch.arange(len(y), device=y.device).repeat_interleave(size), found.flatten()


def _knn_graph(pos: Tensor, k: int, batch: Tensor, loop: bool) -> Tensor:
    assert loop, "a point is a neighbour of itself, as in our search"
    targets, sources = _knn(pos, pos, k, batch, batch)
    return torch.stack([sources, targets])
