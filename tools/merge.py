"""Merge the experts of a sparse checkpoint into the dense model."""

import argparse
import sys
from collections.abc import Sequence

from s2d3d.cli import described, refuse_existing, run_tool
from s2d3d.errors import InputError
from s2d3d.runs.folder import require_checkpoint


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d merge --checkpoint runs/demo/checkpoints/last.pt --output merged.pt"
    parser = argparse.ArgumentParser(prog="merge.py", **described(__doc__, example))
    parser.add_argument("--checkpoint", required=True, metavar="SPARSE", help="a sparse checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE", help="dense checkpoint, .pt or .safetensors")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> None:
    output = refuse_existing(arguments.output, arguments.force, sources=[arguments.checkpoint])
    require_checkpoint(arguments.checkpoint)

    from s2d3d import load_checkpoint, merge_experts, save_checkpoint
    from s2d3d.evaluation.batchnorm import batchnorms_behind
    from s2d3d.runs.checkpoint import KEPT_KEYS, build_model, require_mergeable, require_sparse
    from s2d3d.s2d.ewa import expert_layers

    payload = load_checkpoint(arguments.checkpoint)
    require_sparse(payload, arguments.checkpoint)
    require_mergeable(payload, arguments.checkpoint)
    model = build_model(payload, where=arguments.checkpoint)
    behind = any(batchnorms_behind(model, layer.name) for layer in expert_layers(model))
    before = sum(p.numel() for p in model.parameters())
    try:
        merge_experts(model, inplace=True)
    except ValueError as error:
        raise InputError(f"{arguments.checkpoint}: {error}") from error
    after = sum(p.numel() for p in model.parameters())
    kept = {key: payload[key] for key in KEPT_KEYS if key in payload}
    save_checkpoint(output, kept | {"s2d": None, "state_dict": model.state_dict()})
    if behind:
        print("BatchNorm statistics behind experts are those of the training; a run re-estimates them for merged.pt")
    print(f"{payload['model']['name']}: {before:,} parameters with experts, {after:,} merged")
    print(f"written to {output}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
