"""Export: ONNX, TorchScript and torch.export files, and their comparison with PyTorch."""

FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "torch_export": ".pt2"}
"""File suffix by format."""
