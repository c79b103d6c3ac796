"""Few-shot folds: which classes and shapes they get, that nothing is repeated, and what is refused."""

import json

import pytest
import torch

from s2d3d import evaluate, load_model
from s2d3d.atomic import read_json
from s2d3d.config.data import build_test_loader
from s2d3d.config.load import load_config, parse_config
from s2d3d.datasets import create_dataset
from s2d3d.errors import InputError
from s2d3d.runs.folder import RunFolder
from s2d3d.studies.few_shot import (
    FewShotTask,
    draw_classes,
    draw_shapes,
    fold_config,
    fold_datasets,
    run_folds,
    summarize,
    summary_line,
)
from s2d3d.training.trainer import Trainer

TASK = FewShotTask(ways=3, shots=4, queries=2)


@pytest.fixture
def config(tiny_config, tmp_path):
    return tiny_config("train.batch_size=6", "train.epochs=2", f"output_dir={tmp_path / 'few'}")


@pytest.fixture
def names(shapes_root):
    return create_dataset("shapes", shapes_root, "test", num_points=128).class_names


@pytest.fixture
def trained(monkeypatch):
    """The run folders that trainings were started in."""
    folders, fit = [], Trainer.fit

    def noted(self, resume=None):
        folders.append(self.folder.root.name)
        return fit(self, resume)

    monkeypatch.setattr(Trainer, "fit", noted)
    return folders


# Draws


def test_classes_are_distinct_seeded_and_nested():
    names = [f"class{index}" for index in range(40)]
    folds = [draw_classes(names, 10, seed=0, fold=fold) for fold in range(10)]
    assert folds == [draw_classes(names, 10, seed=0, fold=fold) for fold in range(10)]
    for fold, classes in enumerate(folds):
        assert len(set(classes)) == 10 and set(classes) <= set(names)
        assert draw_classes(names, 5, seed=0, fold=fold) == classes[:5]
    assert len({tuple(classes) for classes in folds}) == 10
    assert draw_classes(names, 10, seed=1, fold=0) != folds[0]
    # Every class has the same chance: 400 folds of 10 of 40.
    counts = dict.fromkeys(names, 0)
    for fold in range(400):
        for name in draw_classes(names, 10, seed=2, fold=fold):
            counts[name] += 1
    assert all(abs(count - 100) < 5 * (100 * 0.75) ** 0.5 for count in counts.values())


def test_shapes_are_counted_seeded_and_nested(shapes_root):
    train = create_dataset("shapes", shapes_root, "train", num_points=128)  # 8 of each class
    drawn = draw_shapes(train, 5, seed=0, fold=0)
    assert train.labels[drawn].tolist() == [label for label in range(12) for _ in range(5)]
    assert len(set(drawn.tolist())) == 60
    assert torch.equal(draw_shapes(train, 5, seed=0, fold=0), drawn)
    assert torch.equal(draw_shapes(train, 2, seed=0, fold=0).view(12, 2), drawn.view(12, 5)[:, :2])
    assert not torch.equal(draw_shapes(train, 5, seed=0, fold=1), drawn)
    assert not torch.equal(draw_shapes(train, 5, seed=1, fold=0), drawn)
    # A class's shapes do not depend on which other classes there are, nor on its place among them.
    some = create_dataset("shapes", shapes_root, "train", num_points=128, classes=["torus", "box"])
    alone = [some.names[index] for index in draw_shapes(some, 5, seed=0, fold=0)]
    whole = [train.names[index] for index in drawn]
    assert alone == whole[-5:] + whole[:5]  # torus is the last class of all, box the first


def test_fold_is_restricted_to_its_classes_with_support_and_queries_apart(config, names):
    own = fold_config(config, TASK, 3, names)
    support, queries = fold_datasets(own, TASK, seed=config.seed, fold=3)
    assert support.class_names == queries.class_names == list(own.data.classes)
    assert own.data.classes == tuple(draw_classes(names, 3, seed=config.seed, fold=3))
    assert support.labels.bincount().tolist() == [4, 4, 4] and queries.labels.bincount().tolist() == [2, 2, 2]
    assert support.training and not queries.training
    stored = {split: create_dataset("shapes", config.data.root, split, num_points=128) for split in ("train", "test")}
    for part, whole in ((support, stored["train"]), (queries, stored["test"])):
        for index, (name, label) in enumerate(zip(part.names, part.labels)):
            origin = whole.names.index(name)
            assert torch.equal(part.points[index], whole.points[origin])
            assert part.class_names[label] == whole.class_names[whole.labels[origin]]
    clouds = {cloud.numpy().tobytes() for part in (support, queries) for cloud in part.points}
    assert len(clouds) == 18
    assert own.output_dir.endswith("few/3way_4shot/fold_3") and own.seed == config.seed + 3


def test_dense_and_sparse_twin_get_the_same_folds(config, tiny_config, names):
    dense = tiny_config("s2d.kind=none", "optim.lr=1e-4")
    for fold in range(3):
        ours, theirs = fold_config(config, TASK, fold, names), fold_config(dense, TASK, fold, names)
        assert ours.data.classes == theirs.data.classes
        first, second = (fold_datasets(c, TASK, seed=0, fold=fold) for c in (ours, theirs))
        assert [part.names for part in first] == [part.names for part in second]


# Runs


def test_folds_are_run_once_and_do_not_depend_on_each_other(config, trained, tmp_path):
    output = tmp_path / "folds.json"
    first = list(run_folds(config, TASK, folds=2, output=output))
    assert trained == ["fold_0", "fold_1"]
    content = json.loads(output.read_text())
    assert content["folds"] == first and (content["ways"], content["shots"], content["queries"]) == (3, 4, 2)
    for fold in first:
        assert fold["oa"] * 6 == pytest.approx(round(fold["oa"] * 6))  # six queries
        assert len(fold["support"]) == 12 and len(fold["queries"]) == 6

    # Again: nothing. One more: only that. Another device or display: the same experiment.
    assert list(run_folds(config, TASK, folds=2, output=output)) == first and len(trained) == 2
    other = config.model_copy(update={"log": config.log.model_copy(update={"interval": 7})})
    more = list(run_folds(other, TASK, folds=3, output=output))
    assert more[:2] == first and trained == ["fold_0", "fold_1", "fold_2"]

    # Alone, in another place: the same fold.
    elsewhere = config.model_copy(update={"output_dir": str(tmp_path / "elsewhere")})
    again = list(run_folds(elsewhere, TASK, folds=3, output=tmp_path / "other.json"))
    own = ("fold", "classes", "oa", "macc", "loss", "support", "queries")
    assert [[fold[key] for key in own] for fold in again] == [[fold[key] for key in own] for fold in more]


def test_a_fold_is_scored_with_the_model_that_it_saved(tiny_config, tmp_path):
    """BatchNorm behind experts is re-estimated before the model is saved, which changes its accuracy."""
    mapping = tiny_config("train.epochs=4", "train.batch_size=6", "optim.lr=4e-3", "s2d.share_rate=0.05").to_dict()
    mapping["output_dir"] = str(tmp_path / "few")
    mapping["model"] = {
        "name": "point_transformer_tiny",
        "channels": [16, 32],
        "depths": [1, 1],
        "strides": [4, 4],
        "num_neighbors": [8, 8],
    }
    config = parse_config(mapping, where="test")
    task = FewShotTask(ways=4, shots=6, queries=3)
    folds = list(run_folds(config, task, folds=2, output=tmp_path / "f.json"))
    before = []
    for fold in folds:
        folder = RunFolder(fold["run"])
        own = load_config(folder.config)
        _, queries = fold_datasets(own, task, seed=config.seed, fold=fold["fold"])
        loader = build_test_loader(queries, data=own.data, batch_size=64, seed=0)
        measured = evaluate(load_model(folder.merged), loader, device="cpu", progress=False)
        assert (fold["oa"], fold["macc"]) == (measured.oa, measured.macc)
        before.append(read_json(folder.metrics)["merged"]["oa"])
    assert [fold["oa"] for fold in folds] != before, "the re-estimation must show for this test to say anything"


def test_interrupted_fold_goes_on_and_force_starts_anew(config, trained, tmp_path):
    whole = next(run_folds(config, TASK, folds=1, output=tmp_path / "whole.json"))
    elsewhere = config.model_copy(update={"output_dir": str(tmp_path / "elsewhere")})
    names = create_dataset("shapes", config.data.root, "test", num_points=128).class_names
    own = fold_config(elsewhere, TASK, 0, names)
    stopping = own.model_copy(update={"train": own.train.model_copy(update={"max_steps": 3})})  # of 4
    Trainer(stopping, datasets=fold_datasets(own, TASK, seed=0, fold=0)).fit()
    continued = next(run_folds(elsewhere, TASK, folds=1, output=tmp_path / "part.json"))
    assert (continued["oa"], continued["loss"]) == (whole["oa"], whole["loss"])
    assert continued["classes"] == whole["classes"] and continued["support"] == whole["support"]
    del trained[:]
    forced = next(run_folds(elsewhere, TASK, folds=1, output=tmp_path / "part.json", force=True))
    assert trained == ["fold_0"] and forced["loss"] == whole["loss"]


def test_mean_and_deviation_in_closed_form():
    folds = {fold: {"fold": fold, "oa": oa} for fold, oa in ((2, 0.9), (0, 0.7), (1, 0.8))}
    result = summarize({"ways": 5}, folds)
    assert result["mean_oa"] == pytest.approx(0.8) and result["std_oa"] == pytest.approx(0.1)  # n - 1
    assert [fold["fold"] for fold in result["folds"]] == [0, 1, 2] and result["ways"] == 5
    assert summarize({}, {0: folds[0]})["std_oa"] is None
    line = summary_line(FewShotTask(), list(folds.values()))
    assert line == "5-way 10-shot: OA 80.00 +- 10.00 % (3 folds, 20 queries a class, last epoch)"


# Refused


@pytest.mark.parametrize(
    ("values", "message"), [((1, 1, 1), "ways is 1"), ((2, 0, 1), "shots"), ((2, 1, 0), "queries")]
)
def test_counts_out_of_range(values, message):
    with pytest.raises(InputError, match=message):
        FewShotTask(*values)


def test_more_classes_or_shapes_than_there_are(config, tmp_path):
    def start(*task, folds=1):
        list(run_folds(config, FewShotTask(*task), folds=folds, output=tmp_path / "f.json"))

    with pytest.raises(InputError, match="ways is 13, more than the 12 classes"):
        start(13, 1, 1)
    with pytest.raises(InputError, match=r"class '\w+' has 8 shapes in split 'train', 9 are needed"):
        start(2, 9, 1)
    with pytest.raises(InputError, match=r"class '\w+' has 3 shapes in split 'test', 4 are needed"):
        start(2, 4, 4)
    with pytest.raises(InputError, match="folds is 0"):
        start(2, 1, 1, folds=0)
    assert not (tmp_path / "f.json").exists()


def test_output_of_another_experiment_is_refused(config, tiny_config, trained, tmp_path):
    output = tmp_path / "folds.json"
    fold = {"fold": 0, "oa": 0.5, "macc": 0.5, "loss": 1.0, "classes": ["a", "b", "c"]}
    header = {"ways": 3, "shots": 4, "queries": 2, "config": config.to_dict()}
    output.write_text(json.dumps(summarize(header, {0: fold})))
    with pytest.raises(InputError, match="holds folds with shots=4, this call has 5"):
        list(run_folds(config, FewShotTask(3, 5, 2), folds=1, output=output))
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.5})})
    with pytest.raises(InputError, match=r"holds folds with optim\.lr=0\.002, this call has 0\.5"):
        list(run_folds(other, TASK, folds=1, output=output))
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"root": str(tmp_path / "others")})})
    with pytest.raises(InputError, match=r"holds folds with data\.root=.*, this call has .*others"):
        list(run_folds(elsewhere, TASK, folds=1, output=output))
    plain = config.model_copy(update={"eval": config.eval.model_copy(update={"recalibrate_batchnorm": False})})
    with pytest.raises(InputError, match=r"holds folds with eval\.recalibrate_batchnorm=True"):
        list(run_folds(plain, TASK, folds=1, output=output))
    before = config.to_dict()
    del before["s2d"]["stop_fraction"]  # came since
    before["s2d"]["rise_fraction"] = 1.0  # went since
    before["log"]["interval"] = 7  # does not alter a run
    output.write_text(json.dumps(summarize({**header, "config": before}, {0: fold})))
    assert [fold["oa"] for fold in run_folds(config, TASK, folds=1, output=output)] == [0.5]
    output.write_text('{"folds": 3}')
    with pytest.raises(InputError, match="folds is 3, which s2d3d does not write"):
        list(run_folds(config, TASK, folds=1, output=output))
    stopping = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 3})})
    with pytest.raises(InputError, match=r"train\.max_steps"):
        list(run_folds(stopping, TASK, folds=1, output=tmp_path / "new.json"))
    with pytest.raises(InputError, match=r"nodir/f\.json: folder .*nodir does not exist; create it first"):
        list(run_folds(config, TASK, folds=1, output=tmp_path / "nodir" / "f.json"))
    assert not trained


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.val_fraction=0.2"], "data.val_fraction"),
        (["data.val_fraction=0.2", "eval.split=validation"], "eval.split"),
    ],
)
def test_queries_are_what_is_scored_and_all_of_the_support_is_trained_on(
    tiny_config, trained, tmp_path, overrides, key
):
    with pytest.raises(InputError, match=rf"^{key}: "):
        list(run_folds(tiny_config(*overrides), TASK, folds=1, output=tmp_path / "f.json"))
    assert not trained
