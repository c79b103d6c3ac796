"""Read files of `torch.save` as data: code in their pickles is never run."""

import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
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


def load_data(
    path: str | Path,
    *,
    map_location: torch.device | str = "cpu",
    allow: Iterable[Callable | tuple[Callable, str]] = (),
) -> Any:
    """Read a file of `torch.save`: tensors, plain Python values and objects that `allow` names.

    Args:
        path: the file.
        map_location: device of the tensors.
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
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(list(allow)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about unusual pickles: they load, or there is an error
            return torch.load(path, map_location=map_location, weights_only=True)
    except (*_UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened; without a name it is torch that seeks where there is nothing
        raise UnreadableError(f"{path}: cannot be read as a checkpoint ({printable(_reason(error))})") from error


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
