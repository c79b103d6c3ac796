"""One reader and one writer for HDF5 files of point clouds, with every check in one place."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ..errors import InputError

MAX_BYTES = 64 * 2**30
"""Largest dataset that is read: a declared shape above it is a broken or hostile file."""

MAX_RATIO = 2000
"""Declared bytes for each stored one; gzip reaches about 1000."""

MAX_SHAPES = 2**27
"""Most shapes of a file: their labels alone take a gigabyte."""

MAX_COORDINATE = 1e18
"""Largest coordinate: squared distances of larger ones overflow float32."""

READ_BYTES = 8 * 2**20
"""What is read at once from a file that does not say itself in which pieces it is stored."""

MAX_PIECE = 2**30
"""Largest piece (HDF5 chunk) of a file that is not read as a whole."""

UP_AXES = ("y", "z")
SEE = "see data/README.md"


@dataclass(frozen=True)
class CloudFile:
    """What one HDF5 file holds.

    Attributes:
        points: (n, P, 3) float16 or float32, as stored.
        label: (n,) int64.
        names: n names of shapes, or None.
        normal: (n, P, 3) of the dtype of `points`, or None.
        mask: (n, P) int64 part or foreground labels, or None.
        up_axis: "y" or "z", the file's attribute of that name, or None.
    """

    points: np.ndarray
    label: np.ndarray
    names: list[str] | None = None
    normal: np.ndarray | None = None
    mask: np.ndarray | None = None
    up_axis: str | None = None

    @property
    def dtype(self) -> np.dtype:
        """float16 or float32, that of the points."""
        return self.points.dtype


@dataclass(frozen=True)
class CloudLayout:
    """What one HDF5 file holds, but for its points and mask, which `read_rows` and `read_mask_rows` read in parts.

    Attributes:
        path: the file.
        shape: (n, P, 3) of its points.
        dtype: float16 or float32, that of the points once read.
        rows_per_read: clouds of one piece of the file; parts that begin at a multiple of it are read fastest.
        label: (n,) int64.
        names: n names of shapes, or None.
        has_mask: whether there is a mask.
        up_axis: "y" or "z", the file's attribute of that name, or None.
        stamp: size and time of change, by which a file that has been replaced is noticed.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    rows_per_read: int
    label: np.ndarray
    names: list[str] | None
    has_mask: bool
    up_axis: str | None
    stamp: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Bytes of the points once read."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def read_h5(
    path: str | os.PathLike, *, num_classes: int | None = None, extras: bool = True, max_bytes: int = MAX_BYTES
) -> CloudFile:
    """Read and check one file: `data` (n, P, 3) float, `label` (n,) or (n, 1) whole numbers.

    Optional: `name` (n,), `normal` (n, P, 3), `mask` (n, P), attribute `up_axis`. Other keys are ignored. Links to
    other places and raw data outside the file are refused; float64 coordinates become float32.

    Args:
        path: the file.
        num_classes: labels must lie in [0, num_classes); without it, be at least 0.
        extras: read `normal` and `mask` too.
        max_bytes: refuse a dataset that declares more than this.

    Raises:
        InputError: whatever is wrong with the file, with its name and the dataset's.

    Example:
        >>> write_h5("two.h5", np.ones((2, 8, 3), np.float32), [0, 1], up_axis="z")  # doctest: +SKIP
        >>> read_h5("two.h5", num_classes=2).label.tolist()  # doctest: +SKIP
        [0, 1]
    """
    path = Path(path)
    with _opened(path) as file:
        item = _points_dataset(path, file, max_bytes)
        count = item.shape[0]
        label = _read_label(path, file, count, num_classes, max_bytes)
        points = _load_points(path, item, 0, count)
        return CloudFile(
            points=points,
            label=label,
            names=_read_names(path, file, count, max_bytes),
            normal=_read_normal(path, file, points, max_bytes) if extras else None,
            mask=_read_mask(path, file, points.shape[:2], max_bytes) if extras else None,
            up_axis=_read_up_axis(path, file),
        )


def points_bytes(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> int:
    """Return the bytes that the points of a file take once read; they are not read.

    Raises:
        InputError: whatever is wrong with the file's `data`.
    """
    path = Path(path)
    with _opened(path) as file:
        item = _points_dataset(path, file, max_bytes)
        return item.size * _kept_dtype(item).itemsize


def inspect_h5(path: str | os.PathLike, *, num_classes: int | None = None, max_bytes: int = MAX_BYTES) -> CloudLayout:
    """Read and check everything of a file but its points, normals and mask.

    Args:
        path: the file.
        num_classes: as for `read_h5`.
        max_bytes: likewise.

    Raises:
        InputError: whatever is wrong with the file; stored in pieces too large to be read one by one.

    Example:
        >>> write_h5("two.h5", np.ones((2, 8, 3), np.float32), [0, 1])  # doctest: +SKIP
        >>> read_rows(inspect_h5("two.h5"), 1, 2).shape  # doctest: +SKIP
        (1, 8, 3)
    """
    path = Path(path)
    stamp = _stamp(path)
    with _opened(path) as file:
        item = _points_dataset(path, file, max_bytes)
        count = item.shape[0]
        mask = _mask_dataset(path, file, item.shape[:2], max_bytes)
        return CloudLayout(
            path=path,
            shape=item.shape,
            dtype=_kept_dtype(item),
            rows_per_read=_rows_per_read(path, item),
            label=_read_label(path, file, count, num_classes, max_bytes),
            names=_read_names(path, file, count, max_bytes),
            has_mask=mask is not None,
            up_axis=_read_up_axis(path, file),
            stamp=stamp,
        )


def read_rows(layout: CloudLayout, start: int, stop: int) -> np.ndarray:
    """Read clouds `start` to `stop` of a file: (stop - start, P, 3) of `layout.dtype`.

    Raises:
        InputError: the file is no longer the one that was inspected, or one of these clouds is not finite.
    """
    with _unchanged(layout) as file:
        return _load_points(layout.path, _points_dataset(layout.path, file, MAX_BYTES), start, stop)


def read_mask_rows(layout: CloudLayout, start: int, stop: int) -> np.ndarray:
    """Read the mask of clouds `start` to `stop`: (stop - start, P) int64; see `read_rows`."""
    with _unchanged(layout) as file:
        return _load_mask(layout.path, _mask_dataset(layout.path, file, layout.shape[:2], MAX_BYTES), start, stop)


def write_h5(
    path: str | os.PathLike,
    points: np.ndarray,
    label: Sequence[int] | np.ndarray,
    *,
    names: Sequence[str] | None = None,
    normal: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    up_axis: str | None = None,
    attributes: Mapping[str, str | int | bool] | None = None,
) -> None:
    """Write a file that `read_h5` reads; it appears whole or not at all.

    Args:
        path: replaced when it exists.
        points: (n, P, 3) float16 or float32, kept as it is.
        label: (n,) class indices.
        names: n names.
        normal: (n, P, 3).
        mask: (n, P).
        up_axis: "y" or "z", stored as an attribute.
        attributes: more attributes of the file.

    Raises:
        InputError: `up_axis` is neither.
    """
    if up_axis is not None:
        check_up_axis(up_axis)
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with h5py.File(temporary, "w") as file:
            _write_array(file, "data", np.asarray(points))
            file["label"] = np.asarray(label, dtype=np.int64).reshape(-1, 1)
            if names is not None:
                file["name"] = np.array([name.encode() for name in names], dtype=np.bytes_)
            for key, extra in (("normal", normal), ("mask", mask)):
                if extra is not None:
                    _write_array(file, key, np.asarray(extra))
            attributes = dict(attributes or {}, **({} if up_axis is None else {"up_axis": up_axis}))
            for key, value in attributes.items():
                # Fixed length: HDF5 can hang on a damaged string heap.
                file.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else value
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_up_axis(up_axis: str, where: str = "up_axis") -> None:
    """Raise InputError unless `up_axis` is "y" or "z"."""
    if up_axis not in UP_AXES:
        raise InputError(f"{where} is {up_axis!r}, must be 'y' or 'z'")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; {SEE}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError) as error:
        # What h5py raises on a foreign, truncated or damaged file: the kind depends on the byte that is wrong.
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not an HDF5 file, truncated or damaged ({reason}); fetch it again, {SEE}") from error


@contextlib.contextmanager
def _unchanged(layout: CloudLayout) -> Iterator[h5py.File]:
    """Open a file that has been inspected; opened anew each time, it serves threads and forked processes alike."""
    _check_stamp(layout)
    try:
        with _opened(layout.path) as file:
            yield file
    finally:
        _check_stamp(layout)  # a file that changed while it was read gives another error, of which this is the cause


def _check_stamp(layout: CloudLayout) -> None:
    if _stamp(layout.path) != layout.stamp:
        raise InputError(f"{layout.path}: has changed since it was opened; put the file back and start or resume again")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns


def _write_array(file: h5py.File, key: str, array: np.ndarray) -> None:
    row_bytes = max(1, array[:1].nbytes)
    chunks = (max(1, min(64, len(array), READ_BYTES // row_bytes)), *array.shape[1:])
    file.create_dataset(key, data=array, chunks=chunks, compression="gzip", compression_opts=4, shuffle=True)


def _dataset(path: Path, file: h5py.File, key: str, max_bytes: int) -> h5py.Dataset | None:
    """Return a dataset that lies in this very file and has a sane size, None when there is none of this name."""
    link = file.get(key, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise InputError(f"{path}: '{key}' is a link, which is not followed; store the dataset in the file itself")
    item = file[key]
    if not isinstance(item, h5py.Dataset):
        raise InputError(f"{path}: '{key}' is a group, must be a dataset; {SEE}")
    if item.external or item.is_virtual:
        raise InputError(f"{path}: dataset '{key}' keeps its values in other files, which are not read")
    if item.shape is None:
        raise InputError(f"{path}: dataset '{key}' is empty; {SEE}")
    num_bytes = item.size * item.dtype.itemsize
    if num_bytes > max_bytes:
        raise InputError(f"{path}: dataset '{key}' declares shape {item.shape}, above {max_bytes} bytes; is it broken?")
    if num_bytes > MAX_RATIO * max(item.id.get_storage_size(), 1024):
        raise InputError(f"{path}: dataset '{key}' declares shape {item.shape} but stores next to nothing; {SEE}")
    return item


def _required(path: Path, file: h5py.File, key: str, max_bytes: int) -> h5py.Dataset:
    item = _dataset(path, file, key, max_bytes)
    if item is None:
        raise InputError(f"{path}: dataset '{key}' missing, found {sorted(map(str, file))}; {SEE}")
    return item


def _points_dataset(path: Path, file: h5py.File, max_bytes: int) -> h5py.Dataset:
    item = _required(path, file, "data", max_bytes)
    if item.ndim != 3 or item.shape[2] != 3:
        raise InputError(f"{path}: dataset 'data' has shape {item.shape}, must be (shapes, points, 3); {SEE}")
    if 0 in item.shape:
        raise InputError(f"{path}: dataset 'data' is empty, shape {item.shape}; {SEE}")
    if item.shape[0] > MAX_SHAPES:
        raise InputError(f"{path}: dataset 'data' declares {item.shape[0]} shapes, above {MAX_SHAPES}; is it broken?")
    if item.dtype.kind != "f":
        raise InputError(f"{path}: dataset 'data' has dtype {item.dtype}, must be float32 or float16; {SEE}")
    return item


def _kept_dtype(item: h5py.Dataset) -> np.dtype:
    return np.dtype(np.float16 if item.dtype.itemsize == 2 else np.float32)


def _rows_per_read(path: Path, item: h5py.Dataset) -> int:
    row_bytes = item.dtype.itemsize * item.shape[1] * item.shape[2]
    if item.chunks is None:
        return max(1, READ_BYTES // row_bytes)
    if int(np.prod(item.chunks, dtype=object)) * item.dtype.itemsize > MAX_PIECE:
        raise InputError(
            f"{path}: dataset 'data' is stored in pieces {item.chunks}, too large to be read one by one; raise "
            "data.memory_budget_gb, or copy it with tools/prepare_data.py"
        )
    return item.chunks[0]


def _load_points(path: Path, item: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        points = item[start:stop].astype(_kept_dtype(item), copy=False)
    # The sum over a shape is not finite if any coordinate is not: cheaper than a mask as large as the data.
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(points.sum(axis=(1, 2), dtype=np.float64))
    if not finite.all():
        sample = start + int(finite.argmin())
        raise InputError(f"{path}: dataset 'data' holds NaN or infinity in sample {sample}; remove it")
    if points.dtype != np.float16 and max(points.max(), -points.min()) > MAX_COORDINATE:
        sample = start + int(np.abs(points).max(axis=(1, 2)).argmax())
        raise InputError(f"{path}: dataset 'data' holds coordinates above {MAX_COORDINATE:g} in sample {sample}; {SEE}")
    return points


def _read_label(path: Path, file: h5py.File, count: int, num_classes: int | None, max_bytes: int) -> np.ndarray:
    item = _required(path, file, "label", max_bytes)
    if item.shape not in ((item.size,), (item.size, 1)):
        raise InputError(f"{path}: dataset 'label' has shape {item.shape}, must be (shapes,) or (shapes, 1); {SEE}")
    if item.size != count:
        raise InputError(f"{path}: dataset 'label' has {item.size} entries, 'data' has {count} shapes; {SEE}")
    if item.dtype.kind not in "iuf":
        raise InputError(f"{path}: dataset 'label' has dtype {item.dtype}, must be an integer; {SEE}")
    label = item[()].reshape(-1)
    bad = ~np.isfinite(label) | (label != np.floor(label))
    if bad.any():
        first = int(bad.argmax())
        raise InputError(f"{path}: dataset 'label' holds {label[first]} in sample {first}, must be a whole number")
    bad = (label < 0) | (label >= (2**31 if num_classes is None else num_classes))
    if bad.any():
        first = int(bad.argmax())
        bound = "at least 0" if num_classes is None else f"in [0, {num_classes})"
        raise InputError(f"{path}: dataset 'label' holds {int(label[first])} in sample {first}, must be {bound}")
    return label.astype(np.int64)


def _read_names(path: Path, file: h5py.File, count: int, max_bytes: int) -> list[str] | None:
    item = _dataset(path, file, "name", max_bytes)
    if item is None:
        return None
    if item.size != count or h5py.check_string_dtype(item.dtype) is None:
        raise InputError(f"{path}: dataset 'name' has shape {item.shape} of {item.dtype}, must be {count} strings")
    try:
        return [name.decode() for name in item[()].reshape(-1)]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: dataset 'name' is not UTF-8 text ({error.reason})") from error


def _read_normal(path: Path, file: h5py.File, points: np.ndarray, max_bytes: int) -> np.ndarray | None:
    item = _dataset(path, file, "normal", max_bytes)
    if item is None:
        return None
    if item.shape != points.shape or item.dtype.kind != "f":
        raise InputError(f"{path}: dataset 'normal' is {item.shape} {item.dtype}, must be {points.shape} float")
    return item[()].astype(points.dtype, copy=False)


def _mask_dataset(path: Path, file: h5py.File, shape: tuple[int, ...], max_bytes: int) -> h5py.Dataset | None:
    item = _dataset(path, file, "mask", max_bytes)
    if item is not None and (item.shape != shape or item.dtype.kind not in "iufb"):
        raise InputError(f"{path}: dataset 'mask' is {item.shape} {item.dtype}, must be {shape} numbers")
    return item


def _load_mask(path: Path, item: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    mask = item[start:stop]
    if not (np.abs(mask) < 2**31).all():  # false for NaN too
        raise InputError(f"{path}: dataset 'mask' holds NaN or numbers beyond 32 bits; {SEE}")
    return mask.astype(np.int64)


def _read_mask(path: Path, file: h5py.File, shape: tuple[int, ...], max_bytes: int) -> np.ndarray | None:
    item = _mask_dataset(path, file, shape, max_bytes)
    return None if item is None else _load_mask(path, item, 0, shape[0])


def _read_up_axis(path: Path, file: h5py.File) -> str | None:
    value = file.attrs.get("up_axis")
    if value is None:
        return None
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    check_up_axis(value if isinstance(value, str) else repr(value), f"{path}: attribute 'up_axis'")
    return value
