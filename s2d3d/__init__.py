"""s2d3d: Sparse-to-Dense training of 3D point-cloud transformers."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config.load import Config, load_config
    from .datasets import create_dataset, register_dataset
    from .evaluation.accuracy import ClassificationReport, evaluate
    from .evaluation.batchnorm import recalibrate_batchnorm_
    from .export.write import export_model
    from .integrations.hub import PointCloudClassifier
    from .models import create_model, fold_batchnorm, list_models, load_pretrained_, register_model
    from .runs.checkpoint import load_checkpoint, load_model, save_checkpoint
    from .s2d import (
        EWA,
        MoFConfig,
        RUPMoF,
        TopKMoE,
        apply_ewa_,
        balance_loss,
        convert_to_mof_,
        is_sparse,
        merge_experts,
    )
    from .training.callbacks import Callback
    from .training.trainer import Trainer

__all__ = [
    "EWA",
    "Callback",
    "ClassificationReport",
    "Config",
    "MoFConfig",
    "PointCloudClassifier",
    "RUPMoF",
    "TopKMoE",
    "Trainer",
    "__version__",
    "apply_ewa_",
    "balance_loss",
    "convert_to_mof_",
    "create_dataset",
    "create_model",
    "evaluate",
    "export_model",
    "fold_batchnorm",
    "is_sparse",
    "list_models",
    "load_checkpoint",
    "load_config",
    "load_model",
    "load_pretrained_",
    "merge_experts",
    "recalibrate_batchnorm_",
    "register_dataset",
    "register_model",
    "save_checkpoint",
]

_HOMES = {
    "config.load": ("Config", "load_config"),
    "datasets": ("create_dataset", "register_dataset"),
    "evaluation.accuracy": ("ClassificationReport", "evaluate"),
    "evaluation.batchnorm": ("recalibrate_batchnorm_",),
    "export.write": ("export_model",),
    "integrations.hub": ("PointCloudClassifier",),
    "models": ("create_model", "fold_batchnorm", "list_models", "load_pretrained_", "register_model"),
    "runs.checkpoint": ("load_checkpoint", "load_model", "save_checkpoint"),
    "s2d": (
        "EWA", "MoFConfig", "RUPMoF", "TopKMoE", "apply_ewa_", "balance_loss", "convert_to_mof_", "is_sparse",
        "merge_experts",
    ),
    "training.callbacks": ("Callback",),
    "training.trainer": ("Trainer",),
}  # fmt: skip
"""Public names by the module that defines them. The module is imported at the first use of one of its names."""
_MODULES = {name: module for module, names in _HOMES.items() for name in names}
_ROOMS = {module.partition(".")[0] for module in _HOMES}


def __getattr__(name: str) -> Any:
    """Import a public name, or a room such as `s2d3d.models`, at its first use: torch and timm take seconds."""
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
