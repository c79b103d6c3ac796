"""Classify files or folders of files: clouds and meshes without labels.

Results are printed in the order of the files, as they come. Files that are read fast share a pass of the model. A file
that cannot be read is reported on stderr; the other files are classified, and the exit code is 1. For files with labels
use tools/evaluate.py.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from s2d3d.atomic import write_json
from s2d3d.cli import CLOUD_FILES, add_file_flags, described, print_error, refuse_existing, run_tool
from s2d3d.errors import InputError, printable
from s2d3d.runs.folder import require_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d predict --checkpoint runs/demo/merged.pt chair.ply scans"
    parser = argparse.ArgumentParser(prog="predict.py", **described(__doc__, example))
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint, or an exported .onnx file")
    parser.add_argument("files", nargs="+", metavar="FILE", help=f"files, or folders of them: {CLOUD_FILES}")
    add_file_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the points sampled from meshes (default: 0)")
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="number of classes to print for each file (default: 3)"
    )
    parser.add_argument("--output", metavar="FILE.json", help="also write all probabilities to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> int:
    output = None
    if arguments.output is not None:
        output = refuse_existing(
            arguments.output, arguments.force, sources=[arguments.checkpoint, *arguments.files], suffix=".json"
        )  # fmt: skip
    for name, least in (("top", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name} is {getattr(arguments, name)}, must be at least {least}")
    require_checkpoint(arguments.checkpoint)

    from s2d3d.datasets.file_set import find_files
    from s2d3d.datasets.files import read_cloud
    from s2d3d.evaluation.classify import classify_clouds
    from s2d3d.runs.trained import open_classifier

    trained, device = open_classifier(arguments.checkpoint, device=arguments.device)
    trained.require_clouds("predict.py")
    names, data, results, num_failed = trained.class_names, trained.config.data, [], 0
    up_axis = arguments.up_axis or trained.up_axis_of_files

    def clouds() -> Iterator[tuple[str, "Tensor"]]:
        nonlocal num_failed
        for path in map(str, find_files(arguments.files)):
            try:
                cloud = read_cloud(
                    path, data.num_points, up_axis=up_axis, normalize=data.normalize, seed=arguments.seed,
                    least=getattr(trained.model, "min_points", None), allow_missing=not arguments.refuse_missing,
                    channels=trained.channels,
                    estimate_normals=arguments.estimate_normals or trained.estimates_normals,
                )  # fmt: skip
            except (InputError, OSError, MemoryError) as error:
                print_error(error)
                num_failed += 1
                continue
            yield path, cloud

    for path, shares in classify_clouds(trained.model, clouds(), device=device, where=f"{arguments.checkpoint}: "):
        best = shares.argsort(descending=True).tolist()
        results.append(
            {"file": path, "class": names[best[0]], "probabilities": {names[i]: float(shares[i]) for i in best}}
        )
        top = (f"{names[i]} {100 * float(shares[i]):.1f} %" for i in best[: arguments.top])
        print(f"{printable(path)}: " + ", ".join(top), flush=True)
    if results:
        noun = "file" if len(results) == 1 else "files"
        print(f"{len(results)} {noun} classified, {num_failed} not read; up axis {up_axis}")
    if output and results:
        content = {"checkpoint": arguments.checkpoint, "up_axis": up_axis, "predictions": results}
        write_json(output, content)
        print(f"written to {output}")
    return int(num_failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
