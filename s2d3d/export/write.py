"""Export of a merged or dense model to one file for other runtimes: ONNX, TorchScript or a `torch.export` program."""

import contextlib
import copy
import importlib
import inspect
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..atomic import parse_json, write_bytes
from ..errors import InputError, did_you_mean, first_line
from ..models import fold_batchnorm
from ..optional import optional
from ..s2d import is_sparse
from ..version import __version__
from . import FORMATS

MAX_BATCH, MAX_POINTS = 2**16, 2**20
_EXTRA = "s2d3d.json"


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    num_points: int = 1024,
    in_channels: int = 3,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Export a model for inference: input `points` (B, N, C) float32, output `logits` (B, num_classes).

    BatchNorm is folded into the linear layers if possible. The number of clouds B is free. The number of points N is
    free too, with the minimum `min_points` of the metadata: farthest point sampling is a loop in the file, and its
    length depends on N. N is fixed, `num_points`, in three cases: a Point Transformer as TorchScript, which unrolls the
    loop; one exported for so few points that its last stage has fewer than two; a model of your own without a method
    `fewest_points`. The metadata lists the free dimensions.

    Args:
        model: dense or merged, on any device, in either mode. It is not changed.
        path: output file; an existing file is replaced, and its folder must exist.
        format: one of `FORMATS`: "onnx" (ONNX Runtime), "torchscript" (torch.jit.load), "torch_export"
            (torch.export.load).
        num_points: points per cloud, at least the minimum of the model.
        in_channels: channels of a point, C.
        metadata: additional metadata as plain types, such as `class_names`, `channels`, `up_axis`, `normalize`.

    Returns:
        The path.

    Raises:
        InputError: the model has experts, the format is unknown, there are too few points, or a package is missing.

    Example:
        >>> import tempfile
        >>> from s2d3d import create_model
        >>> model = create_model("point_bert_tiny", num_classes=3, depth=1, num_group=4)
        >>> path = export_model(model, Path(tempfile.mkdtemp(), "model.pt"), format="torchscript", num_points=64)
        >>> load_exported(path)(torch.rand(5, 80, 3)).shape
        torch.Size([5, 3])
    """
    if format not in FORMATS:
        raise InputError(f"unknown format '{format}'{did_you_mean(format, FORMATS)} (known: {', '.join(FORMATS)})")
    if is_sparse(model):
        raise InputError("the model has experts, which only training needs; merge it first with merge_experts")
    if format == "onnx":
        for package in ("onnx", "onnxscript"):
            _import(package)
    # fold_batchnorm copies; the copy before it keeps the caller's mode and device.
    network = fold_batchnorm(copy.deepcopy(model).cpu().float().eval()).requires_grad_(False)
    example, classes = example_clouds(network, num_points, in_channels)
    least = fewest_points(network)
    free_points = least is not None and num_points >= least
    free_points = free_points and not (format == "torchscript" and _keeps_a_share(network))
    described = {
        "s2d3d_version": __version__,
        "num_classes": classes,
        "num_points": num_points,
        "min_points": least if free_points else num_points,
        "in_channels": in_channels,
        "free_dimensions": ["batch", "points"] if free_points else ["batch"],
        **(metadata or {}),
    }
    try:
        with _quiet():
            content = _WRITERS[format](network, example, least if free_points else None, described)
    except RuntimeError as error:  # of torch.export, ONNX and TorchScript
        raise InputError(
            f"{type(model).__name__} cannot be exported as {format}: {first_line(error)}; correct its forward method"
            + (", or what its fewest_points() returns" if free_points else "")
        ) from error
    write_bytes(path, content)
    return Path(path)


@torch.no_grad()
def example_clouds(model: nn.Module, num_points: int, in_channels: int = 3) -> tuple[Tensor, int]:
    """Return two clouds (2, N, C) that pass through a model on the CPU, and its number of classes.

    Raises:
        InputError: the model needs more points.

    Example:
        >>> from s2d3d import create_model
        >>> example_clouds(create_model("point_bert_tiny", num_classes=3, depth=1, num_group=4).eval(), 64)[1]
        3
    """
    example = torch.rand(2, num_points, in_channels, generator=torch.Generator().manual_seed(0)) - 0.5
    try:
        return example, model(example).shape[1]
    except ValueError as error:
        raise InputError(f"clouds of {num_points} points do not pass through the model: {error}") from error


def fewest_points(network: nn.Module) -> int | None:
    """Return the minimum number of points for a program with a free number of points; see the models' own method.

    None without such a method: nothing is known about other numbers of points than that of the example.

    Example:
        >>> from s2d3d import create_model
        >>> fewest_points(create_model("point_bert_small", num_classes=4))
        32
        >>> fewest_points(create_model("point_transformer_small", num_classes=4))  # one in 64 is left
        128
    """
    least = getattr(network, "fewest_points", None)
    return None if least is None else least()


def _keeps_a_share(network: nn.Module) -> bool:
    """Return whether the number of points that a model selects depends on that of the cloud, such as N // 4."""
    return getattr(network, "keeps_a_share", False)


class Exported:
    """An exported model, ready to run: points (B, N, C) -> logits (B, num_classes), float32 on the CPU.

    Attributes:
        path: of the file.
        metadata: the metadata that `export_model` wrote.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        """Read a file; see `load_exported`."""
        self.path = path = Path(path)
        kinds = {suffix: name for name, suffix in FORMATS.items()}
        if path.suffix not in kinds:
            raise InputError(f"{path}: an exported model ends in one of {', '.join(kinds)}")
        if not path.is_file():
            raise InputError(f"{path}: no such file; write it with: python tools/export.py --output {path}")
        with _quiet():
            self._run, self.metadata = _READERS[kinds[path.suffix]](path, threads)

    def __call__(self, points: Tensor) -> Tensor:
        """Classify points (B, N, C) float32.

        Raises:
            InputError: the file does not accept this number of points or channels.
        """
        self._check(points)
        with torch.no_grad():
            return self._run(points)

    def _check(self, points: Tensor) -> None:
        known = self.metadata
        if "min_points" not in known:  # a file of another origin
            return
        channels, least, free = known["in_channels"], known["min_points"], "points" in known["free_dimensions"]
        takes = f"{least} or more" if free else f"exactly {least}"
        if points.dim() != 3 or points.shape[2] != channels or points.shape[0] < 1:
            raise InputError(f"points have shape {tuple(points.shape)}, the exported model takes (B, N, {channels})")
        if points.shape[1] < least or (points.shape[1] > least and not free):
            raise InputError(f"clouds of {points.shape[1]} points: the exported model takes {takes}")


def load_exported(path: str | Path, *, threads: int | None = None) -> Exported:
    """Read a file of `export_model`; its suffix gives the format.

    Args:
        path: the file.
        threads: threads of ONNX Runtime, default: its own choice. The other formats use the threads of torch.

    Raises:
        InputError: the file does not exist, has an unknown suffix or another format, or a package is missing.
    """
    return Exported(path, threads)


def _program(network: nn.Module, example: Tensor, least: int | None) -> torch.export.ExportedProgram:
    """Return the graph for any number of clouds and, unless `least` is None, any number of points >= `least`."""
    if "prefer_deferred_runtime_asserts_over_guards" not in inspect.signature(torch.export.export).parameters:
        raise InputError(f"torch {torch.__version__} is too old for this format; it needs torch 2.9 or newer")
    dimensions: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    if least is not None:
        dimensions[1] = torch.export.Dim("points", min=least, max=MAX_POINTS)
    torch.compiler.reset()  # what an earlier export has left behind narrows the free dimensions of this one
    # N // 4 <= N and the like are true, and beyond what the exporter proves: it states them in the program instead.
    return torch.export.export(
        network, (example,), dynamic_shapes=(dimensions,), strict=False,
        prefer_deferred_runtime_asserts_over_guards=_keeps_a_share(network),
    )  # fmt: skip


def _write_onnx(network: nn.Module, example: Tensor, least: int | None, metadata: dict[str, Any]) -> bytes:
    program = torch.onnx.export(
        _program(network, example, least), (example,), dynamo=True, optimize=True, verbose=False,
        input_names=["points"], output_names=["logits"],
    )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    _import("onnx").helper.set_model_props(proto, texts)
    return proto.SerializeToString()


def _write_torchscript(network: nn.Module, example: Tensor, least: int | None, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with torch.no_grad():
        traced = torch.jit.trace(network, example, check_trace=False)
    torch.jit.save(traced, buffer, _extra_files={_EXTRA: json.dumps(metadata)})
    return buffer.getvalue()


def _write_torch_export(network: nn.Module, example: Tensor, least: int | None, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    program = _program(network, example, least)
    torch.export.save(program, buffer, extra_files={_EXTRA: json.dumps(metadata)})
    return buffer.getvalue()


def _read_onnx(path: Path, threads: int | None) -> tuple[Any, dict[str, Any]]:
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _unreadable(runtime) as error:
        raise InputError(f"{path}: not an ONNX file that this ONNX Runtime reads ({first_line(error)})") from error
    metadata = {key: _plain(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}

    def run(points: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(["logits"], {"points": _rows(points)})[0])
        except _unreadable(runtime) as error:
            raise InputError(f"{path}: cannot be run on a cloud ({first_line(error)})") from error

    return run, metadata


def _unreadable(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """Return the errors of ONNX Runtime for unreadable files; these classes have no common base."""
    kinds = runtime.capi.onnxruntime_pybind11_state
    return (
        kinds.Fail, kinds.InvalidProtobuf, kinds.InvalidGraph, kinds.InvalidArgument, kinds.NotImplemented,
        kinds.RuntimeException, ValueError,
    )  # fmt: skip


def _read_torchscript(path: Path, threads: int | None) -> tuple[Any, dict[str, Any]]:
    extra = {_EXTRA: ""}
    try:
        module = torch.jit.load(path, map_location="cpu", _extra_files=extra)
    except RuntimeError as error:
        raise InputError(f"{path}: not a TorchScript file ({first_line(error)})") from error
    return module, _metadata(path, extra[_EXTRA])


def _read_torch_export(path: Path, threads: int | None) -> tuple[Any, dict[str, Any]]:
    extra = {_EXTRA: ""}
    try:
        program = torch.export.load(str(path), extra_files=extra)
    except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a program that torch.export.save wrote ({first_line(error)})") from error
    return program.module(), _metadata(path, extra[_EXTRA])


def _metadata(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        content = parse_json(text.decode() if isinstance(text, bytes) else text or "{}")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: its description is damaged; export the model again")
    return content


_WRITERS = {"onnx": _write_onnx, "torchscript": _write_torchscript, "torch_export": _write_torch_export}
_READERS = {"onnx": _read_onnx, "torchscript": _read_torchscript, "torch_export": _read_torch_export}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' own warnings and log messages."""
    noisy = [
        logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", "torch._export")
    ]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels):
            logger.setLevel(level)


def _import(name: str) -> ModuleType:
    with optional(name, "ONNX", extra="export"):
        return importlib.import_module(name)


def _rows(points: Tensor) -> np.ndarray:
    return points.detach().cpu().float().contiguous().numpy()


def _plain(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text
