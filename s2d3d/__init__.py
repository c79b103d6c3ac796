"""s2d3d: Sparse-to-Dense training of 3D point-cloud transformers."""

from .config.load import Config, load_config
from .datasets import create_dataset, register_dataset
from .evaluation.accuracy import ClassificationReport, evaluate
from .evaluation.batchnorm import recalibrate_batchnorm_
from .export.write import export_model
from .models import create_model, fold_batchnorm, list_models, load_pretrained_, register_model
from .runs.checkpoint import load_checkpoint, load_model, save_checkpoint
from .s2d import EWA, MoFConfig, RUPMoF, TopKMoE, apply_ewa_, balance_loss, convert_to_mof_, is_sparse, merge_experts
from .training.trainer import Trainer
from .version import __version__

__all__ = [
    "EWA",
    "ClassificationReport",
    "Config",
    "MoFConfig",
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
