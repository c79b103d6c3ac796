"""The data set of point clouds in memory, with the sampling rule."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..channels import XYZ, num_channels
from ..errors import InputError, printable
from ..ops.points import gather_points
from .labelled import TRAIN, LabelledDataset
from .prefix import farthest_prefix
from .stream import StreamedClouds, StreamedMasks
from .transforms import Transform, coordinates, normalize_stored

SHOWN_CLASSES = 8


class PointCloudDataset(LabelledDataset):
    """Labelled point clouds in memory, z up, with the rule that samples N of P stored points.

    - P = N: all points; training shuffles their order in each sample.
    - P > N: farthest point sampling to 1.2 N (at most P) is computed once and cached; training takes N of
      those at random, a test the first N, which is plain farthest point sampling.
    - P < N: an error.

    Args:
        points: (n, P, C) float16 or float32, z up; not changed. Or clouds that stay in their files, which are read
            batch by batch: samples are the same, and a farthest-point prefix is computed anew each time.
        labels: (n,) int64 in [0, len(class_names)).
        class_names: one name for each class.
        names: one name for each shape.
        mask: (n, P) int64, a value for each stored point, or None.
        split: "train", "test" or "val".
        num_points: N.
        transform: `transform(points (B, N, C), generator)`; the augmentation of a training set. Given to another
            split it is applied too, with random numbers that depend on the indices of the batch only.
        normalize: centre each stored cloud and scale it into the unit sphere, once; normals and colours stay.
        channels: the C numbers of a point, one of `s2d3d.channels.CHANNELS`. Points are chosen by coordinates alone.
        cache_dirs: where farthest-point prefixes may be kept; the first that can be written is used.
        source: what to call this set in errors.

    Attributes:
        up_axis: "z", the vertical of `points`.
        stored_points: P.
        skipped: a line for each file that the reader left out.

    Raises:
        InputError: no shapes, P < N, or another number of channels.
    """

    noun: ClassVar[str] = "shapes"
    up_axis = "z"

    def __init__(
        self,
        points: Tensor | StreamedClouds,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        mask: Tensor | None = None,
        split: str = TRAIN,
        num_points: int = 1024,
        transform: Transform | None = None,
        normalize: bool = True,
        channels: str = XYZ,
        cache_dirs: Sequence[Path] = (),
        source: str = "data set",
    ) -> None:
        count, stored_points = points.shape[:2]
        assert len(labels) == count, "one label for each shape"
        super().__init__(labels, class_names, names=names, split=split, transform=transform, source=source)
        if points.shape[2] != num_channels(channels):
            raise InputError(
                f"{source}: its clouds have {points.shape[2]} channels, {channels} are {num_channels(channels)}"
            )
        if num_points < 1:
            raise InputError(f"{source}: num_points is {num_points}, must be at least 1")
        if stored_points < num_points:
            raise InputError(
                f"{source}: {stored_points} points stored for each shape, num_points asks for {num_points}; "
                f"lower data.num_points to {stored_points} or less"
            )
        length = min(stored_points, num_points * 6 // 5)
        if isinstance(points, StreamedClouds):
            clouds = points.prepared(normalize=normalize, prefix=length)
            self._storage: Tensor | StreamedClouds = clouds
            self._storage_mask: Tensor | StreamedMasks | None = clouds.mask
        else:
            points = normalize_stored(points) if normalize else points
            if stored_points > num_points:
                prefix = farthest_prefix(coordinates(points), length, cache_dirs)
                points = gather_points(points, prefix)
                mask = mask.gather(1, prefix) if mask is not None else None
            self._storage = _share(points)
            self._storage_mask = None if mask is None else mask.to(torch.int32)
        self.num_points = num_points
        self.stored_points = stored_points
        self.normalized = normalize
        self.channels = channels
        assert mask is None or mask.shape == points.shape[:2], "one mask value for each point"

    @property
    def points(self) -> Tensor:
        """(n, M, C) float16 or float32: the points in use, M = P, or the prefix of about 1.2 N when P > N.

        Of a set that stays in its files this reads everything.
        """
        storage = self._storage
        if isinstance(storage, Tensor) and torch.equal(self._rows, torch.arange(len(storage))):
            return storage
        return storage[self._rows]

    @property
    def mask(self) -> Tensor | None:
        """(n, M) int64: the value of each of `points`, None where the files hold no mask."""
        return None if self._storage_mask is None else self._storage_mask[self._rows].long()

    def __str__(self) -> str:
        """Return one line: source, split, size, points, channels and classes."""
        stored = "" if self.stored_points == self.num_points else f" of {self.stored_points} stored"
        shown = ", ".join(map(printable, self.class_names[:SHOWN_CLASSES]))
        more = ", ..." if self.num_classes > SHOWN_CLASSES else ""
        named = "" if self.channels == XYZ else f" ({self.channels})"
        return (
            f"{self.source}: split {self.split}, {len(self)} clouds of {self.num_points} points{stored}, "
            f"{self._storage.shape[2]} channels{named}, {self.num_classes} classes ({shown}{more})"
        )

    def sample(self, indices: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Apply the sampling rule without `transform`: at random with a generator, plain without one.

        Args:
            indices: (B,) int64 in [0, n).
            generator: random sampling with it, plain sampling without.

        Returns:
            points (B, num_points, C) float32, contiguous; labels (B,) int64.
        """
        rows = self._rows[indices]
        points = self._storage[rows]
        if generator is None:
            points = points[:, : self.num_points]
        else:
            points = gather_points(points, self._draw(len(rows), generator))
        return points.float().contiguous(), self._storage_labels[rows]

    def sample_mask(self, indices: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the mask of the points that `sample` gives for a generator in the same state.

        Args:
            indices: (B,) int64 in [0, n).
            generator: as for `sample`.

        Returns:
            (B, num_points) int64.

        Raises:
            InputError: the set has no mask.
        """
        if self._storage_mask is None:
            raise InputError(f"{self.source}: its files hold no mask")
        mask = self._storage_mask[self._rows[indices]].long()
        return mask[:, : self.num_points] if generator is None else mask.gather(1, self._draw(len(mask), generator))

    def _draw(self, count: int, generator: Generator) -> Tensor:
        """Draw (count, num_points) indices of points, without repetition in a row."""
        return torch.rand(count, self._storage.shape[1], generator=generator).argsort(dim=1)[:, : self.num_points]


def require_clouds(dataset: LabelledDataset, use: str) -> PointCloudDataset:
    """Return the data set, which must hold point clouds.

    Args:
        dataset: any.
        use: what needs clouds, for the message.

    Raises:
        InputError: its samples are something else.
    """
    if not isinstance(dataset, PointCloudDataset):
        raise InputError(f"{dataset.source}: holds {dataset.noun}, {use} needs point clouds")
    return dataset


def _share(points: Tensor) -> Tensor:
    """Move points to shared memory where it has room.

    Forked workers read ordinary memory just as well; only spawned ones would copy it. Containers often have 64 MB of
    /dev/shm, where asking for more than there is kills the process.
    """
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        return points.contiguous()
    if shm.is_dir() and shutil.disk_usage(shm).free < 2 * points.nbytes:
        return points.contiguous()
    return points.contiguous().share_memory_()
