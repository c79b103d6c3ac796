"""The folder of one run: what lies where, and how it is written."""

import csv
import fcntl
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import check_writable, link_or_copy, sweep, write_text
from ..errors import InputError

FORMS = ("merged", "routed", "ema", "recalibrated", "voting")
"""Forms of a trained model that a run evaluates, as metrics.json names them."""


class RunFolder:
    """Paths and writers of a run folder; every file appears whole or not at all.

    `config.yaml` (resolved), `environment.json`, `log.csv`, `metrics.json`, `checkpoints/last.pt`,
    `checkpoints/previous.pt` (what last.pt was before), `checkpoints/best.pt` and `merged.pt`, or `final.pt` where
    experts stay (`s2d.kind: topk`); with `train.keep_every` also `checkpoints/epoch_NNN.pt`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.environment = self.root / "environment.json"
        self.log = self.root / "log.csv"
        self.metrics = self.root / "metrics.json"
        self.last = self.root / "checkpoints" / "last.pt"
        self.previous = self.root / "checkpoints" / "previous.pt"
        self.best = self.root / "checkpoints" / "best.pt"
        self.aside = self.root / "checkpoints" / "last.aside.pt"
        self.merged = self.root / "merged.pt"
        self.final = self.root / "final.pt"
        self.robustness = self.root / "robustness.json"
        self.analysis = self.root / "analysis.json"
        self._claim: int | None = None

    def check(self, *, resume: Path | None = None, force: bool = False) -> None:
        """Tell whether a run may start here; nothing is changed.

        Args:
            resume: the checkpoint that the run continues from, if it does.
            force: replace a run that is here.

        Raises:
            InputError: the folder holds a run, which `resume` does not belong to, and `force` is not set; or no folder
                can be made or written here.
        """
        if self._present() and not force and not self.owns(resume):
            own = f", and {resume} is not of it;" if resume else f"; continue it with --resume {self.root},"
            raise InputError(
                f"{self.root}: holds a run already{own} choose another output_dir, or pass --force to replace it"
            )
        check_writable(self.root)

    def create(self, *, resume: Path | None = None, force: bool = False) -> None:
        """Make the folder for a new run, or for one that continues, and claim it; see `check`.

        What a killed process left half written is removed. When the run continues from its previous.pt, that becomes
        last.pt, so that both are whole again after the next checkpoint; the old last.pt is kept as last.aside.pt.

        Raises:
            InputError: as `check`; another process writes to this folder.
        """
        self.check(resume=resume, force=force)
        self.last.parent.mkdir(parents=True, exist_ok=True)
        self._claim_folder()
        if not self.owns(resume):
            # What other tools found out about the model that was here goes with it.
            for path in (*self._present(), self.robustness, self.analysis, self.analysis.with_suffix(".png")):
                path.unlink(missing_ok=True)
        elif resume is not None and resume.resolve() == self.previous.resolve():
            if self.last.exists():
                os.replace(self.last, self.aside)
            link_or_copy(self.previous, self.last)
        sweep(self.root, self.last.parent)

    def release(self) -> None:
        """Let another process write here; the end of the process does it as well."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _claim_folder(self) -> None:
        """Hold a lock on the folder itself, which leaves no file behind and ends with the process, however it ends."""
        self.release()
        self._claim = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise InputError(
                f"{self.root}: another process is training here; wait for it, or choose another output_dir"
            ) from error
        except OSError:  # a network file system without such locks: nobody can tell
            self.release()

    def _present(self) -> list[Path]:
        files = (
            self.config, self.environment, self.log, self.metrics, self.last, self.previous, self.best, self.aside,
            self.merged, self.final,
        )  # fmt: skip
        return [path for path in (*files, *self.all_kept().values()) if path.exists()]

    def owns(self, checkpoint: Path | None) -> bool:
        """Tell whether a checkpoint lies in this folder."""
        return checkpoint is not None and checkpoint.resolve().is_relative_to(self.root.resolve())

    def is_latest(self, checkpoint: Path | None) -> bool:
        """Tell whether a checkpoint is the state from which this folder's run continues: last.pt, or previous.pt."""
        latest = (self.last.resolve(), self.previous.resolve())
        return checkpoint is not None and checkpoint.resolve() in latest

    def kept(self, epoch: int) -> Path:
        """Return where the model after `epoch` epochs is kept."""
        return self.last.with_name(f"epoch_{epoch:03d}.pt")

    def all_kept(self) -> dict[int, Path]:
        """Return the models kept so far by epoch, in order."""
        names = ((path.stem.removeprefix("epoch_"), path) for path in self.last.parent.glob("epoch_*.pt"))
        return dict(sorted((int(name), path) for name, path in names if name.isdecimal()))

    def mark_best(self) -> None:
        """Let best.pt be what last.pt is now, without writing it again where the file system can link."""
        link_or_copy(self.last, self.best)

    def write_log(self, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
        """Write all rows so far as CSV; values that a row lacks stay empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
        write_text(self.log, text.getvalue())


def require_run(path: str | Path) -> None:
    """Refuse what is no run folder, before anything that reads one is imported.

    Raises:
        InputError: no such folder, or it holds no config.yaml.

    Example:
        >>> require_run("no/such")
        Traceback (most recent call last):
        s2d3d.errors.InputError: no/such: no such folder; the folder of a run is needed, as tools/train.py makes it
    """
    needed = "the folder of a run is needed, as tools/train.py makes it"
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such folder; {needed}")
    if not RunFolder(path).config.is_file():
        raise InputError(f"{path}: holds no config.yaml; {needed}")


def require_checkpoint(path: str | Path) -> None:
    """Refuse a path at which no checkpoint can be, before torch is imported to read one.

    Raises:
        InputError: no such file, or a folder.

    Example:
        >>> require_checkpoint("no/such.pt")
        Traceback (most recent call last):
        s2d3d.errors.InputError: no/such.pt: no such checkpoint file
    """
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; name the file, such as {Path(path) / 'merged.pt'}")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path` means: a file, or the last one of a run folder, if that is gone the previous.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        folder = RunFolder(path)
        path = folder.last if folder.last.is_file() or not folder.previous.is_file() else folder.previous
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint to resume from; start anew without --resume")
    return path


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
