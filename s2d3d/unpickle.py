"""Read files of `torch.save` as data, code in their pickles is never run; and safetensors, which hold none."""

import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, UnreadableError, printable

_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    RecursionError,
    EOFError,
    zlib.error,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""Errors of torch for files that are damaged or of another type."""
SAFETENSORS = ".safetensors"
KEY = "s2d3d"
"""Key of the metadata of safetensors under which the description of a checkpoint is stored, as JSON."""


def load_data(
    path: str | Path,
    *,
    allow: Iterable[Callable | tuple[Callable, str]] = (),
) -> Any:
    """Read a file of `torch.save`: tensors, plain Python values and objects that `allow` names; or safetensors.

    Tensors come on the CPU. Of safetensors it is the payload of `save_safetensors`, or else the weights by their names.

    Args:
        path: the file.
        allow: additional functions and classes that the pickle may call, as for `torch.serialization.safe_globals`.

    Raises:
        InputError: the file is missing.
        UnreadableError: the file is damaged, or its pickle calls anything else.

    Example:
        >>> load_data("no/such.pt")
        Traceback (most recent call last):
        s2d3d.errors.InputError: no/such.pt: no such checkpoint file
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    if Path(path).suffix == SAFETENSORS:
        metadata, weights = read_safetensors(path)
        try:
            return with_weights(json.loads(metadata[KEY]), weights) if KEY in metadata else weights
        except (ValueError, TypeError, RecursionError) as error:
            raise _not_safetensors(path, error) from error
    if _is_program(path):
        raise UnreadableError(
            f"{path}: is an exported program, not a checkpoint; name merged.pt of the run, or weights"
        )
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(list(allow)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about unusual pickles: they load, or there is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except (*_UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened; without a name it is torch that seeks where there is nothing
        raise UnreadableError(f"{path}: cannot be read as a checkpoint ({printable(_reason(error))})") from error


def with_weights(description: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the payload of a checkpoint, from its weights and its description that was stored as JSON."""
    payload = {**description, "state_dict": weights}
    files = file_numbers(payload.get("trained_files"))
    return payload if files is None else payload | {"trained_files": files}


def file_numbers(value: object) -> torch.Tensor | None:
    """Return `trained_files` of a checkpoint, or of the JSON of one, as (n,) int64; None if the value is no such thing.

    Example:
        >>> file_numbers([3, 5]), file_numbers([0.5])
        (tensor([3, 5]), None)
    """
    if isinstance(value, list) and all(type(number) is int and -(2**63) <= number < 2**63 for number in value):
        return torch.tensor(value, dtype=torch.int64)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_meta:
        return None
    return value if value.dtype == torch.int64 and value.dim() == 1 else None


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return the metadata and the weights of a file, on the CPU.

    Raises:
        UnreadableError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise _not_safetensors(path, error) from error


def _not_safetensors(path: str | Path, error: Exception) -> UnreadableError:
    reason = printable(" ".join(str(error).split()))[:200]
    return UnreadableError(f"{path}: cannot be read as safetensors (truncated, damaged or something else: {reason})")


def _is_program(path: str | Path) -> bool:
    """Tell whether a file is of ONNX, TorchScript or torch.export."""
    with open(path, "rb") as file:
        if file.read(1) == b"\x08" or Path(path).suffix.lower() == ".onnx":  # ONNX begins so, and no pickle does
            return True
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError):
        return False
    return "archive_format" in names or any(name.startswith("code/") for name in names)


def _check_sums(path: str | Path) -> None:
    """Verify the checksums that `torch.save` wrote. torch does not verify them and would return changed weights.

    Compressed or overlapping parts are refused. `torch.save` never writes them, and they could unpack to huge sizes.
    """
    if not zipfile.is_zipfile(path):  # the format before torch 1.6 has none
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        size = sum(part.file_size for part in parts)
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or size > Path(path).stat().st_size:
            raise zipfile.BadZipFile(f"damaged: its parts declare {size} bytes, more than there are")
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"damaged: the checksum of its part {damaged} is wrong")


def _reason(error: Exception) -> str:
    called = re.search(r"GLOBAL `?([\w.]+)", str(error))
    if called:
        return f"it is more than data: its pickle calls {called[1]}, which is not done"
    text = str(error.strerror) if isinstance(error, OSError) else str(error)
    lines = [line.strip() for line in text.splitlines()]
    lines = [
        line for line in lines if line and not line.startswith(("Weights only load failed", "Please file an issue"))
    ]
    detail = lines[0].partition(". ")[0].rstrip(".:") if lines else type(error).__name__
    return detail if detail.startswith("damaged") else f"truncated, damaged or something else: {detail}"
