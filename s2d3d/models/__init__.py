"""Backbones: points (B, N, C) in, logits (B, num_classes) out; and pre-training models, which return a loss."""

import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from ..errors import InputError, did_you_mean
from .fold import fold_batchnorm
from .point_bert import PointBERT
from .point_mae_pretrain import PointMAEPretrain
from .point_transformer import PointTransformer
from .pretrained import PretrainedReport, load_pretrained_

__all__ = [
    "PointBERT",
    "PointMAEPretrain",
    "PointTransformer",
    "PretrainedReport",
    "create_for_classes",
    "create_model",
    "fold_batchnorm",
    "list_models",
    "load_pretrained_",
    "model_kwargs",
    "register_model",
]

_MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, object]]] = {
    "point_bert": (PointBERT, {}),
    "point_bert_small": (
        PointBERT,
        dict(
            trans_dim=128,
            depth=4,
            num_heads=4,
            num_group=32,
            group_size=32,
            encoder_dims=128,
            encoder_width=32,
            drop_path_rate=0.0,
            head_dropout=0.2,
            init_std=0.1,
        ),
    ),
    "point_bert_tiny": (
        PointBERT,
        dict(
            trans_dim=96,
            depth=4,
            num_heads=3,
            num_group=32,
            group_size=16,
            encoder_dims=64,
            encoder_width=32,
            drop_path_rate=0.0,
            head_dropout=0.2,
            init_std=0.1,
        ),
    ),
    "point_mae": (PointBERT, dict(encoder_dims=384, variant="mae")),
    "point_mae_pretrain": (PointMAEPretrain, {}),
    "point_mae_pretrain_small": (
        PointMAEPretrain,
        dict(
            trans_dim=128,
            encoder_dims=128,
            depth=4,
            num_heads=4,
            decoder_depth=2,
            decoder_num_heads=4,
            num_group=32,
            group_size=32,
            encoder_width=32,
            drop_path_rate=0.0,
            init_std=0.1,
        ),
    ),
    "point_mae_pretrain_tiny": (
        PointMAEPretrain,
        dict(
            trans_dim=96,
            encoder_dims=96,
            depth=4,
            num_heads=3,
            decoder_depth=1,
            decoder_num_heads=3,
            num_group=32,
            group_size=16,
            encoder_width=32,
            drop_path_rate=0.0,
            init_std=0.1,
        ),
    ),
    "point_transformer": (PointTransformer, {}),
    "point_transformer_small": (
        PointTransformer,
        dict(
            channels=(32, 64, 128, 256),
            depths=(0, 1, 2, 2),
            strides=(1, 4, 4, 4),
            num_neighbors=(8, 8, 8, 8),
            drop_path_rate=0.0,
            head_dims=(128,),
            head_dropout=0.2,
        ),
    ),
    "point_transformer_tiny": (
        PointTransformer,
        dict(
            channels=(16, 32, 64, 96),
            depths=(0, 1, 1, 2),
            strides=(1, 4, 4, 4),
            num_neighbors=(8, 8, 8, 8),
            drop_path_rate=0.0,
            head_dims=(64,),
            head_dropout=0.2,
        ),
    ),
}


def list_models(pattern: str = "*", *, task: str | None = None) -> list[str]:
    """List the names that `create_model` knows.

    Args:
        pattern: a glob that names must match.
        task: only models for "classify" or "pretrain"; None: all.

    Example:
        >>> list_models("*_tiny")
        ['point_bert_tiny', 'point_mae_pretrain_tiny', 'point_transformer_tiny']
    """
    return [name for name in sorted(_MODELS) if fnmatchcase(name, pattern) and task in (None, model_task(name))]


def model_task(name: str) -> str:
    """Return what a model is for, "classify" or "pretrain": the attribute `task` of its class, if it has one.

    Raises:
        InputError: unknown name.
    """
    return getattr(_lookup(name)[0], "task", "classify")


def model_kwargs(name: str) -> dict[str, object]:
    """Return the keyword arguments of a model with their defaults, without `num_classes` and `in_channels`.

    Raises:
        InputError: unknown name.
    """
    build, preset = _lookup(name)
    parameters = inspect.signature(build).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {**defaults, **preset}


def create_model(name: str, *, num_classes: int | None = None, in_channels: int = 3, **kwargs) -> nn.Module:
    """Build a backbone with fresh weights.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the head; a pre-training model has none.
        in_channels: channels of a point; the first three are its coordinates.
        **kwargs: replace the defaults that `model_kwargs(name)` returns.

    Raises:
        InputError: unknown name or keyword; `num_classes` is missing, or given to a pre-training model.
        ValueError: a value out of range.

    Example:
        >>> import torch
        >>> create_model("point_bert_tiny", num_classes=40)(torch.rand(2, 256, 3)).shape
        torch.Size([2, 40])
    """
    build, preset = _lookup(name)
    known = model_kwargs(name)
    for key in kwargs:
        if key not in known:
            raise InputError(f"model '{name}' has no parameter '{key}'{did_you_mean(key, known)}")
    options = {**preset, **kwargs}
    if model_task(name) == "pretrain":
        if num_classes is not None:
            raise InputError(f"model '{name}' has no classes: it is for pre-training; leave num_classes out")
        return build(in_channels, **options)
    if num_classes is None:
        raise InputError(f"model '{name}' needs num_classes, the outputs of its head")
    return build(num_classes, in_channels, **options)


def create_for_classes(name: str, num_classes: int, **kwargs) -> nn.Module:
    """Build a backbone for data of so many classes; a pre-training model has no use for their number.

    Args:
        name: one of `list_models()`.
        num_classes: of the data.
        **kwargs: as for `create_model`.

    Raises:
        InputError: as `create_model`.
        ValueError: a value out of range.

    Example:
        >>> type(create_for_classes("point_mae_pretrain_tiny", 40)).__name__
        'PointMAEPretrain'
    """
    return create_model(name, num_classes=num_classes if model_task(name) == "classify" else None, **kwargs)


def register_model(name: str, build: Callable[..., nn.Module], **preset: object) -> None:
    """Make a backbone of your own known to `create_model`, configs and checkpoints, in this process.

    Args:
        name: new, for `create_model` and `model.name`.
        build: called as `build(num_classes, in_channels, **kwargs)`; every further parameter is keyword-only and has a
            default. The module maps points (B, N, C), z up, to logits (B, num_classes).
        **preset: values for `build` that replace its defaults.

    Raises:
        InputError: the name is taken, or `preset` has a key that `build` does not accept.

    Example:
        >>> class Flat(nn.Module):
        ...     def __init__(self, num_classes: int, in_channels: int = 3, *, width: int = 8):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Linear(in_channels, width), nn.ReLU(), nn.Linear(width, num_classes))
        ...
        ...     def forward(self, points):
        ...         return self.layers(points).amax(1)
        >>> register_model("flat_wide", Flat, width=64)
        >>> create_model("flat_wide", num_classes=10).layers[0].out_features
        64
        >>> del _MODELS["flat_wide"]
    """
    if name in _MODELS:
        raise InputError(f"model '{name}' exists already; choose another name")
    parameters = inspect.signature(build).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    unknown = [key for key in preset if key not in known]
    if unknown:
        raise InputError(f"model '{name}' has no parameter '{unknown[0]}'{did_you_mean(unknown[0], known)}")
    _MODELS[name] = (build, preset)


def _lookup(name: str) -> tuple[Callable[..., nn.Module], dict[str, object]]:
    if name not in _MODELS:
        raise InputError(f"unknown model '{name}'{did_you_mean(name, _MODELS)} (known: {', '.join(sorted(_MODELS))})")
    return _MODELS[name]
