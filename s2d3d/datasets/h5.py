"""One reader and one writer for HDF5 files of point clouds, with every check in one place."""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ..atomic import write_bytes
from ..channels import WIDTH, XYZ, num_channels
from ..errors import InputError, printable
from .h5_checks import (
    READ_BYTES,
    SEE,
    check_up_axis,
    further_datasets,
    kept_dtype,
    load_channels,
    load_mask,
    load_points,
    mask_dataset,
    points_dataset,
    read_extra,
    read_label,
    read_mask,
    read_names,
    read_up_axis,
    rows_per_read,
)


@dataclass(frozen=True)
class CloudFile:
    """What one HDF5 file holds.

    Attributes:
        points: (n, P, C) float16 or float32: coordinates as stored, then the channels that were asked for.
        label: (n,) int64.
        names: n names of shapes, or None.
        normal: (n, P, 3) of the dtype of `points`, as stored, or None.
        rgb: (n, P, 3), as stored, or None.
        mask: (n, P) int64 part or foreground labels, or None.
        up_axis: "y" or "z", the file's attribute of that name, or None.
    """

    points: np.ndarray
    label: np.ndarray
    names: list[str] | None = None
    normal: np.ndarray | None = None
    rgb: np.ndarray | None = None
    mask: np.ndarray | None = None
    up_axis: str | None = None

    @property
    def dtype(self) -> np.dtype:
        """float16 or float32, that of the points."""
        return self.points.dtype


@dataclass(frozen=True)
class CloudLayout:
    """What one HDF5 file holds, except its points and mask, which `read_rows` and `read_mask_rows` read in parts.

    Attributes:
        path: the file.
        shape: (n, P, C) of its points.
        dtype: float16 or float32, that of the points once read.
        rows_per_read: clouds of one chunk of the file; parts that begin at a multiple of it are read fastest.
        label: (n,) int64.
        names: n names of shapes, or None.
        has_mask: whether there is a mask.
        up_axis: "y" or "z", the file's attribute of that name, or None.
        stamp: size and time of change, to detect that the file has been replaced.
        channels: those that are read.
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
    channels: str = XYZ


def read_h5(
    path: str | os.PathLike,
    *,
    num_classes: int | None = None,
    extras: bool = True,
    channels: str = XYZ,
    labelled: bool = True,
) -> CloudFile:
    """Read and check one file: `data` (n, P, 3) float, `label` (n,) or (n, 1) whole numbers.

    Optional: `name` (n,), `normal` (n, P, 3), `rgb` (n, P, 3), `mask` (n, P), attribute `up_axis`. Other keys are
    ignored. Links to other places and raw data outside the file are refused; float64 coordinates become float32, clouds
    far from the origin after they were moved to it.

    Args:
        path: the file.
        num_classes: labels must lie in [0, num_classes); without it, be at least 0.
        extras: read `normal`, `rgb` and `mask` too, as they are stored.
        channels: of the points, one of `s2d3d.channels.CHANNELS`; those beyond x, y, z must be there. Normals become
            unit vectors; colours lie in [0, 1], whole numbers are divided by 255 (8 bits) or 65535.
        labelled: False does not read `label`; all labels are 0.

    Raises:
        InputError: the file is wrong; the message names it and the dataset.

    Example:
        >>> write_h5("two.h5", np.ones((2, 8, 3), np.float32), [0, 1], up_axis="z")  # doctest: +SKIP
        >>> read_h5("two.h5", num_classes=2).label.tolist()  # doctest: +SKIP
        [0, 1]
    """
    path = Path(path)
    with _opened(path) as file:
        item = points_dataset(path, file)
        count = item.shape[0]
        label = read_label(path, file, count, num_classes) if labelled else np.zeros(count, np.int64)
        further = further_datasets(path, file, channels, item.shape)
        points = load_points(path, item, 0, count)
        return CloudFile(
            points=load_channels(path, points, further, 0, count),
            label=label,
            names=read_names(path, file, count),
            normal=read_extra(path, file, "normal", points) if extras else None,
            rgb=read_extra(path, file, "rgb", points) if extras else None,
            mask=read_mask(path, file, points.shape[:2]) if extras else None,
            up_axis=read_up_axis(path, file),
        )


def points_bytes(path: str | os.PathLike, *, channels: str = XYZ) -> int:
    """Return the bytes that the points of a file take once read, with these channels; they are not read.

    Raises:
        InputError: the `data` of the file is wrong.
    """
    path = Path(path)
    with _opened(path) as file:
        item = points_dataset(path, file)
        return item.size * kept_dtype(item).itemsize * num_channels(channels) // WIDTH


def has_labels(path: str | os.PathLike) -> bool:
    """Return whether a file has a dataset `label`; its content is not checked.

    Raises:
        InputError: the file cannot be opened.
    """
    with _opened(Path(path)) as file:
        return "label" in file


def inspect_h5(
    path: str | os.PathLike, *, num_classes: int | None = None, channels: str = XYZ, labelled: bool = True
) -> CloudLayout:
    """Read and check everything of a file except its points, normals, colours and mask.

    Args:
        path: the file.
        num_classes: as for `read_h5`.
        channels: likewise; `read_rows` reads them.
        labelled: likewise.

    Raises:
        InputError: the file is wrong, or its chunks are too large to be read one by one.

    Example:
        >>> write_h5("two.h5", np.ones((2, 8, 3), np.float32), [0, 1])  # doctest: +SKIP
        >>> read_rows(inspect_h5("two.h5"), 1, 2).shape  # doctest: +SKIP
        (1, 8, 3)
    """
    path = Path(path)
    stamp = _stamp(path)
    with _opened(path) as file:
        item = points_dataset(path, file)
        count = item.shape[0]
        mask = mask_dataset(path, file, item.shape[:2])
        for further in further_datasets(path, file, channels, item.shape):
            rows_per_read(path, further)
        return CloudLayout(
            path=path,
            shape=(*item.shape[:2], num_channels(channels)),
            dtype=kept_dtype(item),
            rows_per_read=rows_per_read(path, item),
            label=read_label(path, file, count, num_classes) if labelled else np.zeros(count, np.int64),
            names=read_names(path, file, count),
            has_mask=mask is not None,
            up_axis=read_up_axis(path, file),
            stamp=stamp,
            channels=channels,
        )


def read_rows(layout: CloudLayout, start: int, stop: int) -> np.ndarray:
    """Read clouds `start` to `stop` of a file: (stop - start, P, C) of `layout.dtype`.

    Raises:
        InputError: the file is no longer the one that was inspected, or one of these clouds is not finite.
    """
    with _unchanged(layout) as file:
        item = points_dataset(layout.path, file)
        further = further_datasets(layout.path, file, layout.channels, item.shape)
        points = load_points(layout.path, item, start, stop)
        return load_channels(layout.path, points, further, start, stop)


def read_mask_rows(layout: CloudLayout, start: int, stop: int) -> np.ndarray:
    """Read the mask of clouds `start` to `stop`: (stop - start, P) int64; see `read_rows`."""
    with _unchanged(layout) as file:
        return load_mask(layout.path, mask_dataset(layout.path, file, layout.shape[:2]), start, stop)


def write_h5(
    path: str | os.PathLike,
    points: np.ndarray,
    label: Sequence[int] | np.ndarray,
    *,
    names: Sequence[str] | None = None,
    normal: np.ndarray | None = None,
    rgb: np.ndarray | None = None,
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
        rgb: (n, P, 3), floats in [0, 1] or unsigned whole numbers of 8 or 16 bits.
        mask: (n, P).
        up_axis: "y" or "z", stored as an attribute.
        attributes: more attributes of the file.

    Raises:
        InputError: `up_axis` is neither.
        OSError: the file cannot be written, for example because the disk is full.
    """
    if up_axis is not None:
        check_up_axis(up_axis)
    # In memory first: on a full disk HDF5 loses errors, or crashes when it closes the file.
    with h5py.File(f"{path}", "w", driver="core", backing_store=False) as file:
        _write_array(file, "data", np.asarray(points))
        file["label"] = np.asarray(label, dtype=np.int64).reshape(-1, 1)
        if names is not None:
            file["name"] = np.array([name.encode() for name in names], dtype=np.bytes_)
        for key, extra in (("normal", normal), ("rgb", rgb), ("mask", mask)):
            if extra is not None:
                _write_array(file, key, np.asarray(extra))
        attributes = dict(attributes or {}, **({} if up_axis is None else {"up_axis": up_axis}))
        for key, value in attributes.items():
            # Fixed length: HDF5 can hang on a damaged string heap.
            file.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else value
        file.flush()
        image = file.id.get_file_image()
    write_bytes(path, image)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; {SEE}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); change its permissions, or copy it") from error
    try:
        with h5py.File(path, "r", locking=False) as file:  # reading needs no lock, and some file systems have none
            yield file
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError) as error:
        # What h5py raises on a foreign, truncated or damaged file: the kind depends on the byte that is wrong.
        reason = printable(" ".join(str(error).split()))
        if "already open for write" in reason:
            raise InputError(
                f"{path}: another program is writing it, or ended before it closed it; wait for that program, or fetch "
                "the file again"
            ) from error
        number = getattr(error, "errno", None)
        if number not in (None, errno.ENOENT):
            raise InputError(f"{path}: cannot be read ({os.strerror(number)}); copy it to another disk") from error
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
