"""Analyse the experts of an S2D run: divergence over training, accuracy of each expert, barriers between experts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from s2d3d.atomic import write_json
from s2d3d.cli import add_overrides, check_overrides, described, refuse_existing, run_tool
from s2d3d.runs.folder import require_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="analyze.py", **described(__doc__, "s2d3d analyze runs/modelnet_s2d_small"))
    parser.add_argument(
        "run", metavar="RUN", help="run folder of tools/train.py; train.keep_every=N keeps more checkpoints"
    )
    add_overrides(parser)
    parser.add_argument("--output", metavar="DIR", help="folder for analysis.json and analysis.png; default: RUN")
    parser.add_argument("--shapes", type=int, default=500, metavar="N", help="number of test shapes")
    parser.add_argument("--positions", type=int, default=5, metavar="N", help="positions on a line, including its ends")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace an existing analysis")
    return parser


def run(arguments: argparse.Namespace) -> None:
    require_run(arguments.run)
    check_overrides(arguments.overrides, ("data", "eval.batch_size", "seed"))
    folder = Path(arguments.output or arguments.run)
    numbers, picture = (refuse_existing(folder / f"analysis.{kind}", arguments.force) for kind in ("json", "png"))

    from s2d3d.machine import choose_device, keep_large_allocations
    from s2d3d.runs.analysis import analysis_table, analyze_run
    from s2d3d.viz.figure import save_figure
    from s2d3d.viz.plots import experts_figure

    keep_large_allocations()
    result = analyze_run(
        arguments.run,
        overrides=arguments.overrides,
        num_shapes=arguments.shapes,
        num_positions=arguments.positions,
        device=choose_device(arguments.device),
    )
    write_json(numbers, result)
    save_figure(experts_figure(result), picture)
    print(f"{analysis_table(result)}\nwritten to {numbers} and {picture.name}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
