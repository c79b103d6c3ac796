"""Run a study: paired runs of several configurations and seeds. Then write tables and figure from the finished runs.

With --overview, nothing is run; the table of all studies of a folder is updated in a page.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2d3d.atomic import locked
from s2d3d.cli import add_overrides, described, run_tool
from s2d3d.errors import InputError

if TYPE_CHECKING:
    from s2d3d.studies.jobs import Launcher
    from s2d3d.studies.plan import Study


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d study configs/studies/headline.yaml --jobs 2"
    parser = argparse.ArgumentParser(prog="study.py", **described(__doc__, example))
    parser.add_argument("study", metavar="STUDY", help="a YAML file, see configs/studies/; with --overview: a folder")
    add_overrides(parser)
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="number of parallel runs, each a process with one thread; 1: one after another in this process; "
        "default: one on each core of a CPU, else 1",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="run only this configuration; may be repeated"
    )
    parser.add_argument("--max-runs", type=int, metavar="N", help="start at most N runs now")
    parser.add_argument(
        "--report-only", action="store_true", help="run nothing; make tables and figure from the finished runs"
    )
    parser.add_argument("--dry-run", action="store_true", help="check all configs, list the missing runs, and stop")
    parser.add_argument(
        "--overview", metavar="FILE", help="run nothing; write the table of all studies of the folder STUDY into a page"
    )
    parser.add_argument("--results", default="docs/results", metavar="DIR", help="folder for the results")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; the same as train.device=")
    parser.add_argument(
        "--submitit",
        choices=("slurm", "local"),
        help="start runs through submitit; --jobs: number of simultaneous runs",
    )
    parser.add_argument(
        "--submitit-option", action="append", default=[], metavar="KEY=VALUE",
        help="such as slurm_partition=gpu, gpus_per_node=1, timeout_min=600; may be repeated",
    )  # fmt: skip
    return parser


def refuse_unused(arguments: argparse.Namespace) -> None:
    """Refuse options for runs in modes that run nothing."""
    runs = ["jobs", "max_runs", "submitit", "submitit_option"]
    unused = {"overview": [*runs, "only"], "report_only": [*runs, "only"], "dry_run": runs}
    for mode, options in unused.items():
        given = [option for option in options if getattr(arguments, option)]
        if getattr(arguments, mode) and given:
            raise InputError(f"--{given[0]}: has no effect with --{mode}; remove it".replace("_", "-"))
    if arguments.submitit_option and not arguments.submitit:
        raise InputError("--submitit-option: has no effect without --submitit; remove it")


def run(arguments: argparse.Namespace) -> int:
    refuse_unused(arguments)

    from s2d3d.studies.plan import load_study

    overrides = list(arguments.overrides)
    if arguments.device:
        overrides.append(f"train.device={arguments.device}")
    if arguments.overview:
        from s2d3d.studies.page import summarize_folder, write_overview

        summaries = summarize_folder(arguments.study, arguments.results, overrides)
        write_overview(arguments.overview, summaries)
        print(f"{arguments.overview}: table of {len(summaries)} studies written")
        return 0
    return run_one(arguments, load_study(arguments.study, overrides))


def run_one(arguments: argparse.Namespace, study: "Study") -> int:
    from s2d3d.studies.jobs import Outcome, default_jobs
    from s2d3d.studies.page import report_lines, write_report
    from s2d3d.studies.run import missing_cells, publish_records, run_study
    from s2d3d.studies.store import read_failures, read_records
    from s2d3d.studies.summary import summarize

    if arguments.dry_run:
        for cell in missing_cells(study, arguments.results, arguments.only, write=False):
            print(cell)
        return 0
    outcome = Outcome()
    if not arguments.report_only:
        jobs = arguments.jobs
        if jobs is None and arguments.submitit != "slurm":  # a cluster queues the jobs that do not fit
            missing = missing_cells(study, arguments.results, arguments.only, write=False)
            jobs = 1 if arguments.submitit else default_jobs(missing, arguments.max_runs)
            if jobs > 1:
                print(f"{jobs} runs at a time, a thread each; --jobs 1 makes one after another with all threads")
        outcome = run_study(
            study, results=arguments.results, only=arguments.only, max_runs=arguments.max_runs,
            launcher=_launcher(arguments, study.config.name, jobs), jobs=jobs,
        )  # fmt: skip

    # Imported after the runs, because drawing takes a second to import.
    from s2d3d.viz.figure import save_figure
    from s2d3d.viz.plots import study_figure

    publish_records(study, arguments.results)
    command = shlex.join(["python", "tools/study.py", _as_named(study.path), *study.overrides])
    results = Path(arguments.results)
    results.mkdir(parents=True, exist_ok=True)
    figure = results / f"{study.config.name}.png"
    with locked(results):  # if two calls end together, the page of the later one has the records of both
        summary = summarize(study, read_records(results, study.cells), read_failures(results, study.config.name))
        written = write_report(summary, results, command)
        save_figure(study_figure(summary), figure)
    print("\n".join(report_lines(summary)))
    print(f"written to {', '.join(str(path) for path in (*written, figure))}")
    if outcome.failed:
        print(f"error: {len(outcome.failed)} runs failed: {', '.join(outcome.failed)}", file=sys.stderr)
    return outcome.exit_code


def _as_named(path: str) -> str:
    """Return the path of a study as its page names it: below the working directory where it lies there."""
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else path


def _launcher(arguments: argparse.Namespace, name: str, jobs: int | None) -> "Launcher | None":
    from s2d3d.studies.jobs import ProcessLauncher, SubmititLauncher

    if arguments.submitit:
        return SubmititLauncher(arguments.submitit, f"runs/studies/{name}/submitit", arguments.submitit_option)
    return ProcessLauncher(jobs) if jobs is not None and jobs > 1 else None


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
