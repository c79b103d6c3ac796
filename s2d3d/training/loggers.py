"""Loggers in addition to log.csv: TensorBoard and Weights & Biases. Both are off by default."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from ..atomic import read_json, write_json
from ..config.load import Config, dump_config
from ..datasets import LabelledDataset, PointCloudDataset
from ..evaluation.accuracy import ClassificationReport
from ..evaluation.reconstruction import Report
from ..optional import optional
from ..runs.folder import RunFolder
from ..runs.record import final_form
from ..stored import Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""By key of the section `log`: the module to import. The key is also the name of the package and of the extra."""
CLOUDS = 4
"""Number of clouds of each kind, right and wrong, that are logged at the end of a run."""
_COLORS = {"right": (0, 114, 178), "wrong": (213, 94, 0)}


class RunLogger(Protocol):
    """Interface of a logger. The main process makes all calls, in the order of the epochs."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Log one row of log.csv; a column that was not measured is missing."""

    def report(self, name: str, report: Report, epoch: int) -> None:
        """Log an evaluation after `epoch` epochs; `name` says of what: "test", "merged", ...."""

    def clouds(self, kind: str, points: Tensor, captions: Sequence[str], epoch: int) -> None:
        """Log classified clouds (n, N, 3), z up; `kind` is "right" or "wrong"."""

    def close(self) -> None:
        """Write all pending data."""


class RunLoggers:
    """All loggers that a config asks for, as one object. Processes other than the main one have no loggers.

    Example:
        >>> RunLoggers().row({"epoch": 1})  # no loggers: nothing happens
    """

    def __init__(self, loggers: Sequence[RunLogger] = ()) -> None:
        self._loggers = list(loggers)

    def row(self, row: Mapping[str, Any]) -> None:
        """Pass on one row of log.csv."""
        for logger in self._loggers:
            logger.row(row)

    def report(self, name: str, report: Report, epoch: int) -> None:
        """Pass on an evaluation after `epoch` epochs."""
        for logger in self._loggers:
            logger.report(name, report, epoch)

    def finish(self, reports: Mapping[str, Report], dataset: LabelledDataset, epoch: int) -> None:
        """Pass on the evaluations at the end of a run, and some clouds that the final model classified wrong and right.

        Args:
            reports: by the form of the model, as for `run_metrics`.
            dataset: the data set that was scored; if it holds no clouds, there are none to pass on.
            epoch: number of epochs of the run.
        """
        if not self._loggers:
            return
        for name, report in reports.items():
            self.report(name, report, epoch)
        final = reports[final_form(reports)]
        if not isinstance(dataset, PointCloudDataset) or not isinstance(final, ClassificationReport):
            return
        correct = final.correct
        for kind, digit in (("wrong", "0"), ("right", "1")):
            chosen = [index for index, hit in enumerate(correct) if hit == digit][:CLOUDS]
            if chosen:
                points, labels = dataset.batch(torch.tensor(chosen), augment=False)
                captions = [f"shape {i}: {dataset.class_names[label]}" for i, label in zip(chosen, labels.tolist())]
                for logger in self._loggers:
                    logger.clouds(kind, points[..., :3], captions, epoch)

    def close(self) -> None:
        """Close all."""
        for logger in self._loggers:
            logger.close()


class TensorBoardLogger:
    """Writes event files below `tensorboard/` in the run folder; the step of every event is the epoch.

    The columns of log.csv become scalars `train/loss`, `train/oa`, `test/oa`, `run/lr`, .... At the end of the run
    come `final/merged_oa` and others. The confusion matrix of each evaluation is a figure. Clouds are meshes, rotated
    to y up for TensorBoard's viewer.

    A resumed run writes another file into the same folder. Events that a killed process wrote after the checkpoint are
    marked as superseded, and TensorBoard does not show them.
    """

    def __init__(self, config: Config, folder: RunFolder, history: Sequence[Mapping[str, Any]]) -> None:
        """Open the log.

        Args:
            config: of the run; kept as text in the log.
            folder: of the run.
            history: rows of the epochs completed so far. They are written if the folder has no event file.
        """
        continues = bool(folder.events())
        epoch = history[-1]["epoch"] if history else 0
        self._writer = _import("tensorboard").SummaryWriter(
            str(folder.root / "tensorboard"), purge_step=epoch + 1 if continues else None
        )
        if not continues:
            self._writer.add_text("config", f"```yaml\n{dump_config(config)}```", 0)
            for row in history:
                self.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        """Write each column as a scalar."""
        for column, value in row.items():
            if column != "epoch":
                self._writer.add_scalar(tag(column), value, row["epoch"])
        self._writer.flush()

    def report(self, name: str, report: Report, epoch: int) -> None:
        """Write the confusion figure. For evaluations at the end of a run, also write the accuracies, or the loss."""
        if name != "test":
            for score, value in _scores(report).items():
                self._writer.add_scalar(f"final/{name}_{score}", value, epoch)
        if isinstance(report, ClassificationReport):
            self._writer.add_figure(f"confusion/{name}", confusion_figure(report), epoch)
        self._writer.flush()

    def clouds(self, kind: str, points: Tensor, captions: Sequence[str], epoch: int) -> None:
        """Write clouds as meshes that have only points, one tag for each kind."""
        turned = torch.stack((points[..., 0], points[..., 2], -points[..., 1]), -1).float()
        colors = torch.tensor(_COLORS[kind]).expand(*points.shape[:2], 3)
        self._writer.add_mesh(f"clouds/{kind}", turned, colors=colors, global_step=epoch)
        self._writer.add_text(f"clouds/{kind}", "\n".join(f"1. {caption}" for caption in captions), epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class _Note(TypedDict):
    id: Text


class WandbLogger:
    """Sends the run to Weights & Biases: rows by epoch, confusion figures, clouds, and the results as summary.

    The run's W&B id is stored in `wandb.json` in the run folder, so that a resumed run stays the same W&B run.
    W&B handles login and settings such as `WANDB_MODE=offline`.
    """

    def __init__(self, config: Config, folder: RunFolder, history: Sequence[Mapping[str, Any]]) -> None:
        """Start or continue the run; arguments as for `TensorBoardLogger`."""
        self._wandb, note = _import("wandb"), folder.wandb
        known = read_json(note, schema=_Note) if note.exists() else None
        self._run = self._wandb.init(
            project=config.log.wandb, name=folder.root.name, dir=str(folder.root), config=config.to_dict(),
            **({"id": known["id"], "resume": "allow"} if known else {}),
        )  # fmt: skip
        if not known:
            write_json(note, {"id": self._run.id, "project": config.log.wandb})
            for row in history:
                self.row(row)

    def row(self, row: Mapping[str, Any]) -> None:
        """Send a row under the names of log.csv's columns."""
        self._run.log(dict(row), step=row["epoch"])

    def report(self, name: str, report: Report, epoch: int) -> None:
        """Send the confusion figure. For evaluations at the end of a run, also send accuracies or loss as summary."""
        if isinstance(report, ClassificationReport):
            self._run.log({f"confusion/{name}": self._wandb.Image(confusion_figure(report))}, step=epoch)
        if name != "test":
            self._run.summary.update({f"{name}_{score}": value for score, value in _scores(report).items()})

    def clouds(self, kind: str, points: Tensor, captions: Sequence[str], epoch: int) -> None:
        """Send clouds as coloured 3D objects."""
        color = np.broadcast_to(np.array(_COLORS[kind], dtype=np.float64), points.shape[1:])
        objects = [self._wandb.Object3D(np.hstack([cloud.double().numpy(), color])) for cloud in points]
        self._run.log({f"clouds/{kind}": objects, f"captions/{kind}": "; ".join(captions)}, step=epoch)

    def close(self) -> None:
        """End the upload."""
        self._run.finish()


def check_loggers(config: Config) -> None:
    """Check that the packages that `config.log` needs are installed, before a run does any work.

    Raises:
        InputError: a package is missing; the message names the command that installs it.
    """
    for key in _asked(config):
        _import(key)


def open_loggers(config: Config, folder: RunFolder, history: Sequence[Mapping[str, Any]]) -> RunLoggers:
    """Open the loggers that `config.log` asks for.

    Args:
        config: of the run.
        folder: of the run; it must exist.
        history: rows of the epochs completed so far.

    Raises:
        InputError: a package is missing.

    Example:
        >>> loggers = open_loggers(config, RunFolder("runs/a"), [])  # doctest: +SKIP
        >>> loggers.row({"epoch": 1, "train_loss": 2.3})  # doctest: +SKIP
    """
    kinds: dict[str, Callable[..., RunLogger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}
    return RunLoggers([kinds[key](config, folder, history) for key in _asked(config)])


def tag(column: str) -> str:
    """Return TensorBoard's name for a column of log.csv. The group is the split, or "run" for columns without a split.

    Example:
        >>> tag("train_loss"), tag("test_oa"), tag("lr"), tag("share_rate")
        ('train/loss', 'test/oa', 'run/lr', 'run/share_rate')
    """
    group, _, name = column.partition("_")
    return f"{group}/{name}" if group in ("train", "val", "test") else f"run/{column}"


def confusion_figure(report: ClassificationReport) -> "Figure":
    """Draw the confusion matrix of a report; each row holds fractions of its class.

    Example:
        >>> report = ClassificationReport(
        ...     oa=0.75, macc=0.5, loss=1.0, per_class={"box": 0.75, "mug": None}, confusion=[[3, 1], [0, 0]],
        ...     class_names=["box", "mug"], num_samples=4, votes=1)
        >>> confusion_figure(report).axes[0].images[0].get_array().tolist()
        [[0.75, 0.25], [0.0, 0.0]]
    """
    with optional("matplotlib", "a confusion figure", extra="plots"):
        from matplotlib.figure import Figure

    counts, names = np.array(report.confusion, dtype=np.float64), report.class_names
    size = max(4.0, 1.5 + 0.2 * len(names))
    figure = Figure(figsize=(size, size), layout="constrained")
    panel = figure.add_subplot()
    panel.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    panel.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.set(xlabel="predicted", ylabel="true", title=report.summary())
    return figure


def _scores(report: Report) -> dict[str, float]:
    if isinstance(report, ClassificationReport):
        return {"oa": report.oa, "macc": report.macc}
    return {"loss": report.loss}


def _asked(config: Config) -> list[str]:
    return [key for key in PACKAGES if getattr(config.log, key)]


def _import(key: str) -> ModuleType:
    with optional(key, f"log.{key}", extra=key):
        found = importlib.import_module(PACKAGES[key])
        if found.__file__ is None:
            raise ImportError(f"only a folder named {key} is here")  # such as W&B makes
    return found
