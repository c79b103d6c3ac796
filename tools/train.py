"""Train a model, with experts (S2D) or without, then merge and evaluate it. With `task: pretrain`, as pretrain.py."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2d3d.cli import add_overrides, described, own_command, run_tool
from s2d3d.errors import InputError
from s2d3d.runs.folder import RunFolder, find_checkpoint

if TYPE_CHECKING:
    from s2d3d import Trainer
    from s2d3d.config.load import Config

REPORT_SHARE = 0.1
"""Share of the training's time that the report at its end may take."""
LEAST_SECONDS, MOST_SECONDS = 1.0, 300.0
"""Below the first no report can be made, so none is begun. The second ends one that hangs."""


EXAMPLE = "s2d3d train configs/files.yaml data.root=scans output_dir=runs/scans"


def build_parser(
    prog: str = "train.py", description: str | None = __doc__, example: str = EXAMPLE
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, **described(description, example))
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file, see configs/; with --resume default: that of the run"
    )
    add_overrides(parser)
    parser.add_argument(
        "--resume", metavar="PATH", help="continue from a checkpoint, or from the last checkpoint of a run folder"
    )
    parser.add_argument(
        "--extend", type=int, metavar="EPOCHS",
        help="with --resume: go on to this number of epochs in all; needs constant schedules",
    )  # fmt: skip
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; the same as train.device=")
    parser.add_argument("--dry-run", action="store_true", help="check the config, print the resolved config, and stop")
    parser.add_argument("--force", action="store_true", help="replace an existing run in output_dir")
    return parser


def run(arguments: argparse.Namespace, command: str = "train") -> int:
    if not arguments.config and not arguments.resume:
        text = f"the following arguments are required: CONFIG, or --resume RUN; see {command}.py --help"
        print(f"error: {text}", file=sys.stderr)
        return 2

    from s2d3d.config.load import dump_config, load_config

    overrides = list(arguments.overrides)
    if arguments.device:
        overrides.append(f"train.device={arguments.device}")
    if arguments.extend is not None and not arguments.resume:
        raise InputError("--extend: is for a run that is continued; name it by --resume RUN")
    source = find_config(arguments, overrides)
    if arguments.extend is not None:
        overrides.append(f"train.epochs={arguments.extend}")
    config = load_config(source, overrides)
    if command == "pretrain" and config.task != command:
        raise InputError(
            f"{source}: task: is {config.task}, a pre-training has task: pretrain, as configs/pretrain_mae.yaml; "
            "tools/train.py trains a classifier"
        )
    if arguments.dry_run:
        print(dump_config(config), end="")
        return 0

    if arguments.force:
        keep_config(source, config)

    from s2d3d import Trainer
    from s2d3d.training.signals import StoppedBySignal

    trainer = Trainer(config, force=arguments.force)
    foreign = [path for path in trainer.folder.report_files() if path.exists() and not trainer.folder.config.exists()]
    try:
        path = trainer.fit(resume=arguments.resume)
    except StoppedBySignal as stop:
        if trainer.runtime.is_main:
            again = f"{own_command(command)} --resume {shlex.quote(str(trainer.folder.root))}"
            print(f"{stop.reason}; continue with: {again}", file=sys.stderr)
        return stop.exit_code
    if trainer.runtime.is_main and path != trainer.folder.last:
        print(trainer.summary(), flush=True)
        if config.log.report and trainer.logits is not None:  # a pre-training has no classes to report
            write_report(trainer, foreign)
    return 0


def write_report(trainer: "Trainer", foreign: Sequence[Path]) -> None:
    """Write the report of a finished run within its share of the training's time; what hinders it is one line.

    Args:
        trainer: of the finished run.
        foreign: files that had the names of the report before the run; they are not replaced.
    """
    from s2d3d.atomic import sweep
    from s2d3d.workers import run_within

    folder, config, dataset = trainer.folder, trainer.config, trainer.data.scored.dataset
    assert trainer.logits is not None
    probabilities = trainer.logits.softmax(1)
    before = folder.report.stat().st_mtime if folder.report.is_file() else None
    seconds = min(MOST_SECONDS, REPORT_SHARE * sum(row["seconds"] for row in trainer.history))

    def write() -> None:
        from s2d3d.datasets import PointCloudDataset
        from s2d3d.viz.run_report import as_predictions, write_run_report

        # Of other samples the report shows numbers alone.
        clouds = as_predictions(probabilities, dataset, config) if isinstance(dataset, PointCloudDataset) else None
        write_run_report(folder, clouds)

    if foreign:
        reason = f"{foreign[0]} was there before the run; move it elsewhere"
    elif seconds < LEAST_SECONDS:
        reason = f"a tenth of the training's time, {seconds:.1f} s, is too short to make one"
    else:
        try:
            reason = run_within(seconds, write)
        except KeyboardInterrupt:
            reason = "interrupted"
        except OSError as error:  # no process can be started
            reason = str(error)
    if folder.report.is_file() and folder.report.stat().st_mtime != before:
        print(f"{'report':<34}{folder.report}")
    if reason:
        sweep(folder.root, folder.plots)
        command = f"{own_command('open')} {shlex.quote(str(folder.root))}"
        print(f"the report is not complete: {reason}; make it with: {command}", file=sys.stderr)


def find_config(arguments: argparse.Namespace, overrides: list[str]) -> str:
    """Return the path of the config: the one that is named, else that of the run to resume; may add to `overrides`."""
    path, resume = arguments.config, arguments.resume
    if path is not None and not ("=" in path and not Path(path).exists()) and not path.startswith("~"):
        return path
    if path is not None:  # the first override, where no config is named
        overrides.insert(0, path)
    if not resume:
        raise InputError("CONFIG: is missing; name a YAML file, see configs/, or a run by --resume RUN")
    folder = RunFolder(find_checkpoint(resume).parent.parent)
    if not folder.config.is_file():
        raise InputError(f"{folder.config}: no such file; name the config of the run before --resume")
    overrides.insert(0, f"output_dir={json.dumps(str(folder.root))}")  # where the run is, wherever it was made
    return str(folder.config)


def keep_config(path: str, config: "Config") -> None:
    """Refuse to replace a config that is read by another one: `--force` writes the resolved config of the new run."""
    from s2d3d.config.load import dump_config

    own = RunFolder(config.output_dir).config
    if own.is_file() and own.samefile(path) and own.read_text(encoding="utf-8") != dump_config(config):
        text = "is the config that is read, and --force would replace it by another one"
        raise InputError(f"{path}: {text}; copy it elsewhere, or choose another output_dir")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
