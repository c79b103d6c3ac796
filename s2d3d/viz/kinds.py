"""The source of the clouds and the kinds of sheets of `tools/visualize.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..channels import columns
from ..config.data import build_dataset
from ..config.load import Config
from ..datasets import PointCloudDataset, require_clouds
from ..datasets.file_set import find_files, folder_labels, load_files
from ..errors import InputError
from ..evaluation.accuracy import class_probabilities
from ..evaluation.reconstruction import pinned_masks
from ..evaluation.robustness import SEED
from ..machine import choose_device
from ..models import PointMAEPretrain
from ..random_state import derived_generator
from ..runs.checkpoint import require_sparse
from ..runs.trained import TrainedModel, open_trained, up_axis_of_files
from .cloud_sheets import (
    WRONG,
    corruptions_sheet,
    experts_sheet,
    gallery_sheet,
    patches_sheet,
    point_saliency,
    prediction_caption,
    predictions_sheet,
    reconstructions_sheet,
    saliency_sheet,
)
from .sheet import CloudSheet
from .tokens import trace_experts

MOST_CLOUDS = 400  # a PNG of about 7000 x 7000 pixels
NUM_CLOUDS = {
    "predictions": 12, "patches": 6, "experts": 3, "saliency": 12, "corruptions": 3, "reconstructions": 4
}  # fmt: skip
"""Default number of clouds by kind of sheet; a gallery has one of each class."""


@dataclass(frozen=True)
class Source:
    """The source of the clouds: a data set, the chosen clouds, and a model if a checkpoint is given.

    Clouds from files may have no labels.

    Attributes:
        chosen: indices (n,) of the clouds in `dataset`.
        clouds: the clouds (n, N, C), z up, on the CPU, as the model takes them.
        labels: their classes (n,).
        title: name of the source on a sheet.
        from_files: the clouds come from named files, not from a data set.
        labelled: `labels` are valid.
    """

    config: Config
    dataset: PointCloudDataset
    chosen: Tensor
    clouds: Tensor
    labels: Tensor
    model: nn.Module | None
    device: torch.device
    title: str
    from_files: bool = False
    labelled: bool = True

    @property
    def points(self) -> Tensor:
        """What is drawn: coordinates (n, N, 3)."""
        return self.clouds[..., :3]

    @property
    def colors(self) -> Tensor | None:
        """The colours of the points (n, N, 3), None where the clouds have none."""
        place = columns(self.dataset.channels, "rgb")
        return None if place is None else self.clouds[..., place]

    @property
    def captions(self) -> list[str]:
        if not self.labelled:
            return [self.dataset.names[index] for index in self.chosen]
        return [self.dataset.class_names[label] for label in self.labels]

    def verdict(self, shares: Tensor, row: int) -> tuple[str, bool]:
        """Return a caption with the model's prediction, from shares (num_classes,), and whether it is wrong."""
        names, label = self.dataset.class_names, int(self.labels[row])
        if self.labelled:
            return prediction_caption(shares, names, label), int(shares.argmax()) != label
        confidence, guess = shares.max(0)
        return f"{self.captions[row]}\n{names[int(guess)]}, {100 * float(confidence):.0f} %", False

    @property
    def network(self) -> nn.Module:
        """The model, for sheets that need one."""
        assert self.model is not None, "the tool asks for a checkpoint"
        return self.model

    def probabilities(self) -> Tensor:
        size = self.config.eval.batch_size
        return class_probabilities(self.network, self.dataset, device=self.device, indices=self.chosen, batch_size=size)


def read_source(
    kind: str,
    *,
    config: Config | None = None,
    checkpoint: str | Path | None = None,
    overrides: Sequence[str] = (),
    files: Sequence[str] = (),
    up_axis: str | None = None,
    allow_missing: bool = True,
    estimate_normals: bool = False,
    split: str = "test",
    num_clouds: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Source:
    """Read the clouds of a sheet, and the model if a checkpoint is given.

    Args:
        kind: of the sheet: "gallery" or one of `NUM_CLOUDS`.
        config: describes the data set; None: the config of the checkpoint, with `overrides`.
        checkpoint: sparse or dense.
        overrides: `section.key=value`, changes to the checkpoint's config.
        files: clouds and meshes, or folders of them, instead of the data set.
        up_axis: vertical axis of the files, "y" or "z"; None: see `up_axis_of_files`.
        allow_missing: drop points of files that are NaN or infinite, instead of refusing these files.
        estimate_normals: estimate the normals of files that have none, if the model takes normals.
        split: of the data set, "train" or "test".
        num_clouds: number of clouds; None: the default of the kind, or all files.
        seed: of the choice of clouds.
        device: of the model.

    Raises:
        InputError: the checkpoint, the data set or a file cannot be read; their classes differ; there are fewer clouds.
    """
    place = choose_device(device)
    trained: TrainedModel | None = None
    if checkpoint is not None:
        task = {"reconstructions": "pretrain", "gallery": None}.get(kind, "classify")
        trained = open_trained(checkpoint, overrides, device=place, task=task)
        trained.require_clouds("a picture")
        config = trained.config
        if kind == "experts":
            require_sparse(trained.payload, str(checkpoint))
    assert config is not None, "either a config or a checkpoint"
    if files:
        known = trained.class_names if trained else []
        default_axis = trained.up_axis_of_files if trained else up_axis_of_files(config)
        dataset, labelled = _read_files(
            config, files, known, up_axis=up_axis or default_axis, allow_missing=allow_missing, seed=seed,
            estimate_normals=estimate_normals or bool(trained and trained.estimates_normals),
        )  # fmt: skip
    else:
        read = trained.dataset(split) if trained else build_dataset(config.data, split, seed=config.seed)
        dataset = require_clouds(read, "a picture")
        labelled = True
    if num_clouds is None and files:
        num_clouds = min(len(dataset), MOST_CLOUDS)
    elif num_clouds is None:
        usual = len(dataset.labels.unique()) if kind == "gallery" else NUM_CLOUDS[kind]
        num_clouds = min(usual, len(dataset))
    chosen = choose_clouds(dataset, num_clouds, seed)
    if files:
        chosen = chosen.sort().values
    points, labels = dataset.batch(chosen, augment=False)
    title = "files" if files else f"{split} split of {config.data.name}"
    if checkpoint is not None:
        title += f", {checkpoint}"
    model = trained.model if trained else None
    return Source(config, dataset, chosen, points, labels, model, place, title, bool(files), labelled)


def _read_files(
    config: Config,
    paths: Sequence[str],
    class_names: Sequence[str],
    *,
    up_axis: str,
    allow_missing: bool,
    seed: int,
    estimate_normals: bool,
) -> tuple[PointCloudDataset, bool]:
    """Read files as a data set; also return whether all of them are in folders named after classes."""
    files = find_files(paths)
    labels = folder_labels(files, class_names, paths)
    dataset = load_files(
        files, class_names or ["file"], labels, num_points=config.data.num_points, up_axis=up_axis,
        normalize=bool(config.data.normalize), seed=seed, allow_missing=allow_missing, channels=config.data.channels,
        estimate_normals=estimate_normals,
    )  # fmt: skip
    return dataset, labels is not None


def gallery(source: Source) -> CloudSheet:
    """Show clouds of every class in the order of the classes; files keep their order."""
    data, dataset, colors = source.config.data, source.dataset, source.colors
    shown = "colour shows height" if colors is None else "in their own colours"
    if source.from_files:
        title = f"{len(source.points)} files, {data.num_points} points each\n{shown}"
        names = [dataset.names[index] for index in source.chosen]
        return CloudSheet(source.points, names, title, None if colors is None else list(colors))
    title = (
        f"{data.name}, {dataset.split} split\n"
        f"{len(source.points)} of {len(dataset)} clouds, {data.num_points} points each; {shown}"
    )
    return gallery_sheet(source.points, source.labels, dataset.class_names, title, colors)


def predictions(source: Source) -> tuple[CloudSheet, list[str]]:
    """Show the predictions for the clouds, wrong ones first; also return them as lines of text."""
    probabilities, names = source.probabilities(), source.dataset.class_names
    if not source.labelled:
        captions = [source.verdict(shares, row)[0] for row, shares in enumerate(probabilities)]
        title = f"{len(captions)} files\n{source.title}; colour shows height"
        return CloudSheet(source.points, captions, title), [caption.replace("\n", ": ") for caption in captions]
    sheet = predictions_sheet(source.points, source.labels, probabilities, names, f"sample of the {source.title}")
    confidence, guesses = probabilities.max(1)
    lines = []
    for index in (guesses != source.labels).nonzero().flatten().tolist():
        truth, guess = names[source.labels[index]], names[guesses[index]]
        cloud = source.dataset.names[source.chosen[index]]
        lines.append(f"{cloud}: {truth} taken for {guess} ({100 * confidence[index]:.0f} %)")
    return sheet, [*lines, sheet.title.splitlines()[0]]


def patches(source: Source) -> CloudSheet:
    """Show the groups of points that become tokens."""
    model = source.network
    sizes = f"{getattr(model, 'num_group', 0)} groups of {getattr(model, 'group_size', 0)} points"
    title = f"{sizes}, each one token\n{source.title}; a colour for each group, centres large, grey in none"
    return patches_sheet(model, source.clouds, source.captions, title)


def experts(source: Source, *, layer: str | None = None, passes: int = 4, seed: int = 0) -> CloudSheet:
    """Show the expert of each token for each pass."""
    traced = trace_experts(
        source.network, source.clouds.to(source.device), layer=layer, passes=passes, seed=seed
    )  # fmt: skip
    title = (
        f"{traced[0].num_experts} experts of {traced[0].layer} in {passes} training passes\n"
        f"{source.title}; a colour for each expert; all clouds of the sheet are one batch"
    )
    return experts_sheet(source.points, traced, source.captions, title)


def saliency(source: Source) -> CloudSheet:
    """Show the points on which the predicted class depends most."""
    parts = source.clouds.to(source.device).split(source.config.eval.batch_size)
    values = torch.cat([point_saliency(source.network, part).cpu() for part in parts])
    verdicts = [source.verdict(shares, row) for row, shares in enumerate(source.probabilities())]
    captions = [caption for caption, _ in verdicts]
    marks = [WRONG if wrong else None for _, wrong in verdicts]
    title = f"gradient of the predicted class by each point\n{source.title}; dark: none, light: large"
    return saliency_sheet(source.points, values, captions, title, marks)


@torch.no_grad()
def rebuild(source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Return visible, predicted and true hidden points of the clouds, under the masks of evaluations, on the CPU."""
    model = source.network
    assert isinstance(model, PointMAEPretrain), "read_source asks for a pre-training"
    masks = pinned_masks(model, len(source.dataset))[source.chosen]
    visible, rebuilt, hidden = model.complete(source.points.to(source.device), masks)
    return visible.cpu(), rebuilt.cpu(), hidden.cpu()


def reconstructions(source: Source) -> CloudSheet:
    """Show input, visible part, prediction and truth of each cloud."""
    title = (
        f"masked autoencoder: input, visible groups, prediction, truth\n"
        f"{source.title}; blue: predicted and true points of masked groups"
    )
    return reconstructions_sheet(source.points, *rebuild(source), source.captions, title)


def corruptions(source: Source, severity: int) -> CloudSheet:
    """Show clouds unchanged and under each corruption, with the prediction if there is a model."""

    @torch.no_grad()
    def classify(cloud: Tensor, row: int) -> tuple[str, bool]:
        shares = source.network(cloud[None].to(source.device)).float().softmax(1)[0].cpu()
        caption, wrong = source.verdict(shares, row)
        return caption.splitlines()[1], not wrong

    return corruptions_sheet(
        source.clouds,
        source.captions,
        severity,
        f"corruptions of severity {severity}\n{source.title}; colour shows height",
        seed=SEED,
        indices=source.chosen.tolist(),
        channels=source.dataset.channels,
        classify=classify if source.model is not None else None,
    )


def choose_clouds(dataset: PointCloudDataset, count: int, seed: int) -> Tensor:
    """Return (count,) random indices, drawn from the classes in turn, so that few clouds show many classes."""
    most = min(MOST_CLOUDS, len(dataset))
    if not 1 <= count <= most:
        limit = f"the {most} clouds of split '{dataset.split}'" if most == len(dataset) else f"{most}"
        raise InputError(f"--num-clouds is {count}, must be between 1 and {limit}")
    generator = derived_generator(seed, "visualize")
    shuffled = torch.randperm(len(dataset), generator=generator)
    turns = torch.empty(len(dataset), dtype=torch.int64)
    for label in range(dataset.num_classes):
        members = shuffled[dataset.labels[shuffled] == label]
        turns[members] = torch.arange(len(members))
    return shuffled[turns[shuffled].argsort(stable=True)][:count]
