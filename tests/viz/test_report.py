"""The report: what it chooses and says, and what a real browser makes of it."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from s2d3d.errors import InputError
from s2d3d.runs.record import RunRecord
from s2d3d.viz import report as module
from s2d3d.viz.report import (
    Predictions,
    build_report,
    choose_shown,
    config_rows,
    environment_rows,
    html_table,
    summary_rows,
)

NAMES = ["box", "mug", "<cup>"]
CONFIG = {
    "seed": 0,
    "data": {"name": "shapes"},
    "model": {"name": "point_bert_tiny"},
    "s2d": {"kind": "rup", "num_experts": 4, "every": 2, "share_rate": 0.3, "schedule": "linear", "top_k": 2},
    "train": {"epochs": 2, "batch_size": 8},
}
LOG = [
    {
        "epoch": 1,
        "updates": 4,
        "train_loss": 2.0,
        "train_oa": 0.3,
        "seconds": 2.0,
        "divergence": 0.1,
        "share_rate": 0.1,
    },
    {
        "epoch": 2,
        "updates": 8,
        "train_loss": 1.0,
        "train_oa": 0.6,
        "seconds": 2.0,
        "divergence": 0.01,
        "share_rate": 0.3,
    },
]
LABELS = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
GUESSES = torch.tensor([0, 0, 0, 1, 2, 1, 1, 1, 0, 2, 2, 2])
TRUTH = [0.9, 0.8, 0.7, 0.2, 0.1, 0.9, 0.8, 0.6, 0.3, 0.9, 0.8, 0.7]
"""Probability of the true class."""


def predictions(guesses=GUESSES, points=256, source="set"):
    """Twelve clouds; cloud i is a pole of length 1 + i, so that each looks different."""
    probabilities = torch.full((12, 3), 0.01)
    for row, (label, guess, truth) in enumerate(zip(LABELS.tolist(), guesses.tolist(), TRUTH)):
        probabilities[row, label] = truth if guess == label else min(truth, 0.3)
        if guess != label:
            probabilities[row, guess] = 1 - probabilities[row, label]
    clouds = torch.rand(12, points, 3) - 0.5
    clouds[:, :, 2] *= torch.arange(1.0, 13)[:, None]
    return Predictions(clouds, LABELS, probabilities, [f"cloud_{i}" for i in range(12)], NAMES, source)


def metrics(oa):
    final = {
        "oa": oa, "macc": oa, "loss": 0.5, "num_samples": 12, "class_names": NAMES,
        "per_class": dict.fromkeys(NAMES, oa), "confusion": [[3, 1, 1], [1, 3, 0], [0, 0, 3]],
    }  # fmt: skip
    parameters = {"training": 2000, "merged": 1000}
    return {"sparse": final, "merged": final, "train_seconds": 120.0, "parameters": parameters}


def run(name="first", **changes):
    fields = {"config": CONFIG, "environment": {"python": "3.11"}, "log": LOG, "metrics": metrics(0.75)}
    return RunRecord(name, **{**fields, **changes})


def report_of(*runs, said=None, **options):
    """Make the page of runs, all with the same predictions where `said` has no others."""
    return build_report(runs, {run.name: predictions() for run in runs} | (said or {}), **options)


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take most of the time of a report."""
    monkeypatch.setattr(module, "report_figures", lambda runs: {})


# What is chosen


def test_each_kind_of_mistake_is_shown_then_the_worst():
    shown = choose_shown(predictions(), 3)
    assert [index for index in shown if LABELS[index] == 0] == [4, 3, 2], "both mistakes and the least sure right one"
    assert [index for index in shown if LABELS[index] == 1] == [8, 7, 6]
    assert [index for index in shown if LABELS[index] == 2] == [11, 10, 9]
    assert [index for index in choose_shown(predictions(), 1) if LABELS[index] == 0] == [4, 3, 2], "one of each guess"
    assert choose_shown(predictions(), 99) != [] and sorted(choose_shown(predictions(), 99)) == list(range(12))
    assert choose_shown(predictions(), 0) == []


def test_right_and_wrong_clouds_share_the_room():
    labels, guesses = torch.zeros(40, dtype=torch.int64), torch.tensor([0] * 20 + [1] * 20)
    likely = torch.full((40, 2), 0.5)
    likely[torch.arange(40), guesses] = torch.linspace(0.6, 0.9, 40)
    data = Predictions(torch.rand(40, 4, 3), labels, likely / likely.sum(1, keepdim=True), ["x"] * 40, ["a", "b"], "s")
    shown = choose_shown(data, 12)
    assert len(shown) == 12 and sum(guesses[index] == 0 for index in shown) == 6
    assert [int(guesses[index]) for index in shown] == [1] * 6 + [0] * 6


def test_the_page_holds_what_the_model_said(no_plots):
    (entry,) = data_of(report_of(run(), num_mistakes=2, clouds_per_class=1))["runs"]
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for label, guess in zip(LABELS, GUESSES):
        counts[label, guess] += 1
    assert entry["confusion"] == counts.tolist() and entry["classes"] == NAMES and entry["mistakes"] == 3
    worst = [entry["clouds"][place] for place in entry["worst"]]
    assert [cloud["name"] for cloud in worst] == ["cloud_4", "cloud_3"], "the least likely truth first"
    assert worst[0]["label"] == 0 and worst[0]["guess"] == 2 and worst[0]["truth"] == pytest.approx(0.1, abs=0.01)


def test_clouds_come_through_to_a_thirty_thousandth(no_plots):
    given = predictions(points=256)
    page = report_of(run(), said={"first": given}, points_per_cloud=100)
    points = data_of(page)["points"]
    assert len(points) == 12
    for index in range(12):
        entry = points[f"set:{index}"]
        read = np.frombuffer(base64.b64decode(entry["data"]), "<i2").reshape(-1, 3) * entry["unit"]
        cloud = given.points[index].double()
        kept = torch.from_numpy(read) + (cloud.amin(0) + cloud.amax(0)) / 2
        if len(read) == 100:  # about the middle of the part that is kept, not of the whole
            difference = kept[:, None] - cloud
            shift = difference[0][(difference[0].norm(dim=1)).argmin()]
            assert shift.abs().max() < 0.2 * cloud.abs().max()
            nearest = torch.cdist(kept - shift, cloud).min(1)
            assert nearest.values.max() < 2e-3 * float(cloud.abs().max())
            assert len(nearest.indices.unique()) == 100, "a hundred different points"


def test_runs_of_one_set_share_its_clouds(no_plots):
    other = predictions(torch.tensor([1] * 12))
    shared = data_of(report_of(run(), run("second"), said={"second": other}))
    apart = data_of(report_of(run(), run("second"), said={"second": predictions(source="another")}))
    assert len(shared["points"]) == 12 and len(apart["points"]) == 24


# What is said


def test_summary_has_a_column_for_each_run():
    dense = {**CONFIG, "s2d": {**CONFIG["s2d"], "kind": "none"}}
    unfinished = run("second", config=dense, metrics={}, log=LOG[:1])
    head, rows = summary_rows([run(), unfinished], {"first": predictions()})
    table = {title: values for title, *values in rows}
    assert head == ["", "first", "second"]
    assert table["OA, merged or dense"] == table["OA, before merge"] == ["75.00 %", ""]
    assert table["evaluated for this report, OA"] == ["75.00 %", ""], "9 of 12"
    assert table["epochs"] == ["2", "1 of 2"] and table["training time"] == ["2.0 min", ""]
    assert table["parameters in training"] == ["2,000", ""] and table["parameters afterwards"] == ["1,000", ""]
    assert table["experts"] == ["4, in every 2nd FFN, share rate 0.3 linear", "none (dense)"]
    assert "OA, voting" not in table


@pytest.mark.parametrize(
    ("every", "words"), [(1, "every FFN"), (3, "every 3rd FFN"), (11, "every 11th FFN"), (22, "every 22nd FFN")]
)
def test_experts_are_counted_in_proper_english(every, words):
    config = {**CONFIG, "s2d": {**CONFIG["s2d"], "every": every, "kind": "topk"}}
    table = dict(summary_rows([run(config=config)])[1])
    assert table["experts"] == f"top-2 of 4, in {words}, share rate 0.3 linear"


def test_configs_are_compared_key_by_key():
    other = {**CONFIG, "train": {"epochs": 3, "batch_size": 8}, "extra": None}
    head, rows = config_rows([run(), run("second", config=other)])
    assert head == ["key", "first", "second"]
    assert rows == [["train.epochs", "2", "3"], ["extra", "-", "null"]]
    keys = [row[0] for row in config_rows([run()])[1]]
    assert keys[:3] == ["seed", "data.name", "model.name"] and len(keys) == 11, "a single run shows all"


def test_environments_are_marked_where_they_differ():
    rows = environment_rows(
        [run(), run("second", environment={"python": "3.12", "packages": {"torch": "2.6"}, "gpus": []})]
    )
    assert rows[1] == [["python", "3.11", "3.12"], ["packages.torch", "-", "2.6"], ["gpus", "-", "none"]]
    table = html_table(["", "a", "b"], [["x", "1", "1"], ["y", "1", "<2>"]], mark_differences=True)
    assert '<tr><th>x</th><td>1</td><td>1</td></tr><tr class="differs"><th>y</th><td>1</td><td>&lt;2&gt;</td>' in table


def test_plots_are_those_that_there_are_numbers_for():
    names = list(module.report_figures([run()]))
    assert names == ["training", "class_accuracy", "divergence", "throughput"]
    bare = RunRecord("bare", {"seed": 0}, [{"epoch": 1, "train_loss": 1.0}])
    robust = {"clean": {"oa": 0.9}, "corruptions": {"jitter": {"oa": [0.5] * 5}}, "mean_oa": 0.5}
    assert list(module.report_figures([bare])) == ["training"]
    assert "corruptions" in module.report_figures([run(robustness=robust)])


def test_nothing_outside_is_named():
    page = report_of(run("http-run"), run("</script><script>alert(1)</script>"))
    assert len(page.encode()) < module.MOST_BYTES
    assert page.count("<script") == page.count("</script>") == 2, "no name of a run opens or ends one"
    decoded = [base64.b64decode(text).decode() for text in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert len(decoded) == 4
    outside = re.compile(
        r"""(?:src|href)\s*=\s*["'](?!data:image|\#)|url\((?!\#)|@import|https?:|["'(]//|fetch\(|XMLHttp|<link"""
    )
    assert not outside.search(page)
    for text in decoded:
        assert not outside.search(re.sub(r'xmlns(:xlink)?="[^"]+"', "", text))


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ([], {}, "no run to report"),
        ([run(), run()], {}, "two runs of one name"),
        ([run()], {"num_mistakes": -1}, "-1 mistakes, 12 clouds of a class: at least 0"),
    ],
)
def test_what_cannot_be_reported_is_one_line(runs, options, message):
    with pytest.raises(InputError, match=message):
        build_report(runs, **options)


def test_a_report_does_not_grow_beyond_its_limit(monkeypatch, no_plots):
    monkeypatch.setattr(module, "MOST_BYTES", 20_000)
    with pytest.raises(InputError, match=r"the report gets 0\.\d MB, more than the 0 MB .*fewer clouds"):
        report_of(run())


# In a browser

CARDS = "Array.from(document.querySelectorAll('#class-clouds .card'), e => [e.dataset.true, e.dataset.predicted])"
INK = """Array.from(document.querySelectorAll('%s canvas'), c => {
  const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  let ink = 0;
  for (let i = 3; i < pixels.length; i += 4) ink += pixels[i] > 0;
  return ink;
})"""
PICTURE = "document.querySelector('#class-clouds canvas').toDataURL()"


def test_a_click_on_a_class_shows_its_clouds(browser, tmp_path):
    said = {"second": predictions(torch.tensor([1] * 12))}
    path = tmp_path / "report.html"
    path.write_text(report_of(run(), run("second"), said=said, num_mistakes=2), encoding="utf-8")
    browser.open(path)
    assert browser.evaluate("document.title") == "first, second"
    assert browser.evaluate("document.querySelectorAll('#confusion tbody tr').length") == 3
    assert browser.evaluate("document.getElementById('score').textContent") == "9 of 12 clouds recognised, 75.00 %"
    pictures = "Array.from(document.images, e => e.complete && e.naturalWidth > 100)"
    assert browser.evaluate(pictures) == [True] * 4, "the plots"
    assert len(browser.evaluate(INK % "#worst")) == 2 and min(browser.evaluate(INK % "#worst")) > 500
    assert browser.evaluate(CARDS) == []

    browser.click("#confusion button[data-true='0']")
    assert browser.evaluate(CARDS) == [["box", name] for name in ("<cup>", "mug", "box", "box", "box")]
    assert browser.evaluate("document.getElementById('class-title').textContent") == "Clouds of class box"
    assert min(browser.evaluate(INK % "#class-clouds")) > 500, "each cloud is drawn"
    captions = browser.evaluate("Array.from(document.querySelectorAll('#class-clouds figcaption'), e => e.innerText)")
    assert "taken for <cup>" in captions[0] and "recognised" in captions[2] and "cloud_4" in captions[0]

    browser.click("#confusion td[data-true='1'][data-predicted='0']")
    assert browser.evaluate(CARDS) == [["mug", "box"]], "one number of the matrix"
    before = browser.evaluate(PICTURE)
    browser.drag("#class-clouds canvas", 60, 10)
    assert browser.evaluate(PICTURE) != before, "it turns"

    browser.evaluate("(s => { s.value = 1; s.dispatchEvent(new Event('change')); })(document.getElementById('run'))")
    assert browser.evaluate("document.getElementById('score').textContent").startswith("4 of 12 clouds")
    browser.click("#confusion button[data-predicted='1']")
    assert {predicted for _, predicted in browser.evaluate(CARDS)} == {"mug"} and len(browser.evaluate(CARDS)) == 12
    assert browser.errors == []
    assert [address for address in browser.requests if not address.startswith("data:")] == [path.as_uri()]


def test_a_report_without_clouds_says_so(browser, tmp_path, no_plots):
    path = tmp_path / "report.html"
    path.write_text(build_report([run()]), encoding="utf-8")
    browser.open(path)
    assert browser.evaluate("document.getElementById('score').textContent") == "9 of 12 clouds recognised, 75.00 %"
    browser.click("#confusion button[data-true='1']")
    assert (
        browser.evaluate("document.getElementById('class-text').textContent") == "The report was made without clouds."
    )
    path.write_text(build_report([run(metrics={})]), encoding="utf-8")
    browser.open(path)
    assert browser.evaluate("document.getElementById('explorer').hidden")
    assert browser.errors == []
