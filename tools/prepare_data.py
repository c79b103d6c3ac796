"""Make or check a data set: `shapes` generates the procedural one, `modelnet40` takes over a downloaded folder, `scan`
simulates single-view scans of another set."""

import argparse
import sys

from s2d3d.datasets.folder import copy_modelnet40
from s2d3d.datasets.scan import write_scans
from s2d3d.datasets.scan_view import PERTURBATIONS
from s2d3d.datasets.shapes import write_shapes
from s2d3d.engine.cli import run_tool


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    shapes = commands.add_parser("shapes", help="generate the procedural data set from a seed")
    shapes.add_argument("--num-train", type=int, default=1200, help="training shapes (default: %(default)s)")
    shapes.add_argument("--num-test", type=int, default=360, help="test shapes (default: %(default)s)")
    shapes.add_argument("--num-points", type=int, default=1024, help="points of a shape (default: %(default)s)")
    shapes.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")

    modelnet40 = commands.add_parser("modelnet40", help="check a folder in the public HDF5 layout and copy it")
    modelnet40.add_argument("--from", dest="source", required=True, metavar="DIR", help="the folder as downloaded")
    modelnet40.add_argument("--up-axis", choices=("y", "z"), help="vertical of the points (default: data/README.md)")

    scan = commands.add_parser("scan", help="simulate scans in ScanObjectNN's layout, see docs/scan.md")
    scan.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="a set in ModelNet layout, or OFF meshes class/train/*.off",
    )
    scan.add_argument(
        "--variant-like",
        choices=PERTURBATIONS,
        default="PB_T50_RS",
        help="whose boxes to imitate (default: %(default)s)",
    )
    scan.add_argument("--num-points", type=int, help="points of a scan (default: those stored, at most 2048)")
    scan.add_argument("--views", type=int, default=1, help="scans of each shape (default: %(default)s)")
    scan.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    scan.add_argument("--upsample", action="store_true", help="interpolate stored points, to have more than are stored")
    scan.add_argument("--workers", type=int, help="processes (default: 4, or the number of cores if that is smaller)")
    scan.add_argument("--up-axis", choices=("y", "z"), help="vertical of the points (default: data/README.md)")

    for command in (shapes, modelnet40, scan):
        command.add_argument("--output", required=True, metavar="DIR", help="folder to make")
        command.add_argument("--force", action="store_true", help="replace the data set that is there")
    return parser


def body(args: argparse.Namespace) -> None:
    if args.command == "shapes":
        counts = write_shapes(
            args.output,
            num_train=args.num_train,
            num_test=args.num_test,
            num_points=args.num_points,
            seed=args.seed,
            force=args.force,
        )
    elif args.command == "scan":
        counts = write_scans(
            args.source,
            args.output,
            variant=args.variant_like,
            num_points=args.num_points,
            views=args.views,
            seed=args.seed,
            upsample=args.upsample,
            workers=args.workers,
            up_axis=args.up_axis,
            force=args.force,
        )
    else:
        counts = copy_modelnet40(args.source, args.output, up_axis=args.up_axis, force=args.force)
    what = "simulated scans" if args.command == "scan" else "shapes"
    print(f"{args.output}: {counts['train']} training and {counts['test']} test {what}")


def main(argv: list[str] | None = None) -> int:
    return run_tool(build_parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
