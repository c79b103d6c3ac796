"""Draw point clouds: a checkpoint's predictions on its data set, or a gallery of the data set of a config."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from s2d3d import load_checkpoint, load_config
from s2d3d.datasets import PointCloudDataset
from s2d3d.datasets.base import derived_generator
from s2d3d.engine.checkpoint import build_model
from s2d3d.engine.cli import add_overrides, check_overrides, refuse_existing, run_tool
from s2d3d.engine.config import parse_config
from s2d3d.engine.data import build_dataset, check_classes
from s2d3d.engine.runtime import choose_device
from s2d3d.errors import InputError
from s2d3d.viz import draw_grid, render_clouds, show_window

MOST_CLOUDS = 400  # a PNG of about 7000 x 7000 pixels
WRONG = "#c2410c"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="visualize.py", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="FILE", help="draw clouds with true and predicted label")
    source.add_argument("--config", metavar="FILE", help="draw a gallery of its data set, class by class")
    add_overrides(parser)
    parser.add_argument("--output", metavar="FILE.png", help="the picture to write; may be left out with --window")
    parser.add_argument("--window", action="store_true", help="show the clouds in a window, to turn and zoom")
    parser.add_argument("--num-clouds", type=int, metavar="N", help="default: 12, or one of each class in a gallery")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="chooses the clouds; default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> None:
    output = check_output(arguments)
    clouds, captions, marks, title = predictions(arguments) if arguments.checkpoint else gallery(arguments)
    if output:
        draw_grid(render_clouds(clouds), captions, output, marks=marks, title=title)
        print(f"written to {output}")
    if arguments.window:
        show_window(clouds, captions, marks=marks, title=title.splitlines()[0])


def check_output(arguments: argparse.Namespace) -> Path | None:
    if arguments.output is None:
        if not arguments.window:
            raise InputError("nowhere to draw to; give --output FILE.png, --window or both")
        return None
    if Path(arguments.output).suffix.lower() != ".png":
        raise InputError(f"{arguments.output}: the picture is a PNG; give it a name that ends in .png")
    return refuse_existing(arguments.output, arguments.force)


def predictions(arguments: argparse.Namespace) -> tuple[Tensor, list[str], list[str | None], str]:
    """Classify a sample of the split; return clouds, captions, marks, wrong ones first, and a title."""
    check_overrides(arguments.overrides, ("data", "eval", "seed"))
    payload = load_checkpoint(arguments.checkpoint)
    config = parse_config(payload["config"], where=arguments.checkpoint, overrides=arguments.overrides)
    device = choose_device(arguments.device)
    model = build_model(payload, where=arguments.checkpoint).to(device)
    dataset = build_dataset(config.data, arguments.split, seed=config.seed)
    check_classes(dataset, payload["class_names"], arguments.checkpoint)
    chosen = choose_clouds(dataset, 12 if arguments.num_clouds is None else arguments.num_clouds, arguments.seed)
    points, labels = dataset.batch(chosen, augment=False)
    with torch.no_grad():
        logits = torch.cat([model(part.to(device)).float().cpu() for part in points.split(config.eval.batch_size)])
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    right = predicted == labels
    of_truth = probabilities.gather(1, labels[:, None])[:, 0]
    order = sorted(range(len(labels)), key=lambda index: (bool(right[index]), float(of_truth[index])))
    captions, marks = [], [None if right[index] else WRONG for index in order]
    for index in order:
        truth, guess = dataset.class_names[labels[index]], dataset.class_names[predicted[index]]
        percent = f"{100 * confidence[index]:.0f} %"
        if right[index]:
            captions.append(f"{truth}\nrecognised, {percent}")
        else:
            captions.append(f"{truth}\ntaken for {guess}, {percent}")
            print(f"{dataset.names[chosen[index]]}: {truth} taken for {guess} ({percent})")
    score = f"{int(right.sum())} of {len(right)} clouds recognised"
    print(score)
    title = (
        f"{score}\n"
        f"sample of the {arguments.split} split of {config.data.name}, {arguments.checkpoint}; colour shows height"
    )
    return points[order], captions, marks, title


def gallery(arguments: argparse.Namespace) -> tuple[Tensor, list[str], None, str]:
    """Return clouds of every class in the order of the classes, captions, no marks, and a title."""
    config = load_config(arguments.config, arguments.overrides)
    dataset = build_dataset(config.data, arguments.split, seed=config.seed)
    count = len(dataset.labels.unique()) if arguments.num_clouds is None else arguments.num_clouds
    chosen = choose_clouds(dataset, count, arguments.seed)
    chosen = chosen[dataset.labels[chosen].argsort(stable=True)]
    points, labels = dataset.batch(chosen, augment=False)
    title = (
        f"{config.data.name}, {arguments.split} split\n"
        f"{count} of {len(dataset)} clouds, {config.data.num_points} points each; colour shows height"
    )
    return points, [dataset.class_names[label] for label in labels], None, title


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
