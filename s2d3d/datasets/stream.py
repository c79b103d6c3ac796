"""Clouds that stay in their HDF5 files: read batch by batch, through a cache of bounded size."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..channels import XYZ, num_channels
from ..errors import InputError
from ..ops.points import farthest_point_sample, gather_points
from .h5 import SEE, CloudFile, CloudLayout, inspect_h5, points_bytes, read_mask_rows, read_rows
from .h5_checks import check_shapes
from .transforms import coordinates, normalize_stored, turn_up_axis

MEMORY_BUDGET_GB = 4.0
"""Points of one split that are read into memory, in 10^9 bytes; a larger split is streamed."""


def exceeds_budget(paths: Sequence[Path], budget_gb: float, channels: str = XYZ) -> bool:
    """Return whether the points of some files, once read, exceed a budget; they are not read.

    Args:
        paths: the files.
        budget_gb: 10^9 bytes, above 0.
        channels: of a point.

    Raises:
        InputError: the budget is out of range, or a file is wrong.
    """
    if not budget_gb > 0:
        raise InputError(f"memory_budget_gb is {budget_gb}, must be above 0")
    return sum(points_bytes(path, channels=channels) for path in paths) > budget_gb * 1e9


def open_clouds(
    paths: Sequence[Path],
    *,
    num_classes: int,
    up_axis: Callable[[CloudFile | CloudLayout], str],
    budget_gb: float,
    channels: str = XYZ,
    labelled: bool = True,
) -> tuple["StreamedClouds", Tensor, list[str]]:
    """Open the files of one split without reading their points.

    Args:
        paths: the files, in the order of the set; each is checked.
        num_classes: labels lie in [0, num_classes).
        up_axis: tells the vertical of a file, "y" or "z".
        budget_gb: the cache takes at most this, in 10^9 bytes.
        channels: of a point.
        labelled: see `inspect_h5`.

    Returns:
        The clouds, their (n,) int64 labels, and n names of shapes.

    Raises:
        InputError: a file is wrong.
    """
    layouts = [inspect_h5(path, num_classes=num_classes, channels=channels, labelled=labelled) for path in paths]
    for layout in layouts[1:]:
        if layout.shape[1] != layouts[0].shape[1]:
            before = f"the files before it {layouts[0].shape[1]}"
            raise InputError(f"{layout.path}: {layout.shape[1]} points a shape, {before}; {SEE}")
    clouds = StreamedClouds(layouts, [up_axis(layout) for layout in layouts], cache_bytes=int(budget_gb * 1e9))
    labels = torch.from_numpy(np.concatenate([layout.label for layout in layouts]))
    return clouds, labels, [name for layout in layouts for name in shape_names(layout.path, layout)]


def shape_names(path: Path, file: CloudFile | CloudLayout) -> list[str]:
    """Return the names of a file's shapes; where it has none, its own name and a number."""
    return file.names or [f"{path.stem}_{index:04d}" for index in range(len(file.label))]


class StreamedClouds:
    """Clouds (n, M, C), z up, that are read from their files when they are asked for.

    `clouds[rows]` with rows (b,) int64 gives (b, M, C), as indexing a tensor of all of them would, bit for bit. Whole
    chunks of a file are read. The chunks used last are kept, up to `cache_bytes` and at least one. Threads and
    forked processes may read at the same time.

    Attributes:
        layouts: of the files.
        shape: (n, M, C).
        dtype: torch.float16 or torch.float32, the widest of the files.
        mask: gives (b, M) int32 for rows, or None where a file has no mask.
    """

    def __init__(self, layouts: Sequence[CloudLayout], up_axes: Sequence[str], *, cache_bytes: int) -> None:
        """Keep what the files hold; `prepared` and `subset` return views of it that share the cache.

        Args:
            layouts: of the files, with equal numbers of points and channels.
            up_axes: "y" or "z" of each file.
            cache_bytes: bound of the pieces kept.
        """
        self.layouts, self._up_axes = list(layouts), list(up_axes)
        self._starts = np.cumsum([0, *(layout.shape[0] for layout in layouts)])
        self._cache = _Cache(cache_bytes)
        self._rows = torch.arange(int(self._starts[-1]))
        self._normalize, self._prefix = False, layouts[0].shape[1]
        self.dtype = torch.from_numpy(np.empty(0, np.result_type(*(layout.dtype for layout in layouts)))).dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self._rows), self._prefix, num_channels(self.layouts[0].channels))

    @property
    def mask(self) -> "StreamedMasks | None":
        return StreamedMasks(self) if all(layout.has_mask for layout in self.layouts) else None

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, rows: Tensor) -> "StreamedClouds":
        """Return the clouds at `rows`, (m,) int64, in that order."""
        return self._with(_rows=self._rows[rows])

    def prepared(self, *, normalize: bool, prefix: int) -> "StreamedClouds":
        """Return the clouds in the unit sphere, and cut to farthest-point prefixes where `prefix` is less than M."""
        return self._with(_normalize=normalize, _prefix=prefix)

    def __getitem__(self, rows: Tensor) -> Tensor:
        points = self._read(rows, self._piece)
        if self._normalize:
            points = normalize_stored(points)
        return gather_points(points, self._selected(points)) if self._is_cut() else points

    def mask_rows(self, rows: Tensor) -> Tensor:
        """Return (b, M) int32: the mask of the points that `clouds[rows]` gives."""
        mask = self._read(rows, self._mask_piece)
        if not self._is_cut():
            return mask
        points = self._read(rows, self._piece)
        return mask.gather(1, self._selected(normalize_stored(points) if self._normalize else points))

    def _is_cut(self) -> bool:
        return self._prefix < self.layouts[0].shape[1]

    def _selected(self, points: Tensor) -> Tensor:
        return farthest_point_sample(coordinates(points), self._prefix)

    def _read(self, rows: Tensor, piece: Callable[[int, int], Tensor]) -> Tensor:
        chosen = self._rows[rows].numpy()
        files = np.searchsorted(self._starts, chosen, side="right") - 1
        inside = chosen - self._starts[files]
        pieces = inside // np.array([layout.rows_per_read for layout in self.layouts])[files]
        result: Tensor | None = None
        # Empty input: shape and dtype come from the first chunk.
        for file, number in sorted(set(zip(files.tolist(), pieces.tolist()))) or [(0, 0)]:
            part = piece(file, number)
            wanted = np.flatnonzero((files == file) & (pieces == number))
            first = number * self.layouts[file].rows_per_read
            if result is None:
                result = part.new_empty(len(chosen), *part.shape[1:])
            result[torch.from_numpy(wanted)] = part[torch.from_numpy(inside[wanted] - first)]
        assert result is not None
        return result

    def _piece(self, file: int, number: int) -> Tensor:
        layout, up_axis = self.layouts[file], self._up_axes[file]

        def load() -> Tensor:
            start, stop = self._bounds(layout, number)
            points = read_rows(layout, start, stop)
            check_shapes(layout.path, points[..., :3], start)
            return turn_up_axis(torch.from_numpy(points), up_axis, channels=layout.channels).to(self.dtype)

        return self._cache.get(("points", file, number), load)

    def _mask_piece(self, file: int, number: int) -> Tensor:
        layout = self.layouts[file]

        def load() -> Tensor:
            return torch.from_numpy(read_mask_rows(layout, *self._bounds(layout, number))).to(torch.int32)

        return self._cache.get(("mask", file, number), load)

    @staticmethod
    def _bounds(layout: CloudLayout, number: int) -> tuple[int, int]:
        start = number * layout.rows_per_read
        return start, min(start + layout.rows_per_read, layout.shape[0])

    def _with(self, **changes: object) -> "StreamedClouds":
        view = copy.copy(self)
        vars(view).update(changes)
        return view


class StreamedMasks:
    """The masks of streamed clouds, indexed like a tensor."""

    def __init__(self, clouds: StreamedClouds) -> None:
        self._clouds = clouds

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._clouds.mask_rows(rows)


class _Cache:
    """The chunks used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._pieces: OrderedDict[tuple, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple, load: Callable[[], Tensor]) -> Tensor:
        with self._lock:
            if key in self._pieces:
                self._pieces.move_to_end(key)
                return self._pieces[key]
            piece = load()
            self._pieces[key] = piece
            self._bytes += piece.nbytes
            while self._bytes > self._max_bytes and len(self._pieces) > 1:
                self._bytes -= self._pieces.popitem(last=False)[1].nbytes
            return piece

    def __getstate__(self) -> dict:
        return {"_max_bytes": self._max_bytes}

    def __setstate__(self, state: dict) -> None:
        _Cache.__init__(self, state["_max_bytes"])
