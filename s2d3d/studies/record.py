"""What a finished run leaves in docs/results: a small JSON, enough to recompute every table without data or models."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..atomic import write_text
from ..config.compare import FOLDERS, SAME_RESULT, differences, flatten
from ..config.load import parse_config
from ..errors import InputError
from ..runs.folder import RunFolder
from .cell import Cell
from .plan import FORMS

CURVE = ("train_loss", "train_oa", "val_oa", "share_rate", "divergence", "grad_norm")
"""Columns of log.csv that a record keeps, epoch by epoch."""
_KEYS = {
    "study": str, "arm": str, "seed": int, "changes": dict, "config": dict, "split": str, "shapes": str, "updates": int,
    "train_seconds": float, "parameters": dict, "results": dict, "environment": dict, "curve": dict,
}  # fmt: skip


def record_path(results: str | Path, cell: Cell) -> Path:
    """Return where the record of a run lies: RESULTS/STUDY/ARM/seedN.json."""
    return Path(results) / cell.study / cell.arm / f"seed{cell.seed}.json"


def write_record(results: str | Path, cell: Cell) -> Path:
    """Write the record of a run from its folder, which holds its metrics.json; return where.

    Raises:
        InputError: the run is of another config, or its folder cannot be read.
    """
    folder = RunFolder(cell.config.output_dir)
    check_folder(cell)
    metrics = _read_json(folder.metrics)
    if any(key not in metrics for key in ("split", "shapes")):
        raise InputError(f"{folder.metrics}: does not say what was scored; remove the run folder and run again")
    config = cell.config.to_dict()
    for key in FOLDERS:
        section, _, name = key.rpartition(".")
        del (config[section] if section else config)[name]
    environment = _read_json(folder.environment)
    record = {
        "study": cell.study,
        "arm": cell.arm,
        "seed": cell.seed,
        "changes": cell.changes,
        "config": config,
        "data_folder": cell.data_folder,
        **{key: metrics[key] for key in ("split", "shapes", "epochs", "updates", "train_seconds", "parameters")},
        "results": {
            form: {key: metrics[form][key] for key in ("oa", "macc", "loss", "num_samples", "correct")}
            for form in FORMS
            if form in metrics
        },
        "environment": {
            key: environment.get(key)
            for key in ("time", "s2d3d", "git_commit", "python", "packages", "processor", "num_threads", "gpus")
        },
        "curve": _curve(folder.log),
    }
    return _write(results, cell, record)


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        InputError: it is damaged, or no record.
    """
    record = _read_json(Path(path))
    wrong = [key for key, kind in _KEYS.items() if not isinstance(record.get(key), kind)]
    if not wrong and not record["curve"].get("train_loss"):
        wrong = ["curve"]
    results = {} if wrong else record["results"]
    if wrong or not results or not all(_is_result(result) for result in results.values()):
        what = f"its {', '.join(wrong)} is missing or wrong" if wrong else "its results do not add up"
        raise InputError(f"{path}: no record of a run, {what}; remove it, the study writes it again")
    return record


def read_records(results: str | Path, cells: Iterable[Cell]) -> dict[tuple[str, int], dict[str, Any]]:
    """Read the records that are there by (arm, seed), and check that they are of these runs.

    Raises:
        InputError: a record is damaged or of another config; one line for each.
    """
    records, lines = {}, []
    for cell in cells:
        path = record_path(results, cell)
        if not path.exists():
            continue
        try:
            record = read_record(path)
            changed = _changed(record["config"], cell, path)
            if not _same_data(record, cell):
                changed = f"data.root=.../{record['data_folder']}, the study says .../{cell.data_folder}"
            if changed:
                raise InputError(f"{path}: is of a run with {changed}; name the study anew, or remove this file")
            records[cell.arm, cell.seed] = record
        except InputError as error:
            lines.append(str(error))
    if lines:
        raise InputError("\n".join(lines))
    return records


def borrow_record(results: str | Path, cell: Cell, *, write: bool = True) -> Path | None:
    """Write the record of a run that another study, or another arm, has made already; None: there is no such run.

    It is one whose config is the same in everything that matters, seed included; its record says where it is from.

    Args:
        results: folder of the records.
        cell: the run that needs a record.
        write: otherwise nothing is written, and the path is that of the other record.
    """
    for path in sorted(Path(results).glob(f"*/*/seed{cell.seed}.json")):
        try:
            record = read_record(path)
            if not _is_same(record, cell, path):
                continue
        except InputError:  # not ours to judge here: its own study says what is wrong with it
            continue
        if not write:
            return path
        source = record.get("same_run_as", f"{record['study']}/{record['arm']}/seed{record['seed']}")
        names = {"study": cell.study, "arm": cell.arm, "seed": cell.seed, "same_run_as": source}
        return _write(results, cell, {**record, **names, "changes": cell.changes})
    return None


def _is_same(record: Mapping[str, Any], cell: Cell, path: Path) -> bool:
    """Tell whether a record is of this run; raises as `_changed` does."""
    ours, theirs = flatten(cell.config.to_dict()), flatten(record["config"])
    both = ours.keys() & theirs.keys()
    # What both have, first: `_changed` parses a config that lacks a key, or has one that is gone, and takes its time.
    shared = ({key: ours[key] for key in both}, {key: theirs[key] for key in both})
    if differences(shared[0], shared[1], SAME_RESULT) or not _same_data(record, cell):
        return False
    return not _changed(record["config"], cell, path)


def _same_data(record: Mapping[str, Any], cell: Cell) -> bool:
    """Tell whether a record is of the data that a run names; records of before this was noted are of any."""
    return record.get("data_folder", cell.data_folder) == cell.data_folder


def check_folder(cell: Cell) -> None:
    """Check that the folder of a run, if there is one, is of this config.

    Raises:
        InputError: it is of another.
    """
    folder = RunFolder(cell.config.output_dir)
    if not folder.config.is_file():
        return
    try:
        stored = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        raise InputError(f"{folder.config}: cannot be read; remove the run folder and run again") from None
    changed = _changed(stored, cell, folder.config)
    if changed:
        raise InputError(f"{folder.root}: holds a run with {changed}; name the study anew, or remove this folder")


def _changed(stored: object, cell: Cell, path: Path) -> str:
    """Word the first difference that matters between a stored config and that of a run; empty where there is none."""
    ours = cell.config.to_dict()
    if isinstance(stored, Mapping):
        theirs = {**stored, "output_dir": ours["output_dir"]}
        if isinstance(stored.get("data"), Mapping):
            theirs["data"] = {**stored["data"], "root": ours["data"]["root"], "cache_dir": ours["data"]["cache_dir"]}
        if not differences(ours, theirs, SAME_RESULT):
            return ""
        # Parsed, so that a key that came after the run has its default on both sides.
        stored = parse_config(theirs, where=str(path)).to_dict()
        for key, (own, other) in differences(ours, stored, SAME_RESULT).items():
            return f"{key}={other!r}, the study says {own!r}"
        return ""
    raise InputError(f"{path}: holds no config; remove it and run again")


def _write(results: str | Path, cell: Cell, record: Mapping[str, Any]) -> Path:
    path = record_path(results, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f" {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in record.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def _curve(log: Path) -> dict[str, list[float | None]]:
    with open(log, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {key: [float(row[key]) if row.get(key) else None for row in rows] for key in CURVE}
    return {key: values for key, values in columns.items() if any(value is not None for value in values)}


def _is_result(result: object) -> bool:
    if not isinstance(result, dict) or not isinstance(result.get("correct"), str):
        return False
    correct, oa = result["correct"], result.get("oa")
    if not correct or set(correct) - set("01"):
        return False
    if not all(isinstance(result.get(key), (int, float)) for key in ("macc", "loss")):
        return False
    return isinstance(oa, (int, float)) and abs(correct.count("1") / len(correct) - oa) < 1e-9


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; remove the run folder and run again") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); remove it, the study writes it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no record; remove it, the study writes it again")
    return content
