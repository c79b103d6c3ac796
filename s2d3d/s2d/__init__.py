"""The method: Sparse-to-Dense training. Depends on torch and torch-scatter alone and knows nothing of point clouds."""

from .convert import MoFConfig, convert_to_mof_
from .ewa import EWA, apply_ewa_
from .merge import is_sparse, merge_experts
from .moe import TopKMoE, balance_loss
from .mof import RUPMoF

__all__ = [
    "EWA",
    "MoFConfig",
    "RUPMoF",
    "TopKMoE",
    "apply_ewa_",
    "balance_loss",
    "convert_to_mof_",
    "is_sparse",
    "merge_experts",
]
