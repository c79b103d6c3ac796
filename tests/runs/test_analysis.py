"""Models kept over training, and the analysis of a run: against evaluations by hand and a course known beforehand."""

import csv
import json
import math
import shutil

import pytest
import torch

from s2d3d import Trainer, create_dataset, evaluate, load_checkpoint, load_model, merge_experts
from s2d3d.datasets import BatchLoader
from s2d3d.errors import InputError
from s2d3d.runs.analysis import MOMENTUM, analysis_table, analyze_run
from s2d3d.runs.folder import RunFolder
from s2d3d.s2d.analysis import expert_divergence, expert_model, interpolate, predict_divergence


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return tmp_path_factory.mktemp("stock") / "run"


@pytest.fixture
def run(tiny_config, tmp_path, stock):
    """The folder of a run of 3 epochs with 3 experts in both blocks, each epoch's model kept; trained once, copied."""
    if not stock.exists():
        options = ("train.epochs=3", "train.keep_every=1", "s2d.num_experts=3", "s2d.every=1", "optim.lr=0.02")
        Trainer(tiny_config(*options, f"output_dir={stock}")).fit()
    return RunFolder(shutil.copytree(stock, tmp_path / "run"))


def log_rows(folder):
    with open(folder.log) as file:
        return list(csv.DictReader(file))


# Keeping models


def test_kept_models_are_those_of_their_epoch_and_the_log_has_their_divergence(run):
    assert [path.name for path in run.all_kept().values()] == ["epoch_001.pt", "epoch_002.pt", "epoch_003.pt"]
    last = load_checkpoint(run.last)["state_dict"]
    for (epoch, path), row in zip(run.all_kept().items(), log_rows(run)):
        payload = load_checkpoint(path)
        assert "optimizer" not in payload and int(row["epoch"]) == epoch
        by_layer = expert_divergence(load_model(path))
        assert len(by_layer) == 2 and float(row["divergence"]) == pytest.approx(sum(by_layer.values()) / 2, rel=1e-4)
        assert all(torch.equal(tensor, last[key]) for key, tensor in payload["state_dict"].items()) == (epoch == 3)


def test_keeping_does_not_change_the_run_and_a_new_run_removes_it(run, tiny_config, tmp_path):
    plain = Trainer(
        tiny_config(
            "train.epochs=3", "s2d.num_experts=3", "s2d.every=1", "optim.lr=0.02", f"output_dir={tmp_path / 'plain'}"
        )
    )
    plain.fit()
    assert not plain.folder.all_kept()
    ours, theirs = (load_checkpoint(folder.merged)["state_dict"] for folder in (plain.folder, run))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    Trainer(tiny_config("train.epochs=2", "train.keep_every=2"), force=True).fit()
    assert list(run.all_kept()) == [2]


def test_dense_run_has_no_divergence(tiny_config):
    trainer = Trainer(tiny_config("s2d.kind=none", "train.keep_every=1"))
    trainer.fit()
    assert [row["divergence"] for row in log_rows(trainer.folder)] == ["", ""]
    assert list(trainer.folder.all_kept()) == [1, 2]
    with pytest.raises(InputError, match=r"last\.pt: is dense, a sparse checkpoint is needed"):
        analyze_run(trainer.folder.root)


# The analysis


def test_every_figure_is_that_of_an_evaluation_by_hand(run, shapes_root):
    result = analyze_run(run.root, num_shapes=1000, num_positions=3)
    loader = BatchLoader(create_dataset("shapes", shapes_root, "test", num_points=128), 64)

    def measure(model):
        return evaluate(model, loader, device="cpu", progress=False)

    assert (result["num_experts"], result["num_shapes"]) == (3, 36)
    metrics = json.loads(run.metrics.read_text())
    assert result["checkpoints"][-1]["merged"]["oa"] == metrics["merged"]["oa"]
    assert [point["epoch"] for point in result["checkpoints"]] == [1, 2, 3]
    for point in result["checkpoints"]:
        sparse = load_model(run.kept(point["epoch"]))
        assert point["divergence"] == expert_divergence(sparse)
        alone = [expert_model(sparse, index) for index in range(3)]
        reports = [measure(model) for model in alone]
        assert [expert["loss"] for expert in point["experts"]] == [report.loss for report in reports]
        assert [expert["oa"] for expert in point["experts"]] == [report.oa for report in reports]
        mean_loss = sum(report.loss for report in reports) / 3
        assert point["gap"] == pytest.approx(mean_loss - point["merged"]["loss"], abs=1e-9)
        assert point["merged"]["loss"] == pytest.approx(measure(merge_experts(sparse)).loss, rel=1e-6)
        assert [line["experts"] for line in point["barriers"]] == [[0, 1], [0, 2], [1, 2]]
        for line in point["barriers"]:
            first, second = line["experts"]
            middle = measure(interpolate(alone[first], alone[second], 0.5)).loss
            ends = [reports[first].loss, reports[second].loss]
            assert line["losses"] == pytest.approx([ends[0], middle, ends[1]], rel=1e-6)
            assert line["height"] == pytest.approx(max(0, middle - sum(ends) / 2), abs=1e-6)
        assert point["highest_barrier"] == max(line["height"] for line in point["barriers"])
    losses = {point["epoch"]: point["merged"]["loss"] for point in result["checkpoints"]}
    assert [line["epochs"] for line in result["between_checkpoints"]] == [[1, 2], [2, 3], [1, 3]]
    for line in result["between_checkpoints"]:
        start, end = line["epochs"]
        assert (line["losses"][0], line["losses"][-1]) == pytest.approx((losses[start], losses[end]), rel=1e-6)
    for row, logged in zip(result["epochs"], log_rows(run), strict=True):
        assert row["contraction"] == pytest.approx(1 - float(logged["share_rate"]) * 3 / 2)
        assert row["divergence"] == float(logged["divergence"])
    table = analysis_table(result)
    for point in result["checkpoints"]:
        assert f"{100 * point['merged']['oa']:.2f} %" in table and f"{point['highest_barrier']:.4f}" in table


def write_log(run, divergence):
    """Put other divergences into the log of a run; None leaves the column out, as logs of older runs do."""
    rows = log_rows(run)
    columns = [key for key in rows[0] if divergence is not None or key != "divergence"]
    with open(run.log, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for index, row in enumerate(rows):
            writer.writerow(row | ({"divergence": divergence[index]} if divergence else {}))


def test_prediction_finds_the_constant_of_a_course_that_follows_it(run):
    rows = log_rows(run)
    for path in run.all_kept().values():
        path.unlink()  # the course is that of the log; one checkpoint is quicker
    # 6 updates an epoch; lr and share rate are straight between the values of the log, from 1e-6 and 0 on.
    rates, shares = [], []
    for key, start, values in (("lr", 1e-6, rates), ("share_rate", 0.0, shares)):
        for row in rows:
            values += [start + (float(row[key]) - start) * step / 6 for step in range(1, 7)]
            start = float(row[key])
    unit = predict_divergence(rates, shares, 3, correlation=MOMENTUM)[5::6]
    write_log(run, [3.5 * value for value in unit])
    result = analyze_run(run.root, num_shapes=12, num_positions=3)
    assert result["prediction"]["spread_per_lr"] == pytest.approx(3.5, rel=1e-4)
    assert result["prediction"]["typical_factor"] == pytest.approx(1, abs=1e-4)
    assert result["prediction"]["fitted_epochs"] == 3
    assert [row["predicted"] for row in result["epochs"]] == pytest.approx([3.5 * value for value in unit], rel=1e-4)
    # Pure noise: Adam's steps of size sqrt(0.1 / 1.9) lr, 2/3 of their square around the mean of three experts.
    sizes = []
    for layer in ("blocks.blocks.0.mlp", "blocks.blocks.1.mlp"):
        dense = load_model(run.merged).get_submodule(layer)
        sizes.append(float(torch.cat([p.detach().flatten() for p in dense.parameters()]).square().mean().sqrt()))
    noise = sum(math.sqrt(2 / 3 * 0.1 / 1.9) / size for size in sizes) / 2
    assert result["prediction"]["relative_to_noise"] == pytest.approx(3.5 / noise, rel=1e-4)
    # One epoch off by a factor of e^3: the fit is off by e^1, and the typical factor is the deviation of (1, 1, -2).
    write_log(run, [3.5 * unit[0], 3.5 * unit[1], 3.5 * unit[2] * math.exp(-3)])
    changed = analyze_run(run.root, num_shapes=12, num_positions=3)["prediction"]
    assert changed["spread_per_lr"] == pytest.approx(3.5 / math.e, rel=1e-4)
    assert changed["typical_factor"] == pytest.approx(math.exp(math.sqrt(2)), rel=1e-4)


def test_run_without_kept_models_or_logged_divergence(run):
    for path in run.all_kept().values():
        path.unlink()
    write_log(run, None)
    result = analyze_run(run.root, num_shapes=12, num_positions=3)
    assert [point["epoch"] for point in result["checkpoints"]] == [3]
    assert result["checkpoints"][0]["file"] == "last.pt" and result["num_shapes"] == 12
    assert result["between_checkpoints"] == [] and result["prediction"] is None
    assert len(result["epochs"]) == 3 and "predicted" not in result["epochs"][0]
    assert "only one checkpoint" in analysis_table(result)


def test_what_is_refused(run, tiny_config, tmp_path):
    with pytest.raises(InputError, match=r"last\.pt: no such file; the folder of an S2D run is needed"):
        analyze_run(tmp_path / "nothing")
    with pytest.raises(InputError, match="num_positions is 2"):
        analyze_run(run.root, num_positions=2)
    with pytest.raises(
        InputError, match="was trained on 12 classes, this set has 2; give the data set of its training"
    ):
        analyze_run(run.root, overrides=["data.classes=[box, cone]"])
    single = Trainer(tiny_config("s2d.num_experts=1", "train.epochs=2", f"output_dir={tmp_path / 'single'}"))
    single.fit()
    with pytest.raises(InputError, match="no RUP-MoF of several experts"):
        analyze_run(single.folder.root)
