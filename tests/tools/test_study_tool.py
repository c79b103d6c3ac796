"""tools/study.py: tables and figure of a finished study, one line for what is wrong, and processes that are stopped."""

import json
import os
import re
import shutil
import signal
import threading
import time

import pytest
from PIL import Image

from s2d3d import load_checkpoint
from s2d3d.studies.jobs import Outcome
from s2d3d.studies.page import BEGIN, END

EPOCHS = 40
"""Of runs that are stopped: some seconds, so that the signal comes before their end."""


SHORT = {"train.epochs": 1, "optim.warmup_epochs": 0}
"""Of runs whose numbers only need to be there."""


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def one_after_another(monkeypatch):
    """As for a user who has chosen the threads of a run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_runner_uses_the_cores_of_a_cpu_unless_the_user_has_chosen(call, write_study, results, monkeypatch):
    path, jobs = write_study(common=SHORT), []
    monkeypatch.setattr("s2d3d.studies.run.run_study", lambda study, **options: jobs.append(options) or Outcome())
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)), raising=False)
    given = ("study", path, "--results", results, "train.device=cpu")
    said = "runs at a time, a thread each; --jobs 1 makes one after another with all threads"
    assert said not in call(*given).out
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert f"3 {said}" in call(*given).out
    assert f"2 {said}" in call(*given, "--max-runs", "2").out
    assert said not in call(*given, "--jobs", "1").out
    assert [options["jobs"] for options in jobs] == [1, 3, 2, 1]
    assert [options["launcher"] is None for options in jobs] == [True, False, False, True]


def test_a_study_and_its_report_alone(call, write_study, results, tmp_path):
    path = write_study(common=SHORT)
    assert call("study", path, "--results", results, "--dry-run").out.split() == [
        "dense/seed0", "s2d/seed0", "dense/seed1", "s2d/seed1",
    ]  # fmt: skip
    assert not results.exists(), "a dry run leaves nothing"
    first = call("study", path, "--results", results)
    assert first.code == 0 and "run 4 of 4: s2d/seed1" in first.err
    files = [results / f"tiny.{suffix}" for suffix in ("json", "md", "png")]
    content = [file.read_bytes() for file in files]
    summary = json.loads(content[0])
    (difference,) = summary["comparisons"]
    mean = f"{100 * difference['mean']:+.2f}"
    assert re.search(rf"s2d - dense +{re.escape(mean)} points", first.out) and first.out.endswith(
        f"written to {', '.join(map(str, files))}\n"
    )
    with Image.open(files[2]) as picture:
        assert picture.size[0] > 300 and len(picture.convert("L").getcolors(1 << 20)) > 5, "something is drawn"
    shutil.rmtree(tmp_path / "runs")
    for file in files:
        file.unlink()
    again = call("study", path, "--results", results, "--report-only", "data.root=nowhere")
    assert again.code == 0 and again.out == first.out
    assert [file.read_bytes() for file in files[:2]] == content[:2]


def test_a_report_of_nothing_lists_every_cell_as_empty(call, write_study, results):
    result = call("study", write_study(along="train.epochs"), "--results", results, "--report-only")
    assert result.code == 0 and "4 runs are missing" in result.out
    assert "- dense: seed 0, 1\n- s2d: seed 0, 1" in (results / "tiny.md").read_text()
    assert (results / "tiny.png").is_file()


def test_the_table_of_all_studies_stands_inside_a_page(call, refuses, write_study, results, tmp_path):
    studies, page = tmp_path / "studies", tmp_path / "page.md"
    studies.mkdir()
    shutil.copy(write_study(base="../base.yaml", common=SHORT), studies / "tiny.yaml")
    shutil.copy(write_study(base="../base.yaml", name="other", seeds=[5]), studies / "other.yaml")
    arms = {"dense": {"s2d.kind": "none"}, "s2d": {}, "fast": {"optim.lr": 5e-3}}
    shutil.copy(write_study(base="../base.yaml", name="third", seeds=[5], arms=arms), studies / "third.yaml")
    assert call("study", write_study(common=SHORT), "--results", results, "--max-runs", 3).code == 0
    overview = ("study", studies, "--overview", page, "--results", results)
    assert refuses(*overview) == f"{page}: cannot be read: No such file or directory"
    page.write_text("before\n")
    assert refuses(*overview).startswith(f"{page}: has no place for the table; put these two lines")
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):  # the second time over the first
        assert call(*overview).code == 0
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", BEGIN] and lines[-2:] == [END, "after"] and "old" not in lines
    assert lines[3] == "3 of 9 runs are finished; each study counts the runs that it shares with another."
    summary = json.loads((results / "tiny.json").read_text())
    mean = f"{100 * summary['comparisons'][0]['mean']:+.2f}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[2:] == [
        ["[tiny](results/tiny.md)", "validation", "3 of 4", "s2d - dense", "1", mean, "-"],
        ["other", "validation", "0 of 2", "s2d - dense", "0", "empty", "-"],
        ["third", "validation", "0 of 3", "all 2", "0", "empty", "-"],
    ]
    assert refuses("study", tmp_path / "empty", "--overview", page).endswith("no study (*.yaml) in this folder")


def test_what_is_wrong_is_one_line(refuses, write_study, results, tmp_path):
    assert refuses("study", tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such file"
    path = write_study(evaluate="tset")
    expected = f"{path}: evaluate: must be 'validation' or 'test', got 'tset'; did you mean 'test'?"
    assert refuses("study", path, "--results", results) == expected
    path = write_study()
    assert refuses("study", path, "train.epoch=3").startswith("override 'train.epoch=3': train.epoch: unknown key")
    assert refuses("study", path, "--only", "sdd").startswith(f"{path}: no arm 'sdd'; did you mean 's2d'?")
    assert refuses("study", path, "--jobs", 0) == "jobs is 0, must be at least 1"
    assert refuses("study", path, "--submitit", "lsf", code=2).startswith("argument --submitit: invalid choice: 'lsf'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report-only", "--only", "s2d"], "--only: has no effect with --report-only; remove it"),
        (["--report-only", "--max-runs", "1"], "--max-runs: has no effect with --report-only; remove it"),
        (["--dry-run", "--jobs", "2"], "--jobs: has no effect with --dry-run; remove it"),
        (["--submitit-option", "a=1"], "--submitit-option: has no effect without --submitit; remove it"),
    ],
)
def test_options_without_effect_are_refused(refuses, write_study, results, arguments, message):
    assert refuses("study", write_study(), "--results", results, *arguments) == message


def test_a_failing_run_makes_the_exit_code(call, write_study, results):
    arms = {"dense": {"s2d.kind": "none"}, "bad": {"optim.lr": 1e30, "optim.warmup_epochs": 0, "optim.clip_grad": None}}
    result = call("study", write_study(arms=arms, seeds=[0]), "--results", results)
    assert result.code == 1 and "error: 1 runs failed: bad/seed0" in result.err
    assert "error: bad/seed0 failed: loss or gradient is not finite" in result.err
    assert "- bad: seed 0" in (results / "tiny.md").read_text(), "the tables are written all the same"


@pytest.mark.slow
def test_a_process_stops_with_its_study_and_goes_on_with_it(call, write_study, results, tmp_path):
    """SIGTERM to the study: its run saves and ends; the same command finishes it."""
    path = write_study(seeds=[0], common={"train.epochs": EPOCHS})
    run = tmp_path / "runs" / "s2d" / "seed0"
    over = threading.Event()

    def strike():
        deadline = time.monotonic() + 300
        while not (run / "log.csv").exists() and not over.wait(0.02):
            assert time.monotonic() < deadline
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    watch = threading.Thread(target=strike)
    watch.start()
    stopped = call("study", path, "--results", results, "--jobs", 2, "--only", "s2d")
    over.set()
    watch.join()
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert "stopping 1 runs; the same command continues them" in stopped.err
    assert "stopped by SIGTERM" in run.with_name("seed0.log").read_text()
    assert 0 < load_checkpoint(run / "checkpoints" / "last.pt")["progress"]["epoch"] < EPOCHS
    assert not (results / "tiny.jsonl").exists() and "- s2d: seed 0" in (results / "tiny.md").read_text()
    result = call("study", path, "--results", results, "--only", "s2d")
    assert result.code == 0 and "run 1 of 1: s2d/seed0" in result.err and f"epoch {EPOCHS}/{EPOCHS}" in result.err
    assert "epoch 1/" not in result.err, "it went on"
    (record,) = (results / "tiny.jsonl").read_text().splitlines()
    assert len(json.loads(record)["curve"]["val_oa"]) == EPOCHS
