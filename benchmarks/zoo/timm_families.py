"""Families of timm, tiny."""

from functools import partial

from torch import nn

from .family import Family, images

PLAIN = dict(embed_dim=32, depth=2, num_heads=2, img_size=32)
STAGES = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))

MODELS: dict[str, dict] = {
    "beit_base_patch16_224": PLAIN,
    "cait_xxs24_224": PLAIN,
    "coat_lite_tiny": {"img_size": 32},
    "convit_tiny": PLAIN | {"local_up_to_layer": 1},
    "convnext_atto": STAGES,
    "convnextv2_atto": STAGES,
    "cpubone_nano": {},
    "cspnext_tiny": {},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2)},
    "deepseek_vit_412m": PLAIN | {"img_size": 28},
    "deit3_small_patch16_224": PLAIN,
    "deit_tiny_distilled_patch16_224": PLAIN,
    "edgenext_xx_small": {"size": 64},
    "efficientformerv2_s0": {"img_size": 64, "size": 64},
    "efficientvim_m1": {"size": 64},
    "efficientvit_b0": {"size": 64},
    "efficientvit_m0": {"img_size": 64, "size": 64},
    "eva02_tiny_patch14_224": PLAIN | {"img_size": 28},
    "fasternet_t0": {},
    "fastvit_t8": {"size": 64},
    "gemma4_vit_167m": PLAIN,
    "ghostnet_050": {},
    "hgnetv2_b0": {},
    "hiera_tiny_224": {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1), "img_size": (64, 64), "size": 64},
    "sam2_hiera_tiny": {"size": 64},
    "iformer_t": {"size": 64},
    "inception_next_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)},
    "lcnetv2_small": {},
    "levit_128s": {"size": 224},
    "levit_conv_128s": {"size": 224},
    "lowformer_b0": {"size": 64},
    "mambaout_femto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)},
    "poolformer_s12": {},
    "gmixer_12_224": {"img_size": 64, "size": 64},
    "gmlp_ti16_224": {"img_size": 64, "size": 64},
    "mixer_s32_224": {"img_size": 64, "size": 64},
    "resmlp_12_224": {"img_size": 64, "size": 64},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_hybrid_medium": {"size": 64},
    "mobilevit_xxs": {"size": 64},
    "mobilevitv2_050": {"size": 64},
    "naflexvit_base_patch16_gap": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "pit_ti_224": {"img_size": 64, "size": 64},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "size": 64},
    "qwen3_vit_88m": PLAIN,
    "regnety_002": {},
    "repghostnet_050": {},
    "repvit_m0_9": {},
    "resnet18": {},
    "shvit_s1": {"size": 64},
    "starnet_s050": {},
    "swiftformer_xs": {"size": 64},
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "size": 56,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "embed_dim": 16,
    },
    "swinv2_tiny_window8_256": {"img_size": 64, "size": 64, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16},
    "swinv2_cr_tiny_224": {"img_size": 56, "size": 56, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16},
    "tnt_s_patch16_224": {"embed_dim": 36, "num_heads_outer": 6, "depth": 2, "img_size": 32},
    "twins_pcpvt_small": {"depths": (1, 1, 1, 1), "size": 64},
    "visformer_tiny": {"img_size": 64, "size": 64},
    "vit_tiny_patch16_224": PLAIN,
    "vit_base_patch16_siglip_224": PLAIN,
    "vit_small_patch14_dinov2": PLAIN | {"img_size": 28, "size": 28},
    "vit_small_patch16_dinov3": PLAIN,
    "vit_tiny_r_s16_p8_224": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "size": 64},
    "vit_relpos_small_patch16_224": PLAIN,
    "vit_srelpos_small_patch16_224": PLAIN,
    "samvit_base_patch16": PLAIN | {"global_attn_indexes": (1,)},
    "vit_base_patch16_lingbot": PLAIN,
    "aimv2_large_patch14_224": PLAIN | {"img_size": 28, "size": 28},
    "vit_so400m_patch14_siglip_gap_224": PLAIN | {"img_size": 28, "size": 28},
    "vit_base_patch16_xp_224": PLAIN,
    "xcit_nano_12_p16_224": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "size": 64},
    "coatnet_pico_rw_224": {"img_size": 64, "size": 64},
    "maxvit_pico_rw_256": {"img_size": 64, "size": 64},
    "tiny_vit_5m_224": {"size": 64},
    "test_vit": {},
    "test_vit2": {},
    "test_vit3": {"size": 160},
    "test_convnext2": {"size": 64},
    "test_efficientnet": {},
}
"""By model, the keywords that make it small. `size` is that of the images, 32 if it is not given."""


def families() -> list[Family]:
    """List them; timm is imported when one is built."""
    return [
        Family("timm", name, partial(_build, name, options), images(options.get("size", options.get("img_size", 32))))
        for name, options in MODELS.items()
    ]


def _build(name: str, options: dict) -> nn.Module:
    import timm

    options = {key: value for key, value in options.items() if key != "size"}
    return timm.create_model(name, num_classes=5, **options)
