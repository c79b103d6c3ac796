"""Study files: what they expand to, and that everything wrong is one clear line, all problems together."""

import dataclasses

import pytest

from s2d3d.errors import InputError
from s2d3d.studies.plan import load_study


@pytest.fixture
def refused(write_study):
    """Return the lines that a study is refused with, without the path of its file."""

    def check(*overrides: str, **changes: object) -> list[str]:
        path = write_study(**changes)
        with pytest.raises(InputError) as caught:
            load_study(path, overrides)
        return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]

    return check


# Accepted


def test_cells_are_arms_times_seeds_seed_by_seed(write_study, tmp_path):
    study = load_study(write_study(seeds=[3, 1]))
    assert [str(cell) for cell in study.cells] == ["dense/seed3", "s2d/seed3", "dense/seed1", "s2d/seed1"]
    for cell in study.cells:
        assert cell.config.output_dir == str(tmp_path / "runs" / cell.arm / f"seed{cell.seed}")
        assert cell.config.seed == cell.seed
        assert cell.config.s2d.kind == {"dense": "none", "s2d": "rup"}[cell.arm]
    assert [str(cell) for cell in study.select(["s2d"])] == ["s2d/seed3", "s2d/seed1"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_study_decides_what_is_scored_and_when(write_study, split):
    for cell in load_study(write_study(evaluate=split)).cells:
        assert (cell.config.eval.split, cell.config.eval.every) == (split, 0)


def test_arms_win_over_common_values_and_overrides_over_both(write_study):
    arms = {"dense": {"s2d.kind": "none"}, "long": {"train.epochs": 5, "optim.lr": "3e-3"}}
    path = write_study(arms=arms, common={"train.epochs": 3, "train.batch_size": 8})
    configs = {cell.arm: cell.config for cell in load_study(path, ["train.batch_size=4"]).cells}
    assert (configs["dense"].train.epochs, configs["long"].train.epochs) == (3, 5)
    assert configs["long"].optim.lr == 0.003
    assert {config.train.batch_size for config in configs.values()} == {4}


def test_changes_are_what_differs_from_the_base(write_study):
    arms = {"dense": {"s2d.kind": "none"}, "s2d": {"s2d.num_experts": 4, "s2d.share_rate": 0.1}}
    cells = load_study(write_study(arms=arms), ["data.cache_dir=cache", "train.device=cpu"]).cells
    protocol = {"eval.split": "validation", "eval.every": 0}
    assert cells[0].changes == {"s2d.kind": "none", **protocol}
    assert cells[1].changes == {"s2d.share_rate": 0.1, **protocol}, "4 experts are the base; folders do not count"


def test_an_arm_may_replace_a_section(write_study):
    arms = {"dense": {"s2d.kind": "none"}, "other": {"model": {"name": "point_bert_tiny", "depth": 3}}}
    configs = {cell.arm: cell.config for cell in load_study(write_study(arms=arms)).cells}
    assert configs["other"].model.kwargs["depth"] == 3
    assert configs["other"].model.kwargs["trans_dim"] != configs["dense"].model.kwargs["trans_dim"], "nothing is left"


def test_pairs_of_one_reference_and_of_several(write_study):
    arms = {"a": {}, "b": {}, "c": {"s2d.kind": "none"}}
    one = load_study(write_study(arms=arms, reference="c", forms={"d": "a.ema"})).config
    assert one.pairs() == [("a", "c"), ("b", "c"), ("d", "c")]
    assert (one.row("a"), one.row("d")) == (("a", None), ("a", "ema"))
    several = load_study(write_study(arms=arms, reference={"a": "c", "b": "a"})).config
    assert several.pairs() == [("a", "c"), ("b", "a")]


def test_a_cell_is_frozen(write_study):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_study(write_study()).cells[0].seed = 4


# Refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"nmae": "x"}, "nmae: unknown key; did you mean 'name'?"),
        ({"question": None}, "question: required key is missing"),
        ({"name": "a/b"}, "name: must be letters, digits, '_', '-' and '.', as it names a folder, got 'a/b'"),
        ({"evaluate": "tset"}, "evaluate: must be 'validation' or 'test', got 'tset'; did you mean 'test'?"),
        ({"seeds": []}, "seeds: must not be empty"),
        ({"seeds": [1, 2, 1]}, "seeds: names 1 twice"),
        ({"seeds": [0.5]}, "seeds.0: must be a whole number, got 0.5"),
        ({"seeds": [-1]}, "seeds.0: must be at least 0, got -1"),
        ({"arms": {}}, "arms: must name at least one arm"),
        ({"arms": {"dense": "none"}}, "arms.dense: must be a mapping of keys and values, got 'none'"),
        ({"reference": "dnse"}, "reference: unknown arm 'dnse'; did you mean 'dense'?"),
        ({"reference": {"s2d": "s2d"}}, "reference.s2d: an arm is no reference of itself"),
        ({"reference": {"s2": "dense"}}, "reference.s2: unknown arm 's2'; did you mean 's2d'?"),
        ({"reference": 3}, "reference: must be the name of an arm, or a mapping of arm: its reference, got 3"),
        ({"forms": {"dense": "s2d.ema"}}, "forms.dense: is the name of an arm as well; choose another"),
        (
            {"forms": {"x": "s2d.emma"}},
            "forms.x: must be ARM.FORM with FORM one of merged, routed, ema, recalibrated, voting, initial, got "
            "'s2d.emma'; did you mean 's2d'?",
        ),
        ({"common": {"seed": 3}}, "common.seed: is decided by the study; remove it"),
        ({"common": {"eval": {"split": "test"}}}, "common.eval.split: is decided by the study; remove it"),
        ({"along": "train.epoch"}, "along: unknown config key 'train.epoch'; did you mean 'train.epochs'?"),
    ],
)
def test_a_wrong_study_key_is_one_line(refused, changes, expected):
    assert refused(**changes) == [expected]


def test_a_wrong_config_key_of_an_arm_is_one_line_that_names_the_arm(refused):
    arms = {"dense": {"s2d.kind": "none"}, "s2d": {"s2d.shar_rate": 0.1}}
    assert refused(arms=arms) == ["arms.s2d: s2d.shar_rate: unknown key; did you mean 'share_rate'?"]


def test_all_problems_of_all_arms_come_together_and_shared_ones_once(refused):
    arms = {"dense": {"s2d.kind": "non"}, "s2d": {"s2d.num_experts": 0}}
    assert refused(arms=arms, common={"optim.lr": -1}) == [
        "arms.dense: s2d.kind: must be 'none', 'rup' or 'topk', got 'non'; did you mean 'none'?",
        "common: optim.lr: must be greater than 0, got -1",
        "arms.s2d: s2d.num_experts: must be at least 1, got 0",
    ]


def test_what_an_arm_makes_wrong_elsewhere_names_the_arm(refused, tmp_path):
    """Two experts make the share rate of the base file too large."""
    arms = {"dense": {"s2d.kind": "none"}, "two": {"s2d.num_experts": 2}}
    (line,) = refused(arms=arms, common={"s2d.share_rate": 0.6})
    assert line == (
        "common: s2d.share_rate: must be at most 0.5 = (2 - 1) / 2, above which the 2 experts overshoot their mean, "
        "got 0.6 (in arm 'two')"
    )


def test_validation_needs_a_validation_part(refused):
    (line,) = refused(common={"data.val_fraction": 0})
    assert line == "evaluate: eval.split: 'validation' needs data.val_fraction above 0; set it, or score the test split"


def test_overrides_of_what_the_study_decides_are_refused(refused):
    assert refused("seed=3", "eval.every=1") == [
        "override 'seed=3': is decided by the study; change it in the study's file",
        "override 'eval.every=1': is decided by the study; change it in the study's file",
    ]


@pytest.mark.parametrize("override", ["eval={split: test, every: 0}", "eval . split=test", "eval={every: 3}"])
def test_no_way_of_writing_it_makes_another_split_be_scored(refused, override):
    (line,) = refused(override)
    assert "decided by the study" in line


def test_a_base_that_is_not_there_or_stops_early(refused, tmp_path):
    assert refused(base="no.yaml") == [f"{tmp_path / 'no.yaml'}: no such file"]
    assert refused("train.max_steps=3") == [
        "override 'train.max_steps=3': is decided by the study; change it in the study's file"
    ]


def test_an_unknown_arm_is_refused_with_the_nearest(write_study):
    with pytest.raises(InputError, match=r"no arm 'sd2'; did you mean 's2d'\? \(known: dense, s2d\)"):
        load_study(write_study()).select(["sd2"])


def test_a_test_curve_scores_each_epoch_and_needs_the_test_split(write_study, refused):
    study = load_study(write_study(evaluate="test", common={"data.val_fraction": 0}, curve="test"))
    assert {cell.config.eval.every for cell in study.cells} == {1}
    assert refused(curve="test") == ["curve: needs evaluate: test, got 'validation'"]


def test_a_margin_is_above_zero(refused):
    (line,) = refused(equivalence=0)
    assert line.startswith("equivalence: must be")


def test_each_run_has_a_pre_training_of_its_own_seed(write_study):
    path = write_study(arms={"dense": {"s2d.kind": "none"}, "s2d": {"model.pretrained": "pre/seed{seed}/merged.pt"}})
    pretrained = {(cell.arm, cell.seed): cell.config.model.pretrained for cell in load_study(path).cells}
    assert pretrained == {
        ("dense", 0): None, ("s2d", 0): "pre/seed0/merged.pt", ("dense", 1): None, ("s2d", 1): "pre/seed1/merged.pt"
    }  # fmt: skip
