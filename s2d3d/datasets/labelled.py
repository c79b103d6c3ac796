"""The base of every data set: labelled samples with names, a split, a transform and subsets."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, NotRequired, Self, TypedDict

import torch
from torch import Generator, Tensor

from ..errors import InputError
from ..random_state import derived_generator

TRAIN, TEST = "train", "test"


class LabelledDataset(torch.utils.data.Dataset):
    """Labelled samples in memory. A subclass implements `sample`, and says what its samples are.

    Training means `split == "train"`. Indexing works with a plain `torch.utils.data.DataLoader`; `BatchLoader` is
    faster and resumes exactly.

    Args:
        labels: (n,) int64 in [0, len(class_names)), n at least 1.
        class_names: one name for each class.
        names: one name for each sample.
        split: "train", "test" or "val".
        transform: `transform(samples (B, ...), generator)`; the augmentation of a training set. Given to another
            split it is applied too, with random numbers that depend on the indices of the batch only.
        source: what to call this set in errors.

    Attributes:
        noun: what a sample is, in the plural, for messages and pages.
        skipped: a line for each file that the reader left out.
        file_hashes: hashes of the content of all files, by split and name of the sample, of a reader that gives them.

    Raises:
        InputError: no samples.

    Example:
        >>> class Numbers(LabelledDataset):
        ...     noun = "numbers"
        ...     def sample(self, indices, generator=None):
        ...         return self._rows[indices].float()[:, None], self._storage_labels[self._rows[indices]]
        >>> data = Numbers(torch.tensor([0, 1, 0, 1]), ["even", "odd"], split="test")
        >>> data.subset([3, 1]).batch(torch.tensor([0]))[0].tolist()
        [[3.0]]
    """

    noun: ClassVar[str] = "samples"
    skipped: Sequence[str] = ()
    file_hashes: Mapping[str, Mapping[str, bytes]] = {}

    def __init__(
        self,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        split: str = TRAIN,
        transform: Callable[[Tensor, Generator], Tensor] | None = None,
        source: str = "data set",
    ) -> None:
        count = len(labels)
        if count == 0:
            raise InputError(f"{source}: no {self.noun} in split '{split}'")
        self._storage_labels = labels.to(torch.int64)
        self._rows = torch.arange(count)
        self.class_names = list(class_names)
        self.names = list(names) if names is not None else [f"{split}_{index:05d}" for index in range(count)]
        self.split = split
        self.transform = transform
        self.source = source
        self._item_generator: tuple[int, Generator] | None = None
        assert len(self.names) == count, "one name for each sample"

    @property
    def labels(self) -> Tensor:
        """(n,) int64."""
        return self._storage_labels[self._rows]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def training(self) -> bool:
        """Whether samples are drawn at random: the training split."""
        return self.split == TRAIN

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one sample, float32, and its label.

        Randomness comes from a generator of this process seeded with `torch.initial_seed()`, which differs in each
        DataLoader worker and epoch; it runs on from sample to sample, and the global generator is not touched.

        Raises:
            IndexError: outside [-n, n).
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        samples, labels = self.batch(torch.tensor([index % len(self)]))
        return samples[0], int(labels[0])

    def batch(
        self, indices: Tensor, *, generator: Generator | None = None, augment: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return many samples at once.

        Args:
            indices: (B,) int64 in [0, n).
            generator: where random numbers come from. Without it: as `__getitem__` when training, else a
                function of the indices, so that a test batch is always the same.
            augment: True samples at random and applies `transform`, False gives the plain samples, None does what the
                split asks for.

        Returns:
            samples (B, ...) float32, contiguous; labels (B,) int64.
        """
        random = self.training if augment is None else augment
        if generator is None:
            generator = self._own_generator() if random else derived_generator("plain", *indices.tolist())
        samples, labels = self.sample(indices, generator if random else None)
        if self.transform is not None and augment is not False:
            samples = self.transform(samples, generator).contiguous()
        return samples, labels

    def sample(self, indices: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return samples without `transform`: at random with a generator, where the set has a choice; else plain.

        Args:
            indices: (B,) int64 in [0, n), numbers in this set: row `_rows[i]` of what is stored.
            generator: of the random numbers.

        Returns:
            samples (B, ...) float32, contiguous; labels (B,) int64.
        """
        raise NotImplementedError

    def fingerprint(self) -> "Fingerprint":
        """Describe the set in plain values, to recognise it later; see `same_data`.

        Returns:
            `labels`, a hash of all of them. `clouds` and `signed`, a number for each of up to 64 samples spread over
            the set: its weighted mean square value and its weighted mean, which other processors compute equally up to
            rounding. `files`, a hash of the content of all files of both splits, empty where they are unknown.
        """
        chosen = torch.arange(0, len(self), max(1, len(self) // 64))[:64]
        samples = self.sample(chosen)[0].double()
        digest = hashlib.blake2b(f"{len(self)} {samples.shape[1]} {self.class_names}".encode(), digest_size=12)
        digest.update(self.labels.contiguous().numpy().data)
        weights = torch.arange(samples.shape[-1], dtype=torch.float64) % 3 + 1
        flat = samples.flatten(1)
        files = hashlib.blake2b(b"".join(self.file_hashes.get(TRAIN, {}).values()), digest_size=12)
        files.update(b"".join([b"test", *sorted(self.file_hashes.get(TEST, {}).values())]))
        return {
            "labels": digest.hexdigest(),
            "clouds": (samples.square() * weights).flatten(1).mean(1).tolist(),
            "signed": (flat * (torch.arange(flat.shape[1]) % 7 + 1)).mean(1).tolist(),
            "files": files.hexdigest() if self.file_hashes else "",
        }

    def trained_files(self) -> Tensor:
        """Return a number for each file of this set alone, (n,) int64; none where files are unknown.

        A file with a copy among those that the set leaves out, to test or to validate, is not counted.
        """
        own, known = set(self.names), self._hashes()
        others = {content for name, content in known.items() if name not in own}
        return as_numbers({known[name] for name in own if name in known} - others)

    def count_trained(self, numbers: Tensor) -> int:
        """Count the files of this set that a result of `trained_files` names."""
        known = self._hashes()
        return int(torch.isin(as_numbers(known[name] for name in self.names if name in known), numbers).sum())

    def _hashes(self) -> dict[str, bytes]:
        return {name: content for by_name in self.file_hashes.values() for name, content in by_name.items()}

    def subset(self, indices: Tensor | Sequence[int]) -> Self:
        """Return the samples at `indices`, in that order; what is stored is shared, not copied.

        Raises:
            InputError: no index, or one outside [0, n).
        """
        indices = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if len(indices) == 0:
            raise InputError(f"{self.source}: a subset of no {self.noun}")
        if int(indices.min()) < 0 or int(indices.max()) >= len(self):
            raise InputError(
                f"{self.source}: a subset index is outside the {len(self)} {self.noun} of split '{self.split}'"
            )
        part = copy.copy(self)
        part._rows = self._rows[indices]
        part.names = [self.names[index] for index in indices.tolist()]
        part._item_generator = None
        return part

    def _own_generator(self) -> Generator:
        seed = torch.initial_seed()
        if self._item_generator is None or self._item_generator[0] != seed:
            self._item_generator = (seed, derived_generator("item", seed))
        return self._item_generator[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_item_generator": None}


def as_numbers(hashes: Iterable[bytes]) -> Tensor:
    """Return the first 8 bytes of each hash as a number, (n,) int64, in ascending order."""
    numbers = sorted(int.from_bytes(content[:8], "little", signed=True) for content in hashes)
    return torch.tensor(numbers, dtype=torch.int64)


class Fingerprint(TypedDict):
    """What `LabelledDataset.fingerprint` says of a set; the first checkpoints lack the last two."""

    labels: str
    clouds: list[float]
    signed: NotRequired[list[float]]
    files: NotRequired[str]


def same_data(first: Fingerprint, second: Fingerprint) -> bool:
    """Return whether two `fingerprint()` belong to the same set. Sets of other size or labels always differ."""
    if first["labels"] != second["labels"] or len(first["clouds"]) != len(second["clouds"]):
        return False
    if "files" in first and "files" in second and first["files"] != second["files"]:
        return False
    signed = zip(first.get("signed", ()), second.get("signed", ()))
    return all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(first["clouds"], second["clouds"])) and all(
        math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4) for one, other in signed
    )
