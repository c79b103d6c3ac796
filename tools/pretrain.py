"""Pre-train a masked autoencoder without labels, with experts (S2D) or without, then merge and evaluate it."""

import argparse
import sys
from collections.abc import Sequence

from s2d3d.cli import run_tool
from s2d3d.console import load_tool

train = load_tool("train")
"""A pre-training is a training with another task: same trainer, same flags."""


def build_parser() -> argparse.ArgumentParser:
    return train.build_parser("pretrain.py", __doc__, "s2d3d pretrain configs/pretrain_mae_small.yaml")


def run(arguments: argparse.Namespace) -> int:
    return train.run(arguments, "pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
