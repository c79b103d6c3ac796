"""A run folder read back: what `RunFolder` and the trainer wrote, checked as far as a reader needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import read_json
from ..config.load import load_config
from ..errors import InputError
from ..evaluation.robustness import read_robustness
from .folder import RunFolder
from .log import read_log

FORMS = ("merged", "routed", "ema", "recalibrated", "voting")
"""Forms of a trained model that a run evaluates, as metrics.json names them."""


@dataclass(frozen=True)
class RunRecord:
    """The files of a run.

    Attributes:
        name: to call it by.
        folder: where they lie.
        config: resolved, as plain types.
        environment: of environment.json; empty if that is not there.
        log: the rows of log.csv as numbers; empty cells and texts are left out.
        metrics: of metrics.json; empty while the run is not finished.
        analysis: of analysis.json, which `tools/analyze.py` writes, or None.
        robustness: of robustness.json, which `tools/evaluate.py --corruption all` writes, or None.
        checkpoint: the model that the run ended with, or None.
    """

    name: str
    folder: RunFolder
    config: dict[str, Any]
    environment: dict[str, Any]
    log: list[dict[str, float]]
    metrics: dict[str, Any]
    analysis: dict[str, Any] | None
    robustness: dict[str, Any] | None
    checkpoint: Path | None


def final_form(reports: Mapping[str, Any]) -> str:
    """Return the form of the model that a run saved as merged.pt or final.pt.

    That is the value of `kept` where it is known. Older files lack it: there it is the form that the run made last,
    which is the one with re-estimated BatchNorm statistics where the run has it.

    Args:
        reports: by form: the content of metrics.json, the results of a study record, or the trainer's `reports`.

    Raises:
        InputError: none of the forms is there.

    Example:
        >>> final_form({"merged": {"oa": 0.2}, "recalibrated": {"oa": 0.5}})
        'recalibrated'
        >>> final_form({"merged": {"oa": 0.2}, "ema": {"oa": 0.5}})
        'merged'
    """
    kept = reports.get("kept")
    candidates = [kept] if isinstance(kept, str) else ["recalibrated", "routed", "merged"]
    form = next((form for form in candidates if form in reports), None)
    if form is None:
        raise InputError(f"no accuracy of a finished model among {', '.join(reports) or 'nothing'}")
    return form


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """Read run folders, finished or not, and name them: by their folder, or by the whole path where that is not unique.

    Raises:
        InputError: one is not a run folder, has no finished epoch, is named twice, or has a damaged file.

    Example:
        >>> read_runs(["runs/demo"])[0].metrics["merged"]["oa"]  # doctest: +SKIP
        0.9083
    """
    folders = [Path(path) for path in paths]
    resolved = [folder.resolve() for folder in folders]
    for index, place in enumerate(resolved):
        if place in resolved[:index]:
            raise InputError(f"{folders[index]}: is named twice; name each run once")
    short = [place.name for place in resolved]
    names = [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders)]
    return [_read(RunFolder(folder), name) for folder, name in zip(folders, names)]


def _read(folder: RunFolder, name: str) -> RunRecord:
    if not folder.root.is_dir():
        raise InputError(f"{folder.root}: no such folder; the folder of a run is needed, as tools/train.py makes it")
    if not folder.config.is_file():
        raise InputError(
            f"{folder.root}: holds no config.yaml; the folder of a run is needed, as tools/train.py makes it"
        )
    log = read_log(folder.log) if folder.log.is_file() else []
    if not log:
        raise InputError(f"{folder.log}: holds no epoch; wait for the end of the first one")
    ends = [path for path in (folder.final, folder.merged) if path.is_file()]
    return RunRecord(
        name=name,
        folder=folder,
        config=load_config(folder.config).to_dict(),
        environment=_read_json(folder.environment) or {},
        log=log,
        metrics=_read_json(folder.metrics) or {},
        analysis=_read_analysis(folder.analysis),
        robustness=read_robustness(folder.robustness) if folder.robustness.is_file() else None,
        checkpoint=ends[0] if ends else None,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _read_analysis(path: Path) -> dict[str, Any] | None:
    content = _read_json(path)
    if content is not None:
        lists = [content.get(key) for key in ("epochs", "checkpoints", "between_checkpoints")]
        if not all(isinstance(entries, list) for entries in lists) or not lists[1]:
            raise InputError(f"{path}: is not what tools/analyze.py writes; write it again or remove it")
    return content
