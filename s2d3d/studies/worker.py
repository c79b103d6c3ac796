"""One run of a study in a separate process: `python -m s2d3d.studies.worker`, with its task as one line on stdin."""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..machine import watch_parent
from ..runs.folder import RunFolder, find_checkpoint
from ..training.signals import StoppedBySignal
from ..training.trainer import Trainer
from .cell import Cell, cell_from_dict


def main() -> int:
    """Run the task from stdin. The exit code is 0, 1 for a failure (its last line is the reason), or 128 + signal."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    task = json.loads(sys.stdin.readline())
    watch_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))  # which saves and ends the run
    try:
        run_cell(cell_from_dict(task))
    except StoppedBySignal as stop:
        logging.info(stop)
        return stop.exit_code
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        logging.debug("traceback", exc_info=True)
        logging.error(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        return 1
    return 0


def run_cell(cell: Cell) -> Path:
    """Train one run to its end, from its last checkpoint if it has one; return its folder.

    Raises:
        InputError: a problem with the data, the config or the run folder.
        TrainingError: the training cannot continue.
        StoppedBySignal: SIGTERM or Ctrl-C was received; the state is saved.
    """
    folder = RunFolder(cell.config.output_dir)
    if not folder.metrics.is_file():
        try:
            find_checkpoint(folder.root)
            resume = folder.root
        except InputError:  # no run yet, or a run that ended before its first checkpoint
            resume = None
        Trainer(cell.config).fit(resume=resume)
    return folder.root


class CellTask:
    """A run as a callable that submitit can send to another machine."""

    def __init__(self, plain: dict[str, Any]) -> None:
        """Store the run, as a result of `cell_to_dict`."""
        self.plain = plain

    def __call__(self) -> str:
        """Run it; return the path of its folder."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return str(run_cell(cell_from_dict(self.plain)))

    def checkpoint(self) -> Any:
        """Return what submitit queues after a preemption: the same run, which then resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


if __name__ == "__main__":
    sys.exit(main())
