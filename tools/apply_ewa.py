"""Apply Experts Weights Averaging once to a sparse checkpoint."""

import argparse
import sys
from collections.abc import Sequence

from s2d3d.cli import described, refuse_existing, run_tool
from s2d3d.errors import InputError
from s2d3d.runs.folder import require_checkpoint


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d apply-ewa --checkpoint runs/demo/checkpoints/last.pt --share-rate 0.3 --output averaged.pt"
    parser = argparse.ArgumentParser(prog="apply_ewa.py", **described(__doc__, example))
    parser.add_argument("--checkpoint", required=True, metavar="SPARSE", help="a sparse checkpoint")
    parser.add_argument("--share-rate", required=True, type=float, metavar="B", help="share rate in [0, 1]")
    parser.add_argument("--output", required=True, metavar="FILE", help="sparse checkpoint, without training state")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> None:
    output = refuse_existing(arguments.output, arguments.force, sources=[arguments.checkpoint])
    if not 0 <= arguments.share_rate <= 1:
        raise InputError(f"--share-rate is {arguments.share_rate}, must be in [0, 1]")
    require_checkpoint(arguments.checkpoint)

    from s2d3d import apply_ewa_, load_checkpoint, save_checkpoint
    from s2d3d.runs.checkpoint import KEPT_KEYS, build_model, has_router, require_sparse
    from s2d3d.s2d.analysis import expert_divergence

    payload = load_checkpoint(arguments.checkpoint)
    require_sparse(payload, arguments.checkpoint)
    model = build_model(payload, where=arguments.checkpoint)
    before = expert_divergence(model)
    apply_ewa_(model, arguments.share_rate)
    after = expert_divergence(model)
    kept = {key: payload[key] for key in KEPT_KEYS if key in payload}
    save_checkpoint(output, kept | {"state_dict": model.state_dict()})

    width = max(len("layer"), *map(len, before))
    print(f"{'layer':<{width}}  divergence before  after")
    for name in before:
        print(f"{name:<{width}}  {before[name]:>17.6f}  {after[name]:.6f}")
    if has_router(payload):
        print("The experts have routers and are not merged, so this changes the model.")
    else:
        print("The mean of the experts is unchanged, and so is the merged model.")
    print(f"written to {output}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
