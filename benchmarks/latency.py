"""Latency of a classification: the dense architecture, the merged model and its exported files."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d3d.export import FORMATS
from s2d3d.export.check import TOLERANCE
from s2d3d.export.write import export_model, load_exported
from s2d3d.machine import installed_version
from s2d3d.models import create_model, fold_batchnorm

from .comparison import Comparison
from .interleave import Contestant, Task, interleave, local
from .section import Settings, new_section
from .tables import comparison_table, hardware_lines
from .timing import make_timer

BATCHES = (1, 32)
MIN_SECONDS = 0.1
"""Short work is repeated within its turn for about this time."""
PACKAGES = ("torch", "numpy", "timm", "onnx", "onnxruntime", "onnxscript")
DENSE, AGAIN, MERGED, FOLDED = "dense", "dense again", "merged", "merged, BatchNorm folded"
NOTES = {
    DENSE: "the architecture without experts, the same weights",
    AGAIN: "the same once more: its ratio is noise",
    MERGED: "the checkpoint",
}
TITLES = {"onnx": "ONNX Runtime", "torchscript": "TorchScript", "torch_export": "torch.export"}

Form = Callable[[Tensor], Tensor]


def measure_latency(
    forms: dict[str, Form], points: Tensor, *, rounds: int = 20, batches: tuple[int, ...] = BATCHES
) -> list[Comparison]:
    """Time the forms of a model on batches of clouds; ratios refer to the first.

    Args:
        forms: by name, points (B, N, C) -> logits (B, num_classes), the same function.
        points: (n, N, C) float32; repeated where a batch is larger.
        rounds: how often each runs, at least 1.
        batches: numbers of clouds.

    Raises:
        InputError: logits of a form differ from those of the first by more than 1e-4.

    Example:
        >>> from s2d3d.models import create_model
        >>> model = create_model("point_bert_tiny", num_classes=4, depth=1, num_group=4).eval()
        >>> (single,) = measure_latency({"a": model, "b": model}, torch.rand(1, 64, 3), rounds=1, batches=(1,))
        >>> len(single.times["b"]), single.deviations["b"]
        (1, 0.0)
    """
    threads, results = torch.get_num_threads(), []
    for size in batches:
        batch = points[torch.arange(size) % len(points)]
        contestants = [
            Contestant(name, partial(_task, form, batch), note=NOTES.get(name, "")) for name, form in forms.items()
        ]
        comparison = interleave(
            "latency", contestants, start=local(make_timer(torch.device("cpu"))), rounds=rounds, tolerance=TOLERANCE,
            title=f"{size} cloud{'s' if size > 1 else ''} of {batch.shape[1]} points, {threads} thread"
            f"{'s' if threads > 1 else ''}",
            samples=size, min_seconds=MIN_SECONDS,
        )  # fmt: skip
        results.append(comparison)
    return results


def model_forms(model: nn.Module, payload: dict[str, Any], num_points: int) -> dict[str, Form]:
    """Return the dense architecture, the model, and its exports of all formats, all with the same weights.

    Args:
        model: of the checkpoint, merged or dense, in eval mode.
        payload: of the checkpoint.
        num_points: of a cloud.

    Raises:
        InputError: a package for a format is missing.
    """
    described = payload["model"]

    def dense() -> nn.Module:
        fresh = create_model(
            described["name"], num_classes=described["num_classes"], in_channels=described["in_channels"],
            **described["kwargs"],
        )  # fmt: skip
        fresh.load_state_dict(model.state_dict())
        return fresh.eval()

    forms: dict[str, Form] = {DENSE: dense(), AGAIN: dense(), MERGED: model, FOLDED: fold_batchnorm(model)}
    with tempfile.TemporaryDirectory() as folder:
        for name, suffix in FORMATS.items():
            path = export_model(
                model, Path(folder, f"model{suffix}"), format=name, num_points=num_points,
                in_channels=described["in_channels"],
            )  # fmt: skip
            forms[TITLES[name]] = load_exported(path, threads=torch.get_num_threads())
    return forms


@torch.no_grad()
def without_ties(forms: dict[str, Form], points: Tensor) -> Tensor:
    """Return the clouds for which all forms agree. About one in a hundred has a tie, see `Agreement`.

    If the forms disagree on more than one in eight, all clouds are returned, so that `measure_latency` refuses them.
    """
    logits = torch.stack([torch.cat([form(batch) for batch in points.split(32)]) for form in forms.values()])
    agree = (logits - logits[0]).abs().amax((0, 2)) <= TOLERANCE
    return points[agree] if 8 * int(agree.sum()) >= 7 * len(points) else points


def latency_page(model: nn.Module, payload: dict[str, Any], points: Tensor, *, rounds: int = 20) -> str:
    """Return the tables of a checkpoint as Markdown, with the machine they were measured on.

    Arguments as for `model_forms` and `measure_latency`.

    Raises:
        InputError: a package is missing, or a form computes something else.
    """
    settings = Settings(torch.device("cpu"), torch.get_num_threads(), rounds=rounds)
    section = new_section("latency", "Latency", settings)
    section.hardware["packages"] = {name: installed_version(name) for name in PACKAGES}
    forms = model_forms(model, payload, points.shape[1])
    tables = [comparison_table(one) for one in measure_latency(forms, without_ties(forms, points), rounds=rounds)]
    return "\n\n".join([f"# Latency of {payload['model']['name']}", *tables, "\n".join(hardware_lines(section))])


def _task(form: Form, points: Tensor) -> Task:
    def call() -> Tensor:
        with torch.no_grad():
            return form(points)

    return Task(call, lambda: [call()])
