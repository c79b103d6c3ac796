"""Running a study: what is missing, what was interrupted, nothing twice; a run that fails does not stop the others."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..training.signals import StoppedBySignal
from .cell import Cell
from .jobs import Launcher, Outcome, run_concurrently
from .plan import Study
from .record import check_folder, find_same_run, record_of_run
from .store import Key, Record, all_records, publish, read_records
from .worker import run_cell

logger = logging.getLogger(__name__)


def missing_cells(study: Study, results: str | Path, only: Sequence[str] = (), *, write: bool = True) -> list[Cell]:
    """Return the runs that are still to be done, in order, after publishing the records of those that have ended.

    A run that another study has made with the same config and seed is taken over, not repeated.

    Args:
        study: from `load_study`.
        results: folder of the records.
        only: names of arms; empty: all.
        write: publish those records; otherwise nothing is changed.

    Raises:
        InputError: an unknown arm; a record or a run folder is of another config; one line for each.
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
    """Publish the records of the runs that have ended.

    Args:
        study: from `load_study`.
        results: folder of the records.
        only: names of arms whose run folders are looked at; empty: all.

    Raises:
        InputError: an unknown arm; a record or the folder of a finished run is of another config; one line for each.
    """
    records = read_records(results, study.cells)
    lines = _add_finished(records, study.select(only))
    publish(results, study.config.name, records)
    if lines:
        raise InputError("\n".join(lines))


def _add_finished(records: dict[Key, Record], cells: Sequence[Cell]) -> list[str]:
    """Add the records of finished runs that have none; return what is wrong with others, one line for each."""
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
    """Run what a study lacks; an interrupted run goes on from its last checkpoint, a finished one is not repeated.

    Args:
        study: from `load_study`.
        results: folder of the records, published at the end; until then the run folders hold what they need.
        only: names of arms; empty: all.
        max_runs: start at most so many runs in this call; None: all.
        launcher: how runs are started beside this process; None: one after another in this process.
        jobs: runs at a time with a launcher, at least 1; None: all at once.

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
