"""A PointNet of two layers with random weights: as a module, and as an ONNX file like those of tools/export.py."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from s2d3d.export.facts import model_facts
from s2d3d.prepare.shapes import make_shape

POINTS = 64


def weights(classes: int) -> dict[str, np.ndarray]:
    """Return the weights; the last one centres the logits, without it one class would take all shapes."""
    rng = np.random.default_rng(1)
    first, shift, last = 3 * rng.normal(size=(3, 32)), rng.normal(size=32), rng.normal(size=(32, classes))
    shapes = np.stack([make_shape(0, "test", index, POINTS) for index in range(12)])
    usual = np.maximum(shapes @ first + shift, 0).max(1).mean(0) @ last
    return {"first": first, "shift": shift, "last": last, "usual": -usual}


class Tiny(nn.Module):
    """The network: points (B, N, 3) -> logits (B, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        for name, value in weights(classes).items():
            self.register_buffer(name, torch.from_numpy(value).float())

    def forward(self, points: Tensor) -> Tensor:
        return torch.relu(points @ self.first + self.shift).amax(1) @ self.last + self.usual


def write_tiny_model(path: Path, names: Sequence[str], **facts: object) -> dict:
    """Write the network as ONNX; return its metadata. `facts` replace some, None leaves one out."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("MatMul", ["points", "first"], ["a"]), helper.make_node("Add", ["a", "shift"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]), helper.make_node("ReduceMax", ["c"], ["d"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["d", "last"], ["e"]), helper.make_node("Add", ["e", "usual"], ["logits"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("points", TensorProto.FLOAT, ["batch", "count", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(names)])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights(len(names)).items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    known = model_facts(model="tiny", class_names=names, up_axis="z", normalize=True)
    known |= dict(num_points=POINTS, min_points=16, in_channels=3, free_dimensions=["batch", "points"])
    known = {key: value for key, value in (known | facts).items() if value is not None}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}
    helper.set_model_props(model, texts)
    onnx.save(model, path)
    return known
