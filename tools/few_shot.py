"""Few-shot classification: train on a few shapes of a few classes, test on other shapes, over several folds."""

import argparse
import sys
from collections.abc import Sequence

from s2d3d.cli import add_overrides, described, run_tool


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d few-shot configs/few_shot_s2d.yaml --ways 5 --shots 10 --output folds.json"
    parser = argparse.ArgumentParser(prog="few_shot.py", **described(__doc__, example))
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/few_shot_*.yaml")
    add_overrides(parser)
    parser.add_argument("--ways", type=int, default=5, metavar="N", help="classes per fold")
    parser.add_argument("--shots", type=int, default=10, metavar="N", help="training shapes per class")
    parser.add_argument("--queries", type=int, default=20, metavar="N", help="test shapes per class")
    parser.add_argument("--folds", type=int, default=10, metavar="N", help="repetitions")
    parser.add_argument(
        "--output", required=True, metavar="FILE.json", help="results; existing folds in this file are not repeated"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; the same as train.device=")
    parser.add_argument("--force", action="store_true", help="start again: discard finished folds and their runs")
    return parser


def run(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.device:
        overrides.append(f"train.device={arguments.device}")

    from s2d3d import load_config

    config = load_config(arguments.config, overrides)

    from s2d3d.studies.few_shot import FewShotTask, run_folds, summary_line
    from s2d3d.training.signals import StoppedBySignal

    task = FewShotTask(arguments.ways, arguments.shots, arguments.queries)
    folds = []
    try:
        for fold in run_folds(config, task, folds=arguments.folds, output=arguments.output, force=arguments.force):
            folds.append(fold)
            print(f"fold {fold['fold']}: OA {100 * fold['oa']:.2f} %  ({', '.join(fold['classes'])})", flush=True)
    except StoppedBySignal as stop:
        print(f"stopped by a signal; the same command continues with fold {len(folds)}", file=sys.stderr)
        return stop.exit_code
    print(summary_line(task, folds))
    print(f"written to {arguments.output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
