"""The folder of one run: what lies where, and how it is written."""

import contextlib
import csv
import fcntl
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..atomic import check_writable, link_or_copy, read_json, real_path, sweep, write_json, write_text
from ..errors import InputError
from .replaced import ReplacedRun

FORMS = ("merged", "routed", "ema", "recalibrated", "voting", "initial")
"""Forms of a trained model that a run evaluates, as metrics.json names them.

"initial" is the model of a pre-training with its random weights of the start."""


HUB_CONFIG, HUB_WEIGHTS, HUB_CARD = "config.json", "model.safetensors", "README.md"
"""Files of a model in the layout of the Hugging Face hub."""


class RunFolder:
    """Paths and writers of a run folder; every file appears whole or not at all.

    `config.yaml` (resolved), `environment.json`, `log.csv`, `metrics.json`, `checkpoints/last.pt`,
    `checkpoints/previous.pt` (what last.pt was before), `checkpoints/best.pt` and `merged.pt`, or `final.pt` where
    experts stay (`s2d.kind: topk`); with `train.keep_every` also `checkpoints/epoch_NNN.pt`; `skipped_files.txt` if the
    data set left out files; `report.html` and `plots/` at the end. A run that `--force` replaces is kept in `replaced/`
    until an epoch of the new one is saved.
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
        self.wandb = self.root / "wandb.json"
        self.report = self.root / "report.html"
        self.plots = self.root / "plots"
        self.skipped = self.root / "skipped_files.txt"
        self.replaced = ReplacedRun(self.root)
        self._claim: int | None = None
        self._entered = False

    def check(self, *, resume: Path | None = None, force: bool = False, reads: Sequence[str | Path] = ()) -> None:
        """Tell whether a run may start here; nothing is changed.

        Args:
            resume: the checkpoint that the run continues from, if it does.
            force: replace a run that is here.
            reads: files that the new run reads; they are not replaced.

        Raises:
            InputError: the folder holds a run, which `resume` does not belong to, and `force` is not set; the run holds
                one of the files to read; or no folder can be made or written here.
        """
        if real_path(self.root) == Path("/"):
            raise InputError(f"{self.root}: is the root of the file system; choose another output_dir")
        present = self._present()
        if present and force and not self.owns(resume):
            self.replaced.check()
            for source in (Path(path) for path in reads if Path(path).exists()):
                if any(path.exists() and path.samefile(source) for path in present):
                    raise InputError(f"{source}: is what is read, and --force would replace it; copy it elsewhere")
        if present and not force and not self.owns(resume):
            own = f", and {resume} is not of it;" if resume else f"; continue it with --resume {self.root},"
            raise InputError(
                f"{self.root}: holds a run already{own} choose another output_dir, or pass --force to replace it"
            )
        check_writable(self.root)

    def create(self, *, resume: Path | None = None, force: bool = False) -> None:
        """Make the folder for a new run, or for one that continues, and claim it; see `check`.

        What a killed process left half written is removed. A run that is replaced is moved aside, with what other tools
        found out about its model; see `giving_back`. When the run continues from its previous.pt, that becomes last.pt,
        so that both are whole again after the next checkpoint; the old last.pt is kept as last.aside.pt.

        Raises:
            InputError: as `check`; another process writes to this folder.
        """
        self.check(resume=resume, force=force)
        self.last.parent.mkdir(parents=True, exist_ok=True)
        self._claim_folder()
        sweep(self.root, self.last.parent)
        if not self.owns(resume):
            if self.replaced.is_there():  # the run that is replaced now has not saved an epoch; the one before it has
                self._remove_run()
            elif self._present():
                self.replaced.put_aside([*self._present(), *self._findings()])
        elif resume is not None and real_path(resume) == real_path(self.previous):
            if self.last.exists():
                os.replace(self.last, self.aside)
            link_or_copy(self.previous, self.last)
        self._entered = True

    def recover(self) -> None:
        """Put back a run that a killed process had moved aside, unless a new one has taken its place.

        Raises:
            InputError: another process writes to this folder.
        """
        if self.replaced.is_there():
            self._claim_folder()
            self.replaced.recover(new=bool(self._present()))
            self.release()

    @contextlib.contextmanager
    def giving_back(self, *stops: type[BaseException]) -> Iterator[None]:
        """Put back the run that was replaced if the body fails before the new one `stands`.

        Args:
            stops: errors after which the new run is there to be continued.
        """
        failed = True
        try:
            yield
            failed = False
        except stops:
            failed = False
            raise
        finally:
            if failed and self._entered and self.replaced.is_there():
                self._remove_run()
                self.replaced.put_back()

    def last_good(self) -> str:
        """Say where the last good checkpoint lies when this run fails now."""
        if self.replaced.is_there():
            return "none of this run, the one that it replaced is back"
        return str(self.last) if self.last.exists() else "none"

    def stands(self) -> None:
        """Note that an epoch of this run is saved: the run that it replaced is removed."""
        if self.replaced.is_there():
            self.replaced.drop()

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
            self.merged, self.final, self.skipped,
        )  # fmt: skip
        return [path for path in (*files, *self.all_kept().values()) if path.exists()]

    def _findings(self) -> list[Path]:
        """Return what other tools and loggers have written about the run, where it is there."""
        analysis = (self.analysis, self.analysis.with_suffix(".png"))
        files = (self.robustness, *analysis, self.wandb, *self.report_files(), *self.events())
        return [path for path in files if path.exists()]

    def _remove_run(self) -> None:
        for path in (*self._present(), *self._findings()):
            path.unlink(missing_ok=True)

    def events(self) -> list[Path]:
        """Return the event files of TensorBoard."""
        return list((self.root / "tensorboard").glob("events.out.tfevents.*"))

    def report_files(self) -> list[Path]:
        """Return where the report of the run and its plots lie."""
        return [self.report, *(self.plots / f"{name}.png" for name in ("training", "confusion", "mistakes"))]

    def owns(self, checkpoint: Path | None) -> bool:
        """Tell whether a checkpoint lies in this folder."""
        return checkpoint is not None and real_path(checkpoint).is_relative_to(real_path(self.root))

    def is_latest(self, checkpoint: Path | None) -> bool:
        """Tell whether a checkpoint is the state from which this folder's run continues: last.pt, or previous.pt."""
        latest = (real_path(self.last), real_path(self.previous))
        return checkpoint is not None and real_path(checkpoint) in latest

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

    def write_environment(self, environment: dict[str, Any], *, continues: bool) -> None:
        """Write environment.json; of a run that continues, `earlier` has what it said at each start before."""
        earlier = []
        if continues and self.environment.is_file():
            before = read_json(self.environment, advice="remove it to go on without it")
            earlier = [*before.pop("earlier", []), before]
        write_json(self.environment, environment | ({"earlier": earlier} if earlier else {}))

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


def is_hub_folder(path: str | Path) -> bool:
    """Return whether a folder has the layout of a model on the Hugging Face hub.

    Example:
        >>> is_hub_folder("no/such")
        False
    """
    return all(Path(path, name).is_file() for name in (HUB_CONFIG, HUB_WEIGHTS))


def require_checkpoint(path: str | Path) -> None:
    """Refuse a path at which no checkpoint can be, before torch is imported to read one.

    Raises:
        InputError: no such file, or a folder.

    Example:
        >>> require_checkpoint("no/such.pt")
        Traceback (most recent call last):
        s2d3d.errors.InputError: no/such.pt: no such checkpoint file
    """
    if is_hub_folder(path):
        return
    if Path(path).is_dir():
        places = [Path(path) / "merged.pt", Path(path).parent / "merged.pt", *sorted(Path(path).glob("*.pt"))]
        raise InputError(f"{path}: is a folder; name the file, such as {next(filter(Path.is_file, places), places[0])}")
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


def find_pretrained(path: str | Path) -> Path:
    """Return the file that `model.pretrained` means: a file, or the weights of a run folder or of one for the hub.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if is_hub_folder(path):
        return path / HUB_WEIGHTS
    if path.is_dir():
        folder = RunFolder(path)
        if folder.merged.is_file():
            return folder.merged
        if folder.final.is_file():
            raise InputError(
                f"model.pretrained: {path} has a router, so it is not merged; pre-train with s2d.kind: rup or none"
            )
        raise InputError(f"model.pretrained: {path} holds no merged.pt; finish its run, or name a file")
    if not path.is_file():
        raise InputError(f"model.pretrained: no such file {path}")
    return path


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
