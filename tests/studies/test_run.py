"""Running studies: pairs start alike, nothing is repeated or lost, and the tables come from the records alone."""

import json
import shutil
import signal
from functools import partialmethod
from pathlib import Path

import pytest
import torch

from s2d3d import Callback, Trainer, load_model, merge_experts
from s2d3d.config.data import build_dataset
from s2d3d.datasets import split_train_validation
from s2d3d.errors import InputError
from s2d3d.machine import start_runtime
from s2d3d.studies.page import report_text
from s2d3d.studies.plan import load_study
from s2d3d.studies.run import missing_cells, publish_records, run_study
from s2d3d.studies.store import note_failures, read_failures, read_records, records_path
from s2d3d.studies.summary import summarize
from s2d3d.training import task as task_module
from s2d3d.training.loaders import build_loaders
from s2d3d.training.parts import build_model

pytestmark = pytest.mark.usefixtures("enough_updates")

ARMS = {
    "dense": {"s2d.kind": "none"},
    "s2d": {},
    "routed": {"s2d.kind": "topk"},
    "independent": {"s2d.init": "independent"},
    "fast": {"s2d.lr_multiplier": 4},
}


SHORT = {"train.epochs": 1, "optim.warmup_epochs": 0}
"""Settings for runs of which only the order and the records matter."""


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


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return tmp_path_factory.mktemp("stock")


@pytest.fixture
def finished(write_study, results, tmp_path, stock):
    """The file of a study of seed 0 with its two run folders and its records, which are trained once and copied."""
    path = write_study(seeds=[0])
    if not any(stock.iterdir()):
        assert run_study(load_study(path), results=results).exit_code == 0
        shutil.copytree(results, stock / "results")
        shutil.copytree(tmp_path / "runs", stock / "runs")
    shutil.copytree(stock, tmp_path, dirs_exist_ok=True)
    return path


def change_record(results, cell, edit):
    """Rewrite the line of a run in its study's file; `edit` changes the record, or returns None for no line."""
    path = records_path(results, cell.study)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [record for record in records if (record["arm"], record["seed"]) != (cell.arm, cell.seed) or edit(record)]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))


def older(*keys):
    """Return an edit for `change_record`: keys such as ("s2d", "stop_fraction") go, two that all data sets had come."""

    def edit(record):
        for section, key in keys:
            del record["config"][section][key]
        record["config"]["data"] |= {"variant": None, "background": None}
        return True

    return edit


def summary_of(path, results):
    study = load_study(path)
    return summarize(study, read_records(results, study.cells))


# Pairing


def start_of(config):
    """First batch, initial dense weights and state of the random numbers of a run, as the trainer makes them."""
    runtime = start_runtime("cpu")
    data = build_loaders(config, runtime)
    parts = build_model(config, runtime, data.class_names)
    batches = []
    for epoch in range(2):
        data.train.set_position(epoch)
        batches += [points for points, _ in data.train]
    model = parts.model
    if parts.routed:  # the dense model: the first expert, as all are copies
        model = merge_experts(model, allow_average=True)
    return torch.cat(batches), merge_experts(model).state_dict(), data.scored.dataset.names


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
    path = write_study(common=SHORT)
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
    study = load_study(write_study(common=SHORT))
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


def test_an_interrupted_run_goes_on_where_it_was(finished, results, tmp_path, fits, monkeypatch):
    path, whole = finished, load_study(finished)
    expected = read_records(results, whole.cells)
    shutil.rmtree(results)
    shutil.rmtree(tmp_path / "runs")
    fits.clear()
    plain = Trainer.__init__

    class Struck(Callback):
        def on_update(self, trainer):
            if trainer.config.s2d.kind == "rup" and trainer.progress.updates == 5:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "__init__", partialmethod(Trainer.__init__, callbacks=[Struck()]))
    outcome = run_study(load_study(path), results=results)
    assert outcome.exit_code == 128 + signal.SIGTERM and [str(cell) for cell in outcome.finished] == ["dense/seed0"]
    monkeypatch.setattr(Trainer, "__init__", plain)
    outcome = run_study(load_study(path), results=results)
    assert outcome.exit_code == 0 and fits == [("dense/seed0", False), ("s2d/seed0", False), ("s2d/seed0", True)]
    again = read_records(results, whole.cells)
    for key, record in expected.items():
        for part in ("results", "curve", "shapes", "updates", "config"):
            assert again[key][part] == record[part], (key, part)
    starts = {arm: len(record["environment"].get("earlier", [])) for (arm, _), record in again.items()}
    assert starts == {"dense": 0, "s2d": 1}, "the record names each start"


def test_a_run_that_ended_without_its_record_gets_it_without_training(finished, results, fits):
    study = load_study(finished)
    fits.clear()
    path = records_path(results, "tiny")
    before = path.read_bytes()
    first = before.splitlines(keepends=True)[0]
    path.write_bytes(first)
    assert missing_cells(study, results, write=False) == [] and path.read_bytes() == first
    run_study(study, results=results)
    assert fits == [] and path.read_bytes() == before
    path.unlink()
    publish_records(study, results)
    assert path.read_bytes() == before


def test_a_run_that_fails_is_reported_and_the_others_go_on(write_study, results, caplog):
    bad = {"optim.lr": 1e30, "optim.warmup_epochs": 0, "optim.clip_grad": None}
    arms = {"dense": {"s2d.kind": "none"}, "bad": bad, "s2d": {}}
    study = load_study(write_study(arms=arms, seeds=[0], common=SHORT))
    outcome = run_study(study, results=results)
    assert outcome.exit_code == 1 and [str(cell) for cell in outcome.finished] == ["dense/seed0", "s2d/seed0"]
    assert list(outcome.failed) == ["bad/seed0"] and "not finite" in outcome.failed["bad/seed0"]
    assert any("bad/seed0 failed: loss" in message for message in caplog.messages)
    failed = read_failures(results, study.config.name)
    summary = summarize(study, read_records(results, study.cells), failed)
    assert summary["empty"] == [["bad", 0]] and failed == outcome.failed
    assert (
        f"- bad: seed 0\n\nOf these, the following were started and failed:\n\n- bad/seed0: {failed['bad/seed0']}\n"
        in (report_text(summary, "command"))
    )
    note_failures(results, study.config.name, {}, [("dense", 0)])
    assert read_failures(results, study.config.name) == failed
    note_failures(results, study.config.name, {}, [("bad", 0)])
    assert not read_failures(results, study.config.name), "it was run again"


def test_a_changed_config_of_a_finished_run_is_refused_in_one_line(finished, write_study, results, fits):
    fits.clear()
    changed = load_study(write_study(seeds=[0], arms={"dense": {"s2d.kind": "none"}, "s2d": {"s2d.share_rate": 0.1}}))
    path = records_path(results, "tiny")
    with pytest.raises(InputError) as caught:
        run_study(changed, results=results)
    advice = "name the study anew, or remove this line"
    assert str(caught.value) == f"{path}: line 2: is of a run with s2d.share_rate=0.3, the study says 0.1; {advice}"
    change_record(results, changed.cells[1], lambda record: None)  # the run folder alone says it as well
    with pytest.raises(InputError, match=r"s2d/seed0: holds a run with s2d\.share_rate=0\.3, the study says 0\.1; "):
        run_study(changed, results=results)
    assert fits == []


def test_where_and_how_fast_it_computes_may_change(finished, results, tmp_path, shapes_root, fits):
    fits.clear()
    other = tmp_path / "other_place"
    other.symlink_to(shapes_root)
    overrides = [f"data.root={other}", "train.num_threads=1", "log.interval=3", "train.device=cpu"]
    assert run_study(load_study(finished, overrides), results=results).finished == [] and fits == []


def test_a_record_from_before_a_key_existed_counts_with_its_default(finished, results):
    study = load_study(finished)
    change_record(results, study.cells[0], older(("s2d", "stop_fraction"), ("eval", "votes")))
    assert missing_cells(study, results) == []


def test_the_same_run_of_another_study_is_taken_over(finished, write_study, results, tmp_path, fits):
    first = load_study(finished)
    fits.clear()
    change_record(results, first.cells[0], older(("s2d", "stop_fraction")))  # as in a record older than this key
    arms = {"twin": {"s2d.kind": "none"}, "three": {"s2d.num_experts": 3}}
    other = load_study(
        write_study(name="other", seeds=[0], arms=arms, reference="twin", output_dir=str(tmp_path / "runs2"))
    )
    assert [str(cell) for cell in missing_cells(other, results, write=False)] == ["three/seed0"]
    assert not records_path(results, "other").exists(), "nothing is written when it is only asked what is missing"
    run_study(other, results=results)
    assert [name for name, _ in fits] == ["three/seed0"]
    records = read_records(results, other.cells)
    assert records["twin", 0]["same_run_as"] == "tiny/dense/seed0" and records["twin", 0]["study"] == "other"
    assert "same_run_as" not in records["three", 0]


def test_a_run_of_other_data_is_not_taken_over(write_study, results, tmp_path, shapes_root, fits):
    other = shutil.copytree(shapes_root, tmp_path / "other_set")
    arms = {"dense": {"s2d.kind": "none"}, "elsewhere": {"s2d.kind": "none", "data.root": str(other)}}
    study = load_study(write_study(seeds=[0], arms=arms, common=SHORT))
    run_study(study, results=results)
    assert [name for name, _ in fits] == ["dense/seed0", "elsewhere/seed0"]
    arms = {"dense": arms["elsewhere"], "elsewhere": arms["dense"]}
    swapped = load_study(write_study(seeds=[0], arms=arms, common=SHORT))
    with pytest.raises(
        InputError, match=r"tiny\.jsonl: line 1: is of a run with data\.root=\.\.\./\S+, the study says"
    ):
        read_records(results, swapped.cells)


def test_overrides_stand_on_the_page(write_study, results, tmp_path):
    study = load_study(write_study(seeds=[0]), ["train.epochs=1", "optim.warmup_epochs=0", "train.device=cpu"])
    assert study.overrides == ("train.epochs=1", "optim.warmup_epochs=0"), "how it is computed does not"
    summary = summarize(study, {})
    assert summary["overrides"] == ["train.epochs=1", "optim.warmup_epochs=0"]
    assert "with `train.epochs=1` in all configurations from the command line" in report_text(summary, "command")


# Protocol


@pytest.mark.parametrize(("evaluate", "split"), [("validation", "val"), ("test", "test")])
def test_only_the_named_split_is_scored(write_study, results, monkeypatch, evaluate, split):
    scored = []

    def watch(name):
        original = getattr(task_module, name)

        def watched(model, loader, **kwargs):
            scored.append(loader.dataset.split)
            return original(model, loader, **kwargs)

        monkeypatch.setattr(task_module, name, watched)

    watch("evaluate")
    watch("score")
    common = {"data.val_fraction": 0.25 if evaluate == "validation" else 0}
    study = load_study(write_study(evaluate=evaluate, seeds=[0], common=common))
    run_study(study, results=results, only=["s2d"])
    ending = [split] * 2  # the sparse and the merged model
    assert scored == (["val"] * 2 + ending if evaluate == "validation" else ending), "epochs, then the end"
    record = read_records(results, study.cells)["s2d", study.cells[1].seed]
    assert record["split"] == evaluate
    metrics = json.loads(Path(study.cells[1].config.output_dir, "metrics.json").read_text())
    assert metrics["split"] == evaluate and metrics["selection"] == "last epoch"


def test_a_test_curve_holds_each_epoch_and_ends_with_the_result(write_study, results):
    common = {
        "data.val_fraction": 0,
        "train.epochs": 5,
        "train.keep_every": 1,
        "model.init_std": 0.1,
        "model.head_dropout": 0,
    }
    study = load_study(write_study(evaluate="test", seeds=[0], common=common, curve="test"))
    run_study(study, results=results, only=["s2d"])
    record, config = read_records(results, study.cells)["s2d", 0], study.cells[1].config
    test = build_dataset(config.data, "test", seed=0)
    points, labels = test.batch(torch.arange(len(test)))
    expected = []
    for epoch in range(1, 6):
        model = load_model(f"{config.output_dir}/checkpoints/epoch_{epoch:03d}.pt").eval()
        with torch.no_grad():
            expected.append((model(points).argmax(1) == labels).double().mean().item())
    assert record["curve"]["test_oa"] == pytest.approx(expected, abs=1e-5)
    assert record["curve"]["test_oa"][-1] == record["results"]["merged"]["oa"] and len(set(expected)) > 1


def test_marks_in_a_record_are_those_of_the_merged_model_shape_by_shape(finished, results):
    study = load_study(finished)
    config = study.cells[1].config
    _, validation = split_train_validation(build_dataset(config.data, "train", seed=0), 0.25, 0)
    model = load_model(f"{config.output_dir}/merged.pt")
    points, labels = validation.batch(torch.arange(len(validation)))
    with torch.no_grad():
        expected = "".join("01"[hit] for hit in (model(points).argmax(1) == labels).tolist())
    record = read_records(results, study.cells)["s2d", study.cells[1].seed]
    assert record["results"]["merged"]["correct"] == expected and len(set(expected)) == 2
    assert record["curve"]["val_oa"][-1] == pytest.approx(record["results"]["merged"]["oa"], abs=1e-5), "last epoch"


def test_a_row_is_the_model_that_the_run_saved(write_study, results, shapes_root):
    """Behind the experts of a Point Transformer stands BatchNorm, whose statistics are re-estimated once merged."""
    sizes = {"name": "point_transformer_tiny", "channels": [16, 32], "depths": [0, 2], "strides": [1, 4]}
    model = sizes | {"num_neighbors": [4, 4], "mlp_ratio": 2.0}
    study = load_study(write_study(seeds=[0], common={"model": model, "s2d.every": 1}))
    run_study(study, results=results, only=["s2d"])
    records = read_records(results, study.cells)
    record = records["s2d", 0]
    assert record["kept"] == "recalibrated"
    assert record["results"]["recalibrated"]["correct"] != record["results"]["merged"]["correct"]
    _, validation = split_train_validation(build_dataset(study.cells[1].config.data, "train", seed=0), 0.25, 0)
    points, labels = validation.batch(torch.arange(len(validation)))
    saved = load_model(f"{study.cells[1].config.output_dir}/merged.pt")
    with torch.no_grad():
        expected = (saved(points).argmax(1) == labels).double().mean().item()
    merged = record["results"]["merged"]["oa"]
    row = summarize(study, records)["rows"][1]
    assert (row["form"], row["oa"]["0"]) == ("recalibrated", pytest.approx(expected)) and expected != merged
    old = {key: value for key, value in record.items() if key != "kept"}  # as records were before they said it
    assert summarize(study, {("s2d", 0): old})["rows"][1] == row


def test_a_record_names_no_folder_of_this_machine(finished, results, tmp_path, stock, shapes_root):
    text = records_path(results, "tiny").read_text()
    assert not any(str(path) in text for path in (tmp_path.parent, stock.parent, shapes_root))
