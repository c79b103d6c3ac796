"""Linear probe: how well a linear classifier reads classes from the features of a frozen model."""

import importlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..datasets import BatchLoader, LabelledDataset
from ..datasets.class_folders import UNLABELLED
from ..errors import InputError
from ..models import create_for_classes
from ..models.mode import eval_mode
from ..optional import optional
from ..random_state import derived_generator
from .batchnorm import recalibrate_batchnorm_

FEATURES = ("mean+max", "max", "concat")
"""How the tokens of a cloud become one vector: sum of mean and maximum, maximum, or both beside each other."""
STRENGTHS = (0.003, 0.01, 0.03, 0.1)
"""C of the support vector machine; one of them is chosen on a part of the training split."""
HELD_OUT = 0.2
"""The share of each class of the training split on which C is chosen."""


@dataclass(frozen=True)
class ProbeReport:
    """What a linear probe found; fractions in [0, 1].

    Attributes:
        oa: overall accuracy on the test split.
        macc: mean class accuracy there, over the classes that occur.
        c: the chosen C.
        choice: accuracy on the held-out part of the training split, by C.
        num_features: length of a vector.
        num_train: training clouds.
        num_test: test clouds.
        correct: one character for each test cloud in the order of the set, "1" where it was classified correctly.
    """

    oa: float
    macc: float
    c: float
    choice: dict[float, float]
    num_features: int
    num_train: int
    num_test: int
    correct: str = ""

    def summary(self) -> str:
        """Return one line: OA, mAcc and the chosen C."""
        return f"OA {100 * self.oa:.2f} %, mAcc {100 * self.macc:.2f} % ({self.num_test} samples, C {self.c:g})"

    def to_dict(self) -> dict[str, object]:
        """Return plain types for JSON."""
        return asdict(self) | {"choice": {str(c): score for c, score in self.choice.items()}}


@torch.no_grad()
def model_features(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
    kind: str = "mean+max",
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute one vector for each cloud: of the final tokens, in eval mode, nothing masked, without the class token.

    Args:
        model: has `forward_features(points)`, which returns tokens (B, T, C), `num_prefix_tokens` (default 0) class
            tokens first; on `device`.
        loader: yields points (B, N, C) and labels (B,).
        device: where to compute.
        kind: one of `FEATURES`.
        progress: show a progress bar on a terminal.

    Returns:
        Features (n, D) float32 and labels (n,) int64, on the CPU.

    Raises:
        InputError: an unknown kind, a model without tokens, an empty loader, or features that are not finite.
    """
    if kind not in FEATURES:
        raise InputError(f"features is '{kind}', must be one of {', '.join(FEATURES)}")
    tokens_of = getattr(model, "forward_features", None)
    if tokens_of is None:
        raise InputError(f"{type(model).__name__} has no forward_features, which a linear probe reads")
    skipped, parts, labels = getattr(model, "num_prefix_tokens", 0), [], []
    with eval_mode(model):
        for points, label in tqdm(loader, desc="features", leave=False, disable=None if progress else True):
            tokens = tokens_of(points.to(device))[:, skipped:].float()
            mean, largest = tokens.mean(1), tokens.amax(1)
            vectors = {"mean+max": mean + largest, "max": largest, "concat": torch.cat([largest, mean], 1)}
            parts.append(vectors[kind].cpu())
            labels.append(torch.as_tensor(label).cpu())
    if not parts:
        raise InputError("the loader yields no batch to compute features of")
    features = torch.cat(parts)
    bad = ~torch.isfinite(features).all(1)
    if bad.any():
        raise InputError(f"features of {int(bad.sum())} of {len(bad)} clouds are not finite; the model has diverged")
    return features, torch.cat(labels)


def probe_model(
    model: nn.Module,
    train: LabelledDataset,
    test: LabelledDataset,
    *,
    device: torch.device | str,
    kind: str = "mean+max",
    batch_size: int = 64,
    progress: bool = True,
) -> ProbeReport:
    """Fit a linear probe to the features that a model computes of plain training clouds, and score it on test clouds.

    Args:
        model: see `model_features`.
        train: labelled clouds; its augmentation is not applied.
        test: likewise, with the same classes.
        device: where to compute features.
        kind: one of `FEATURES`.
        batch_size: clouds of one forward pass.
        progress: show progress bars on a terminal.

    Raises:
        InputError: see `model_features` and `linear_probe`.
    """
    parts = [
        model_features(model, BatchLoader(part, batch_size, augment=False), device=device, kind=kind, progress=progress)
        for part in (train, test)
    ]
    return linear_probe(parts[0], parts[1], progress=progress)


def probe_coordinates(
    train: LabelledDataset, test: LabelledDataset, *, batch_size: int = 64, progress: bool = True
) -> ProbeReport:
    """Fit a linear probe to `coordinate_statistics` of plain training clouds, and score it on test clouds.

    Each number is standardised by its mean and deviation over the training clouds, as they have different units.

    Args:
        train: labelled clouds; its augmentation is not applied.
        test: likewise, with the same classes.
        batch_size: clouds read at once.
        progress: show progress bars on a terminal.
    """
    features = [
        torch.cat([coordinate_statistics(points) for points, _ in BatchLoader(part, batch_size, augment=False)])
        for part in (train, test)
    ]
    mean, deviation = features[0].mean(0), features[0].std(0, correction=0).clamp_min(1e-6)
    parts = [((rows - mean) / deviation, part.labels) for rows, part in zip(features, (train, test))]
    return linear_probe(parts[0], parts[1], progress=progress)


def random_encoder(
    name: str,
    kwargs: Mapping[str, Any],
    train: LabelledDataset,
    *,
    seed: int,
    device: torch.device,
    batch_size: int = 64,
) -> nn.Module:
    """Build a model with the fresh weights that a run of this seed starts from; the global generators stay as they are.

    Its BatchNorm statistics are re-estimated on plain training clouds: those of a fresh model, 0 and 1, would make a
    weaker baseline.

    Args:
        name: as for `create_model`.
        kwargs: of the model.
        train: the training clouds.
        seed: of the run.
        device: of the model.
        batch_size: clouds of one forward pass; an incomplete last batch is left out where there are others.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model = create_for_classes(name, train.num_classes, **kwargs).to(device).eval()
        size = min(batch_size, len(train))
        recalibrate_batchnorm_(model, BatchLoader(train, size, augment=False, drop_last=True), device=device)
    return model


def coordinate_statistics(points: Tensor) -> Tensor:
    """Describe clouds without a model: what a probe of learned features has to beat.

    Args:
        points: (B, N, 3 or more), z up; the first three channels count.

    Returns:
        (B, 54): mean, deviation, least and largest of x, y, z; the second moments; nine quantiles of x, y, z and of the
        distance from the centre.

    Example:
        >>> coordinate_statistics(torch.rand(2, 64, 3)).shape
        torch.Size([2, 54])
    """
    xyz = points[..., :3].float()
    centred = xyz - xyz.mean(1, keepdim=True)
    rows, columns = torch.triu_indices(3, 3)
    moments = (centred.transpose(1, 2) @ centred / xyz.shape[1])[:, rows, columns]
    levels = torch.linspace(0.1, 0.9, 9)
    values = torch.cat([xyz, centred.norm(dim=-1, keepdim=True)], -1)
    quantiles = values.quantile(levels, dim=1).permute(1, 2, 0).flatten(1)
    return torch.cat([xyz.mean(1), xyz.std(1, correction=0), xyz.amin(1), xyz.amax(1), moments, quantiles], 1)


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    strengths: Sequence[float] = STRENGTHS,
    progress: bool = True,
) -> ProbeReport:
    """Fit a linear support vector machine to training features, and score it on test features.

    C is the one of `strengths` with the best accuracy on a fifth of each class of the training split, of equal ones the
    smallest; the machine is then fitted to the whole split. The test split has no part in the choice. The fifth is the
    same for each model and each seed of a run.

    Args:
        train: features (n, D) and labels (n,) of the training split.
        test: likewise, of the test split.
        strengths: values of C, above 0.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: scikit-learn is missing; fewer than two classes, or too few clouds to hold some out.
    """
    require_sklearn()
    from sklearn.svm import SVC

    features, labels = (part.numpy() for part in train)
    held = _held_out(train[1])
    choice = {}
    for c in tqdm(sorted(strengths), desc="choosing C", leave=False, disable=None if progress else True):
        machine = _fit(SVC(kernel="linear", C=c), features[~held], labels[~held])
        choice[c] = float(machine.score(features[held], labels[held]))
    best = max(choice, key=lambda c: (choice[c], -c))
    machine = _fit(SVC(kernel="linear", C=best), features, labels)
    truth = test[1].numpy()
    hits = machine.predict(test[0].numpy()) == truth
    return ProbeReport(
        oa=float(hits.mean()),
        macc=float(np.mean([hits[truth == label].mean() for label in np.unique(truth)])),
        c=best,
        choice=choice,
        num_features=features.shape[1],
        num_train=len(labels),
        num_test=len(truth),
        correct="".join("01"[hit] for hit in hits.tolist()),
    )


def require_sklearn() -> None:
    """Check that scikit-learn is installed, before anything is computed.

    Raises:
        InputError: it is not.
    """
    with optional("scikit-learn", "a linear probe", extra="probe"):
        importlib.import_module("sklearn.svm")


def _fit(machine: Any, features: np.ndarray, labels: np.ndarray) -> Any:
    """Return the machine, fitted; labels are classes also where scikit-learn guesses a regression from few of each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes is greater than", UserWarning)
        return machine.fit(features, labels)


def check_labels(train: LabelledDataset, use: str, advice: str) -> None:
    """Check that a linear probe can be fitted to a training split, before anything is computed.

    Args:
        train: the training split.
        use: what needs it, for the message.
        advice: what to do where it has no labels, for the message.

    Raises:
        InputError: it has no labels, one class, or too few clouds to hold some out.
    """
    names = train.class_names
    if list(names) == [UNLABELLED]:
        raise InputError(f"{train.source}: holds no labels, which {use} needs; {advice}")
    if len(names) < 2:
        raise InputError(f"{train.source}: has one class, {names[0]}, and {use} needs two; {advice}")
    _held_out(train.labels)


def _held_out(labels: Tensor) -> np.ndarray:
    """Mark the share of each class, rounded to the nearest number, that is held out: (n,) bool.

    Raises:
        InputError: fewer than two classes, or too few clouds.
    """
    if len(labels.unique()) < 2:
        raise InputError("a linear probe needs training clouds of at least two classes")
    marks = np.zeros(len(labels), dtype=bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=derived_generator(0, "probe", label))
        marks[members[order[: round(HELD_OUT * len(members))]].numpy()] = True
    if not marks.any():
        raise InputError(
            f"a linear probe holds {HELD_OUT:.0%} of each class out to choose C, and {len(labels)} training clouds of "
            f"{len(labels.unique())} classes are too few for that; it needs three clouds of a class"
        )
    return marks
