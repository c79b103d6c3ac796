"""One run of a study in a process of its own: `python -m s2d3d.studies.worker`, its task as one line on stdin."""

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
    """Run what stdin names; the exit code is 0, 1 for a failure (its last line says why), or that of a signal."""
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
    """Train one run to its end, from its last checkpoint where there is one; return its folder.

    Raises:
        InputError: whatever is wrong with data, config or the run folder.
        TrainingError: the training cannot go on.
        StoppedBySignal: SIGTERM or Ctrl-C; the state has been saved.
    """
    folder = RunFolder(cell.config.output_dir)
    if not folder.metrics.is_file():
        try:
            find_checkpoint(folder.root)
            resume = folder.root
        except InputError:  # nothing there, or a run that ended before its first checkpoint
            resume = None
        Trainer(cell.config, force=resume is None).fit(resume=resume)
    return folder.root


class CellTask:
    """A run as a function that submitit can send to another machine."""

    def __init__(self, plain: dict[str, Any]) -> None:
        """Keep the run, as `cell_to_dict` makes it."""
        self.plain = plain

    def __call__(self) -> str:
        """Run it; return the path of its folder."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return str(run_cell(cell_from_dict(self.plain)))

    def checkpoint(self) -> Any:
        """Tell submitit how to go on after a preemption: the same run again, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


if __name__ == "__main__":
    sys.exit(main())
