"""Draw point clouds: of a data set, what a model says of them, how it cuts them up, what it looks at, corruptions."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2d3d import load_checkpoint, load_config
from s2d3d.cli import add_files, add_overrides, check_overrides, refuse_existing, run_tool
from s2d3d.config.data import build_dataset, check_classes
from s2d3d.config.load import Config, parse_config
from s2d3d.datasets import PointCloudDataset
from s2d3d.datasets.file_set import find_files, folder_labels, load_files
from s2d3d.errors import InputError
from s2d3d.evaluation.accuracy import class_probabilities
from s2d3d.evaluation.robustness import SEED
from s2d3d.machine import choose_device
from s2d3d.random_state import derived_generator
from s2d3d.runs.checkpoint import build_model, require_sparse
from s2d3d.viz import CloudSheet, sheet_paths, write_sheet
from s2d3d.viz.cloud_sheets import (
    WRONG,
    corruptions_sheet,
    experts_sheet,
    gallery_sheet,
    patches_sheet,
    point_saliency,
    prediction_caption,
    predictions_sheet,
    saliency_sheet,
)
from s2d3d.viz.tokens import trace_experts

MOST_CLOUDS = 400  # a PNG of about 7000 x 7000 pixels
MOST_PIXELS = 1024
NUM_CLOUDS = {"predictions": 12, "patches": 6, "experts": 3, "saliency": 12, "corruptions": 3}
NEEDS_MODEL = ("predictions", "patches", "experts", "saliency")
OWN_FLAGS = {"passes": ("experts", 4), "layer": ("experts", None), "severity": ("corruptions", 3)}
"""Flags of one kind alone, and their defaults."""


@dataclass(frozen=True)
class Source:
    """Where the clouds come from: a data set, the clouds chosen of it, and a model where a checkpoint is given.

    Files may be a data set without labels.
    """

    config: Config
    dataset: PointCloudDataset
    chosen: Tensor
    points: Tensor
    labels: Tensor
    model: nn.Module | None
    device: torch.device
    title: str
    labelled: bool = True

    @property
    def captions(self) -> list[str]:
        if not self.labelled:
            return [self.dataset.names[index] for index in self.chosen]
        return [self.dataset.class_names[label] for label in self.labels]

    def verdict(self, shares: Tensor, row: int) -> tuple[str, bool]:
        """Caption a cloud with what the model says, shares (num_classes,); and tell whether that is wrong."""
        names, label = self.dataset.class_names, int(self.labels[row])
        if self.labelled:
            return prediction_caption(shares, names, label), int(shares.argmax()) != label
        confidence, guess = shares.max(0)
        return f"{self.captions[row]}\n{names[int(guess)]}, {100 * float(confidence):.0f} %", False

    @property
    def network(self) -> nn.Module:
        """The model, for what cannot be drawn without one."""
        assert self.model is not None, "check_flags asks for a checkpoint"
        return self.model

    def probabilities(self) -> Tensor:
        size = self.config.eval.batch_size
        return class_probabilities(self.network, self.dataset, device=self.device, indices=self.chosen, batch_size=size)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="visualize.py", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="FILE", help="a model, and the data set that it was trained on")
    source.add_argument("--config", metavar="FILE", help="a data set, without a model")
    add_overrides(parser)
    add_files(parser, "draw files, or folders of them, instead of the data set")
    parser.add_argument(
        "--kind", choices=("gallery", *NUM_CLOUDS), help="default: predictions of a checkpoint, gallery of a config"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="FILE.png, FILE.ply (numbered files) or FILE.html (to turn in a browser)"
    )
    parser.add_argument("--window", action="store_true", help="show the clouds in a window, to turn and zoom")
    parser.add_argument(
        "--num-clouds", type=int, metavar="N", help="default: 3 to 12, or one of each class in a gallery"
    )
    parser.add_argument("--split", choices=("train", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="chooses the clouds, partitions; default: %(default)s")
    parser.add_argument("--size", type=int, default=320, metavar="N", help="pixels of a cloud in a PNG; default: 320")
    parser.add_argument("--passes", type=int, metavar="N", help="experts: training passes side by side; default: 4")
    parser.add_argument("--layer", metavar="NAME", help="experts: an expert layer by its name; default: the first")
    parser.add_argument("--severity", type=int, metavar="N", help="corruptions: 1 (mild) to 5; default: 3")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> None:
    check_flags(arguments)
    if arguments.output is None and not arguments.window:
        raise InputError("nowhere to draw to; give --output FILE.png, --window or both")
    output = None
    if arguments.output is not None:
        output = refuse_existing(sheet_paths(arguments.output, 1)[0], arguments.force)
    sheet = make_sheet(arguments)
    if output:
        for path in sheet_paths(output, len(sheet.clouds)):
            refuse_existing(path, arguments.force)
        first, *others = write_sheet(sheet, output, size=arguments.size)
        print(f"written to {first}" + (f" ... {others[-1].name}" if others else ""))
    if arguments.window:
        sheet.show()


def check_flags(arguments: argparse.Namespace) -> None:
    """Fill in defaults, and refuse flags that the kind would ignore."""
    arguments.kind = arguments.kind or ("predictions" if arguments.checkpoint else "gallery")
    if arguments.kind in NEEDS_MODEL and not arguments.checkpoint:
        raise InputError(f"--kind {arguments.kind}: needs a model; give --checkpoint FILE instead of --config")
    if not 16 <= arguments.size <= MOST_PIXELS:
        raise InputError(f"--size is {arguments.size}, must be between 16 and {MOST_PIXELS}")
    for name, (kind, default) in OWN_FLAGS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif arguments.kind != kind:
            raise InputError(f"--{name}: is for --kind {kind} only")


def make_sheet(arguments: argparse.Namespace) -> CloudSheet:
    makers = {
        "gallery": gallery, "predictions": predictions, "patches": patches, "experts": experts, "saliency": saliency,
        "corruptions": corruptions,
    }  # fmt: skip
    return makers[arguments.kind](arguments, read_source(arguments))


def read_source(arguments: argparse.Namespace) -> Source:
    device, model = choose_device(arguments.device), None
    if arguments.checkpoint:
        check_overrides(arguments.overrides, ("data", "eval", "seed"))
        payload = load_checkpoint(arguments.checkpoint)
        config = parse_config(payload["config"], where=arguments.checkpoint, overrides=arguments.overrides)
        if arguments.kind == "experts":
            require_sparse(payload, arguments.checkpoint)
        model = build_model(payload, where=arguments.checkpoint).to(device)
    else:
        config = load_config(arguments.config, arguments.overrides)
    known = payload["class_names"] if model is not None else []
    dataset, labelled = read_dataset(arguments, config, known)
    if not arguments.files and model is not None:
        check_classes(dataset, known, arguments.checkpoint)
    if arguments.files and arguments.num_clouds is None:
        arguments.num_clouds = min(len(dataset), MOST_CLOUDS)
    usual = (
        len(dataset.labels.unique()) if arguments.kind == "gallery" else min(NUM_CLOUDS[arguments.kind], len(dataset))
    )
    count = usual if arguments.num_clouds is None else arguments.num_clouds
    chosen = choose_clouds(dataset, count, arguments.seed)
    if arguments.files:
        chosen = chosen.sort().values
    points, labels = dataset.batch(chosen, augment=False)
    title = "files" if arguments.files else f"{arguments.split} split of {config.data.name}"
    if arguments.checkpoint:
        title += f", {arguments.checkpoint}"
    return Source(config, dataset, chosen, points, labels, model, device, title, labelled)


def read_dataset(
    arguments: argparse.Namespace, config: Config, class_names: Sequence[str]
) -> tuple[PointCloudDataset, bool]:
    """Read a split of the data set, or the files that are named instead; tell whether the clouds have labels."""
    data = config.data
    if not arguments.files:
        if arguments.up_axis:
            raise InputError("--up-axis: is for --files only; that of a data set is data.up_axis")
        return build_dataset(data, arguments.split, seed=config.seed), True
    files = find_files(arguments.files)
    labels = folder_labels(files, class_names)
    dataset = load_files(
        files, class_names or ["file"], labels, num_points=data.num_points, up_axis=arguments.up_axis or "z",
        normalize=bool(data.normalize), seed=arguments.seed, allow_missing=not arguments.refuse_missing,
    )  # fmt: skip
    return dataset, labels is not None


def gallery(arguments: argparse.Namespace, source: Source) -> CloudSheet:
    """Clouds of every class in the order of the classes; files in theirs."""
    data, dataset = source.config.data, source.dataset
    if arguments.files:
        title = f"{len(source.points)} files, {data.num_points} points each\ncolour shows height"
        return CloudSheet(source.points, [dataset.names[index] for index in source.chosen], title)
    title = (
        f"{data.name}, {arguments.split} split\n"
        f"{len(source.points)} of {len(dataset)} clouds, {data.num_points} points each; colour shows height"
    )
    return gallery_sheet(source.points, source.labels, dataset.class_names, title)


def predictions(arguments: argparse.Namespace, source: Source) -> CloudSheet:
    """What the model takes the clouds for, wrong ones first; says so on stdout too."""
    probabilities, names = source.probabilities(), source.dataset.class_names
    if not source.labelled:
        captions = [source.verdict(shares, row)[0] for row, shares in enumerate(probabilities)]
        print("\n".join(caption.replace("\n", ": ") for caption in captions))
        return CloudSheet(source.points, captions, f"{len(captions)} files\n{source.title}; colour shows height")
    sheet = predictions_sheet(source.points, source.labels, probabilities, names, f"sample of the {source.title}")
    confidence, guesses = probabilities.max(1)
    for index in (guesses != source.labels).nonzero().flatten().tolist():
        truth, guess = names[source.labels[index]], names[guesses[index]]
        cloud = source.dataset.names[source.chosen[index]]
        print(f"{cloud}: {truth} taken for {guess} ({100 * confidence[index]:.0f} %)")
    print(sheet.title.splitlines()[0])
    return sheet


def patches(arguments: argparse.Namespace, source: Source) -> CloudSheet:
    """The groups that become tokens."""
    model = source.network
    sizes = f"{getattr(model, 'num_group', 0)} groups of {getattr(model, 'group_size', 0)} points"
    title = f"{sizes}, each one token\n{source.title}; a colour for each group, centres large, grey in none"
    return patches_sheet(model, source.points, source.captions, title)


def experts(arguments: argparse.Namespace, source: Source) -> CloudSheet:
    """Which expert each token goes to, pass after pass."""
    passes = trace_experts(
        source.network,
        source.points.to(source.device),
        layer=arguments.layer,
        passes=arguments.passes,
        seed=arguments.seed,
    )
    layer, count = passes[0].layer, passes[0].num_experts
    title = (
        f"{count} experts of {layer} in {arguments.passes} training passes\n"
        f"{source.title}; a colour for each expert; all clouds of the sheet are one batch"
    )
    return experts_sheet(source.points, passes, source.captions, title)


def saliency(arguments: argparse.Namespace, source: Source) -> CloudSheet:
    """Which points the predicted class depends on."""
    parts = source.points.to(source.device).split(source.config.eval.batch_size)
    values = torch.cat([point_saliency(source.network, part).cpu() for part in parts])
    verdicts = [source.verdict(shares, row) for row, shares in enumerate(source.probabilities())]
    captions = [caption for caption, _ in verdicts]
    marks = [WRONG if wrong else None for _, wrong in verdicts]
    title = f"gradient of the predicted class by each point\n{source.title}; dark: none, light: large"
    return saliency_sheet(source.points, values, captions, title, marks)


def corruptions(arguments: argparse.Namespace, source: Source) -> CloudSheet:
    """Clouds as they are and under each corruption, with the model's verdict where there is a model."""

    @torch.no_grad()
    def classify(cloud: Tensor, row: int) -> tuple[str, bool]:
        shares = source.network(cloud[None].to(source.device)).float().softmax(1)[0].cpu()
        caption, wrong = source.verdict(shares, row)
        return caption.splitlines()[1], not wrong

    return corruptions_sheet(
        source.points,
        source.captions,
        arguments.severity,
        f"corruptions of severity {arguments.severity}\n{source.title}; colour shows height",
        seed=SEED,
        indices=source.chosen.tolist(),
        classify=classify if source.model is not None else None,
    )


def choose_clouds(dataset: PointCloudDataset, count: int, seed: int) -> Tensor:
    """Choose at random, but from the classes in turn, so that few clouds show many classes: (count,) indices."""
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


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
