"""Our own JSON, damaged: each file is refused in one line that names the key, or read as it is."""

import copy
import json
import os

import numpy as np
import pytest

from s2d3d.atomic import parse_json, read_json
from s2d3d.datasets.corruptions import CORRUPTIONS
from s2d3d.errors import InputError
from s2d3d.evaluation.accuracy import ClassificationReport
from s2d3d.runs import record as runs
from s2d3d.runs.folder import RunFolder
from s2d3d.runs.schemas import Analysis, Environment
from s2d3d.studies.record import check_record
from s2d3d.viz.plots import confusion_figure, experts_figure
from s2d3d.viz.report import environment_rows, summary_rows

REPORT = ClassificationReport(
    oa=0.75, macc=0.75, loss=1.0, per_class={"box": 1.0, "mug": 0.5}, confusion=[[2, 0], [1, 1]],
    class_names=["box", "mug"], num_samples=4, correct="1101",
).to_dict()  # fmt: skip
METRICS = {
    "split": "test", "shapes": "ab", "epochs": 2, "updates": 12, "seed": 0, "kept": "merged", "train_seconds": 1.5,
    "parameters": {"training": 20, "merged": 10}, "sparse": REPORT, "merged": REPORT,
}  # fmt: skip
ENVIRONMENT = {
    "time": "2026-01-01", "command": ["train.py"], "s2d3d": "0.1.0", "git_commit": None, "python": "3.11",
    "packages": {"torch": "2.0", "timm": None}, "platform": "Linux", "processor": "any", "num_threads": 1, "gpus": [],
}  # fmt: skip
LINE = {"positions": [0.0, 0.5, 1.0], "losses": [1.0, 1.5, 1.0], "height": 0.5}
POINT = {
    "epoch": 1, "divergence": {"blocks.1.mlp": 0.5}, "experts": [{"oa": 0.5}, {"oa": 0.25}], "merged": {"oa": 0.5},
    "gap": 0.1, "barriers": [{"experts": [0, 1], **LINE}], "highest_barrier": 0.5,
}  # fmt: skip
ANALYSIS = {
    "num_experts": 2, "num_shapes": 4, "prediction": None, "checkpoints": [POINT, POINT],
    "epochs": [{"epoch": 1, "contraction": 0.9, "divergence": 0.5, "predicted": 0.4}],
    "between_checkpoints": [{"epochs": [1, 2], **LINE}],
}  # fmt: skip
ROBUSTNESS = {
    "clean": {"oa": 0.5}, "mean_oa": 0.25, "corruptions": {name: {"oa": [0.25] * 5} for name in CORRUPTIONS},
}  # fmt: skip
RECORD = {
    "study": "s", "arm": "a", "seed": 1, "changes": {}, "config": {}, "split": "test", "shapes": "ab", "updates": 12,
    "train_seconds": 1.5, "parameters": {"training": 20}, "kept": "merged", "environment": ENVIRONMENT,
    "results": {"merged": {key: REPORT[key] for key in ("oa", "macc", "loss", "num_samples", "correct")}},
    "curve": {"train_loss": [2.0, 1.0], "test_oa": [None, 0.5]},
}  # fmt: skip
JUNK = (None, True, -1, 2.5, 10**400, float("nan"), float("inf"), "x", "\x1b[2J", [], {}, [[]], {"a": [None]})


def places(content, path=()):
    """Yield the path of every value inside."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def damaged(content, rng, count):
    """Yield a content with a value removed or replaced, `count` times; it may still be one that we could write."""
    found = list(places(content))
    for number in range(count):
        other = copy.deepcopy(content)
        place = other
        path = found[number % len(found)] if number < len(found) else found[rng.integers(len(found))]
        for key in path[:-1]:
            place = place[key]
        if rng.random() < 0.25:
            del place[path[-1]]
        else:
            place[path[-1]] = JUNK[rng.integers(len(JUNK))]
        yield path, other


def show_metrics(folder):
    record = runs.RunRecord("a", {}, [{"epoch": 1.0}], metrics=runs.read_metrics(folder.metrics), folder=folder)
    runs.require_whole([record])
    summary_rows([record])
    if record.final:
        confusion_figure(record.final["confusion"], record.final["class_names"])


def show_environment(folder):
    environment_rows([runs.RunRecord("a", {}, [], environment=read_json(folder.environment, schema=Environment))])


def show_analysis(folder):
    experts_figure(read_json(folder.analysis, schema=Analysis))


def show_robustness(folder):
    runs.read_robustness(folder.robustness)


def show_record(folder):
    check_record(parse_json(folder.wandb.read_text()))


KINDS = {
    "metrics": (METRICS, show_metrics, "metrics"),
    "environment": (ENVIRONMENT, show_environment, "environment"),
    "analysis": (ANALYSIS, show_analysis, "analysis"),
    "robustness": (ROBUSTNESS, show_robustness, "robustness"),
    "record": (RECORD, show_record, "wandb"),
}


def complaints(kind, folder, count, seed=0):
    content, show, name = KINDS[kind]
    path, wrong = getattr(folder, name), []
    path.write_text(json.dumps(content))
    show(folder)
    for place, other in damaged(content, np.random.default_rng(seed), count):
        path.write_text(json.dumps(other))
        try:
            show(folder)
        except InputError as error:
            text = str(error)
            if not text.isprintable() or len(text) > 500 or (kind != "record" and not text.startswith(f"{path}: ")):
                wrong.append(f"{place}: {text!r}")
        except Exception as error:
            wrong.append(f"{place}: {type(error).__name__}: {error}")
    return wrong


@pytest.mark.parametrize(("kind", "count"), [("metrics", 40), ("environment", 30), ("robustness", 40), ("record", 40)])
def test_damaged_files_are_one_line(kind, count, tmp_path):
    assert not complaints(kind, RunFolder(tmp_path), count)


def test_a_damaged_analysis_is_one_line(tmp_path):
    assert not complaints("analysis", RunFolder(tmp_path), 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_one_line(kind, tmp_path):
    assert not complaints(kind, RunFolder(tmp_path), 200 if kind == "analysis" else 600, seed=1)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, "{", "", "\x00", '{"a": 1}}'])
def test_text_that_is_no_json(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.json: not a JSON file \(.*\); write it again or remove it"):
        read_json(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match="is no regular file"):
        read_json(tmp_path / "a.json")
