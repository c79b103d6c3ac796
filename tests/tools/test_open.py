"""The report at the end of a training, and tools/open.py: the page of the run, in time; nothing spoils a run."""

import json
import os
import re
import shutil
import signal
import sys
import time
import webbrowser

import pytest

from s2d3d.runs.folder import RunFolder
from s2d3d.viz import report as report_module
from s2d3d.viz import run_report


@pytest.fixture
def finished(trained, tmp_path) -> RunFolder:
    return RunFolder(shutil.copytree(trained.folder.root, tmp_path / "run"))


@pytest.fixture
def train_on(tool, trained, finished, capsys, monkeypatch):
    """Resume the finished run, which evaluates it once more and ends it; return exit code, stdout and stderr."""

    def run(*arguments: str, share: float = 1000.0):
        train = tool("train")
        monkeypatch.setattr(train, "REPORT_SHARE", share)
        root = finished.root
        code = train.main([str(trained.config), f"output_dir={root}", "--resume", str(root), *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def plain_figures(monkeypatch):
    """Leave out what matplotlib draws, which takes seconds; tests/viz has tests of it."""
    monkeypatch.setattr(report_module, "report_figures", lambda runs: {})
    monkeypatch.setattr(run_report, "save_figure", lambda figure, path: path.write_text(figure.get_label()))


def data_of(path):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.S)[1])


def files(folder: RunFolder) -> set[str]:
    return {path.relative_to(folder.root).as_posix() for path in folder.root.rglob("*") if path.is_file()}


def test_a_training_ends_with_the_page_that_the_tool_makes(call, train_on, finished, plain_figures, tmp_path):
    before = files(finished)
    code, out, err = train_on("log.report=true")
    assert code == 0 and out.splitlines()[-1].split() == ["report", str(finished.report)] and "report" not in err
    plots = {f"plots/{name}.png" for name in ("training", "confusion", "mistakes")}
    assert files(finished) == before | {"report.html"} | plots
    other = tmp_path / "other.html"
    assert call("report", finished.root, "--output", other, "--device", "cpu").code == 0
    ours, theirs = data_of(finished.report), data_of(other)
    assert ours["runs"][0]["mistakes"] > 5 and ours["runs"][0]["clouds"]
    assert ours["runs"] == [{**run, "clouds": ours["runs"][i]["clouds"]} for i, run in enumerate(theirs["runs"])]
    clouds = [(cloud["name"], cloud["label"], cloud["guess"]) for cloud in theirs["runs"][0]["clouds"]]
    assert [(cloud["name"], cloud["label"], cloud["guess"]) for cloud in ours["runs"][0]["clouds"]] == clouds
    assert sorted(ours["points"].values(), key=str) == sorted(theirs["points"].values(), key=str)


@pytest.mark.slow
def test_the_plots_are_pictures(train_on, finished):
    from matplotlib.image import imread

    assert train_on("log.report=true")[0] == 0
    for path in finished.report_files()[1:]:
        image = imread(path)[..., :3]
        assert (image.max(-1) - image.min(-1)).max() > 0.3, f"{path} has something coloured"


def hangs(folder, predictions):
    time.sleep(60)


def crashes(folder, predictions):
    os.kill(os.getpid(), signal.SIGKILL)  # as a system without memory does


def refuses(folder, predictions):
    raise TypeError("an array of the wrong kind")


def stops_after_the_page(folder, predictions):
    folder.report.write_text("page")
    raise OSError(28, "No space left on device", str(folder.plots))


@pytest.mark.parametrize(
    "problem, reason",
    [
        (hangs, "it took longer than 1.0 s"),
        (crashes, "its process ended with exit code -9"),
        (refuses, "an array of the wrong kind"),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_run_is_whole(train_on, finished, monkeypatch, tool, problem, reason):
    before = files(finished)
    monkeypatch.setattr(run_report, "write_run_report", problem)
    seconds = sum(float(line.rsplit(",", 1)[1]) for line in finished.log.read_text().splitlines()[1:])
    code, out, err = train_on("log.report=true", share=1.0 / seconds * 1.001)
    assert code == 0 and "after merge" in out and "report " not in out
    (line,) = [line for line in err.splitlines() if "report" in line]
    assert line.startswith(f"the report is not complete: {reason}; make it with: ")
    assert line.endswith(f" open {finished.root}") and files(finished) == before


def test_a_page_without_plots_is_shown_and_what_is_missing_is_said(train_on, finished, monkeypatch):
    monkeypatch.setattr(run_report, "write_run_report", stops_after_the_page)
    code, out, err = train_on("log.report=true")
    assert code == 0 and out.splitlines()[-1].split() == ["report", str(finished.report)]
    assert "the report is not complete: [Errno 28] No space left on device" in err


def test_a_short_training_or_a_missing_package_gives_one_line(train_on, finished, monkeypatch):
    before = files(finished)
    code, _, err = train_on("log.report=true", share=0.001)
    assert code == 0 and "the report is not complete: a tenth of the training's time, 0.0 s, is too short" in err
    for name in [name for name in sys.modules if name.startswith("s2d3d.viz")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = train_on("log.report=true")
    assert code == 0 and "the report is not complete: drawing needs matplotlib (import of matplotlib halted" in err
    assert 'pip install "s2d3d[plots]"; make it with' in err
    assert files(finished) == before
    assert "report" not in train_on("log.report=false")[2]


def test_a_file_of_the_users_is_not_replaced(tool, trained, tmp_path, capsys, monkeypatch):
    root = tmp_path / "new"
    root.mkdir()
    (root / "report.html").write_text("mine")
    train = tool("train")
    monkeypatch.setattr(train, "REPORT_SHARE", 1000.0)
    short = ["train.epochs=1", "optim.warmup_epochs=0", "log.report=true", f"output_dir={root}"]
    assert train.main([str(trained.config), *short]) == 0
    assert f"the report is not complete: {root / 'report.html'} was there before the run" in capsys.readouterr().err
    assert (root / "report.html").read_text() == "mine" and not (root / "plots").exists()


def test_open_shows_the_page_and_makes_it_only_when_it_must(call, finished, plain_figures, monkeypatch):
    shown = []
    monkeypatch.setattr(webbrowser, "open", lambda address: shown.append(address) or True)
    monkeypatch.setenv("DISPLAY", ":0")
    result = call("open", finished.root, "--device", "cpu")
    assert (result.code, result.out, result.err) == (0, f"{finished.report}: shown in the browser\n", "")
    assert shown == [finished.report.as_uri()] and data_of(finished.report)["runs"][0]["clouds"]
    finished.report.write_text("as it is")
    assert call("open", finished.root).code == 0 and finished.report.read_text() == "as it is"
    late = finished.report.stat().st_mtime + 10
    os.utime(finished.metrics, (late, late))
    assert call("open", finished.root).code == 0 and finished.report.read_text() != "as it is"


def test_open_without_a_screen_or_without_data(call, finished, plain_figures, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    text = finished.config.read_text()
    finished.merged.unlink()
    result = call("open", finished.root)
    assert (result.code, result.out) == (0, f"no browser here; open {finished.report.as_uri()}\n")
    assert data_of(finished.report)["runs"][0]["clouds"] == [] and finished.config.read_text() == text


def test_what_open_refuses(refuses, tmp_path):
    needed = "the folder of a run is needed, as tools/train.py makes it"
    assert refuses("open", tmp_path / "none") == f"{tmp_path}/none: no such folder; {needed}"
    assert refuses("open", tmp_path) == f"{tmp_path}: holds no config.yaml; {needed}"
