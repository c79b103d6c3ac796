"""Families of torchvision, vit_pytorch, torch itself and this package, tiny."""

import importlib
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, images

TORCHVISION: dict[str, dict[str, Any]] = {
    "VisionTransformer": dict(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    ),
    "SwinTransformer": dict(
        patch_size=[4, 4], embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=5,
        stochastic_depth_prob=0.0,
    ),
    "MaxVit": dict(
        input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[8, 16], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.0, num_classes=5,
    ),
    "resnet18": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {"stochastic_depth_prob": 0.0},
    "regnet_x_400mf": {},
}  # fmt: skip
"""By class or function of torchvision.models."""

TINY_VIT = dict(
    image_size=32, img_size=32, patch_size=8, num_classes=5, dim=16, depth=2, heads=2, mlp_dim=32, dim_head=8,
    dropout=0.0, emb_dropout=0.0, cls_depth=1, seq_len=32, frames=4, frame_patch_size=2, image_patch_size=8,
    spatial_depth=1, temporal_depth=1, local_depth=1,
)  # fmt: skip
"""Keywords of the models of vit_pytorch; each gets those that it has."""
VIT_PYTORCH: dict[tuple[str, str], dict[str, Any]] = {
    ("ats_vit", "ViT"): {"max_tokens_per_depth": (8, 4)},
    ("attn_residual_with_dca_simple_vit", "SimpleViT"): {},
    ("cait", "CaiT"): {},
    ("cct", "CCT"): {"embedding_dim": 32, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2, "attention_dropout": 0.0,
                     "stochastic_depth_rate": 0.0},
    ("cross_vit", "CrossViT"): {"sm_dim": 16, "lg_dim": 16, "sm_patch_size": 8, "lg_patch_size": 16, "sm_enc_depth": 1,
                                "sm_enc_heads": 2, "sm_enc_mlp_dim": 32, "lg_enc_depth": 1, "lg_enc_heads": 2,
                                "lg_enc_mlp_dim": 32, "depth": 1},
    ("cvt", "CvT"): {f"s{stage}_{key}": 1 for stage in (1, 2, 3) for key in ("depth", "heads")}
    | {"s1_emb_dim": 8, "s2_emb_dim": 16, "s3_emb_dim": 16},
    ("deepvit", "DeepViT"): {},
    ("jumbo_vit", "JumboViT"): {"num_jumbo_cls": 1, "jumbo_cls_k": 2, "jumbo_ff_mult": 2},
    ("learnable_memory_vit", "ViT"): {},
    ("levit", "LeViT"): {"mlp_mult": 2, "image_size": 64, "stages": 2, "dim": (16, 32), "depth": 1, "heads": (2, 2)},
    ("looped_vit", "LoopedViT"): {},
    ("max_vit", "MaxViT"): {"depth": (1, 1), "dim_conv_stem": 16, "window_size": 4},
    ("nest", "NesT"): {"num_hierarchies": 2, "block_repeats": (1, 1), "patch_size": 4},
    ("normalized_vit", "nViT"): {},
    ("parallel_vit", "ViT"): {},
    ("pit", "PiT"): {"depth": (1, 1), "image_size": 64},
    ("rvt", "RvT"): {},
    ("scalable_vit", "ScalableViT"): {"reduction_factor": (8, 4), "depth": (1, 1), "heads": (1, 2)},
    ("simple_vit", "SimpleViT"): {},
    ("simple_vit_with_qk_norm", "SimpleViT"): {},
    ("simple_vit_with_register_tokens", "SimpleViT"): {},
    ("simple_vit_with_value_residual", "SimpleViT"): {},
    ("simple_uvit", "SimpleUViT"): {},
    ("t2t", "T2TViT"): {"t2t_layers": ((3, 2), (3, 2))},
    ("vit", "ViT"): {},
    ("vit_detpool", "ViTDetPool"): {},
    ("vit_5", "ViT"): {},
    ("vit_for_small_dataset", "ViT"): {},
    ("vit_with_keel_post_ln", "ViT"): {},
    ("vit_with_patch_merger", "ViT"): {},
    ("xcit", "XCiT"): {},
}  # fmt: skip
"""By module and class, the keywords that are its own."""

OURS: dict[str, dict[str, Any]] = {
    "point_bert_tiny": {},
    "point_mae": {"trans_dim": 32, "encoder_dims": 32, "depth": 2, "num_heads": 2, "num_group": 8, "group_size": 8},
    "point_transformer_tiny": {},
}


def families() -> list[Family]:
    """List them; a package is imported when one of its families is built."""
    return [
        *(Family("s2d3d", name, partial(_ours, name, options), _cloud) for name, options in OURS.items()),
        Family("torch", "TransformerEncoder", _torch_encoder, _tokens),
        Family("torch", "Transformer", _torch_transformer, lambda batch: (_tokens(batch), torch.randn(batch, 5, 16))),
        *(Family("torchvision", name, partial(_torchvision, name), images(32)) for name in TORCHVISION),
        *(
            Family("vit_pytorch", f"{module}.{kind}", partial(_vit_pytorch, module, kind), _vit_input(options))
            for (module, kind), options in VIT_PYTORCH.items()
        ),
    ]


def _vit_input(options: dict[str, Any]) -> Any:
    return images(options.get("image_size", 32))


def _tokens(batch: int) -> Tensor:
    return torch.randn(batch, 7, 16)


def _cloud(batch: int) -> Tensor:
    return torch.rand(batch, 128, 3) * 2 - 1


def _ours(name: str, options: dict[str, Any]) -> nn.Module:
    from s2d3d import create_model

    return create_model(name, num_classes=5, **options)


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _torch_transformer() -> nn.Module:
    return nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)


def _torchvision(name: str) -> nn.Module:
    import torchvision.models as models

    make = getattr(models, name, None) or getattr(models.maxvit, name)
    return make(**TORCHVISION[name])


def _vit_pytorch(module: str, kind: str) -> nn.Module:
    make = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)
    known = inspect.signature(make.__init__).parameters
    common = {key: value for key, value in TINY_VIT.items() if key in known}
    return make(**common | VIT_PYTORCH[module, kind])
