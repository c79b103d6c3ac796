"""Write a merged or dense checkpoint as one file for other runtimes, and compare the two."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from s2d3d import create_model, export_model, load_checkpoint
from s2d3d.bench.interleave import Contestant, Task, interleave, local, make_timer
from s2d3d.bench.tables import comparison_table
from s2d3d.engine.checkpoint import build_model
from s2d3d.engine.cli import refuse_existing, run_tool
from s2d3d.engine.config import parse_config
from s2d3d.errors import InputError
from s2d3d.export import FORMATS, Exported, export_error, load_exported
from s2d3d.models import fold_batchnorm

TOLERANCE = 1e-4
CLOUDS = 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a dense checkpoint, such as merged.pt")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write: .onnx, .pt or .pt2")
    parser.add_argument("--format", choices=FORMATS, help="default: that of the output's suffix")
    parser.add_argument("--num-points", type=int, metavar="N", help="points of a cloud; default: data.num_points")
    parser.add_argument("--merge", action="store_true", help="merge the experts of a sparse checkpoint first")
    parser.add_argument("--latency", action="store_true", help="time the file against PyTorch, in turn")
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="rounds of --latency (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> int:
    suffix, kinds = Path(arguments.output).suffix, {suffix: name for name, suffix in FORMATS.items()}
    chosen = arguments.format or kinds.get(suffix)
    if chosen is None or kinds.get(suffix) != chosen:
        wanted = FORMATS[chosen] if chosen else ", ".join(kinds)
        raise InputError(f"--output {arguments.output}: the name must end in {wanted}")
    output = refuse_existing(arguments.output, arguments.force, sources=[arguments.checkpoint])
    for name in ("num_points", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, must be at least 1")
    payload = load_checkpoint(arguments.checkpoint)
    if payload["s2d"] is not None and not arguments.merge:
        raise InputError(f"{arguments.checkpoint}: has experts, which only training needs; pass --merge to merge them")
    config = parse_config(payload["config"], where=arguments.checkpoint)
    model = build_model(payload, where=arguments.checkpoint, merge=arguments.merge)
    described, num_points = payload["model"], arguments.num_points or config.data.num_points
    metadata = {
        "model": described["name"],
        "class_names": payload["class_names"],
        "up_axis": described["up_axis"],
        "normalize": "unit_sphere" if config.data.normalize else "none",
    }
    channels = described["in_channels"]
    export_model(model, output, format=chosen, num_points=num_points, in_channels=channels, metadata=metadata)
    exported = load_exported(output, threads=torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    points = nn.functional.normalize(torch.randn(CLOUDS, num_points, channels, generator=generator), dim=-1)
    worst = float(export_error(model, exported, points).max())
    free = " and ".join(exported.metadata["free_dimensions"])
    print(f"written to {output}: {chosen}, {output.stat().st_size:,} bytes, free: {free}")
    print(f"largest difference to PyTorch: {worst:.1e} on {CLOUDS} random clouds of {num_points} points")
    if arguments.latency:
        print(latency_table(model, exported, payload, points, arguments.rounds))
    if worst > TOLERANCE:
        print(f"error: {output}: differs from PyTorch by more than {TOLERANCE:g}; do not use it", file=sys.stderr)
        return 1
    return 0


def latency_table(model: nn.Module, exported: Exported, payload: dict, points: torch.Tensor, rounds: int) -> str:
    """Time batches of 1 cloud and of all: the architecture with fresh weights, the checkpoint, folded, exported."""
    described = payload["model"]
    fresh = create_model(
        described["name"], num_classes=described["num_classes"], in_channels=described["in_channels"],
        **described["kwargs"],
    )  # fmt: skip
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "checkpoint": model,
        "fresh dense": fresh.eval(),
        "BatchNorm folded": fold_batchnorm(model.eval()),
        "exported": exported,
    }
    tables = []
    for batch in (points[:1], points):
        contestants = [
            Contestant(name, partial(_task, form, batch), same_math=name != "fresh dense")
            for name, form in forms.items()
        ]
        comparison = interleave(
            "latency", contestants, start=local(make_timer(torch.device("cpu"))), rounds=rounds, tolerance=TOLERANCE,
            title=f"{len(batch)} cloud(s) of {batch.shape[1]} points, {torch.get_num_threads()} threads",
            samples=len(batch),
        )  # fmt: skip
        tables.append(comparison_table(comparison))
    return "\n" + "\n\n".join(tables)


def _task(form: Callable[[torch.Tensor], torch.Tensor], points: torch.Tensor) -> Task:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return form(points)

    return Task(call, lambda: [call()])


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
