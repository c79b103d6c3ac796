"""Evaluation: accuracy of a classifier on a loader, and the probabilities that it gives to classes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..datasets import BatchLoader, LabelledDataset, PointCloudDataset, build_augmentation
from ..errors import InputError
from ..models.mode import eval_mode

MATRIX_CLASSES = 16
"""Up to so many classes a confusion matrix is read as text at a glance."""
TOP_CONFUSIONS = 10
BATCH_SIZE = 64
"""Clouds of one forward pass, where a data set is evaluated."""
Part = TypeVar("Part")
"""What is known of a part of a batch."""


@dataclass(frozen=True)
class ClassificationReport:
    """Accuracy of one evaluation; fractions in [0, 1].

    Attributes:
        oa: overall accuracy, the share of samples classified correctly.
        macc: mean class accuracy, over the classes that occur.
        loss: mean cross-entropy, nats.
        per_class: accuracy of each class by name; None where it has no sample.
        confusion: `confusion[true][predicted]`, counts.
        class_names: in the order of `confusion`.
        num_samples: samples evaluated.
        votes: passes whose logits were averaged.
        correct: one character for each sample in the order of the set, "1" where it was classified correctly, else "0".
    """

    oa: float
    macc: float
    loss: float
    per_class: dict[str, float | None]
    confusion: list[list[int]]
    class_names: list[str]
    num_samples: int
    votes: int = 1
    correct: str = ""

    def to_dict(self) -> dict[str, object]:
        """Return plain types for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Return the per-class table as text, percent."""
        width = max(10, *(len(name) for name in self.class_names))
        lines = [f"{'class':<{width}}  samples  correct  accuracy  most often taken for"]
        for index, (name, row) in enumerate(zip(self.class_names, self.confusion)):
            others = [(count, -other) for other, count in enumerate(row) if other != index]
            count, other = max(others, default=(0, 0))
            mistake = f"{self.class_names[-other]} ({count})" if count else ""
            fraction = self.per_class[name]
            accuracy = "-" if fraction is None else f"{100 * fraction:.1f} %"
            lines.append(f"{name:<{width}}  {sum(row):>7}  {row[index]:>7}  {accuracy:>8}  {mistake}".rstrip())
        return "\n".join(lines)

    def confusions(self) -> str:
        """Return the confusion counts as text: the matrix of few classes, the most frequent confusions of many.

        Example:
            >>> report = ClassificationReport(
            ...     oa=0.75, macc=0.5, loss=1.0, per_class={"box": 0.75, "mug": None}, confusion=[[3, 1], [0, 0]],
            ...     class_names=["box", "mug"], num_samples=4)
            >>> print(report.confusions())
            confusion counts, rows: true class, columns: predicted class
                              1    2
              1 box           3    1
              2 mug           .    .
        """
        names = self.class_names
        if len(names) <= MATRIX_CLASSES:
            width = max(10, *(len(name) for name in names))
            cell = max(5, len(str(self.num_samples)) + 1)
            head = "".join(f"{number:>{cell}}" for number in range(1, len(names) + 1))
            lines = ["confusion counts, rows: true class, columns: predicted class", f"{'':>{width + 4}}{head}"]
            for number, (name, row) in enumerate(zip(names, self.confusion), 1):
                lines.append(f"{number:>3} {name:<{width}}" + "".join(f"{count or '.':>{cell}}" for count in row))
            return "\n".join(lines)
        counts = enumerate(self.confusion)
        pairs = [(n, i, j) for i, row in counts for j, n in enumerate(row) if n and i != j]
        pairs.sort(key=lambda pair: -pair[0])
        lines = [f"most frequent confusions ({min(len(pairs), TOP_CONFUSIONS)} of {len(pairs)})"]
        for count, true, predicted in pairs[:TOP_CONFUSIONS]:
            lines.append(f"{count:>5} of {sum(self.confusion[true])} {names[true]} taken for {names[predicted]}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Return one line: OA, mAcc and what they were measured on."""
        votes = f", {self.votes} votes" if self.votes > 1 else ""
        return f"OA {100 * self.oa:.2f} %, mAcc {100 * self.macc:.2f} % ({self.num_samples} samples{votes})"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]] | Dataset,
    *,
    device: torch.device | str | None = None,
    votes: int = 1,
    progress: bool = True,
    class_names: list[str] | None = None,
) -> ClassificationReport:
    """Classify every sample of a data set or loader in eval mode; the model's mode is restored afterwards.

    Args:
        model: points (B, N, C) -> logits (B, num_classes), already on `device`.
        loader: yields points (B, N, C) and labels (B,), the same samples in the same order at every pass. When it is
            one rank's part (`loader.world_size` > 1), the counts of all ranks are added up. Of a data set, all samples
            are classified in its order and without augmentation, `BATCH_SIZE` at a time.
        device: where to compute; default: that of the model.
        votes: passes whose logits are averaged, at least 1. Pass 0 is the plain one; the others come from
            `loader.vote(i)`, a seeded augmentation. More than 1 needs a `BatchLoader` or a `PointCloudDataset`.
        progress: show a progress bar on a terminal.
        class_names: default those of `loader.dataset`, else "0", "1", ....

    Raises:
        InputError: an empty loader, `votes` below 1, votes from a loader without them, clouds with other channels than
            the model takes, labels that are not classes of the model, or logits that are not finite.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
        >>> loader = [(torch.rand(4, 8, 3), torch.tensor([0, 1, 0, 0]))]
        >>> evaluate(model, loader, progress=False).num_samples
        4
        >>> dataset = PointCloudDataset(torch.rand(3, 8, 3), torch.zeros(3), ["a", "b"], split="test", num_points=8)
        >>> evaluate(model, dataset, progress=False).num_samples
        3
    """
    return score(model, loader, device=device, votes=votes, progress=progress, class_names=class_names)[0]


@torch.no_grad()
def score(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]] | Dataset,
    *,
    device: torch.device | str | None = None,
    votes: int = 1,
    progress: bool = True,
    class_names: list[str] | None = None,
) -> tuple[ClassificationReport, list[Tensor]]:
    """Do as `evaluate`; return the report, and the logits (b, num_classes) of each batch of this rank.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
        >>> loader = [(torch.rand(4, 8, 3), torch.tensor([0, 1, 0, 0]))]
        >>> [len(logits) for logits in score(model, loader, device="cpu", progress=False)[1]]
        [4]
    """
    if votes < 1:
        raise InputError(f"votes is {votes}, must be at least 1")
    if device is None:
        device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    if isinstance(loader, Dataset):
        loader = _in_order(loader)
    vote_pass: Callable[[int], Iterable[tuple[Tensor, Tensor]]] | None = getattr(loader, "vote", None)
    if votes > 1 and vote_pass is None:
        kind = type(loader).__name__
        raise InputError(f"votes is {votes}, but a {kind} cannot repeat a pass with other points; use BatchLoader")
    passes = []
    with eval_mode(model):
        for vote in range(votes):
            batches = vote_pass(vote) if vote and vote_pass else loader
            title = "evaluate" if votes == 1 else f"vote {vote + 1}/{votes}"
            passes.append(list(_logits(model, batches, torch.device(device), title, progress)))
    ranks = getattr(loader, "world_size", 1)
    if not passes[0] and ranks == 1:
        raise InputError("the loader yields no batch to evaluate")
    classes = passes[0][0][0].shape[1] if passes[0] else 0
    if class_names is None:
        known = getattr(getattr(loader, "dataset", None), "class_names", [])
        class_names = list(known) or [str(index) for index in range(classes)]
    confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)
    loss_sum = torch.zeros((), dtype=torch.float64)
    hits: list[str] = []
    outputs: list[Tensor] = []
    if passes[0]:
        labels = torch.cat([label for _, label in passes[0]])
        all_logits = (torch.cat([logit for logit, _ in batches]) for batches in passes)
        logits = sum(all_logits, start=torch.zeros(())) / votes
        _check_outputs(logits, labels, len(class_names))
        confusion = confusion_matrix(logits.argmax(1), labels, len(class_names))
        loss_sum = F.cross_entropy(logits.double(), labels, reduction="sum")
        sizes = [len(label) for _, label in passes[0]]
        parts = (logits.argmax(1) == labels).split(sizes)
        hits = ["".join("01"[hit] for hit in part.tolist()) for part in parts]
        outputs = list(logits.split(sizes))
    if ranks > 1:
        for counts in (confusion, loss_sum):
            _all_reduce(counts, torch.device(device))
    hits = gather_in_order(hits, ranks)
    return _report(confusion, float(loss_sum), class_names, votes, "".join(hits)), outputs


def _in_order(dataset: Dataset) -> Iterable[tuple[Tensor, Tensor]]:
    """Return a loader of all samples in their order, without the augmentation of a training set."""
    if not isinstance(dataset, LabelledDataset):
        return DataLoader(dataset, BATCH_SIZE)
    votes = build_augmentation() if isinstance(dataset, PointCloudDataset) else None
    return BatchLoader(dataset, BATCH_SIZE, augment=False if dataset.training else votes)


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count predictions: `confusion[true][predicted]`, (num_classes, num_classes) int64.

    Args:
        predicted: (n,) int64 in [0, num_classes).
        labels: (n,) int64 in [0, num_classes).
        num_classes: rows and columns.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    pairs = labels * num_classes + predicted
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def _check_outputs(logits: Tensor, labels: Tensor, num_classes: int) -> None:
    if logits.shape[1] != num_classes:
        raise InputError(f"the model has {logits.shape[1]} classes, the data {num_classes}")
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        sample = int(bad.int().argmax())
        raise InputError(f"sample {sample} has label {int(labels[sample])}, must be in [0, {num_classes})")
    _check_finite(logits)


def _check_finite(logits: Tensor) -> None:
    bad = int((~torch.isfinite(logits).all(1)).sum())
    if bad:
        text = f"the model's output is not finite for {bad} of {len(logits)} samples"
        raise InputError(f"{text}; its training has diverged, or the checkpoint is damaged")


def _logits(
    model: nn.Module, loader: Iterable, device: torch.device, title: str, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    for points, labels in tqdm(loader, desc=title, leave=False, disable=None if progress else True):
        yield model(points.to(device, non_blocking=True)).float().cpu(), torch.as_tensor(labels).cpu()


def _all_reduce(counts: Tensor, device: torch.device) -> None:
    reduced = counts.to(device)
    dist.all_reduce(reduced)
    counts.copy_(reduced)


def gather_in_order(parts: list[Part], ranks: int) -> list[Part]:
    """Join the parts that the ranks have of each global batch; the last batch may lack some parts."""
    if ranks == 1:
        return parts
    everyone: list[list[Part]] = [[] for _ in range(ranks)]
    dist.all_gather_object(everyone, parts)
    return [part for batch in zip_longest(*everyone) for part in batch if part is not None]


def _report(confusion: Tensor, loss_sum: float, class_names: list[str], votes: int, hits: str) -> ClassificationReport:
    support, correct = confusion.sum(1), confusion.diag()
    accuracy = [int(c) / int(s) if s else None for c, s in zip(correct, support)]
    present = [a for a in accuracy if a is not None]
    total = int(support.sum())
    return ClassificationReport(
        oa=int(correct.sum()) / total,
        macc=sum(present) / len(present),
        loss=loss_sum / total,
        per_class=dict(zip(class_names, accuracy)),
        confusion=confusion.tolist(),
        class_names=list(class_names),
        num_samples=total,
        votes=votes,
        correct=hits,
    )


@torch.no_grad()
def class_probabilities(
    model: nn.Module,
    dataset: LabelledDataset,
    *,
    device: torch.device | str,
    indices: Tensor | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Tensor:
    """Classify samples of a set without augmentation, in eval mode; the model's mode is restored afterwards.

    Args:
        model: points (B, N, 3) -> logits (B, num_classes), already on `device`.
        dataset: any split.
        device: where to compute.
        indices: (n,) int64, which clouds; default: all.
        batch_size: clouds of one forward pass, at least 1.
        progress: show a progress bar on a terminal.

    Returns:
        (n, num_classes) float32 on the CPU, rows sum to 1.

    Raises:
        InputError: an output that is not finite.

    Example:
        >>> data = PointCloudDataset(torch.rand(3, 8, 3), torch.zeros(3), ["any"], split="test", num_points=8)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
        >>> class_probabilities(model, data, device="cpu", progress=False).sum(1).round().tolist()
        [1.0, 1.0, 1.0]
    """
    indices = torch.arange(len(dataset)) if indices is None else indices
    with eval_mode(model):
        batches = tqdm(indices.split(batch_size), desc="classify", leave=False, disable=None if progress else True)
        outputs = [model(dataset.batch(part, augment=False)[0].to(device)).float().cpu() for part in batches]
    logits = torch.cat(outputs)
    _check_finite(logits)
    return logits.softmax(1)
