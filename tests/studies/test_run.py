"""Running studies: pairs start alike, nothing is repeated or lost, and the tables come from the records alone."""

import json
import shutil
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from s2d3d import Trainer, load_model, merge_experts
from s2d3d.config.data import build_dataset
from s2d3d.datasets import split_train_validation
from s2d3d.errors import InputError
from s2d3d.machine import start_runtime
from s2d3d.studies.page import report_lines, report_text
from s2d3d.studies.plan import load_study
from s2d3d.studies.record import read_records, record_path
from s2d3d.studies.run import missing_cells, run_study
from s2d3d.studies.stats import (
    bonferroni_level,
    correctness,
    detectable_difference,
    hierarchical_bootstrap,
    holm,
    paired_t,
)
from s2d3d.studies.summary import summarize
from s2d3d.training import trainer as trainer_module

ARMS = {
    "dense": {"s2d.kind": "none"},
    "s2d": {},
    "routed": {"s2d.kind": "topk"},
    "independent": {"s2d.init": "independent"},
    "fast": {"s2d.lr_multiplier": 4},
}


@pytest.fixture
def fits(monkeypatch):
    """Count the calls of Trainer.fit by run folder, with the value of `resume`."""
    calls, original = [], Trainer.fit

    def fit(self, resume=None):
        calls.append(("/".join(self.config.output_dir.split("/")[-2:]), resume is not None))
        return original(self, resume)

    monkeypatch.setattr(Trainer, "fit", fit)
    return calls


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def summary_of(path, results):
    study = load_study(path)
    return summarize(study, read_records(results, study.cells))


# Pairing


def start_of(config):
    """First batch, initial dense weights and state of the random numbers of a run, as the trainer makes them."""
    trainer = Trainer(config)
    trainer.runtime = start_runtime("cpu")
    trainer._build_data()
    trainer._build_model()
    batches = []
    for epoch in range(2):
        trainer.train_loader.set_position(epoch)
        batches += [points for points, _ in trainer.train_loader]
    model = trainer.model
    if trainer.routed:  # its dense twin: the first expert, as all are copies
        model = merge_experts(model, allow_average=True)
    return torch.cat(batches), merge_experts(model).state_dict(), trainer.scored_loader.dataset.names


@pytest.mark.parametrize("seed", [0, 1])
def test_arms_of_a_seed_have_the_same_weights_batches_and_augmentation(write_study, seed):
    cells = [cell for cell in load_study(write_study(arms=ARMS)).cells if cell.seed == seed]
    batches, weights, names = start_of(cells[0].config)
    assert cells[0].arm == "dense" and len(batches) == 2 * 64
    for cell in cells[1:]:
        other_batches, other_weights, other_names = start_of(cell.config)
        assert torch.equal(batches, other_batches) and names == other_names, cell
        assert weights.keys() == other_weights.keys()
        for key, weight in weights.items():
            if cell.arm == "independent" and ".1.mlp." in key:  # the mean of experts that are drawn anew
                continue
            assert torch.equal(weight, other_weights[key]), (cell, key)


def test_seeds_differ_in_all_of_them(write_study):
    first, second = (cell.config for cell in load_study(write_study()).cells if cell.arm == "dense")
    (batches, weights, names), (other_batches, other_weights, other_names) = start_of(first), start_of(second)
    assert not torch.equal(batches, other_batches) and names != other_names
    assert not torch.equal(weights["cls_head_finetune.0.weight"], other_weights["cls_head_finetune.0.weight"])


# Nothing twice, nothing lost


def test_a_study_runs_everything_once_and_a_second_call_nothing(write_study, results, tmp_path, fits):
    path = write_study()
    outcome = run_study(load_study(path), results=results)
    assert outcome.exit_code == 0 and [str(cell) for cell in outcome.finished] == [
        "dense/seed0", "s2d/seed0", "dense/seed1", "s2d/seed1",
    ]  # fmt: skip
    assert fits == [(str(cell), False) for cell in outcome.finished]
    first = summary_of(path, results)
    assert run_study(load_study(path), results=results).finished == [] and len(fits) == 4
    assert summary_of(path, results) == first and first["empty"] == []
    shutil.rmtree(tmp_path / "runs")  # neither run folders nor data are needed
    assert run_study(load_study(path, ["data.root=nowhere"]), results=results).finished == [] and len(fits) == 4
    assert summary_of(path, results) == first


def test_runs_may_be_limited_to_arms_and_to_a_number(write_study, results, fits):
    study = load_study(write_study())
    assert len(run_study(study, results=results, only=["s2d"], max_runs=1).finished) == 1
    run_study(study, results=results, only=["s2d"])
    assert [name for name, _ in fits] == ["s2d/seed0", "s2d/seed1"]
    assert [str(cell) for cell in missing_cells(study, results)] == ["dense/seed0", "dense/seed1"]
    summary = summarize(study, read_records(results, study.cells))
    assert summary["empty"] == [["dense", 0], ["dense", 1]]
    (comparison,) = summary["comparisons"]
    assert comparison["n"] == 0 and comparison["mean"] is None
    for name, value in (("jobs", 0), ("max_runs", 0)):
        with pytest.raises(InputError, match=f"{name} is 0, must be at least 1"):
            run_study(study, results=results, **{name: value})


def test_an_interrupted_run_goes_on_where_it_was(write_study, results, tmp_path, fits, monkeypatch):
    path = write_study(seeds=[0])
    whole = load_study(path)
    run_study(whole, results=results)
    expected = read_records(results, whole.cells)
    shutil.rmtree(results)
    shutil.rmtree(tmp_path / "runs")
    fits.clear()
    after_update = Trainer._after_update

    def struck(self, bar):
        if self.config.s2d.kind == "rup" and self.progress.updates == 5:
            signal.raise_signal(signal.SIGTERM)
        after_update(self, bar)

    monkeypatch.setattr(Trainer, "_after_update", struck)
    outcome = run_study(load_study(path), results=results)
    assert outcome.exit_code == 128 + signal.SIGTERM and [str(cell) for cell in outcome.finished] == ["dense/seed0"]
    monkeypatch.setattr(Trainer, "_after_update", after_update)
    outcome = run_study(load_study(path), results=results)
    assert outcome.exit_code == 0 and fits == [("dense/seed0", False), ("s2d/seed0", False), ("s2d/seed0", True)]
    again = read_records(results, whole.cells)
    for key, record in expected.items():
        for part in ("results", "curve", "shapes", "updates", "config"):
            assert again[key][part] == record[part], (key, part)


def test_a_run_that_ended_without_its_record_gets_it_without_training(write_study, results, fits):
    study = load_study(write_study(seeds=[0]))
    run_study(study, results=results)
    before = [record_path(results, cell).read_bytes() for cell in study.cells]
    record_path(results, study.cells[1]).unlink()
    assert missing_cells(study, results, write=False) == [] and not record_path(results, study.cells[1]).exists()
    run_study(study, results=results)
    assert len(fits) == 2
    assert [record_path(results, cell).read_bytes() for cell in study.cells] == before


def test_a_run_that_fails_is_reported_and_the_others_go_on(write_study, results, caplog):
    bad = {"optim.lr": 1e30, "optim.warmup_epochs": 0, "optim.clip_grad": None}
    arms = {"dense": {"s2d.kind": "none"}, "bad": bad, "s2d": {}}
    study = load_study(write_study(arms=arms, seeds=[0]))
    outcome = run_study(study, results=results)
    assert outcome.exit_code == 1 and [str(cell) for cell in outcome.finished] == ["dense/seed0", "s2d/seed0"]
    assert list(outcome.failed) == ["bad/seed0"] and "not finite" in outcome.failed["bad/seed0"]
    assert any("bad/seed0 failed: loss" in message for message in caplog.messages)
    assert summarize(study, read_records(results, study.cells))["empty"] == [["bad", 0]]


def test_a_changed_config_of_a_finished_run_is_refused_in_one_line(write_study, results, fits):
    run_study(load_study(write_study(seeds=[0])), results=results)
    changed = load_study(write_study(seeds=[0], arms={"dense": {"s2d.kind": "none"}, "s2d": {"s2d.share_rate": 0.1}}))
    record = record_path(results, changed.cells[1])
    with pytest.raises(InputError) as caught:
        run_study(changed, results=results)
    advice = "name the study anew, or remove this file"
    assert str(caught.value) == f"{record}: is of a run with s2d.share_rate=0.3, the study says 0.1; {advice}"
    record.unlink()  # the run folder alone says it as well
    with pytest.raises(InputError, match=r"s2d/seed0: holds a run with s2d\.share_rate=0\.3, the study says 0\.1; "):
        run_study(changed, results=results)
    assert len(fits) == 2


def test_where_and_how_fast_it_computes_may_change(write_study, results, tmp_path, shapes_root, fits):
    path = write_study(seeds=[0])
    run_study(load_study(path), results=results)
    other = tmp_path / "other_place"
    other.symlink_to(shapes_root)
    overrides = [f"data.root={other}", "train.num_threads=1", "log.interval=3", "train.device=cpu"]
    assert run_study(load_study(path, overrides), results=results).finished == [] and len(fits) == 2


def test_a_record_from_before_a_key_existed_counts_with_its_default(write_study, results):
    study = load_study(write_study(seeds=[0]))
    run_study(study, results=results)
    path = record_path(results, study.cells[0])
    record = json.loads(path.read_text())
    del record["config"]["s2d"]["stop_fraction"], record["config"]["eval"]["votes"]
    record["config"]["data"] |= {"variant": None, "background": None}  # which every data set had
    path.write_text(json.dumps(record))
    assert missing_cells(study, results) == []


def test_the_same_run_of_another_study_is_taken_over(write_study, results, tmp_path, fits):
    first = load_study(write_study(seeds=[0]))
    run_study(first, results=results)
    path = record_path(results, first.cells[0])
    record = json.loads(path.read_text())
    del record["config"]["s2d"]["stop_fraction"]  # as one of before there was this key
    record["config"]["data"] |= {"variant": None, "background": None}  # which every data set had
    path.write_text(json.dumps(record))
    arms = {"twin": {"s2d.kind": "none"}, "three": {"s2d.num_experts": 3}}
    other = load_study(
        write_study(name="other", seeds=[0], arms=arms, reference="twin", output_dir=str(tmp_path / "runs2"))
    )
    assert [str(cell) for cell in missing_cells(other, results, write=False)] == ["three/seed0"]
    assert not record_path(results, other.cells[0]).exists(), "nothing is written when it is only asked what is missing"
    run_study(other, results=results)
    assert [name for name, _ in fits] == ["dense/seed0", "s2d/seed0", "three/seed0"]
    records = read_records(results, other.cells)
    assert records["twin", 0]["same_run_as"] == "tiny/dense/seed0" and records["twin", 0]["study"] == "other"
    assert "same_run_as" not in records["three", 0]


def test_a_run_of_other_data_is_not_taken_over(write_study, results, tmp_path, shapes_root, fits):
    other = shutil.copytree(shapes_root, tmp_path / "other_set")
    arms = {"dense": {"s2d.kind": "none"}, "elsewhere": {"s2d.kind": "none", "data.root": str(other)}}
    study = load_study(write_study(seeds=[0], arms=arms))
    run_study(study, results=results)
    assert [name for name, _ in fits] == ["dense/seed0", "elsewhere/seed0"]
    swapped = load_study(write_study(seeds=[0], arms={**arms, "dense": arms["elsewhere"], "elsewhere": arms["dense"]}))
    with pytest.raises(InputError, match=r"dense/seed0\.json: is of a run with data\.root=\.\.\./\S+, the study says"):
        read_records(results, swapped.cells)


def test_overrides_stand_on_the_page(write_study, results, tmp_path):
    study = load_study(write_study(seeds=[0]), ["train.epochs=1", "optim.warmup_epochs=0", "train.device=cpu"])
    assert study.overrides == ("train.epochs=1", "optim.warmup_epochs=0"), "how it is computed does not"
    summary = summarize(study, {})
    assert summary["overrides"] == ["train.epochs=1", "optim.warmup_epochs=0"]
    assert "with `train.epochs=1` in all arms from the command line" in report_text(summary, "command")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "not a JSON file"),
        (lambda text: text.replace('"split"', '"spilt"'), "no record of a run, its split is missing or wrong"),
        (lambda text: text.replace('"correct":"', '"correct":"1'), "no record of a run, its results do not add up"),
        (lambda text: text.replace('"loss":', '"los":'), "no record of a run, its results do not add up"),
        (lambda text: text.replace('"train_loss":', '"loss":'), "no record of a run, its curve is missing or wrong"),
    ],
)
def test_a_damaged_record_is_named(write_study, results, damage, message):
    study = load_study(write_study(seeds=[0]))
    run_study(study, results=results, only=["dense"])
    path = record_path(results, study.cells[0])
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError) as caught:
        missing_cells(study, results)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


# Protocol


@pytest.mark.parametrize(("evaluate", "split"), [("validation", "val"), ("test", "test")])
def test_only_the_named_split_is_scored(write_study, results, monkeypatch, evaluate, split):
    scored, original = [], trainer_module.evaluate

    def watched(model, loader, **kwargs):
        scored.append(loader.dataset.split)
        return original(model, loader, **kwargs)

    monkeypatch.setattr(trainer_module, "evaluate", watched)
    common = {"data.val_fraction": 0.25 if evaluate == "validation" else 0}
    study = load_study(write_study(evaluate=evaluate, seeds=[0], common=common))
    run_study(study, results=results, only=["s2d"])
    ending = [split] * 2  # the sparse and the merged model
    assert scored == (["val"] * 2 + ending if evaluate == "validation" else ending), "epochs, then the end"
    record = json.loads(record_path(results, study.cells[1]).read_text())
    assert record["split"] == evaluate
    metrics = json.loads(Path(study.cells[1].config.output_dir, "metrics.json").read_text())
    assert metrics["split"] == evaluate and metrics["selection"] == "last epoch"


def test_marks_in_a_record_are_those_of_the_merged_model_shape_by_shape(write_study, results):
    study = load_study(write_study(seeds=[1]))
    run_study(study, results=results, only=["s2d"])
    config = study.cells[1].config
    _, validation = split_train_validation(build_dataset(config.data, "train", seed=1), 0.25, 1)
    model = load_model(f"{config.output_dir}/merged.pt")
    points, labels = validation.batch(torch.arange(len(validation)))
    with torch.no_grad():
        expected = "".join("01"[hit] for hit in (model(points).argmax(1) == labels).tolist())
    record = json.loads(record_path(results, study.cells[1]).read_text())
    assert record["results"]["merged"]["correct"] == expected and len(set(expected)) == 2
    assert record["curve"]["val_oa"][-1] == pytest.approx(record["results"]["merged"]["oa"], abs=1e-5), "last epoch"


def test_a_record_names_no_folder_of_this_machine(write_study, results, tmp_path, shapes_root):
    study = load_study(write_study(seeds=[0]))
    run_study(study, results=results, only=["dense"])
    text = record_path(results, study.cells[0]).read_text()
    assert str(tmp_path) not in text and str(shapes_root) not in text


# Tables, from records as runs write them, without runs


def made_up(study, seed=0):
    """A record for every run of a study: marks drawn at random, arms of a seed scored on the same shapes."""
    rng = np.random.default_rng(seed)
    environment = {
        "python": "3",
        "packages": {"torch": "2"},
        "processor": "a CPU",
        "num_threads": 1,
        "git_commit": "c0",
    }
    records = {}
    for cell in study.cells:
        marks = {form: "".join(rng.choice(["0", "1"], 50, p=[0.3, 0.7])) for form in ("merged", "ema")}
        results = {
            form: {"oa": text.count("1") / 50, "macc": text.count("1") / 60, "loss": rng.random(), "correct": text}
            for form, text in marks.items()
        }
        records[cell.arm, cell.seed] = {
            "shapes": f"those of seed {cell.seed}", "updates": 12, "train_seconds": 10.0 * len(cell.arm) + cell.seed,
            "parameters": {"training": 1000 * cell.config.s2d.num_experts, "merged": 1000}, "results": results,
            "environment": environment, "curve": {"train_loss": [2.0, rng.random()]},
        }  # fmt: skip
    return records


@pytest.fixture
def three_arms(write_study):
    arms = {"dense": {"s2d.kind": "none"}, "s2d": {"train.ema_decay": 0.5}, "k2": {"s2d.num_experts": 2}}
    return load_study(write_study(arms=arms, seeds=[0, 1, 2], forms={"s2d_ema": "s2d.ema"}))


def test_the_summary_is_what_the_records_say(three_arms):
    records = made_up(three_arms)
    summary = summarize(three_arms, records)
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["dense", "s2d", "k2", "s2d_ema"] and rows["s2d_ema"]["form"] == "ema"
    for name, arm, form in (("dense", "dense", "merged"), ("k2", "k2", "merged"), ("s2d_ema", "s2d", "ema")):
        oa = [records[arm, seed]["results"][form]["oa"] for seed in (0, 1, 2)]
        assert rows[name]["oa_mean"] == pytest.approx(statistics.fmean(oa))
        assert rows[name]["oa_std"] == pytest.approx(statistics.stdev(oa))
        assert list(rows[name]["oa"].values()) == oa
        assert rows[name]["train_seconds_mean"] == 10 * len(arm) + 1
    assert rows["s2d"]["parameters"] == {"training": 4000, "merged": 1000}
    assert summary["num_comparisons"] == len(summary["comparisons"]) == 3 and summary["empty"] == []
    for item, p in zip(summary["comparisons"], holm([item["p"] for item in summary["comparisons"]])):
        arm, form = three_arms.config.row(item["name"])
        sides = ((arm, form or "merged"), ("dense", "merged"))
        marks = [
            [correctness(records[side, seed]["results"][form]["correct"]) for side, form in sides] for seed in (0, 1, 2)
        ]
        differences = [ours.mean() - theirs.mean() for ours, theirs in marks]
        test = paired_t(differences)
        assert item["n"] == 3 and item["p_holm"] == p
        assert (item["mean"], item["p"]) == pytest.approx((test.mean, test.p))
        assert (item["t_low"], item["t_high"]) == pytest.approx((test.low, test.high))
        wide = paired_t(differences, bonferroni_level(3))
        assert (item["bonferroni_low"], item["bonferroni_high"]) == pytest.approx((wide.low, wide.high))
        bounds = hierarchical_bootstrap([ours - theirs for ours, theirs in marks], crossed=False)
        assert (item["bootstrap_low"], item["bootstrap_high"]) == bounds
        assert item["equal_updates"] is True
        assert item["detectable"] == pytest.approx(detectable_difference(test.std, 3))
        losses = [[records[side, seed]["results"][form]["loss"] for side, form in sides] for seed in (0, 1, 2)]
        last = [[records[side, seed]["curve"]["train_loss"][1] for side, _ in sides] for seed in (0, 1, 2)]
        for key, pairs in (("scored", losses), ("training", last)):
            test = paired_t([ours - theirs for ours, theirs in pairs])
            assert item["losses"][key] == {"mean": test.mean, "t_low": test.low, "t_high": test.high}


def test_shapes_of_a_test_split_are_drawn_once_for_all_seeds(write_study):
    study = load_study(write_study(evaluate="test", common={"data.val_fraction": 0}))
    records = {key: {**record, "shapes": "all"} for key, record in made_up(study).items()}
    summary = summarize(study, records)
    parts = []
    for seed in (0, 1):
        ours, theirs = (records[arm, seed]["results"]["merged"]["correct"] for arm in ("s2d", "dense"))
        parts.append(correctness(ours) - correctness(theirs))
    (item,) = summary["comparisons"]
    assert (item["bootstrap_low"], item["bootstrap_high"]) == hierarchical_bootstrap(parts, crossed=True)
    assert "shapes are drawn once for all seeds of a resample" in report_text(summary, "command")


def test_the_page_states_every_number_and_what_was_corrected(three_arms):
    summary = summarize(three_arms, made_up(three_arms))
    text = report_text(summary, "python tools/study.py configs/studies/tiny.yaml")
    table, losses = (
        {line.split(" | ")[0].removeprefix("| "): line for line in part.splitlines() if line.startswith("| ")}
        for part in text.split("## Paired differences in loss")
    )
    for row in summary["rows"]:
        line = next(value for key, value in table.items() if key.split(" ")[0] == row["name"] and " - " not in key)
        assert f"{100 * row['oa_mean']:.2f} +- {100 * row['oa_std']:.2f}" in line
        assert all(f"| {100 * value:.2f} |" in line for value in row["oa"].values())
        assert f"{row['parameters']['training']:,} / 1,000" in line
    for item in summary["comparisons"]:
        line = table[f"{item['name']} - {item['reference']}"]
        assert f"| {100 * item['mean']:+.2f} | [{100 * item['t_low']:+.2f}, {100 * item['t_high']:+.2f}] |" in line
        assert f"[{100 * item['bonferroni_low']:+.2f}, {100 * item['bonferroni_high']:+.2f}]" in line
        assert f"| {100 * item['detectable']:.2f} |" in line
        line = losses[f"{item['name']} - {item['reference']}"]
        for loss in item["losses"].values():
            assert f"| {loss['mean']:+.4f} [{loss['t_low']:+.4f}, {loss['t_high']:+.4f}] |" in line
    assert "3 comparison(s)" in text and "Holm" in text and "10,000 resamples" in text
    assert "None: every arm has all its seeds." in text
    assert "(50 shapes), the test split was left alone" in text and "last epoch" in text
    assert any(line.startswith("s2d - dense") and "(n = 3)" in line for line in report_lines(summary))


def test_empty_cells_are_listed_and_still_count_in_the_correction(three_arms):
    records = made_up(three_arms)
    for seed in (0, 2):
        del records["k2", seed]
    summary = summarize(three_arms, records)
    assert summary["empty"] == [["k2", 0], ["k2", 2]]
    by_name = {item["name"]: item for item in summary["comparisons"]}
    assert by_name["k2"]["n"] == 1 and by_name["k2"]["p"] is None and by_name["k2"]["mean"] is not None
    smallest = min(by_name["s2d"]["p"], by_name["s2d_ema"]["p"])
    assert min(by_name["s2d"]["p_holm"], by_name["s2d_ema"]["p_holm"]) == pytest.approx(min(1, 3 * smallest))
    assert by_name["k2"]["losses"]["scored"]["t_low"] is None and by_name["k2"]["detectable"] is None
    text = report_text(summary, "command")
    assert "\n- k2: seed 0, 2\n" in text and "| empty |" in text


def test_arms_that_were_not_scored_on_the_same_shapes_are_not_compared(three_arms):
    records = made_up(three_arms)
    records["k2", 1]["shapes"] = "others"
    with pytest.raises(InputError, match="'k2' and 'dense' were not scored on the same shapes with seed 1"):
        summarize(three_arms, records)


def test_a_form_that_runs_do_not_have_is_named(three_arms):
    records = made_up(three_arms)
    del records["s2d", 2]["results"]["ema"]
    with pytest.raises(InputError, match=r"forms\.s2d_ema: runs of 's2d' have no form 'ema', they have merged"):
        summarize(three_arms, records)


def test_another_number_of_updates_is_said(three_arms):
    records = made_up(three_arms)
    records["k2", 1]["updates"] = 13
    summary = summarize(three_arms, records)
    assert [item["equal_updates"] for item in summary["comparisons"]] == [True, False, True]
    assert "k2 - dense (other number of updates)" in report_text(summary, "command")
