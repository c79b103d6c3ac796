"""Export a merged or dense checkpoint to one file for other runtimes, and compare the outputs. To time all formats, use
benchmark.py latency."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from s2d3d.cli import add_overrides, check_overrides, described, refuse_existing, run_tool
from s2d3d.errors import InputError
from s2d3d.export import FORMATS
from s2d3d.runs.folder import require_checkpoint

HUB = "hub"


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d export --checkpoint runs/demo/merged.pt --output model.onnx"
    parser = argparse.ArgumentParser(prog="export.py", **described(__doc__, example))
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a dense checkpoint, such as merged.pt")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="file to write: .onnx, .pt or .pt2; with --format hub: a folder"
    )
    parser.add_argument(
        "--format", choices=[*FORMATS, HUB],
        help="default: the format of the output's suffix; hub: a folder in the layout of the Hugging Face hub",
    )  # fmt: skip
    add_overrides(parser)
    parser.add_argument("--num-points", type=int, metavar="N", help="points per cloud; default: data.num_points")
    parser.add_argument(
        "--clouds",
        type=int,
        default=64,
        metavar="N",
        help="number of test clouds for the comparison (default: %(default)s)",
    )
    parser.add_argument("--merge", action="store_true", help="merge the experts of a sparse checkpoint first")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.format == HUB:
        return write_hub_folder(arguments)
    suffix, kinds = Path(arguments.output).suffix, {suffix: name for name, suffix in FORMATS.items()}
    chosen = arguments.format or kinds.get(suffix)
    if chosen is None or kinds.get(suffix) != chosen:
        wanted = FORMATS[chosen] if chosen else ", ".join(kinds)
        raise InputError(f"--output {arguments.output}: the name must end in {wanted}")
    output = refuse_existing(arguments.output, arguments.force, sources=[arguments.checkpoint])
    for name in ("num_points", "clouds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, must be at least 1")
    check_overrides(arguments.overrides, ("data", "seed"))
    require_checkpoint(arguments.checkpoint)

    import torch

    from s2d3d import export_model
    from s2d3d.export.check import TOLERANCE, compare_exported
    from s2d3d.export.write import example_clouds, load_exported
    from s2d3d.runs.checkpoint import require_dense
    from s2d3d.runs.clouds import sample_clouds
    from s2d3d.runs.trained import open_trained

    overrides = list(arguments.overrides)
    if arguments.num_points is not None:
        overrides.append(f"data.num_points={arguments.num_points}")
    trained = open_trained(arguments.checkpoint, overrides, merge=arguments.merge)
    if not arguments.merge:
        require_dense(trained.payload, arguments.checkpoint)
    trained.require_clouds("export.py")
    model, config = trained.model, trained.config
    described, num_points = trained.payload["model"], config.data.num_points
    example_clouds(model, num_points, described["in_channels"])  # before any data is read
    points, source = sample_clouds(
        trained, arguments.clouds,
        required=any(override.startswith("data.root") for override in arguments.overrides),
    )  # fmt: skip
    metadata = {
        "model": described["name"],
        "class_names": trained.class_names,
        "channels": trained.channels,
        "up_axis": described["up_axis"],
        "normalize": "unit_sphere" if config.data.normalize else "none",
    }
    channels = described["in_channels"]
    export_model(model, output, format=chosen, num_points=num_points, in_channels=channels, metadata=metadata)
    exported = load_exported(output, threads=torch.get_num_threads())
    free = exported.metadata["free_dimensions"]
    print(f"written to {output}: {chosen}, {output.stat().st_size:,} bytes, free: {' and '.join(free)}")
    wrong = 0
    halved = max(num_points // 2, exported.metadata["min_points"])
    for count in (num_points, halved) if "points" in free and halved < num_points else (num_points,):
        agreement = compare_exported(model, exported, points[:, :count])
        print(f"{len(points)} {source}, {count} points: {agreement.summary()}")
        wrong += agreement.wrong
    if wrong:
        print(f"error: {output}: differs from PyTorch by more than {TOLERANCE:g}; do not use it", file=sys.stderr)
        return 1
    return 0


def write_hub_folder(arguments: argparse.Namespace) -> int:
    """Write weights, config and model card to a folder."""
    if arguments.overrides or arguments.num_points is not None:
        given = arguments.overrides[0] if arguments.overrides else "--num-points"
        raise InputError(f"{given}: has no effect with --format {HUB}; remove it")
    require_checkpoint(arguments.checkpoint)

    from s2d3d import PointCloudClassifier

    classifier = PointCloudClassifier.from_checkpoint(arguments.checkpoint, merge=arguments.merge)
    classifier.save_pretrained(arguments.output, force=arguments.force)
    print(f"written to {arguments.output}: weights, config.json and README.md, the model card; read it before sharing")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
