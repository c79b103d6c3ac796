"""Running a study: what is missing, what was interrupted, nothing twice; a run that fails does not stop the others."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..runs.folder import RunFolder
from ..training.signals import StoppedBySignal
from .cell import Cell
from .jobs import Launcher, Outcome, run_concurrently
from .plan import Study
from .record import borrow_record, check_folder, read_records, write_record
from .worker import run_cell

logger = logging.getLogger(__name__)


def missing_cells(study: Study, results: str | Path, only: Sequence[str] = (), *, write: bool = True) -> list[Cell]:
    """Return the runs without a record, in order, after writing the records of those that have ended without one.

    A run that another study has made with the same config and seed is taken over, not repeated.

    Args:
        study: from `load_study`.
        results: folder of the records.
        only: names of arms; empty: all.
        write: write those records; otherwise nothing is changed.

    Raises:
        InputError: an unknown arm; a record or a run folder is of another config; one line for each.
    """
    cells = study.select(only)
    records = read_records(results, study.cells)
    missing, lines = [], []
    for cell in cells:
        if (cell.arm, cell.seed) in records:
            continue
        try:
            check_folder(cell)
            ended = RunFolder(cell.config.output_dir).metrics.is_file()
            if ended and write:
                write_record(results, cell)
            elif not ended and not borrow_record(results, cell, write=write):
                missing.append(cell)
        except InputError as error:
            lines.append(str(error))
    if lines:
        raise InputError("\n".join(lines))
    return missing


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
        results: folder of the records, one written as soon as its run ends.
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
        return run_concurrently(cells, launcher, results, jobs or max(1, len(cells)))
    return _run_in_turn(cells, results)


def _run_in_turn(cells: Sequence[Cell], results: str | Path) -> Outcome:
    outcome = Outcome()
    for number, cell in enumerate(cells, 1):
        logger.info(f"run {number} of {len(cells)}: {cell}")
        try:
            run_cell(cell, results)
        except StoppedBySignal as stop:
            outcome.exit_code = stop.exit_code
            return outcome
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            logger.debug("traceback", exc_info=True)
            outcome.fail(cell, " ".join(str(error).split()) or type(error).__name__)
        else:
            outcome.finished.append(cell)
    return outcome
