"""Make or check a data set: `shapes` generates the procedural one, `modelnet40` downloads or converts a public copy of
ModelNet, `scan` simulates single-view scans of another set."""

import argparse
import sys
from pathlib import Path

from s2d3d.cli import described, run_tool
from s2d3d.errors import InputError
from s2d3d.prepare import DEFAULT_POINTS
from s2d3d.prepare.download import ARCHIVES, fetch
from s2d3d.prepare.perturbations import PERTURBATIONS


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d prepare-data shapes --output data/shapes"
    parser = argparse.ArgumentParser(prog="prepare_data.py", **described(__doc__, example))
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, **described(f"{text[0].upper()}{text[1:]}.", example))

    example = "s2d3d prepare-data shapes --output data/shapes"
    shapes = add("shapes", "generate the procedural data set from a seed", example)
    shapes.add_argument("--num-train", type=int, default=1200, help="training shapes (default: %(default)s)")
    shapes.add_argument("--num-test", type=int, default=360, help="test shapes (default: %(default)s)")
    shapes.add_argument("--num-points", type=int, default=1024, help="points per shape (default: %(default)s)")
    shapes.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")

    example = "s2d3d prepare-data modelnet40 --from ModelNet40 --output data/modelnet40"
    modelnet40 = add("modelnet40", "convert a public copy of ModelNet10 or ModelNet40", example)
    origin = modelnet40.add_mutually_exclusive_group(required=True)
    origin.add_argument("--from", dest="source", metavar="DIR", help="a public copy: HDF5, OFF meshes or text files")
    origin.add_argument(
        "--download",
        nargs="?",
        choices=ARCHIVES,
        const="modelnet40_ply_hdf5_2048",
        help="download a public copy first, with resume and checksum (default: %(const)s)",
    )
    modelnet40.add_argument(
        "--downloads", metavar="DIR", help="folder for downloads (default: downloads/ next to the output)"
    )
    modelnet40.add_argument(
        "--num-points", type=int, help=f"points per shape, from meshes and text files (default: {DEFAULT_POINTS})"
    )
    modelnet40.add_argument("--seed", type=int, help="seed of the choice of points (default: 0)")
    modelnet40.add_argument("--workers", type=int, help="processes (default: the number of cores, at most 8)")
    modelnet40.add_argument("--up-axis", choices=("y", "z"), help="vertical of the points (default: data/README.md)")
    modelnet40.add_argument(
        "--estimate-normals", action="store_true", help="give clouds of HDF5 files without normals some, by Open3D"
    )

    example = "s2d3d prepare-data scan --from data/modelnet40 --output data/scan_modelnet40"
    scan = add("scan", "simulate scans in ScanObjectNN's layout, see docs/scan.md", example)
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
        help="variant whose boxes are simulated (default: %(default)s)",
    )
    scan.add_argument("--num-points", type=int, help="points per scan (default: number of stored points, at most 2048)")
    scan.add_argument("--views", type=int, default=1, help="scans per shape (default: %(default)s)")
    scan.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    scan.add_argument(
        "--upsample", action="store_true", help="interpolate between stored points, to get more points than are stored"
    )
    scan.add_argument("--workers", type=int, help="processes (default: 4, or the number of cores if that is smaller)")
    scan.add_argument("--up-axis", choices=("y", "z"), help="vertical of the points (default: data/README.md)")

    for command in (modelnet40, scan):
        command.add_argument(
            "--allow-links", action="store_true", help="follow links that lead out of --from, as data.allow_links"
        )
        command.add_argument(
            "--skip-others", action="store_true",
            help="leave out clouds in --from that have no place in its layout; default: count them and stop",
        )  # fmt: skip
    for command in (shapes, modelnet40, scan):
        command.add_argument("--output", required=True, metavar="DIR", help="folder to make")
        command.add_argument("--force", action="store_true", help="replace an existing data set")
    return parser


def body(args: argparse.Namespace) -> None:
    if args.command == "shapes":
        from s2d3d.prepare.shapes import write_shapes

        counts = write_shapes(
            args.output,
            num_train=args.num_train,
            num_test=args.num_test,
            num_points=args.num_points,
            seed=args.seed,
            force=args.force,
        )
    elif args.command == "scan":
        from s2d3d.prepare.scan import write_scans

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
            allow_links=args.allow_links,
            skip_others=args.skip_others,
            force=args.force,
        )
    else:
        counts = take_over(args)
    what = "simulated scans" if args.command == "scan" else "shapes"
    print(f"{args.output}: {counts['train']} training and {counts['test']} test {what}")


def take_over(args: argparse.Namespace) -> dict[str, int]:
    """Copy or convert a public copy of ModelNet; download it first with --download."""
    from s2d3d.prepare.convert import convert_modelnet
    from s2d3d.prepare.folder import MARK, check_output, copy_modelnet40

    output = Path(args.output)
    downloads = Path(args.downloads or output.parent / "downloads")
    check_output(output, args.force, downloads if args.download else Path(args.source))
    if args.download:
        source = fetch(args.download, downloads)
    elif args.downloads:
        raise InputError("--downloads: is for --download only")
    else:
        source = Path(args.source)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; --from names the one that holds the public files")
    if not (source / MARK).is_file():
        if args.estimate_normals:
            raise InputError(f"--estimate-normals: has no effect here, meshes and text files in {source} have normals")
        return convert_modelnet(
            source,
            output,
            num_points=DEFAULT_POINTS if args.num_points is None else args.num_points,
            seed=args.seed or 0,
            up_axis=args.up_axis,
            workers=args.workers,
            allow_links=args.allow_links,
            skip_others=args.skip_others,
            force=args.force,
        )
    if args.num_points is not None:
        raise InputError(
            f"--num-points: {source} is in HDF5 layout, whose points stay as they are; set data.num_points"
        )
    for name in ("seed", "workers"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name}: has no effect here, {source} is in HDF5 layout and is copied as it is")
    return copy_modelnet40(
        source, output, up_axis=args.up_axis, estimate_normals=args.estimate_normals, allow_links=args.allow_links,
        skip_others=args.skip_others,
        force=args.force,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return run_tool(build_parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
