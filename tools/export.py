"""Export a merged or dense checkpoint to one file for other runtimes, or to a web page, and compare the outputs.

To time all formats, use benchmark.py latency.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d3d.cli import add_overrides, check_overrides, described, refuse_existing, run_tool
from s2d3d.errors import InputError
from s2d3d.export import FORMATS
from s2d3d.runs.folder import require_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from s2d3d.runs.trained import TrainedModel

HUB, WEB = "hub", "web"
"""The formats that are folders: in the layout of the Hugging Face hub, and with a web page."""


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d export --checkpoint runs/demo/merged.pt --output model.onnx"
    parser = argparse.ArgumentParser(prog="export.py", **described(__doc__, example))
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a dense checkpoint, such as merged.pt")
    parser.add_argument(
        "--output", required=True, metavar="FILE",
        help="file to write: .onnx, .pt or .pt2; with --format hub or web: a folder",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=[*FORMATS, HUB, WEB],
        help="default: the format of the output's suffix; hub: a folder in the layout of the Hugging Face hub; web: a "
        "page that classifies files in a browser",
    )  # fmt: skip
    parser.add_argument(
        "--runtime", metavar="npm|FILE.tgz|DIR",
        help="for web: the npm package onnxruntime-web, or npm to let npm fetch it; default: node_modules",
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
    if arguments.runtime is not None and arguments.format != WEB:
        raise InputError("--runtime: is for --format web only")
    if arguments.format == HUB:
        return write_hub_folder(arguments)
    chosen = check_output(arguments)
    for name in ("num_points", "clouds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, must be at least 1")
    check_overrides(arguments.overrides, ("data", "seed"))
    require_checkpoint(arguments.checkpoint)
    output = Path(arguments.output)

    if chosen == WEB:
        from s2d3d.export.web import find_runtime

        runtime = find_runtime(arguments.runtime)

    from s2d3d.export.write import example_clouds
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
    # before any data is read
    example_clouds(trained.model, trained.config.data.num_points, trained.payload["model"]["in_channels"])
    clouds = sample_clouds(
        trained, arguments.clouds,
        required=any(override.startswith("data.root") for override in arguments.overrides),
    )  # fmt: skip
    if chosen != WEB:
        wrong, _ = write_and_compare(trained, output, chosen, *clouds)
        if wrong:
            print(f"error: {differs(output)}; do not use it", file=sys.stderr)
        return int(wrong > 0)

    from s2d3d.export.web import MODEL, new_site, write_site

    with new_site(output, force=arguments.force) as folder:
        wrong, facts = write_and_compare(trained, folder / MODEL, "onnx", *clouds, shown=output / MODEL)
        if wrong:
            raise InputError(f"{differs(output / MODEL)}; no page is written")
        facts.pop("trained_files", None)  # the page has no use for them
        write_site(folder, facts, runtime)
    print(f"written to {output}; show it with: python -m http.server --bind 127.0.0.1 --directory {output}")
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


def check_output(arguments: argparse.Namespace) -> str:
    """Return the format; refuse an output that may not be written."""
    output, chosen = arguments.output, arguments.format
    if chosen == WEB:
        from s2d3d.export.web import check_site

        check_site(Path(output), arguments.force)
        return WEB
    kinds = {suffix: name for name, suffix in FORMATS.items()}
    found = kinds.get(Path(output).suffix)
    chosen = chosen or found
    if chosen is None or found != chosen:
        wanted = FORMATS[chosen] if chosen else ", ".join(kinds)
        raise InputError(f"--output {output}: the name must end in {wanted}")
    refuse_existing(output, arguments.force, sources=[arguments.checkpoint])
    return chosen


def write_and_compare(
    trained: "TrainedModel", path: Path, kind: str, points: "Tensor", source: str, *, shown: Path | None = None
) -> tuple[int, dict[str, Any]]:
    """Write a file and compare it with PyTorch on some clouds.

    Args:
        trained: the model.
        path: the file.
        kind: its format.
        points: the clouds (n, N, C).
        source: what they are.
        shown: the path to print; default: `path`.

    Returns:
        Number of clouds whose logits are wrong, and the metadata of the file.
    """
    import torch

    from s2d3d import export_model
    from s2d3d.config.compare import FOLDERS
    from s2d3d.export.check import compare_exported
    from s2d3d.export.facts import model_facts
    from s2d3d.export.write import load_exported

    config, described = trained.config.to_dict(), trained.payload["model"]
    data = {key: value for key, value in config["data"].items() if f"data.{key}" not in FOLDERS}
    count, channels = trained.config.data.num_points, described["in_channels"]
    facts = model_facts(
        model=described["name"], class_names=trained.class_names, up_axis=described["up_axis"],
        normalize=trained.config.data.normalize, files_up_axis=trained.up_axis_of_files, channels=trained.channels,
        config={"seed": config["seed"], "data": data, "eval": config["eval"]},
        trained_files=trained.payload.get("trained_files"),
    )  # fmt: skip
    export_model(trained.model, path, format=kind, num_points=count, in_channels=channels, metadata=facts)
    exported = load_exported(path, threads=torch.get_num_threads())
    free = exported.metadata["free_dimensions"]
    print(f"written to {shown or path}: {kind}, {path.stat().st_size:,} bytes, free: {' and '.join(free)}")
    wrong = 0
    halved = max(count // 2, exported.metadata["min_points"])
    for size in (count, halved) if "points" in free and halved < count else (count,):
        agreement = compare_exported(trained.model, exported, points[:, :size])
        print(f"{len(points)} {source}, {size} points: {agreement.summary()}")
        wrong += agreement.wrong
    return wrong, exported.metadata


def differs(path: Path) -> str:
    from s2d3d.export.check import TOLERANCE

    return f"{path}: differs from PyTorch by more than {TOLERANCE:g}"


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
