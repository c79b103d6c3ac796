"""Running a study: missing and interrupted runs only. A run that fails does not stop the others."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..training.signals import StoppedBySignal
from .cell import Cell
from .jobs import Launcher, Outcome, run_concurrently
from .plan import Study
from .record import check_folder, find_same_run, record_of_run
from .store import Key, Record, all_records, note_failures, publish, read_records
from .worker import run_cell

logger = logging.getLogger(__name__)


def missing_cells(study: Study, results: str | Path, only: Sequence[str] = (), *, write: bool = True) -> list[Cell]:
    """Publish the records of finished runs, then return the missing runs in order.

    A run of another study with the same config and seed is reused, not repeated.

    Args:
        study: from `load_study`.
        results: folder of the records.
        only: names of arms; empty: all.
        write: publish the records; otherwise nothing is changed.

    Raises:
        InputError: an arm is unknown; a record or a run folder has another config; one line for each.
    """
    cells = study.select(only)
    records = read_records(results, study.cells)
    lines = _add_finished(records, cells)
    others = list(all_records(results))
    missing = []
    for cell in cells:
        if (cell.arm, cell.seed) in records:
            continue
        try:
            check_folder(cell)
        except InputError as error:
            lines.append(str(error))
            continue
        same = find_same_run(cell, others)
        if same is None:
            missing.append(cell)
        else:
            records[cell.arm, cell.seed] = same[1]
    if write:
        publish(results, study.config.name, records)
    if lines:
        raise InputError("\n".join(dict.fromkeys(lines)))
    return missing


def publish_records(study: Study, results: str | Path, only: Sequence[str] = ()) -> None:
    """Publish the records of the finished runs.

    Args:
        study: from `load_study`.
        results: folder of the records.
        only: names of arms whose run folders are read; empty: all.

    Raises:
        InputError: an arm is unknown; a record or the folder of a finished run has another config; one line for each.
    """
    records = read_records(results, study.cells)
    lines = _add_finished(records, study.select(only))
    publish(results, study.config.name, records)
    if lines:
        raise InputError("\n".join(lines))


def _add_finished(records: dict[Key, Record], cells: Sequence[Cell]) -> list[str]:
    """Add the missing records of finished runs; return the problems of other runs, one line for each."""
    lines = []
    for cell in cells:
        if (cell.arm, cell.seed) in records:
            continue
        try:
            record = record_of_run(cell)
        except InputError as error:
            lines.append(str(error))
            continue
        if record is not None:
            records[cell.arm, cell.seed] = record
    return lines


def run_study(
    study: Study,
    *,
    results: str | Path,
    only: Sequence[str] = (),
    max_runs: int | None = None,
    launcher: Launcher | None = None,
    jobs: int | None = 1,
) -> Outcome:
    """Run the missing runs of a study. Interrupted runs continue from their last checkpoint; finished runs are kept.

    Args:
        study: from `load_study`.
        results: folder of the records. They are published at the end, from the run folders.
        only: names of arms; empty: all.
        max_runs: maximum number of runs to start in this call; None: all.
        launcher: starts runs in parallel; None: one run after another in this process.
        jobs: number of simultaneous runs with a launcher, at least 1; None: all at once.

    Raises:
        InputError: see `missing_cells`; a number is out of range.
        KeyboardInterrupt: Ctrl-C between two runs.
    """
    for name, value in (("jobs", jobs), ("max_runs", max_runs)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, must be at least 1")
    cells = missing_cells(study, results, only)
    done = len(study.select(only)) - len(cells)
    cells = cells[:max_runs]
    logger.info(f"{study.config.name}: {done} runs are finished, {len(cells)} to do now")
    if launcher is not None:
        outcome = run_concurrently(cells, launcher, jobs or max(1, len(cells)))
    else:
        outcome = _run_in_turn(cells)
    publish_records(study, results, only)
    note_failures(results, study.config.name, outcome.failed, read_records(results, study.cells))
    return outcome


def _run_in_turn(cells: Sequence[Cell]) -> Outcome:
    outcome = Outcome()
    for number, cell in enumerate(cells, 1):
        logger.info(f"run {number} of {len(cells)}: {cell}")
        try:
            run_cell(cell)
        except StoppedBySignal as stop:
            outcome.exit_code = stop.exit_code
            return outcome
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            logger.debug("traceback", exc_info=True)
            outcome.fail(cell, " ".join(str(error).split()) or type(error).__name__)
        else:
            outcome.finished.append(cell)
    return outcome
