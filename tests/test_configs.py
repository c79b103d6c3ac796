"""The shipped configs: every file is valid, twins differ in the method alone, the recipe has the published numbers."""

import functools
import json
from pathlib import Path

import pytest
import yaml

from s2d3d.config.load import Config, dump_config, load_config, parse_config
from s2d3d.studies.plan import Study, load_study

CONFIGS = Path(__file__).parent.parent / "configs"
STUDIES = sorted((CONFIGS / "studies").glob("*.yaml"))
SHIPPED = sorted(set(CONFIGS.rglob("*.yaml")) - set(STUDIES))
DENSE = [path for path in SHIPPED if "_dense" in path.stem]


@functools.cache
def load(path: Path) -> Config:
    """Load it once: to check the model section, the model is built."""
    return load_config(path)


@functools.cache
def load_shipped_study(path: Path) -> Study:
    return load_study(path)


def twin_of(dense: Path) -> Path:
    return dense.with_name(dense.name.replace("_dense", "_s2d"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_file_is_valid_and_round_trips(path, tmp_path):
    config = load(path)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped) == config
    assert parse_config(json.loads(json.dumps(config.to_dict())), where="json") == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_run_has_a_folder_of_its_own_named_like_its_config(path):
    assert load(path).output_dir == f"runs/{path.stem}"


def test_pairs_are_complete():
    sparse = {path for path in SHIPPED if "_s2d" in path.stem}
    assert {twin_of(path) for path in DENSE} == sparse
    assert {"modelnet_dense", "modelnet_dense_small"} <= {path.stem for path in DENSE}


@pytest.mark.parametrize("dense", DENSE, ids=lambda path: path.stem)
def test_twins_differ_in_the_method_and_the_folder_alone(dense):
    """As written and as resolved: no default may come between them."""
    written = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (dense, twin_of(dense))]
    resolved = [load(path).to_dict() for path in (dense, twin_of(dense))]
    for theirs, ours in (written, resolved):
        assert (theirs.pop("s2d")["kind"], ours.pop("s2d")["kind"]) == ("none", "rup")
        del theirs["output_dir"], ours["output_dir"]
        assert theirs == ours


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_valid_and_named_like_its_file(path):
    study = load_shipped_study(path)
    assert study.config.name == path.stem
    assert len({cell.config.output_dir for cell in study.cells}) == len(study.cells) >= 6
    assert {cell.config.eval.split for cell in study.cells} == {study.config.evaluate}
    dense = {cell.arm for cell in study.cells if cell.config.s2d.kind == "none"}
    references = {study.config.row(reference)[0] for _, reference in study.config.pairs()}
    assert dense and references & dense, "there is a dense twin to compare with"


def test_no_study_that_scores_the_test_split_uses_a_seed_of_the_searches():
    searched, tested = set(), set()
    for path in STUDIES:
        config = load_shipped_study(path).config
        (searched if config.evaluate == "validation" else tested).update(config.seeds)
    assert searched and len(tested) >= 5
    assert not searched & tested


def test_studies_that_score_the_test_split_have_seeds_of_their_own():
    by_study = {path.stem: load_shipped_study(path).config for path in STUDIES}
    tested = {name: {*config.seeds} for name, config in by_study.items() if config.evaluate == "test"}
    shared = [{one, other} for one in tested for other in tested if one < other and tested[one] & tested[other]]
    assert shared == [{"all_layers", "normals"}, {"full_recipe_gpu", "scarce"}], "these were made before the rule"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_arms_that_are_compared_take_equally_many_updates(path):
    """As far as the configs say it: batch, and epochs times the share of the data, whose channels may differ."""
    study = load_shipped_study(path)
    by_arm = {cell.arm: cell.config for cell in study.cells}
    for pair in study.config.pairs():
        ours, theirs = (by_arm[study.config.row(row)[0]] for row in pair)
        data = [config.data.model_dump(exclude={"channels"}) for config in (ours, theirs)]
        assert data[0] == data[1]
        assert (ours.train.epochs, ours.train.batch_size) == (theirs.train.epochs, theirs.train.batch_size)


def test_modelnet_recipe_is_the_published_one():
    """Point-BERT's: ViT-S, 1024 points in 64 groups of 32; AdamW 5e-4 for 300 epochs of batches of 32."""
    config = load(CONFIGS / "modelnet_s2d.yaml")
    data, model, optim, train = config.data, config.model, config.optim, config.train
    assert (data.name, data.num_points, data.normalize, data.fraction, data.val_fraction) == (
        "modelnet40", 1024, True, 1, 0,
    )  # fmt: skip
    assert data.augment.model_dump() == {
        "scale": (pytest.approx(2 / 3, abs=1e-6), 1.5), "shift": 0.2, "rotate": False, "jitter": 0, "dropout": 0,
    }  # fmt: skip
    assert model.name == "point_bert" and model.pretrained is None
    expected = dict(num_group=64, group_size=32, trans_dim=384, depth=12, num_heads=6, encoder_dims=256, mlp_ratio=4)
    assert {key: model.kwargs[key] for key in expected} == expected
    assert model.kwargs["drop_path_rate"] == 0.1
    assert (optim.name, optim.lr, optim.weight_decay, optim.clip_grad) == ("adamw", 5e-4, 0.05, 10)
    assert (optim.schedule, optim.warmup_epochs, optim.warmup_lr, optim.min_lr) == ("cosine", 10, 1e-6, 1e-6)
    assert (train.epochs, train.batch_size, train.drop_last, train.label_smoothing) == (300, 32, True, 0)
    assert (train.amp, train.ema_decay) == ("none", None)


def test_modelnet_experts_are_those_of_the_paper():
    experts = load(CONFIGS / "modelnet_s2d.yaml").s2d
    assert (experts.kind, experts.num_experts, experts.every, experts.targets) == ("rup", 4, 2, ("*.mlp",))
    assert (experts.init, experts.init_noise) == ("copy", 0)
    assert (experts.share_rate, experts.schedule, experts.stop_fraction) == (0.3, "linear", 1)
