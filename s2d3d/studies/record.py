"""The record of a finished run. A study's tables are computed from records, without data, models or run folders."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from ..config.compare import FOLDERS, SAME_RESULT, differences, flatten
from ..config.io import read_yaml
from ..config.load import parse_config
from ..errors import InputError
from ..runs.folder import RunFolder
from ..runs.log import read_log
from ..runs.record import FORMS, final_form, read_environment, read_metrics
from ..runs.schemas import Environment
from ..stored import Count, Finite, Share, Text, check_stored
from .cell import Cell

CURVE = ("train_loss", "train_oa", "val_oa", "val_loss", "share_rate", "divergence", "grad_norm")
"""Columns of log.csv that a record keeps for each epoch. `test_oa` is added if the study asks for it."""
_KEYS = {
    "study": str, "arm": str, "seed": int, "changes": dict, "config": dict, "split": str, "shapes": str, "updates": int,
    "train_seconds": float, "parameters": dict, "results": dict, "environment": dict, "curve": dict,
}  # fmt: skip

_ADVICE = "remove the run folder and run again"
SCORED = ("split", "shapes", "epochs", "updates", "train_seconds", "parameters")
"""What a record takes from metrics.json beside the results."""


class _Result(TypedDict):
    oa: Share
    macc: Share
    loss: Finite
    num_samples: NotRequired[Count]
    correct: Text


class _Record(TypedDict):
    arm: Text
    seed: Count
    split: Literal["test", "validation"]
    updates: Count
    train_seconds: Finite
    parameters: dict[Text, Count]
    kept: NotRequired[Text]
    data_folder: NotRequired[Text]
    same_run_as: NotRequired[Text]
    results: dict[Text, _Result]
    environment: Environment
    curve: dict[Text, list[Finite | None]]


_NO_TEST_CURVE = "no accuracy on the test split after each epoch"


def record_of_run(cell: Cell) -> dict[str, Any] | None:
    """Make the record of a run from its folder; None if the run is not finished.

    Raises:
        InputError: the run has another config, or its folder cannot be read.
    """
    folder = RunFolder(cell.config.output_dir)
    if not folder.metrics.is_file():
        return None
    check_folder(cell)
    pretraining = cell.config.task == "pretrain"
    metrics = read_metrics(folder.metrics, advice=_ADVICE)
    if any(key not in metrics for key in SCORED):
        raise InputError(f"{folder.metrics}: does not say what was scored; {_ADVICE}")
    config = cell.config.to_dict()
    for key in FOLDERS:
        section, _, name = key.rpartition(".")
        del (config[section] if section else config)[name]
    environment = read_environment(folder.environment, advice=_ADVICE)
    earlier = [_start(start) for start in environment.get("earlier", [])]
    log = read_log(folder.log)
    curve = {key: [row.get(key) for row in log] for key in CURVE}
    kept = final_form(metrics)
    scored = [form for form in FORMS if form in metrics and (not pretraining or "oa" in metrics[form])]  # by a probe
    if kept not in scored:
        raise InputError(f"{folder.metrics}: holds no linear probe; run the pre-training with eval.probe: true")
    for form in scored:
        check_stored(metrics[form], _Result, where=f"{folder.metrics}: {form}", advice=_ADVICE)
    if cell.config.eval.every:  # the last epoch is scored only at the end
        curve["test_oa"] = [*(row.get("test_oa") for row in log[:-1]), metrics[kept]["oa"]]
    record = {
        "study": cell.study,
        "arm": cell.arm,
        "seed": cell.seed,
        "changes": cell.changes,
        "config": config,
        "data_folder": cell.data_folder,
        **{key: metrics[key] for key in SCORED},
        "kept": kept,
        "results": {
            form: {key: metrics[form][key] for key in ("oa", "macc", "loss", "num_samples", "correct")}
            for form in scored
        },
        "environment": _start(environment) | ({"earlier": earlier} if earlier else {}),
        "curve": {key: values for key, values in curve.items() if any(value is not None for value in values)},
    }
    if problem := _incomplete(record, cell):
        raise InputError(f"{folder.root}: holds a run with {problem}; {_ADVICE}")
    return record


def _start(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record keeps of a start of a run: when it was, with which code, on which machine."""
    keys = ("time", "s2d3d", "git_commit", "python", "packages", "processor", "num_threads", "gpus")
    return {key: environment.get(key) for key in keys}


def kept_form(record: Mapping[str, Any]) -> str:
    """Return the form of the model that a run saved; see `final_form`. Older records do not hold it directly."""
    return final_form({**record["results"], "kept": record.get("kept")})


def check_record(record: Mapping[str, Any]) -> None:
    """Check that a record is whole.

    Raises:
        InputError: it is damaged, or not a record. The caller puts the place in front of the message.
    """
    wrong = [key for key, kind in _KEYS.items() if not isinstance(record.get(key), kind)]
    if not wrong and not record["curve"].get("train_loss"):
        wrong = ["curve"]
    if not wrong and record.get("kept", "") not in ("", *record["results"]):
        wrong = ["kept"]
    results = {} if wrong else record["results"]
    if wrong or not results or not all(_is_result(result) for result in results.values()):
        what = f"its {', '.join(wrong)} is missing or wrong" if wrong else "its results do not add up"
        raise InputError(f"no record of a run, {what}")
    check_stored(record, _Record, where="no record of a run", advice="it is damaged")


def changed_since(record: Mapping[str, Any], cell: Cell, where: str) -> str:
    """Return the first relevant difference between a record and the run that it should describe; empty if none.

    Raises:
        InputError: the config of the record is invalid; the message begins with `where`.
    """
    if problem := _incomplete(record, cell):
        return problem
    if not _same_data(record, cell):
        return f"data.root=.../{record['data_folder']}, the study says .../{cell.data_folder}"
    return _changed(record["config"], cell, where)


def _incomplete(record: Mapping[str, Any], cell: Cell) -> str:
    """Return what a record lacks of the run that it should describe; empty if nothing."""
    if _lacks_test_curve(record, cell):
        return _NO_TEST_CURVE
    if record["split"] != cell.config.eval.split:
        return f"the {record['split']} split scored, the study says {cell.config.eval.split}"
    losses = record["curve"]["train_loss"]
    if len(losses) != cell.config.train.epochs or losses[-1] is None:
        return (
            f"{len(losses)} epochs, the last with loss {losses[-1]}; the study says {cell.config.train.epochs} epochs"
        )
    return ""


def find_same_run(cell: Cell, records: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[str, dict[str, Any]] | None:
    """Return the place of the record of a run with the same config, and that record renamed to `cell`.

    The configs are equal in all relevant keys, including the seed. `same_run_as` of the record names its origin. None
    if there is no such run.

    Args:
        cell: the run that needs a record.
        records: records of other studies or arms, each with its place.
    """
    for where, record in records:
        if record["seed"] != cell.seed or _lacks_test_curve(record, cell):
            continue
        if "test_oa" in record["curve"] and not cell.config.eval.every:  # it was scored more than once
            continue
        try:
            if not _is_same(record, cell, where):
                continue
        except InputError:  # its own study says what is wrong with it
            continue
        source = record.get("same_run_as", f"{record['study']}/{record['arm']}/seed{record['seed']}")
        names = {"study": cell.study, "arm": cell.arm, "seed": cell.seed, "same_run_as": source}
        return where, {**record, **names, "changes": cell.changes}
    return None


def _is_same(record: Mapping[str, Any], cell: Cell, where: str) -> bool:
    """Return whether a record belongs to this run; raises like `_changed`."""
    ours, theirs = flatten(cell.config.to_dict()), flatten(record["config"])
    both = ours.keys() & theirs.keys()
    # Compare the common keys first: `_changed` parses a config with missing or removed keys, which is slow.
    shared = ({key: ours[key] for key in both}, {key: theirs[key] for key in both})
    if differences(*shared, SAME_RESULT) or not _same_data(record, cell):
        return False
    return not _changed(record["config"], cell, where)


def _lacks_test_curve(record: Mapping[str, Any], cell: Cell) -> bool:
    """Return whether a study needs the test accuracy of each epoch and a record lacks it."""
    return bool(cell.config.eval.every) and None in record["curve"].get("test_oa", [None])


def _same_data(record: Mapping[str, Any], cell: Cell) -> bool:
    """Return whether a record was made with the data of a run. Older records hold no data folder and match any."""
    return record.get("data_folder", cell.data_folder) == cell.data_folder


def check_folder(cell: Cell) -> None:
    """Check that the folder of a run, if it exists, has this config.

    Raises:
        InputError: it has another config.
    """
    folder = RunFolder(cell.config.output_dir)
    if not folder.config.is_file():
        return
    try:
        stored, _ = read_yaml(folder.config)
    except InputError as error:
        raise InputError(f"{error}; {_ADVICE}") from None
    changed = _changed(stored, cell, str(folder.config))
    if changed:
        raise InputError(f"{folder.root}: holds a run with {changed}; name the study anew, or remove this folder")


def _changed(stored: object, cell: Cell, where: str) -> str:
    """Return the first relevant difference between a stored config and that of a run as text; empty if none."""
    ours = cell.config.to_dict()
    if isinstance(stored, Mapping):
        theirs = {**stored, "output_dir": ours["output_dir"]}
        if isinstance(stored.get("data"), Mapping):
            theirs["data"] = {**stored["data"], "root": ours["data"]["root"], "cache_dir": ours["data"]["cache_dir"]}
        if not differences(ours, theirs, SAME_RESULT):
            return ""
        # Parsed, so that a key that was added after the run has its default on both sides.
        stored = parse_config(theirs, where=where).to_dict()
        for key, (own, other) in differences(ours, stored, SAME_RESULT).items():
            return f"{key}={other!r}, the study says {own!r}"
        return ""
    raise InputError(f"{where}: holds no config; remove it and run again")


def _is_result(result: object) -> bool:
    if not isinstance(result, dict) or not isinstance(result.get("correct"), str):
        return False
    correct, oa = result["correct"], result.get("oa", 0)
    if not correct or set(correct) - set("01"):
        return False
    if not all(_is_number(result.get(key)) for key in ("oa", "macc", "loss")):
        return False
    return bool(abs(correct.count("1") / len(correct) - oa) < 1e-9)


def _is_number(value: object) -> bool:
    """Tell whether a value is a number that a float can hold."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
