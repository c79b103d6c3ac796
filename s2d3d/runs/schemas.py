"""What the JSON files of a run folder hold, as far as it is read."""

from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic needs these before Python 3.12
)

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from ..datasets.corruptions import SEVERITIES
from ..stored import Count, Finite, Share, Text


def _consistent(report: dict[str, Any]) -> dict[str, Any]:
    if not report.keys() >= {"class_names", "confusion", "per_class", "num_samples"}:
        return report
    names, confusion = report["class_names"], report["confusion"]
    if len(confusion) != len(names) or any(len(row) != len(names) for row in confusion):
        raise ValueError("confusion is not square")
    if set(report["per_class"]) != set(names) or sum(map(sum, confusion)) != report["num_samples"]:
        raise ValueError("classes or samples do not agree")
    return report


class _Report(TypedDict):
    oa: Share
    macc: NotRequired[Share]
    loss: NotRequired[Finite]
    per_class: NotRequired[dict[Text, Share | None]]
    confusion: NotRequired[list[list[Count]]]
    class_names: NotRequired[list[Text]]
    num_samples: NotRequired[Count]
    correct: NotRequired[Annotated[Text, Field(pattern="^[01]*$")]]


Report = Annotated[_Report, AfterValidator(_consistent)]


class WholeReport(TypedDict):
    """A report with all that tables and figures show."""

    oa: Share
    macc: Share
    loss: Finite
    per_class: dict[Text, Share | None]
    confusion: list[list[Count]]
    class_names: list[Text]
    num_samples: Count


class _Ended(TypedDict):
    """What every run tells of its end."""

    split: NotRequired[Text]
    shapes: NotRequired[Text]
    epochs: NotRequired[Count]
    updates: NotRequired[Count]
    train_seconds: NotRequired[Finite]
    parameters: NotRequired[dict[Text, Count]]
    kept: NotRequired[Text]


class Metrics(_Ended):
    """metrics.json."""

    sparse: NotRequired[Report]
    merged: NotRequired[Report]
    routed: NotRequired[Report]
    ema: NotRequired[Report]
    recalibrated: NotRequired[Report]
    voting: NotRequired[Report]


class _Reconstruction(TypedDict):
    loss: Finite
    norm: Text
    num_samples: Count
    oa: NotRequired[Share]
    macc: NotRequired[Share]
    correct: NotRequired[Annotated[Text, Field(pattern="^[01]*$")]]


class PretrainingMetrics(_Ended):
    """metrics.json of a pre-training."""

    task: Literal["pretrain"]
    sparse: NotRequired[_Reconstruction]
    merged: NotRequired[_Reconstruction]
    routed: NotRequired[_Reconstruction]
    ema: NotRequired[_Reconstruction]
    recalibrated: NotRequired[_Reconstruction]
    initial: NotRequired[_Reconstruction]


class Environment(TypedDict):
    """environment.json."""

    time: NotRequired[Text]
    command: NotRequired[list[Text]]
    s2d3d: NotRequired[Text]
    git_commit: NotRequired[Text | None]
    python: NotRequired[Text]
    packages: NotRequired[dict[Text, Text | None]]
    platform: NotRequired[Text]
    processor: NotRequired[Text]
    num_threads: NotRequired[Count]
    gpus: NotRequired[list[Text]]
    earlier: NotRequired[list["Environment"]]


class _Accuracy(TypedDict):
    oa: Share


class _Epoch(TypedDict):
    epoch: Finite
    contraction: Finite
    divergence: NotRequired[Finite]
    predicted: NotRequired[Finite]


class _Line(TypedDict):
    height: Finite
    positions: Annotated[list[Finite], Field(min_length=2)]
    losses: Annotated[list[Finite], Field(min_length=2)]


def _as_long(line: dict[str, Any]) -> dict[str, Any]:
    if len(line["positions"]) != len(line["losses"]):
        raise ValueError("a line has other numbers of positions and losses")
    return line


class _Experts(_Line):
    experts: Annotated[list[Count], Field(min_length=2, max_length=2)]


class _Epochs(_Line):
    epochs: Annotated[list[Finite], Field(min_length=2, max_length=2)]


class _Checkpoint(TypedDict):
    epoch: Finite
    divergence: Annotated[dict[Text, Finite], Field(min_length=1)]
    experts: Annotated[list[_Accuracy], Field(min_length=1)]
    merged: _Accuracy
    gap: Finite
    barriers: Annotated[list[Annotated[_Experts, AfterValidator(_as_long)]], Field(min_length=1)]


class _Analysis(TypedDict):
    epochs: list[_Epoch]
    checkpoints: Annotated[list[_Checkpoint], Field(min_length=1)]
    between_checkpoints: list[Annotated[_Epochs, AfterValidator(_as_long)]]


def _same_experts(analysis: dict[str, Any]) -> dict[str, Any]:
    first = analysis["checkpoints"][0]
    for point in analysis["checkpoints"]:
        if point["divergence"].keys() != first["divergence"].keys() or len(point["experts"]) != len(first["experts"]):
            raise ValueError("checkpoints have other experts")
    return analysis


Analysis = Annotated[_Analysis, AfterValidator(_same_experts)]
"""analysis.json."""


class _Corruption(TypedDict):
    oa: Annotated[list[Share], Field(min_length=len(SEVERITIES), max_length=len(SEVERITIES))]


class Robustness(TypedDict):
    """robustness.json."""

    corruptions: dict[Text, _Corruption]
    clean: _Accuracy
    mean_oa: Share


class FinishedFold(TypedDict):
    """A fold in a file of few-shot folds."""

    fold: Count
    oa: Share
    macc: Share
    loss: Finite
    classes: list[Text]


class Folds(TypedDict):
    """A file of few-shot folds."""

    folds: list[FinishedFold]
