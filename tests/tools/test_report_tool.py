"""tools/report.py: the page says what the run's own evaluation said; plots as files; what is refused."""

import json
import re
import shutil

import pytest
from matplotlib.image import imread

from s2d3d.config.load import parse_config
from s2d3d.runs.record import read_runs
from s2d3d.training.trainer import Trainer
from s2d3d.viz.report import report_figures

NO_CLOUDS = ("--num-mistakes", 0, "--clouds-per-class", 0)


def data_of(path):
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def test_the_page_agrees_with_the_run(call, trained, tmp_path):
    output = tmp_path / "report.html"
    result = call("report", trained.folder.root, "--output", output, "--device", "cpu", "--num-mistakes", 5)
    assert (result.code, result.out, result.err) == (0, f"written to {output}\n", "")
    merged = json.loads(trained.folder.metrics.read_text())["merged"]
    (entry,) = data_of(output)["runs"]
    assert entry["confusion"] == merged["confusion"] and entry["classes"] == merged["class_names"]
    wrong = sum(map(sum, merged["confusion"])) - sum(row[i] for i, row in enumerate(merged["confusion"]))
    assert 5 < wrong == entry["mistakes"] and len(entry["worst"]) == 5
    worst = [entry["clouds"][place] for place in entry["worst"]]
    assert all(cloud["label"] != cloud["guess"] for cloud in worst)
    assert [cloud["truth"] for cloud in worst] == sorted(cloud["truth"] for cloud in worst)
    page = output.read_text()
    assert f"<td>{100 * merged['oa']:.2f} %</td>" in page and "http" not in page and len(page) < 10_000_000
    assert list(tmp_path.iterdir()) == [output]


def test_a_run_that_was_scored_on_a_validation_part_is_reported_on_it(call, tiny_config, tmp_path):
    trainer = Trainer(tiny_config("train.epochs=2", "data.val_fraction=0.25", "eval.split=validation"))
    trainer.fit()
    output = tmp_path / "report.html"
    assert call("report", trainer.folder.root, "--output", output, "--device", "cpu").code == 0
    (entry,) = data_of(output)["runs"]
    (record,) = read_runs([trainer.folder.root])
    assert entry["confusion"] == record.final["confusion"]
    shown = f"<tr><th>evaluated for this report, OA</th><td>{100 * record.final['oa']:.2f} %</td></tr>"
    assert shown in output.read_text(encoding="utf-8")


def test_the_headline_is_that_of_the_saved_model(call, tiny_config, tmp_path):
    """BatchNorm behind experts is re-estimated before the model is saved, which changes its accuracy."""
    config = tiny_config(
        "train.epochs=4", "optim.lr=4e-3", "s2d.share_rate=0.05", "eval.every=2", "data.num_points=64"
    ).to_dict()  # fmt: skip
    config["model"] = {
        "name": "point_transformer_tiny",
        "channels": [16, 32],
        "depths": [1, 1],
        "strides": [4, 4],
        "num_neighbors": [8, 8],
    }
    trainer = Trainer(parse_config(config, where="test"))
    merged = trainer.fit()
    before, kept = trainer.reports["merged"].oa, trainer.reports["recalibrated"].oa
    assert before != kept, "the re-estimation must show for this test to say anything"
    evaluated = call("evaluate", "--checkpoint", merged, "--output", tmp_path / "report.json")
    assert evaluated.code == 0 and json.loads((tmp_path / "report.json").read_text())["oa"] == kept
    output = tmp_path / "report.html"
    assert call("report", trainer.folder.root, "--output", output, "--clouds-per-class", 0).code == 0
    page = output.read_text(encoding="utf-8")
    for title in ("OA, final model", "evaluated for this report, OA"):
        assert f"<tr><th>{title}</th><td>{100 * kept:.2f} %</td></tr>" in page
    assert f"<tr><th>OA, merged or dense</th><td>{100 * before:.2f} %</td></tr>" in page
    (record,) = read_runs([trainer.folder.root])
    assert record.final["confusion"] == trainer.reports["recalibrated"].confusion
    curve = next(axes for axes in report_figures([record])["training"].axes if "final model" in axes.get_title())
    measured = [[row["epoch"], 100 * row["test_oa"]] for row in record.log if "test_oa" in row]
    assert curve.lines[0].get_xydata().tolist() == [*measured, [4, 100 * kept]] and len(measured) == 1


def test_plots_are_files_and_need_no_model(call, trained, tmp_path):
    folder = tmp_path / "plots"
    result = call("report", trained.folder.root, "--plots", folder)
    assert result.code == 0, result.err
    names = {path.name for path in folder.iterdir()}
    assert names == {"training.png", "class_accuracy.png", "divergence.png", "throughput.png", "confusion_of_run.png"}
    assert result.out.splitlines() == [f"written to {folder / name}" for name in sorted(names, key=result.out.index)]
    for name in names:
        image = imread(folder / name)[..., :3]
        assert (image.max(-1) - image.min(-1)).max() > 0.3, f"{name} has something coloured"
    again = call("report", trained.folder.root, "--plots", folder)
    assert again.code == 1 and "exists already" in again.err


def test_names_that_become_one_file_name_are_told_apart(call, trained, tmp_path):
    runs = [shutil.copytree(trained.folder.root, tmp_path / name) for name in ("a b", "a_b", "a$^b")]
    result = call("report", *runs, "--plots", tmp_path / "plots")
    assert result.code == 0, result.err
    names = {path.name for path in (tmp_path / "plots").glob("confusion*")}
    assert names == {"confusion_of_a_b.png", "confusion_of_a_b-2.png", "confusion_of_a_b-3.png"}


def test_two_runs_one_of_them_under_way(call, trained, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    text = trained.folder.config.read_text()
    (other / "config.yaml").write_text(text.replace("seed: 0", "seed: 3"))
    (other / "log.csv").write_text("\n".join(trained.folder.log.read_text().splitlines()[:3]) + "\n")
    output = tmp_path / "report.html"
    refused = call("report", trained.folder.root, other, "--output", output)
    assert refused.code == 1 and "merged.pt: no such file, the run is not finished; report it without" in refused.err
    assert not output.exists()
    result = call("report", trained.folder.root, other, "--output", output, *NO_CLOUDS)
    assert result.code == 0, result.err
    page = output.read_text()
    assert "<tr><th>seed</th><td>0</td><td>3</td></tr>" in page and "<td>2 of 10</td>" in page
    (entry,) = data_of(output)["runs"]
    assert entry["name"] == "run" and entry["clouds"] == [], "the other has no confusion matrix yet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "nothing to write; give --output FILE.html, --plots DIR or both"),
        (
            ["RUN", "--output", "report.pdf"],
            "report.pdf: the report is an HTML page; give it a name that ends in .html",
        ),
        (["RUN", "--output", "OUT", "--num-mistakes", "-1"], "--num-mistakes is -1, must be at least 0"),
        (["RUN", "RUN", "--output", "OUT"], "is named twice"),
        (["none", "--output", "OUT"], "none: no such folder; the folder of a run is needed"),
        (["data.root=x", "--output", "OUT"], "no run to report; name a run folder"),
        (["RUN", "seed=1", "--output", "OUT"], "seed=1: has no effect on a report"),
        (["RUN", "eval.votes=9", "--output", "OUT"], "eval.votes=9: has no effect on a report"),
        (["RUN", "data.root=none", "--output", "OUT"], "none"),
        (["RUN", "data.rot=x", "--output", "OUT"], "data.rot: unknown key; did you mean 'root'?"),
        (["RUN", "--output", "OUT", "--device", "gpu"], "device 'gpu' is unknown"),
    ],
)
def test_bad_input_is_one_line_and_no_file(refuses, trained, tmp_path, arguments, message):
    places = {"RUN": trained.folder.root, "OUT": tmp_path / "report.html"}
    assert message in refuses("report", *(places.get(argument, argument) for argument in arguments))


def test_process_good_and_bad(fork, trained, tmp_path):
    output = tmp_path / "report.html"
    good = fork("report", trained.folder.root, "--output", output, *NO_CLOUDS)
    assert (good.returncode, good.stdout, good.stderr) == (0, f"written to {output}\n", "")
    bad = fork("report", trained.folder.root, "--output", output, *NO_CLOUDS)
    assert (bad.returncode, bad.stdout) == (1, "") and bad.stderr.startswith(f"error: {output}: exists already")
