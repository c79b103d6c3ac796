"""Batches that depend only on seed, epoch, step and rank, so that a run resumes exactly where it stopped."""

import copy
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..errors import InputError
from ..random_state import derived_generator
from .base import require_clouds
from .labelled import LabelledDataset
from .transforms import Transform


class BatchLoader:
    """Iterate over a data set in batches, vectorised, without worker processes.

    Batches share no random state: each has its own generator, made from (seed, epoch, step, rank). The order of an
    epoch depends on (seed, epoch), the same on every rank.

    Args:
        dataset: where samples come from.
        batch_size: samples of a *global* batch; each rank yields its equal part.
        shuffle: draw a new order each epoch; otherwise in the order of the set.
        drop_last: leave out the last batch when it is not full.
        seed: of everything random.
        rank: this process, in [0, world_size).
        world_size: number of processes. Together they yield each shape once. The last parts may be uneven;
            of a shuffled set, a last batch with fewer shapes than ranks is left out, because ranks must take equally
            many steps.
        augment: replaces the transform of the data set. A training set is sampled at random and augmented; any
            other set is given plain, and this is the augmentation of its votes. False: plain in any case.
        prefetch: batches prepared ahead in a background thread; the batches are the same.
        pin_memory: put batches in page-locked memory, from which a GPU copies while it computes; needs a GPU.

    Raises:
        InputError: `batch_size` is not a positive multiple of `world_size`; no full batch with `drop_last`.

    Example:
        >>> from s2d3d.datasets import PointCloudDataset
        >>> shapes = PointCloudDataset(torch.rand(10, 64, 3), torch.zeros(10), ["any"], num_points=64)
        >>> [len(labels) for points, labels in BatchLoader(shapes, 4, shuffle=True)]
        [4, 4, 2]
    """

    def __init__(
        self,
        dataset: LabelledDataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        augment: Transform | bool | None = None,
        prefetch: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise InputError(f"rank is {rank} of world_size {world_size}, must be in [0, world_size)")
        if batch_size < 1 or batch_size % world_size:
            raise InputError(f"batch_size is {batch_size}, must be a positive multiple of the {world_size} processes")
        if drop_last and len(dataset) < batch_size:
            raise InputError(
                f"batch_size is {batch_size}, more than the {len(dataset)} {dataset.noun} of split '{dataset.split}': "
                "no full batch is left; lower it"
            )
        if prefetch < 0:
            raise InputError(f"prefetch is {prefetch}, must be at least 0")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.augment = augment
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self._vote: int | None = None
        self._epoch = self._step = 0

    def __len__(self) -> int:
        """Batches that this rank yields in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        # array_split order: the first ranks get the larger parts, so a rank has a share when its number is below rest.
        has_rest = rest >= self.world_size if self.shuffle else rest > self.rank
        return full + (has_rest and not self.drop_last)

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Start the next iteration before batch `step` of `epoch`; it runs to the end of that epoch.

        Without it, iterations of a shuffled loader are epochs 0, 1, 2, ...; others repeat the same epoch.

        Raises:
            InputError: negative, or `step` beyond the end of an epoch.
        """
        if epoch < 0 or not 0 <= step <= len(self):
            raise InputError(f"position is epoch {epoch}, step {step}; an epoch has {len(self)} steps")
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield samples (b, ...) float32, such as points (b, N, 3), and labels (b,) int64."""
        epoch, first = self._epoch, self._step
        self._epoch, self._step = epoch + self.shuffle, 0
        return self._batches(epoch, first)

    def vote(self, index: int, augment: Transform | None = None) -> "BatchLoader":
        """Return a loader for one pass of a vote: the same shapes in the same order.

        Args:
            index: 0 is the plain pass; i > 0 draws the points of each shape and augments them, as a function of
                seed, i, batch size and number of processes.
            augment: instead of the loader's own augmentation.

        Raises:
            InputError: `index` is negative, the loader shuffles, or its set holds no clouds and `index` is above 0.
        """
        if index < 0:
            raise InputError(f"vote is {index}, must be at least 0")
        if self.shuffle:
            raise InputError("votes need a loader that does not shuffle: logits are averaged shape by shape")
        if index > 0:
            require_clouds(self.dataset, "a vote")
        voter = copy.copy(self)
        voter._vote = index
        voter._epoch = voter._step = 0
        voter.augment = self.augment if augment is None else augment
        return voter

    def weight(self, step: int) -> float:
        """Return the factor on this rank's mean over batch `step`, so that the mean over ranks is that of the batch.

        It is 1 but in an incomplete last batch, of which ranks may have different numbers of samples.

        Example:
            >>> from s2d3d.datasets import PointCloudDataset
            >>> shapes = PointCloudDataset(torch.rand(7, 64, 3), torch.zeros(7), ["any"], num_points=64)
            >>> [round(BatchLoader(shapes, 4, rank=rank, world_size=2).weight(1), 3) for rank in (0, 1)]
            [1.333, 0.667]
        """
        size = min(self.batch_size, len(self.dataset) - step * self.batch_size)
        share, rest = divmod(size, self.world_size)
        return (share + (self.rank < rest)) * self.world_size / size

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order(epoch)
        steps = range(first, len(self))
        if not self.prefetch:
            for step in steps:
                yield self._load(order, epoch, step)
            return
        with ThreadPoolExecutor(max_workers=1) as pool:
            pending: deque = deque()
            try:
                for step in steps:
                    pending.append(pool.submit(self._load, order, epoch, step))
                    if len(pending) > self.prefetch:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:  # the consumer may stop early
                for future in pending:
                    future.cancel()

    def indices(self, epoch: int, step: int) -> Tensor:
        """Return which shapes of the set, (b,) int64, this rank's batch `step` of `epoch` holds.

        Raises:
            InputError: negative, or `step` is not below `len(self)`.

        Example:
            >>> from s2d3d.datasets import PointCloudDataset
        >>> shapes = PointCloudDataset(torch.rand(10, 64, 3), torch.zeros(10), ["any"], num_points=64)
            >>> BatchLoader(shapes, 4).indices(0, 2).tolist()
            [8, 9]
        """
        if epoch < 0 or not 0 <= step < len(self):
            raise InputError(f"batch is epoch {epoch}, step {step}; an epoch has {len(self)} steps")
        return self._indices(self._order(epoch), step)

    def _order(self, epoch: int) -> Tensor:
        count = len(self.dataset)
        if not self.shuffle:
            return torch.arange(count)
        return torch.randperm(count, generator=derived_generator(self.seed, "order", epoch))

    def _indices(self, order: Tensor, step: int) -> Tensor:
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        return batch.tensor_split(self.world_size)[self.rank]

    def _load(self, order: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        points, labels = self._make(order, epoch, step)
        return (points.pin_memory(), labels.pin_memory()) if self.pin_memory else (points, labels)

    def _make(self, order: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        indices = self._indices(order, step)
        random = self.dataset.training if self._vote is None else self._vote > 0
        if self.augment is False or not random:
            # None keeps a transform that the user gave to a test set; the one of a training set is an augmentation.
            off = self.augment is False or self.dataset.training
            return self.dataset.batch(indices, augment=False if off else None)
        generator = derived_generator(self.seed, self._vote or 0, epoch, step, self.rank)
        if not callable(self.augment):
            return self.dataset.batch(indices, generator=generator, augment=True)
        points, labels = self.dataset.sample(indices, generator)
        return self.augment(points, generator).contiguous(), labels
