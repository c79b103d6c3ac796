"""Read files of `torch.save` as data: code in their pickles is never run."""

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What torch raises on files that are damaged, or something else altogether."""


def load_data(
    path: str | Path,
    *,
    map_location: torch.device | str = "cpu",
    allow: Iterable[Callable | tuple[Callable, str]] = (),
) -> Any:
    """Read what `torch.save` wrote: tensors, plain Python values and what `allow` names.

    Args:
        path: the file.
        map_location: device of the tensors.
        allow: functions and classes that the pickle may call besides, as for `torch.serialization.safe_globals`.

    Raises:
        InputError: the file is missing, damaged, or its pickle calls for anything else.

    Example:
        >>> load_data("no/such.pt")
        Traceback (most recent call last):
        s2d3d.errors.InputError: no/such.pt: no such checkpoint file
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals(list(allow)):
            return torch.load(path, map_location=map_location, weights_only=True)
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be read as a checkpoint ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    called = re.search(r"GLOBAL `?([\w.]+)", str(error))
    if called:
        return f"it is more than data: its pickle calls {called[1]}, which is not done"
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("Weights only load failed")]
    return lines[0].rstrip(".:") if lines else type(error).__name__
