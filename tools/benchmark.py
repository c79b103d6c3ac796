"""Measure speed and memory: layers, training steps, point operations, data path, scaling, evaluation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is part of a clone, not of the package

from benchmarks import SECTIONS
from s2d3d.cli import add_overrides, described, run_tool
from s2d3d.runs.folder import require_checkpoint


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d benchmark inference --output inference.json"
    parser = argparse.ArgumentParser(prog="benchmark.py", **described(__doc__, example))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, title: str, arguments: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=title, **described(title, f"s2d3d benchmark {name} {arguments}"))

    for name, title in SECTIONS.items():
        command = add(name, title, "--quick")
        _add_settings(command)
        command.add_argument("--output", metavar="FILE.json", help="also write the results to this file")
        command.add_argument("--force", action="store_true", help="replace the output if it exists")
    everything = add("all", "all sections, written as a page and its numbers", "--output benchmarks.md")
    _add_settings(everything)
    _add_page(everything)
    page = add("report", "the page from existing results", "inference.json layer.json --output benchmarks.md")
    page.add_argument(
        "inputs", nargs="+", metavar="FILE.json",
        help="results, added to those of the page; of equal sections of one machine the last one is used",
    )  # fmt: skip
    _add_page(page, "replace the page and its numbers, whatever they hold")
    arguments = "--checkpoint runs/demo/merged.pt --output latency.md"
    latency = add("latency", "a trained model: dense, merged, and exported in all formats", arguments)
    latency.add_argument("--checkpoint", required=True, metavar="FILE", help="a dense checkpoint, such as merged.pt")
    add_overrides(latency)
    latency.add_argument("--merge", action="store_true", help="merge the experts of a sparse checkpoint first")
    latency.add_argument("--num-points", type=int, metavar="N", help="points per cloud; default: data.num_points")
    latency.add_argument("--clouds", type=int, default=64, metavar="N", help="number of test clouds (default: 64)")
    latency.add_argument("--rounds", type=int, default=20, metavar="N", help="rounds of every comparison (default: 20)")
    latency.add_argument("--output", metavar="FILE.md", help="also write the tables to this file")
    latency.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads per process; default: its choice")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds of every comparison; default: depends on the comparison"
    )
    parser.add_argument(
        "--resolve", type=float, metavar="SHARE",
        help="go on until each ratio's interval is this narrow to each side, such as 0.01 for 1 %%",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=10.0, metavar="MINUTES",
        help="with --resolve: longest time of each comparison (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="time that ratios refer to; cpu: on a machine that others use too, with --threads 1 (default: wall)",
    )  # fmt: skip
    parser.add_argument("--root", metavar="DATA", help="a folder in ModelNet40 layout, for the data path")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and inputs")
    parser.add_argument("--compile", action="store_true", help="measure compiled models as well")
    parser.add_argument("--bf16", action="store_true", help="measure bf16 even without hardware support")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it works; no valid results")


def _add_page(parser: argparse.ArgumentParser, force: str = "replace a file that another program made") -> None:
    parser.add_argument("--output", required=True, metavar="FILE.md", help="the page; its numbers go to FILE.json")
    parser.add_argument("--force", action="store_true", help=force)


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "latency":
        require_checkpoint(arguments.checkpoint)

    from benchmarks.command import run_benchmark

    run_benchmark(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
