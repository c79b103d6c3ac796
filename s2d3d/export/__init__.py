"""Export: ONNX, TorchScript and torch.export files, and their comparison with PyTorch."""

from .check import compare_exported
from .write import export_model, load_exported

__all__ = ["compare_exported", "export_model", "load_exported"]
