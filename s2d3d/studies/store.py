"""The records of a study: RESULTS/NAME.jsonl, one line for each finished run, sorted by arm and seed.

Older versions wrote one file for each record, RESULTS/NAME/ARM/seedN.json. These files are read as well. Publishing
moves their records into the common file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import locked, parse_json, read_json, write_json, write_text
from ..errors import InputError
from .cell import Cell
from .record import changed_since, check_record

Key = tuple[str, int]
"""Arm and seed."""
Record = Mapping[str, Any]


@dataclass
class _Published:
    """The content of a study's file: its records with their line numbers, and the problems of other lines."""

    path: Path
    records: dict[Key, Record] = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, key: Key) -> str:
        return f"{self.path}: line {self.lines[key]}"


def records_path(results: str | Path, study: str) -> Path:
    """Return the path of a study's records: RESULTS/NAME.jsonl."""
    return Path(results) / f"{study}.jsonl"


def read_records(results: str | Path, cells: Iterable[Cell]) -> dict[Key, Record]:
    """Read the existing records by (arm, seed), and check that they belong to these runs.

    Args:
        results: folder of the records.
        cells: runs of one or several studies.

    Raises:
        InputError: a record is damaged or has another config; one line for each.
    """
    cells, records, lines = list(cells), {}, []
    files: dict[str, _Published] = {}
    for cell in cells:
        if cell.study not in files:
            files[cell.study] = _read_file(records_path(results, cell.study))
            lines += files[cell.study].problems
        published, key = files[cell.study], (cell.arm, cell.seed)
        try:
            if key in published.records:
                record, where, what = published.records[key], published.place(key), "line"
            elif (path := _own_file(results, cell)).is_file():
                record, where, what = _read_own_file(path), str(path), "file"
            else:
                continue
            changed = changed_since(record, cell, where)
            if changed:
                raise InputError(f"{where}: is of a run with {changed}; name the study anew, or remove this {what}")
            records[key] = record
        except InputError as error:
            lines.append(str(error))
    named = {(cell.study, cell.arm, cell.seed) for cell in cells}
    for study, published in files.items():
        for arm, seed in published.records:
            if (study, arm, seed) not in named:
                where = published.place((arm, seed))
                lines.append(
                    f"{where}: {arm}/seed{seed} is not in the study; put it back there, or move the record away"
                )
    if lines:
        raise InputError("\n".join(lines))
    return records


def all_records(results: str | Path) -> Iterator[tuple[str, Record]]:
    """Yield each valid record of all studies with its place. Damaged ones are skipped; their own study reports them."""
    for path in sorted(Path(results).glob("*.jsonl")):
        published = _read_file(path)
        for key, record in published.records.items():
            yield published.place(key), record
    for path in sorted(Path(results).glob("*/*/seed*.json")):
        try:
            record = _read_own_file(path)
        except InputError:
            continue
        yield str(path), record


def publish(results: str | Path, study: str, records: Mapping[Key, Record]) -> None:
    """Add records to the file of a study. Existing records of the same (arm, seed) stay unchanged.

    Several processes may publish at the same time. A lock prevents lost records.

    Raises:
        InputError: the file is damaged; nothing is written.
    """
    path = records_path(results, study)
    if not records:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        published = _read_file(path)
        if published.problems:
            raise InputError("\n".join(published.problems))
        merged = {**records, **published.records}
        if len(merged) > len(published.records):
            lines = (json.dumps(merged[key], separators=(",", ":")) for key in sorted(merged))
            write_text(path, "".join(f"{line}\n" for line in lines))


def read_failures(results: str | Path, study: str) -> dict[str, str]:
    """Return the reasons of runs that failed and have not been run again, by "arm/seedN"."""
    path = _failures_path(results, study)
    return read_json(path, advice="remove it, and run the study again") if path.is_file() else {}


def note_failures(results: str | Path, study: str, failed: Mapping[str, str], finished: Iterable[Key]) -> None:
    """Keep why runs failed in RESULTS/NAME_failed.json, so that they are told from runs that were never started.

    Args:
        results: folder of the records.
        study: its name.
        failed: reasons of this call, by "arm/seedN".
        finished: runs that have a record, whose earlier failures are forgotten.
    """
    path, done = _failures_path(results, study), {f"{arm}/seed{seed}" for arm, seed in finished}
    if not failed and not path.is_file():
        return
    with locked(path.parent):
        noted = {name: text for name, text in {**read_failures(results, study), **failed}.items() if name not in done}
        if noted:
            write_json(path, noted)
        else:
            path.unlink(missing_ok=True)


def _failures_path(results: str | Path, study: str) -> Path:
    return Path(results) / f"{study}_failed.json"


def _read_file(path: Path) -> _Published:
    published = _Published(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return published
    except UnicodeDecodeError as error:
        published.problems.append(
            f"{path}: not a text file ({error}); restore it, or remove it and run the study again"
        )
        return published
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = _parse(line)
            key = (record["arm"], record["seed"])
            if key in published.records:
                raise InputError(f"a second record of {key[0]}/seed{key[1]}, after line {published.lines[key]}")
        except InputError as error:
            published.problems.append(f"{path}: line {number}: {error}; remove this line, the study writes it again")
        else:
            published.records[key], published.lines[key] = record, number
    return published


def _parse(line: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise InputError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError("holds no JSON object")
    check_record(record)
    return record


def _own_file(results: str | Path, cell: Cell) -> Path:
    return Path(results) / cell.study / cell.arm / f"seed{cell.seed}.json"


def _read_own_file(path: Path) -> dict[str, Any]:
    advice = "remove it, the study writes it again"
    record = read_json(path, advice=advice)
    try:
        check_record(record)
    except InputError as error:
        raise InputError(f"{path}: {error}; {advice}") from None
    return record
