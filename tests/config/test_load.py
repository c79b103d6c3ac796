"""Configs: what is accepted, and that everything else is one clear line, all problems together."""

import copy
import os

import pytest
import torch
from base_config import BASE, changed
from timm.layers import Mlp

from s2d3d import models
from s2d3d.config.io import show
from s2d3d.config.load import Config, load_config, load_layered_config, parse_config
from s2d3d.datasets import list_datasets
from s2d3d.errors import InputError
from s2d3d.models import create_model, list_models, model_kwargs

SECTIONS = ("data", "model", "s2d", "optim", "train", "eval", "log")


def lines_of(mapping: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_config(mapping, where="a.yaml")
    return str(caught.value).split("\n")


# Accepted


def test_defaults_are_those_of_the_published_recipe():
    config = parse_config(BASE, where="base")
    assert config.seed == 0 and config.output_dir == "runs/test"
    assert config.data.num_points == 1024 and config.data.augment.scale == (0.6666667, 1.5)
    assert (config.s2d.kind, config.s2d.num_experts, config.s2d.targets, config.s2d.every) == ("rup", 4, ("*.mlp",), 2)
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("adamw", 5e-4, 0.05)
    assert (config.train.epochs, config.train.batch_size, config.train.max_steps) == (300, 32, None)
    assert config.eval.every == 10 and config.log.interval == 20


def test_model_section_is_filled_with_the_models_own_defaults():
    config = parse_config(changed("model.depth", 3), where="base")
    assert config.model.kwargs == model_kwargs("point_bert_tiny") | {"depth": 3}
    assert len(create_model(config.model.name, num_classes=5, **config.model.kwargs).blocks.blocks) == 3


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("optim.lr", "5e-4", 5e-4),
        ("optim.lr", "1", 1.0),
        ("optim.lr", ".5e-3", 5e-4),
        ("optim.weight_decay", 0, 0.0),
        ("optim.clip_grad", None, None),
        ("optim.warmup_epochs", 0.5, 0.5),
        ("model.mlp_ratio", "2e0", 2.0),
        ("data.augment.scale", ["8e-1", 1], (0.8, 1.0)),
        ("data.augment.scale", None, None),
        ("data.up_axis", "y", "y"),
        ("data.classes", ["chair", "sofa"], ("chair", "sofa")),
        ("train.device", "cuda:1", "cuda:1"),
        ("model.pretrained", "no/such/file.pth", "no/such/file.pth"),
        ("model.pretrained", None, None),
        ("train.ema_decay", 0.999, 0.999),
        ("s2d.share_rate", 0.75, 0.75),
        ("s2d.targets", ["*.0.mlp", "*.1.mlp"], ("*.0.mlp", "*.1.mlp")),
        ("s2d.targets", None, None),
        ("s2d.lr_multiplier", 2, 2.0),
        ("seed", 2**32 - 1, 2**32 - 1),
        ("eval.every", 0, 0),
    ],
)
def test_accepted_values(path, value, expected):
    got = parse_config(changed(path, value), where="base")
    for key in path.split("."):
        got = getattr(got, key)
    assert got == expected and type(got) is type(expected)


def test_unquoted_exponent_in_a_file_is_the_number_that_the_user_meant(base):
    base.write_text(base.read_text() + "optim: {lr: 5e-4, min_lr: 1e-5}\n")
    config = load_config(base)
    assert (config.optim.lr, config.optim.min_lr) == (0.0005, 0.00001)


def test_dense_section_may_be_its_kind_alone():
    config = parse_config(changed("s2d", {"kind": "none"}), where="base")
    assert config.s2d.kind == "none"


def test_one_expert_has_no_bound_on_the_share_rate():
    parse_config(changed("s2d", {"num_experts": 1, "share_rate": 1}), where="base")


def test_a_config_is_frozen():
    config = parse_config(BASE, where="base")
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3
    with pytest.raises(ValueError, match="frozen"):
        config.model.depth = 3


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    parse_config(changed("s2d", {"init": "independent", "init_noise": 0.1}), where="base")
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_leaves_the_given_mapping_alone():
    mapping = copy.deepcopy(BASE)
    parse_config(mapping, where="base")
    assert mapping == BASE


def test_every_key_is_described():
    def check(schema):
        for key, field in schema.model_fields.items():
            assert field.description and field.description.endswith("."), f"{schema.__name__}.{key}"
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation)

    check(Config)


# Refused values: what stands after `a.yaml: `

QUOTES = '; for text, put quotes around it: "..."'
REFUSED = [
    ("train.epochs", "ten", "train.epochs: must be a whole number, got 'ten'"),
    ("train.epochs", "10", "train.epochs: must be a whole number, got '10'"),
    ("train.epochs", 10.0, "train.epochs: must be a whole number, got 10.0"),
    ("train.epochs", True, "train.epochs: must be a whole number, got true"),
    ("train.epochs", None, "train.epochs: must be a whole number, got null"),
    ("train.epochs", 0, "train.epochs: must be at least 1, got 0"),
    ("train.epochs", 10**30, "train.epochs: must be at most 9223372036854775807, got 1" + "0" * 30),
    ("train.checkpoint_every", 0, "train.checkpoint_every: must be at least 1 (or null), got 0"),
    ("train.compile", 1, "train.compile: must be true or false, got 1"),
    ("train.compile", "true", "train.compile: must be true or false, got 'true'"),
    (
        "train.compile_mode",
        "reduce_overhead",
        "train.compile_mode: must be 'default', 'reduce-overhead' or 'max-autotune', got 'reduce_overhead'; did you "
        "mean 'reduce-overhead'?",
    ),
    ("train.amp", "fp16", "train.amp: must be 'none' or 'bf16', got 'fp16'; did you mean 'bf16'?"),
    ("train.device", "gpu", "train.device: must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
    ("train.device", "cuda:", "train.device: must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'cuda:'"),
    ("train.ema_decay", 1, "train.ema_decay: must be less than 1 (or null), got 1"),
    ("train.label_smoothing", 1.0, "train.label_smoothing: must be less than 1, got 1.0"),
    ("optim.lr", -1, "optim.lr: must be greater than 0, got -1"),
    ("optim.lr", 0, "optim.lr: must be greater than 0, got 0"),
    ("optim.lr", "fast", "optim.lr: must be a number, got 'fast'"),
    ("optim.lr", "nan", "optim.lr: must be a number, got 'nan'"),
    ("optim.lr", "", "optim.lr: must be a number, got ''"),
    ("optim.lr", True, "optim.lr: must be a number, got true"),
    ("optim.lr", [1], "optim.lr: must be a number, got [1]"),
    ("optim.lr", float("nan"), "optim.lr: must be a finite number, got nan"),
    ("optim.lr", float("inf"), "optim.lr: must be a finite number, got inf"),
    ("optim.lr", "1e999", "optim.lr: must be a finite number, got inf"),
    ("optim.lr", 10**400, "optim.lr: must be a finite number, got inf"),
    ("optim.name", "adamwx", "optim.name: unknown optimizer 'adamwx'; did you mean 'adamw'?"),
    ("optim.clip_grad", 0, "optim.clip_grad: must be greater than 0 (or null), got 0"),
    ("optim.schedule", "cosin", "optim.schedule: must be 'cosine' or 'constant', got 'cosin'; did you mean 'cosine'?"),
    ("seed", -1, "seed: must be at least 0, got -1"),
    ("seed", 2**32, "seed: must be at most 4294967295, got 4294967296"),
    ("output_dir", "", "output_dir: must be a path, got ''"),
    ("output_dir", 3, "output_dir: must be text, got 3" + QUOTES),
    ("output_dir", None, "output_dir: must be text, got null"),
    ("data.root", "a\0b", "data.root: must be a path, got 'a\\x00b'"),
    ("data.fraction", 0, "data.fraction: must be greater than 0, got 0"),
    ("data.val_fraction", 0.6, "data.val_fraction: must be at most 0.5, got 0.6"),
    ("data.up_axis", "x", "data.up_axis: must be 'y' or 'z' (or null), got 'x'"),
    ("data.classes", [], "data.classes: must not be empty"),
    ("data.classes", "chair", "data.classes: must be a list (or null), got 'chair'"),
    ("data.classes", ["sofa", "sofa"], "data.classes: names 'sofa' twice"),
    ("data.classes", ["sofa", 3], "data.classes.1: must be text, got 3" + QUOTES),
    ("data.augment", None, "data.augment: must be a section of keys and values, got null"),
    ("data.augment.scale", [1, 2, 3], "data.augment.scale: must be [low, high], got [1, 2, 3]"),
    ("data.augment.scale", 1, "data.augment.scale: must be a list (or null), got 1"),
    (
        "data.augment.scale",
        [1.5, 0.5],
        "data.augment.scale: must be [low, high] with 0 < low <= high, got [1.5, 0.5]",
    ),
    ("data.augment.scale", [1, "a"], "data.augment.scale.1: must be a number, got 'a'"),
    ("data.augment.dropout", 1, "data.augment.dropout: must be less than 1, got 1"),
    (
        "data.channels",
        "xyz+norm",
        "data.channels: must be 'xyz', 'xyz+normal', 'xyz+rgb' or 'xyz+normal+rgb', got "
        "'xyz+norm'; did you mean 'xyz+normal'?",
    ),
    ("data.augment.scales", [1, 2], "data.augment.scales: unknown key; did you mean 'scale'?"),
    ("s2d.num_expert", 4, "s2d.num_expert: unknown key; did you mean 'num_experts'?"),
    ("s2d.kind", "rups", "s2d.kind: must be 'none', 'rup' or 'topk', got 'rups'; did you mean 'rup'?"),
    ("s2d.kind", None, "s2d.kind: must be 'none', 'rup' or 'topk', got null"),
    ("s2d.targets", "*.mlp", "s2d.targets: must be a list (or null), got '*.mlp'"),
    ("s2d.targets", [], "s2d.targets: must not be empty"),
    ("s2d.targets", [""], "s2d.targets.0: must not be empty, got ''"),
    ("s2d.share_rate", 1.1, "s2d.share_rate: must be at most 1, got 1.1"),
    ("s2d", [], "s2d: must be a section of keys and values, got []"),
    ("lr", 1, "lr: unknown key; did you mean 'optim.lr'?"),
    ("log.votes", 1, "log.votes: unknown key; did you mean 'eval.votes'?"),
    ("log.zzz", 1, "log.zzz: unknown key; valid keys: interval, progress, tensorboard, wandb, report"),
    ("log.a\nb", 1, "log.a\\nb: unknown key; valid keys: interval, progress, tensorboard, wandb, report"),
    ("model.depht", 3, "model.depht: unknown key; did you mean 'depth'?"),
    ("model.depth", 3.0, "model.depth: must be a whole number, got 3.0"),
    ("model.depth", None, "model.depth: must be a whole number, got null"),
    ("model.drop_path_rate", "much", "model.drop_path_rate: must be a number, got 'much'"),
    ("model.num_classes", 40, "model.num_classes: comes from the data, remove it"),
    ("model.in_channels", 3, "model.in_channels: comes from the data, remove it"),
    ("model.pretrained", "", "model.pretrained: must be a path, got ''"),
    ("model.pretrained", 3, "model.pretrained: must be text (or null), got 3" + QUOTES),
    ("model.pretrain", "a.pth", "model.pretrain: unknown key; did you mean 'pretrained'?"),
    ("model.pretrained_up_axis", "x", "model.pretrained_up_axis: must be 'y' or 'z', got 'x'"),
    ("model.name", 3, "model.name: must be text, got 3" + QUOTES),
    ("model.name", ["a"], "model.name: must be text, got ['a']"),
]


@pytest.mark.parametrize(("path", "value", "expected"), REFUSED, ids=lambda item: repr(item)[:30])
def test_refused_value(path, value, expected):
    assert lines_of(changed(path, value)) == [f"a.yaml: {expected}"]


@pytest.mark.parametrize(
    ("path", "kind", "known"),
    [("model.name", "model", lambda: list_models(task="classify")), ("data.name", "dataset", list_datasets)],
)
def test_unknown_name_gets_the_nearest_and_the_list(path, kind, known):
    name = known()[0]
    (line,) = lines_of(changed(path, name + "x"))
    assert line.startswith(f"a.yaml: {path}: unknown {kind} '{name}x'; did you mean '{name}'?")
    assert all(other in line for other in known())


def test_values_that_the_models_constructor_refuses():
    (line,) = lines_of(changed("model.num_heads", 7))
    assert line.startswith("a.yaml: model: ") and "num_heads" in line and "7" in line


def test_targets_that_match_nothing_name_the_candidates():
    (line,) = lines_of(changed("s2d.targets", ["*.mpl"]))
    assert line.startswith("a.yaml: s2d: no module matches '*.mpl'") and "blocks.blocks.0.mlp" in line


@pytest.mark.parametrize("missing", ["output_dir", "data", "model", "data.name", "data.root", "model.name"])
def test_missing_key(missing):
    mapping = copy.deepcopy(BASE)
    *section, key = missing.split(".")
    del (mapping[section[0]] if section else mapping)[key]
    assert lines_of(mapping) == [f"a.yaml: {missing}: required key is missing"]


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"optim": {"lr": 1e-7}, "train": {"epochs": 5}}, [
            "optim.warmup_lr: must be at most optim.lr (1e-07), got 1e-06",
            "optim.min_lr: must be at most optim.lr (1e-07), got 1e-06",
            "optim.warmup_epochs: must be less than train.epochs (5), got 10",
        ]),
        ({"model": {"name": "point_bert_tiny", "pretrained": "a.pth"}, "s2d": {"init": "independent"}}, [
            ("s2d.init: must be 'copy' with model.pretrained: experts drawn anew would not be pretrained, "
            "got 'independent'")
        ]),
        ({"optim": {"name": "adamuon"}, "s2d": {"kind": "rup"}}, [
            ("optim.name: must not be Muon, AdamP, SGDP or MARS with experts: they do other things with stacks of "
             "matrices, got 'adamuon'")
        ]),
        ({"train": {"epochs": 10}}, ["optim.warmup_epochs: must be less than train.epochs (10), got 10"]),
        ({"train": {"accum_steps": 5}}, ["train.accum_steps: must divide train.batch_size (32), got 5"]),
        ({"train": {"save_every": 4, "keep_every": 6}}, [
            "train.keep_every: must be a multiple of train.save_every (4), got 6"
        ]),
        ({"train": {"compile_mode": "reduce-overhead"}}, [
            "train.compile_mode: has no effect without train.compile: true, got 'reduce-overhead'"
        ]),
        ({"train": {"compile": True, "compile_mode": "max-autotune", "accum_steps": 2}}, [
            ("train.compile_mode: must be 'default' with train.accum_steps 2: a CUDA graph overwrites the gradients "
            "to add to, got 'max-autotune'")
        ]),
        ({"s2d": {"num_experts": 2, "share_rate": 0.6}}, [
            "s2d.share_rate: must be at most 0.5 = (2 - 1) / 2, above which the 2 experts overshoot their mean, got 0.6"
        ]),
        ({"s2d": {"num_experts": 3, "share_rate": 0.7}}, [
            ("s2d.share_rate: must be at most 0.666667 = (3 - 1) / 3, above which the 3 experts overshoot their mean, "
            "got 0.7")
        ]),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together(mapping, expected):
    assert lines_of(BASE | mapping) == [f"a.yaml: {line}" for line in expected]


def test_all_problems_are_reported_together(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "seed: 1\nseed: -2\ndata: {name: modelnet40}\nmodel: {name: point_bert_tiny, depht: 3, num_heads: x}\n"
        "s2d: {num_expert: 4}\ntrain: {epochs: ten, foo: 1}\noptim: {lr: -1}\nextra: {}\n"
    )
    with pytest.raises(InputError) as caught:
        load_config(path, ["train.compile=maybe", "log.interval=0", "broken", "data.x=["])
    places = [line.split(": ")[:2] for line in str(caught.value).split("\n")]
    assert sorted(places) == sorted([
        [f"{path}", "seed"], [f"{path}", "seed"], [f"{path}", "output_dir"], [f"{path}", "data.root"],
        [f"{path}", "model.depht"], [f"{path}", "model.num_heads"], [f"{path}", "s2d.num_expert"],
        [f"{path}", "train.epochs"], [f"{path}", "train.foo"], [f"{path}", "optim.lr"], [f"{path}", "extra"],
        ["override 'train.compile=maybe'", "train.compile"], ["override 'log.interval=0'", "log.interval"],
        ["override 'broken'", "expected section.key=value"], ["override 'data.x=['", "not valid YAML"],
    ])  # fmt: skip


@pytest.mark.parametrize("mapping", [None, [], "text", 3])
def test_what_is_no_mapping(mapping):
    (line,) = lines_of(mapping)
    assert line.startswith("a.yaml: must be a mapping of sections, got ")


@pytest.mark.parametrize(
    ("key", "idle", "wrong"),
    [
        ("s2d.active_fraction", (1.0, 1, "1e0"), (0.5, None, True)),
        ("s2d.average_moments", (False,), (True, 0, None)),
        ("s2d.rise_fraction", (1.0,), (0.25, torch.ones(2))),
    ],
)
def test_a_key_that_was_removed_is_read_where_it_did_nothing(base, key, idle, wrong):
    """As every older config, checkpoint and record holds it."""
    for value in idle:
        assert parse_config(changed(key, value), where="old.pt") == parse_config(BASE, where="base")
    for value in wrong:
        assert lines_of(changed(key, value)) == [f"a.yaml: {key}: {_removed(value)}"]
    value = wrong[0]
    section, name = key.split(".")
    for override in (f"{key}={show(value)}", f"{section}={{{name}: {show(value)}}}"):
        with pytest.raises(InputError) as caught:
            load_config(base, [override])
        assert str(caught.value) == f"override '{override}': {key}: {_removed(value)}"


def _removed(value: object) -> str:
    text = f"was removed, it did not help (docs/results.md), got {show(value)}"
    return f"{text}; remove the key, or use commit 6eb7082 of s2d3d"


def test_keys_that_are_not_text():
    lines = lines_of(BASE | {3: 4})
    assert len(lines) == 1 and "keys must be text" in lines[0]


# Round trip


def test_to_dict_is_complete():
    resolved = parse_config(BASE, where="base").to_dict()
    for section in SECTIONS:
        assert set(resolved[section]) >= set(Config.model_fields[section].annotation.model_fields)
    own = set(Config.model_fields["model"].annotation.model_fields)
    assert set(resolved["model"]) == own | set(model_kwargs("point_bert_tiny"))


# Keys of the studies


def test_scoring_the_validation_part_needs_one():
    (line,) = lines_of(changed("eval.split", "validation"))
    assert line == ("a.yaml: eval.split: 'validation' needs data.val_fraction above 0; set it, or score the test split")
    mapping = changed("eval.split", "validation")
    mapping["data"]["val_fraction"] = 0.1
    assert parse_config(mapping, where="base").eval.split == "validation"


# Layers of a study


def test_layers_win_over_the_file_and_overrides_over_them(base):
    layers = {"common": {"train.epochs": 20, "s2d.every": 1}, "arm": {"train.epochs": 30}}
    config = load_layered_config(base, layers, ["s2d.every=3"])
    assert (config.train.epochs, config.s2d.every) == (30, 3)


def test_a_layer_may_replace_a_section(base):
    config = load_layered_config(base, {"arm": {"model": {"name": "point_transformer_tiny"}}})
    assert config.model.name == "point_transformer_tiny"


def test_errors_name_the_layer_that_a_value_is_from(base):
    layers = {
        "common": {"optim.lr": -1, "train.epochs": 20},
        "arm": {"s2d.evry": 2, "train.epochs": 0, "output_dir.x": 1},
    }
    with pytest.raises(InputError) as caught:
        load_layered_config(base, layers, ["eval.batch_size=0"])
    assert set(str(caught.value).splitlines()) == {
        "common: optim.lr: must be greater than 0, got -1",
        "arm: s2d.evry: unknown key; did you mean 'every'?",
        "arm: train.epochs: must be at least 1, got 0",
        "arm: output_dir.x: 'output_dir' is not a section",
        "override 'eval.batch_size=0': eval.batch_size: must be at least 1, got 0",
    }


def test_a_model_is_built_once_for_all_configs_that_share_it(monkeypatch):
    """The runs of a study differ in seeds and rates; what is refused is refused each time."""
    built = []

    class Counted(torch.nn.Module):
        def __init__(self, num_classes: int, in_channels: int = 3, *, width: int = 8):
            super().__init__()
            built.append(width)
            if width < 4:
                raise ValueError("width is too small")
            self.mlp = Mlp(width, 2 * width)

    monkeypatch.setattr(models, "_MODELS", dict(models._MODELS))
    models.register_model("counted", Counted)
    one = changed("model", {"name": "counted"}) | {"s2d": {"every": 1}}
    for seed, rate in ((0, 0.1), (1, 0.3)):
        mapping = copy.deepcopy(one) | {"seed": seed}
        mapping["s2d"]["share_rate"] = rate
        assert parse_config(mapping, where="base").model.kwargs == {"width": 8}
    assert built == [8, 8], "with experts and without"
    mapping["s2d"]["num_experts"] = 2
    parse_config(mapping, where="base")
    assert built == [8, 8, 8]
    mapping["model"]["width"] = 2
    for _ in range(2):
        assert lines_of(mapping) == ["a.yaml: model: width is too small"]


# Places


def test_a_home_folder_is_expanded(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny_config("output_dir=~/runs/a", "data.cache_dir=~/cache", "data.root=~/data")
    assert config.output_dir == f"{tmp_path}/runs/a" and config.data.cache_dir == f"{tmp_path}/cache"
    assert config.data.root == f"{tmp_path}/data"


def test_a_pipe_as_config_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(InputError, match=r"a\.yaml: is a pipe or a device, expected a YAML file"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.augment.jitter=1e38", "data.augment.jitter: must be at most 1e+06"),
        ("data.augment.shift=1e38", "data.augment.shift: must be at most 1e+06"),
        ("data.augment.scale=[1, 1e38]", "data.augment.scale: must be \\[low, high\\] within"),
        ("optim.name=adahessian", "optim.name: 'adahessian' needs second derivatives"),
    ],
)
def test_values_that_no_training_survives(tiny_config, override, message):
    with pytest.raises(InputError, match=message.replace("+", "[+]")):
        tiny_config(override)


def test_the_backbone_gets_the_channels_of_the_data_or_refuses_them(monkeypatch):
    class OnlyCoordinates(torch.nn.Module):
        def __init__(self, num_classes: int, in_channels: int = 3, *, width: int = 8):
            super().__init__()
            if in_channels != 3:
                raise ValueError(f"in_channels is {in_channels}, must be 3")
            self.mlp = Mlp(width, 2 * width)

    assert parse_config(changed("data.channels", "xyz+normal+rgb"), where="a.yaml").in_channels == 9
    assert parse_config(changed("seed", 0), where="a.yaml").in_channels == 3
    monkeypatch.setattr(models, "_MODELS", dict(models._MODELS))
    models.register_model("only", OnlyCoordinates)
    mapping = changed("model", {"name": "only"}) | {"s2d": {"every": 1}}
    parse_config(mapping, where="a.yaml")
    mapping["data"]["channels"] = "xyz+rgb"
    assert lines_of(mapping) == ["a.yaml: data.channels: only: in_channels is 6, must be 3"]
