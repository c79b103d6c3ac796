"""A run folder read back: what `RunFolder` and the trainer wrote, checked as far as a reader needs it."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.load import load_config
from ..errors import InputError
from ..evaluation.robustness import read_robustness
from .folder import RunFolder


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
    log = _read_log(folder.log) if folder.log.is_file() else []
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
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); write it again or remove it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; write it again or remove it")
    return content


def _read_analysis(path: Path) -> dict[str, Any] | None:
    content = _read_json(path)
    if content is not None:
        lists = [content.get(key) for key in ("epochs", "checkpoints", "between_checkpoints")]
        if not all(isinstance(entries, list) for entries in lists) or not lists[1]:
            raise InputError(f"{path}: is not what tools/analyze.py writes; write it again or remove it")
    return content


def _read_log(path: Path) -> list[dict[str, float]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file ({error})") from None
    log = [{key: value for key, text in row.items() if (value := _number(text)) is not None} for row in rows]
    for number, row in enumerate(log, 2):
        if "epoch" not in row:
            raise InputError(
                f"{path}: line {number} has no number in column 'epoch'; it is damaged, or no log of s2d3d"
            )
    return log


def _number(text: str | list[str] | None) -> float | None:
    if not isinstance(text, str):  # a row with fewer or more cells than columns
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
