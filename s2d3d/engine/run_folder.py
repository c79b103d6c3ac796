"""The folder of one run: what lies where, and how it is written."""

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError


class RunFolder:
    """Paths and writers of a run folder; every file appears whole or not at all.

    `config.yaml` (resolved), `environment.json`, `log.csv`, `metrics.json`, `checkpoints/last.pt`,
    `checkpoints/best.pt` and `merged.pt`, or `final.pt` where experts stay (`s2d.kind: topk`); with `train.keep_every`
    also `checkpoints/epoch_NNN.pt`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.environment = self.root / "environment.json"
        self.log = self.root / "log.csv"
        self.metrics = self.root / "metrics.json"
        self.last = self.root / "checkpoints" / "last.pt"
        self.best = self.root / "checkpoints" / "best.pt"
        self.merged = self.root / "merged.pt"
        self.final = self.root / "final.pt"

    def check(self, *, resume: Path | None = None, force: bool = False) -> None:
        """Tell whether a run may start here; nothing is changed.

        Args:
            resume: the checkpoint that the run continues from, if it does.
            force: replace a run that is here.

        Raises:
            InputError: the folder holds a run, which `resume` does not belong to, and `force` is not set; or no folder
                can be made or written here.
        """
        if self._present() and not force and not self._is_own(resume):
            own = f", and {resume} is not of it;" if resume else f"; continue it with --resume {self.root},"
            raise InputError(
                f"{self.root}: holds a run already{own} choose another output_dir, or pass --force to replace it"
            )
        check_writable(self.root)

    def create(self, *, resume: Path | None = None, force: bool = False) -> None:
        """Make the folder for a new run, or for one that continues; see `check`."""
        self.check(resume=resume, force=force)
        if not self._is_own(resume):
            for path in self._present():
                path.unlink()
        self.last.parent.mkdir(parents=True, exist_ok=True)

    def _present(self) -> list[Path]:
        files = (self.config, self.environment, self.log, self.metrics, self.last, self.best, self.merged, self.final)
        return [path for path in (*files, *self.all_kept().values()) if path.exists()]

    def _is_own(self, checkpoint: Path | None) -> bool:
        return checkpoint is not None and checkpoint.resolve().is_relative_to(self.root.resolve())

    def kept(self, epoch: int) -> Path:
        """Return where the model after `epoch` epochs is kept."""
        return self.last.with_name(f"epoch_{epoch:03d}.pt")

    def all_kept(self) -> dict[int, Path]:
        """Return the models kept so far by epoch, in order."""
        names = ((path.stem.removeprefix("epoch_"), path) for path in self.last.parent.glob("epoch_*.pt"))
        return dict(sorted((int(name), path) for name, path in names if name.isdecimal()))

    def mark_best(self) -> None:
        """Let best.pt be what last.pt is now, without writing it again where the file system can link."""
        temporary = self.best.with_name("best.pt.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(self.last, temporary)
        except OSError:
            shutil.copyfile(self.last, temporary)
        os.replace(temporary, self.best)

    def write_log(self, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
        """Write all rows so far as CSV; values that a row lacks stay empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
        write_text(self.log, text.getvalue())


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made; one that does not exist, if it cannot be made. Leaves no trace.

    Raises:
        InputError: as said.
    """
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{place}: is a file, a folder is needed here; choose another place")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"{place}: cannot be written to ({error.strerror}); choose another place") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path` means: a file, or the last one of a run folder.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = RunFolder(path).last
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint to resume from; start anew without --resume")
    return path


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
