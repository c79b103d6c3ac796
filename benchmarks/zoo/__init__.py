"""Which model families convert: tiny models of public packages, tried one by one (docs/compatibility.md)."""

from . import hugging_face, other_families, point_families, timm_families
from .check import Row, examine
from .family import Family

DEFAULT = """
s2d3d:point_bert_tiny torch:TransformerEncoder torch:Transformer torchvision:VisionTransformer
timm:cait_xxs24_224 timm:deit3_small_patch16_224 timm:eva02_tiny_patch14_224 timm:vit_relpos_small_patch16_224
torchvision:SwinTransformer timm:convnextv2_atto timm:xcit_nano_12_p16_224 timm:swinv2_cr_tiny_224
transformers:bert transformers:gpt2 transformers:opt transformers:llama transformers:bloom
transformers:mixtral transformers:t5 transformers:dinov2
""".split()  # noqa: SIM905
"""The families that a test tries by default: cheap ones, of every kind."""


def families() -> list[Family]:
    """List all families; the packages are imported when one is built."""
    return [*other_families.families(), *point_families.families(), *timm_families.families(), *hugging_face.families()]


def examine_named(title: str) -> Row:
    """Try the family of a title; by name, because the functions that build models do not travel to other processes."""
    return examine(next(family for family in families() if family.title == title))
