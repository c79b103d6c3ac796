"""The report that lies in a run folder: the page report.html and three plots."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..atomic import write_text
from ..config.load import Config
from ..datasets import PointCloudDataset, require_clouds, split_train_validation
from ..datasets.labelled import TRAIN
from ..errors import InputError
from ..evaluation.accuracy import class_probabilities
from ..runs.folder import RunFolder
from ..runs.record import RunRecord, read_runs, require_whole
from ..runs.trained import open_trained
from .cloud_sheets import WRONG, by_mistake, prediction_caption
from .clouds import VIEW, height_colors
from .figure import save_figure
from .plots import confusion_figure, training_curves
from .report import Predictions, build_report

COLUMNS, ROWS = 4, 3
"""Panels of the figure of mistakes, at most."""
POINTS = 512
"""Points of a cloud in that figure, at most."""


class PlainClouds:
    """The clouds of a set without augmentation, read one by one: `PlainClouds(dataset)[index]` is (N, 3)."""

    def __init__(self, dataset: PointCloudDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Tensor:
        return self.dataset.batch(torch.tensor([index]), augment=False)[0][0, :, :3]


def as_predictions(probabilities: Tensor, dataset: PointCloudDataset, config: Config) -> Predictions:
    """Return predictions of a whole set for `build_report`.

    Args:
        probabilities: (n, num_classes), in the order of the set.
        dataset: the set.
        config: that it was read by; with the set's source it tells whether two runs share their clouds.
    """
    data = config.data
    source = f"{dataset.source} {data.name} {data.classes} {data.num_points} {data.kwargs}"
    return Predictions(
        PlainClouds(dataset), dataset.labels, probabilities, dataset.names, dataset.class_names, source
    )  # fmt: skip


def predict_run(record: RunRecord, overrides: Sequence[str] = (), *, device: torch.device | str) -> Predictions:
    """Run the final model of a run once, on what the run was scored on: its test set or its validation part.

    Args:
        record: of the run, from `read_runs`.
        overrides: changes of the config, as `data.key=value` or `eval.key=value`.
        device: where to compute.

    Raises:
        InputError: the run is not finished, or its model or its data cannot be read.
    """
    trained = open_trained(finished(record), overrides, device=device)
    trained.require_clouds("a report with clouds (--num-mistakes 0 --clouds-per-class 0: one without)")
    config = trained.config
    if config.eval.split == "validation":
        _, scored = split_train_validation(trained.dataset(TRAIN), config.data.val_fraction, config.seed)
        trained.refuse_trained(scored, "validation")
    else:
        scored = trained.dataset()
    dataset = require_clouds(scored, "a report with clouds")
    probabilities = class_probabilities(trained.model, dataset, device=device, batch_size=config.eval.batch_size)
    return as_predictions(probabilities, dataset, config)


def finished(record: RunRecord) -> Path:
    """Return the final model of a run.

    Raises:
        InputError: the run is not finished.
    """
    if record.checkpoint is None:
        assert record.folder is not None, "read_runs sets it"
        raise InputError(
            f"{record.folder.merged}: no such file, the run is not finished; "
            "report it without clouds by --num-mistakes 0 --clouds-per-class 0"
        )
    return record.checkpoint


def write_run_report(folder: RunFolder, predictions: Predictions | None = None) -> None:
    """Write the page of a run into its folder, then the plots; files that are there are replaced.

    Args:
        folder: of a run with at least one finished epoch.
        predictions: of its final model. Without them the page has no clouds, and there is no plot of mistakes.

    Raises:
        InputError: the folder holds no such run, or a damaged file.
        OSError: a file cannot be written.

    Example:
        >>> write_run_report(RunFolder("runs/demo"))  # doctest: +SKIP
    """
    (record,) = read_runs([folder.root])
    require_whole([record])
    write_text(folder.report, build_report([record], {record.name: predictions} if predictions else None))
    folder.plots.mkdir(exist_ok=True)
    save_figure(training_curves({record.name: record.log}), folder.plots / "training.png")
    final = record.final
    if final:
        title = f"{record.name}, OA {100 * final['oa']:.2f} %"
        save_figure(
            confusion_figure(final["confusion"], final["class_names"], title=title), folder.plots / "confusion.png"
        )
    if predictions:
        save_figure(mistakes_figure(predictions), folder.plots / "mistakes.png")


def mistakes_figure(predictions: Predictions) -> Figure:
    """Draw the worst mistakes, each cloud with its true and its predicted class.

    The clouds are coloured by height and seen from the front right and above, as in all sheets. All are drawn in one
    panel, which takes matplotlib a fraction of the time of a panel each.

    Example:
        >>> likely = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
        >>> data = Predictions(torch.rand(2, 9, 3), torch.tensor([0, 1]), likely, list("ab"), ["box", "mug"], "s")
        >>> [text.get_text() for text in mistakes_figure(data).axes[0].texts]
        ['mug\\ntaken for box, 80 %']
    """
    shares, labels = predictions.probabilities, predictions.labels
    wrong = [index for index in by_mistake(shares, labels).tolist() if shares[index].argmax() != labels[index]]
    shown = wrong[: COLUMNS * ROWS]
    rows = max(1, -(-len(shown) // COLUMNS))
    figure = Figure(figsize=(2.3 * COLUMNS, 2.7 * rows + 0.4))
    count = f"{len(shown)} of {len(wrong)} mistakes, the worst first" if wrong else "no mistake"
    figure.suptitle(f"{count}; {len(labels)} clouds")
    azimuth, elevation = np.radians(VIEW)
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0])
    near = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    up = np.cross(near, right)
    panel = figure.add_axes((0, 0, 1, 1 - 0.4 / (2.7 * rows + 0.4)))
    panel.set(xlim=(0, COLUMNS), ylim=(-rows, 0))
    panel.set_axis_off()
    for place, index in enumerate(shown):
        row, column = divmod(place, COLUMNS)
        cloud = np.asarray(predictions.points[index][:POINTS].double())
        cloud = cloud - (cloud.max(0) + cloud.min(0)) / 2
        cloud = cloud[(cloud @ near).argsort()]
        unit = 0.4 / max(float(np.linalg.norm(cloud, axis=1).max()), 1e-9)
        across, along = column + 0.5 + unit * (cloud @ right), -row - 0.58 + unit * 2.3 / 2.7 * (cloud @ up)
        panel.scatter(across, along, s=5, c=height_colors(cloud), linewidths=0)
        caption = prediction_caption(shares[index], predictions.class_names, int(labels[index]))
        panel.text(column + 0.5, -row - 0.02, caption, color=WRONG, fontsize=9, ha="center", va="top")
    return figure
