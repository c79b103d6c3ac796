"""Draw point clouds: a data set, predictions, groups and tokens of a model, saliency, corruptions, reconstructions."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from s2d3d.cli import add_files, add_overrides, check_file_flags, check_overrides, described, refuse_existing, run_tool
from s2d3d.errors import InputError
from s2d3d.runs.folder import require_checkpoint

if TYPE_CHECKING:
    from s2d3d.config.load import Config
    from s2d3d.viz.sheet import CloudSheet

MOST_PIXELS = 1024
KINDS = ("gallery", "predictions", "patches", "experts", "saliency", "corruptions", "reconstructions")
NEEDS_MODEL = ("predictions", "patches", "experts", "saliency", "reconstructions")
OWN_FLAGS = {"passes": ("experts", 4), "layer": ("experts", None), "severity": ("corruptions", 3)}
"""Flags that only one kind has, and their defaults."""


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d visualize --checkpoint runs/demo/merged.pt --output predictions.png"
    parser = argparse.ArgumentParser(prog="visualize.py", **described(__doc__, example))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="FILE", help="a model; its training data set is used")
    source.add_argument("--config", metavar="FILE", help="a data set, without a model")
    add_overrides(parser)
    add_files(parser, "draw files or folders of files instead of the data set")
    parser.add_argument("--kind", choices=KINDS, help="default: predictions of a checkpoint, gallery of a config")
    parser.add_argument(
        "--output", metavar="FILE", help="FILE.png, FILE.ply (numbered files) or FILE.html (interactive, for a browser)"
    )
    parser.add_argument("--window", action="store_true", help="show the clouds in an interactive window")
    parser.add_argument(
        "--num-clouds", type=int, metavar="N", help="default: 3 to 12, or one of each class in a gallery"
    )
    parser.add_argument("--split", choices=("train", "test"), default="test", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the choice of clouds and of partitions; default: %(default)s"
    )
    parser.add_argument(
        "--size", type=int, default=320, metavar="N", help="side length of a cloud in a PNG, pixels; default: 320"
    )
    parser.add_argument("--passes", type=int, metavar="N", help="experts: number of training passes; default: 4")
    parser.add_argument("--layer", metavar="NAME", help="experts: name of an expert layer; default: the first")
    parser.add_argument("--severity", type=int, metavar="N", help="corruptions: 1 (mild) to 5; default: 3")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> None:
    check_flags(arguments)
    check_file_flags(arguments)
    if arguments.output is None and not arguments.window:
        raise InputError("no output; give --output FILE.png, --window or both")
    config = None
    if arguments.checkpoint:
        require_checkpoint(arguments.checkpoint)
        check_overrides(arguments.overrides, ("data", "eval.batch_size", "seed"))
    else:
        from s2d3d.config.load import load_config

        config = load_config(arguments.config, arguments.overrides)

    from s2d3d.viz.sheet import sheet_paths, write_sheet

    if arguments.output is not None:
        refuse_existing(sheet_paths(arguments.output, 1)[0], arguments.force, sources=arguments.files or ())
    sheet = make_sheet(arguments, config)
    if arguments.output is not None:
        for path in sheet_paths(arguments.output, len(sheet.clouds)):
            refuse_existing(path, arguments.force)
        first, *others = write_sheet(sheet, arguments.output, size=arguments.size)
        print(f"written to {first}" + (f" ... {others[-1].name}" if others else ""))
    if arguments.window:
        sheet.show()


def check_flags(arguments: argparse.Namespace) -> None:
    """Set defaults, and refuse flags that the kind would ignore."""
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


def make_sheet(arguments: argparse.Namespace, config: "Config | None") -> "CloudSheet":
    """Read the clouds and make the sheet; print predictions to stdout."""
    from s2d3d.viz import kinds

    source = kinds.read_source(
        arguments.kind, config=config, checkpoint=arguments.checkpoint, overrides=arguments.overrides,
        files=arguments.files or (), up_axis=arguments.up_axis, allow_missing=not arguments.refuse_missing,
        estimate_normals=arguments.estimate_normals,
        split=arguments.split,
        num_clouds=arguments.num_clouds, seed=arguments.seed, device=arguments.device,
    )  # fmt: skip
    if arguments.output is not None and not arguments.files and source.config.data.name == "files":
        refuse_existing(arguments.output, True, sources=[source.config.data.root])
    if arguments.kind == "predictions":
        sheet, lines = kinds.predictions(source)
        print("\n".join(lines))
        return sheet
    if arguments.kind == "experts":
        return kinds.experts(source, layer=arguments.layer, passes=arguments.passes, seed=arguments.seed)
    if arguments.kind == "corruptions":
        return kinds.corruptions(source, arguments.severity)
    sheets = {
        "gallery": kinds.gallery, "patches": kinds.patches, "saliency": kinds.saliency,
        "reconstructions": kinds.reconstructions,
    }  # fmt: skip
    return sheets[arguments.kind](source)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
