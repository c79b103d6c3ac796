"""Checks of the datasets in an HDF5 file of point clouds, and how each is read; used by `h5`."""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from ..channels import WIDTH, XYZ, groups, missing
from ..errors import InputError
from .attributes import unit_colors, unit_normals
from .precision import MAX_COORDINATE, MIN_EXTENT, has_lost_shape, is_single, to_single

MAX_BYTES = 64 * 2**30
"""Largest dataset that is read: a declared shape above it is a broken or hostile file."""

MAX_RATIO = 2000
"""Declared bytes for each stored one; gzip reaches about 1000."""

MAX_SHAPES = 2**27
"""Most shapes of a file: their labels alone take a gigabyte."""

READ_BYTES = 8 * 2**20
"""What is read at once from a file that does not say itself in which pieces it is stored."""

MAX_PIECE = 2**30
"""Largest piece (HDF5 chunk) of a file that is not read as a whole."""

UP_AXES = ("y", "z")
SEE = "see data/README.md"


def check_up_axis(up_axis: str, where: str = "up_axis") -> None:
    """Raise InputError unless `up_axis` is "y" or "z"."""
    if up_axis not in UP_AXES:
        raise InputError(f"{where} is {up_axis!r}, must be 'y' or 'z'")


def dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset | None:
    """Return a dataset that is stored in this file and has a plausible size, or None if there is none of this name."""
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
    if num_bytes > MAX_BYTES:
        raise InputError(f"{path}: dataset '{key}' declares shape {item.shape}, above {MAX_BYTES} bytes; is it broken?")
    if num_bytes > MAX_RATIO * max(item.id.get_storage_size(), 1024):
        raise InputError(f"{path}: dataset '{key}' declares shape {item.shape} but stores next to nothing; {SEE}")
    return item


def required(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    """Return a dataset that must be there; see `dataset`."""
    item = dataset(path, file, key)
    if item is None:
        raise InputError(f"{path}: dataset '{key}' missing, found {sorted(map(str, file))}; {SEE}")
    return item


def points_dataset(path: Path, file: h5py.File) -> h5py.Dataset:
    """Return `data` after checking its shape and type."""
    item = required(path, file, "data")
    if item.ndim != 3 or item.shape[2] != 3:
        raise InputError(f"{path}: dataset 'data' has shape {item.shape}, must be (shapes, points, 3); {SEE}")
    if 0 in item.shape:
        raise InputError(f"{path}: dataset 'data' is empty, shape {item.shape}; {SEE}")
    if item.shape[0] > MAX_SHAPES:
        raise InputError(f"{path}: dataset 'data' declares {item.shape[0]} shapes, above {MAX_SHAPES}; is it broken?")
    if item.dtype.kind != "f":
        raise InputError(f"{path}: dataset 'data' has dtype {item.dtype}, must be float32 or float16; {SEE}")
    return item


def kept_dtype(item: h5py.Dataset) -> np.dtype:
    """Return the type in which points are kept: float16 as stored, anything else as float32."""
    return np.dtype(np.float16 if item.dtype.itemsize == 2 else np.float32)


def rows_per_read(path: Path, item: h5py.Dataset) -> int:
    """Return how many clouds are in one chunk of a dataset."""
    row_bytes = item.dtype.itemsize * item.shape[1] * item.shape[2]
    if item.chunks is None:
        return max(1, READ_BYTES // row_bytes)
    if int(np.prod(item.chunks, dtype=object)) * item.dtype.itemsize > MAX_PIECE:
        raise InputError(
            f"{path}: dataset '{item.name[1:]}' is stored in chunks {item.chunks}, too large to be read one by one; "
            "raise data.memory_budget_gb, or copy it with tools/prepare_data.py"
        )
    return item.chunks[0]


def load_points(path: Path, item: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    """Read clouds `start` to `stop`, and check that they are finite; float64 becomes float32, see `to_single`."""
    wide = item.dtype.itemsize > 4
    with np.errstate(over="ignore"):
        points = item[start:stop].astype(np.float64 if wide else kept_dtype(item), copy=False)
    # The sum over a shape is not finite if any coordinate is not: cheaper than a mask as large as the data.
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(points.sum(axis=(1, 2), dtype=np.float64))
    if not finite.all():
        sample = start + int(finite.argmin())
        raise InputError(f"{path}: dataset 'data' holds NaN or infinity in sample {sample}; remove it")
    if points.dtype != np.float16 and max(points.max(), -points.min()) > MAX_COORDINATE:
        sample = start + int(np.abs(points).max(axis=(1, 2)).argmax())
        raise InputError(f"{path}: dataset 'data' holds coordinates above {MAX_COORDINATE:g} in sample {sample}; {SEE}")
    if wide:
        check_shapes(path, points, start)
        points = to_single(points)
    return points


def check_shapes(path: Path, points: np.ndarray, start: int = 0) -> None:
    """Refuse clouds of (almost) no extent, and those so far from the origin that their numbers cannot hold a shape.

    Args:
        path: the file, for the message.
        points: (n, P, 3) float16, float32 or float64.
        start: number of the first in the file.

    Raises:
        InputError: names the first such cloud.
    """
    low, high = points.min(axis=1), points.max(axis=1)
    doubtful = has_lost_shape(low, high, np.float16 if points.dtype == np.float16 else np.float32)
    for index in np.flatnonzero(doubtful | ((high - low).max(axis=1) < MIN_EXTENT)):
        extent = float((high[index] - low[index]).max())
        where = f"{path}: sample {start + int(index)} of dataset 'data'"
        if extent == 0:
            raise InputError(f"{where}: all its points are equal, a cloud without extent; remove it")
        if extent < MIN_EXTENT:
            raise InputError(f"{where} spans {extent:.3g}, must be at least {MIN_EXTENT:g}; scale it up")
        if points.dtype.itemsize < 8 or has_lost_shape(low[index], high[index], np.float64) or is_single(points[index]):
            distance = float(np.abs(points[index]).max())
            raise InputError(
                f"{where} spans {extent:.3g} at a distance of {distance:.3g} from the origin, a few steps of the "
                "numbers it is stored in, so its shape is lost; move it to the origin before storing it"
            )


def read_label(path: Path, file: h5py.File, count: int, num_classes: int | None) -> np.ndarray:
    """Read the labels as (n,) int64, and check them."""
    item = required(path, file, "label")
    if item.shape not in ((item.size,), (item.size, 1)):
        raise InputError(f"{path}: dataset 'label' has shape {item.shape}, must be (shapes,) or (shapes, 1); {SEE}")
    if item.size != count:
        raise InputError(f"{path}: dataset 'label' has {item.size} entries, 'data' has {count} shapes; {SEE}")
    if item.dtype.kind not in "iuf":
        raise InputError(f"{path}: dataset 'label' has dtype {item.dtype}, must be an integer; {SEE}")
    label = item[()].reshape(-1)
    label = label.astype(np.float64) if label.dtype.kind == "f" else label  # float16 ends below the bound of labels
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


def read_names(path: Path, file: h5py.File, count: int) -> list[str] | None:
    """Read the names of the shapes, if there are any."""
    item = dataset(path, file, "name")
    if item is None:
        return None
    if item.size != count or h5py.check_string_dtype(item.dtype) is None:
        raise InputError(f"{path}: dataset 'name' has shape {item.shape} of {item.dtype}, must be {count} strings")
    try:
        return [name.decode() for name in item[()].reshape(-1)]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: dataset 'name' is not UTF-8 text ({error.reason})") from error


def group_dataset(path: Path, file: h5py.File, group: str, shape: tuple) -> h5py.Dataset | None:
    """Return `normal` or `rgb` after checking its shape and type, if it is there."""
    item = dataset(path, file, group)
    kinds, named = ("f", "float") if group == "normal" else ("fu", "float or unsigned integers")
    if item is not None and (item.shape != shape or item.dtype.kind not in kinds):
        raise InputError(f"{path}: dataset '{group}' is {item.shape} {item.dtype}, must be {shape} {named}")
    return item


def further_datasets(path: Path, file: h5py.File, channels: str, shape: tuple) -> list[h5py.Dataset]:
    """Return the datasets of the channels beyond the coordinates, each checked.

    Raises:
        InputError: one is not there or wrong.
    """
    items = []
    for group in groups(channels):
        if group == XYZ:
            continue
        item = group_dataset(path, file, group, shape)
        if item is None:
            add = "add them with: prepare_data.py modelnet40 --from DIR --estimate-normals"
            stored = f"no dataset '{group}'"
            raise missing(path, group, channels, stored=stored, advice=add if group == "normal" else "")
        items.append(item)
    return items


def load_channels(path: Path, points: np.ndarray, items: Sequence[h5py.Dataset], start: int, stop: int) -> np.ndarray:
    """Put the normals and colours of clouds `start` to `stop` behind their points, in the type of these.

    Args:
        path: the file.
        points: (stop - start, P, 3), as `load_points` gives them.
        items: of `further_datasets`.
        start: the first cloud.
        stop: behind the last cloud.

    Returns:
        (stop - start, P, C).

    Raises:
        InputError: a normal is not finite, or a colour is out of range.
    """
    if not items:
        return points
    result = np.empty((*points.shape[:2], WIDTH * (1 + len(items))), points.dtype)
    result[..., :WIDTH] = points
    for number, item in enumerate(items, 1):
        where, values = f"{path}: dataset '{item.name[1:]}' from sample {start} on", item[start:stop]
        unit = unit_normals(values, where) if item.name == "/normal" else unit_colors(values, where, by_type=True)
        result[..., WIDTH * number : WIDTH * (number + 1)] = unit
    return result


def read_extra(path: Path, file: h5py.File, group: str, points: np.ndarray) -> np.ndarray | None:
    """Read `normal`, in the type of the points, or `rgb` as it is, if it is there."""
    item = group_dataset(path, file, group, points.shape)
    if item is None:
        return None
    return item[()].astype(points.dtype, copy=False) if group == "normal" else item[()]


def mask_dataset(path: Path, file: h5py.File, shape: tuple[int, ...]) -> h5py.Dataset | None:
    """Return `mask` after checking its shape and type, if it is there."""
    item = dataset(path, file, "mask")
    if item is not None and (item.shape != shape or item.dtype.kind not in "iufb"):
        raise InputError(f"{path}: dataset 'mask' is {item.shape} {item.dtype}, must be {shape} numbers")
    return item


def load_mask(path: Path, item: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    """Read the masks of clouds `start` to `stop` as int64."""
    mask = item[start:stop]
    if not (np.abs(mask) < 2**31).all():  # false for NaN too
        raise InputError(f"{path}: dataset 'mask' holds NaN or numbers beyond 32 bits; {SEE}")
    return mask.astype(np.int64)


def read_mask(path: Path, file: h5py.File, shape: tuple[int, ...]) -> np.ndarray | None:
    """Read all masks, if there are any."""
    item = mask_dataset(path, file, shape)
    return None if item is None else load_mask(path, item, 0, shape[0])


def read_up_axis(path: Path, file: h5py.File) -> str | None:
    """Read the attribute `up_axis`, if it is there."""
    value = file.attrs.get("up_axis")
    if value is None:
        return None
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    check_up_axis(value if isinstance(value, str) else repr(value), f"{path}: attribute 'up_axis'")
    return value
