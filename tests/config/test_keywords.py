"""Keyword arguments as config keys: those of a data set's reader and of a model's constructor."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import s2d3d.config
from s2d3d import datasets, models
from s2d3d.config.data import build_dataset
from s2d3d.config.keywords import keyword_fields
from s2d3d.config.load import dump_config, load_config, parse_config
from s2d3d.config.schema import Config
from s2d3d.datasets import PointCloudDataset, create_dataset, list_datasets, register_dataset
from s2d3d.errors import InputError
from s2d3d.runs.checkpoint import load_checkpoint
from s2d3d.training.trainer import Trainer


def read_blobs(
    root,
    split,
    *,
    num_points,
    transform=None,
    stretch: float = 1.0,
    side: Literal["x", "y"] = "x",
    shapes: int = 8,
    sizes: Sequence[float] = (1.0, 2.0),
    suffix: str | None = None,
    hook=print,
    _cache=None,
    **_,
):
    """Blobs stretched along an axis, one class a size."""
    labels = torch.arange(len(sizes)).repeat_interleave(shapes)
    points = torch.rand(len(labels), num_points, 3, generator=torch.Generator().manual_seed(len(split)))
    points *= torch.tensor(sizes)[labels].view(-1, 1, 1)
    points[..., "xy".index(side)] *= stretch
    names = [f"size {size}{suffix or ''}" for size in sizes]
    return PointCloudDataset(points, labels, names, split=split, num_points=num_points, transform=transform)


def check_blobs(*, stretch, shapes, **_):
    return {"stretch": f"must be above 0, got {stretch:g}"} if stretch <= 0 else {}


@pytest.fixture
def blobs(monkeypatch):
    monkeypatch.setattr(datasets, "_DATASETS", dict(datasets._DATASETS))
    register_dataset("blobs", read_blobs, check_blobs)


def mapping(**data):
    return {
        "output_dir": "runs/x",
        "data": {"name": "blobs", "root": "r", **data},
        "model": {"name": "point_bert_tiny"},
    }


def lines(content: dict) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_config(content, where="a.yaml")
    return str(caught.value).splitlines()


def test_a_readers_keywords_are_filled_with_its_defaults_and_reach_it(blobs, tmp_path):
    own = {"stretch": 1.0, "side": "x", "shapes": 8, "sizes": (1.0, 2.0), "suffix": None}
    assert parse_config(mapping(), where="a.yaml").data.kwargs == own, "no function, nothing private"
    config = parse_config(mapping(stretch="5e0", side="y", sizes=[1, 2, 4], suffix="!"), where="a.yaml")
    assert config.data.kwargs == {"stretch": 5.0, "side": "y", "shapes": 8, "sizes": (1.0, 2.0, 4.0), "suffix": "!"}
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    dataset = build_dataset(config.data, "test", seed=0)
    direct = read_blobs("r", "test", num_points=1024, stretch=5.0, side="y", sizes=(1.0, 2.0, 4.0), suffix="!")
    assert dataset.points.equal(direct.points) and dataset.class_names == direct.class_names
    direct = read_blobs("r", "test", num_points=1024, stretch=3.0)
    assert create_dataset("blobs", "r", "test", stretch=3.0).points.equal(direct.points)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"stretsh": 2.0}, "data.stretsh: unknown key; did you mean 'stretch'?"),
        ({"num_point": 2}, "data.num_point: unknown key; did you mean 'num_points'?"),
        ({"lr": 2}, "data.lr: unknown key; did you mean 'optim.lr'?"),
        ({"stretch": "far"}, "data.stretch: must be a number, got 'far'"),
        ({"stretch": True}, "data.stretch: must be a number, got true"),
        ({"shapes": 2.5}, "data.shapes: must be a whole number, got 2.5"),
        ({"shapes": None}, "data.shapes: must be a whole number, got null"),
        ({"side": "z"}, "data.side: must be 'x' or 'y', got 'z'"),
        ({"sizes": 1.0}, "data.sizes: must be a list, got 1.0"),
        ({"sizes": [1.0, "a"]}, "data.sizes.1: must be a number, got 'a'"),
        ({"suffix": 3}, 'data.suffix: must be text (or null), got 3; for text, put quotes around it: "..."'),
        ({"stretch": -1}, "data.stretch: must be above 0, got -1"),
        ({"variant": "OBJ_BG"}, "data.variant: only scanobjectnn has one, 'blobs' has not; remove it"),
    ],
)
def test_a_wrong_keyword_of_a_reader_is_one_line(blobs, data, line):
    assert lines(mapping(**data)) == [f"a.yaml: {line}"]


def test_without_a_known_name_only_keys_that_look_mistyped_are_reported(blobs):
    unknown = mapping(stretch=2.0, num_point=3)
    unknown["data"]["name"] = "blobbs"
    first, second = lines(unknown)
    assert first.startswith("a.yaml: data.name: unknown dataset 'blobbs'; did you mean 'blobs'?")
    assert second == "a.yaml: data.num_point: unknown key; did you mean 'num_points'?"
    for section, wrong, near in (("data", "nmae", "name"), ("model", "nane", "name")):
        content = mapping()
        content[section][wrong] = content[section].pop("name")
        assert lines(content) == [
            f"a.yaml: {section}.name: required key is missing",
            f"a.yaml: {section}.{wrong}: unknown key; did you mean '{near}'?",
        ]


def test_wrong_keywords_of_create_dataset_are_one_line(blobs):
    with pytest.raises(InputError, match=r"^data set 'blobs' has no stretsh; did you mean 'stretch'\?$"):
        create_dataset("blobs", "r", "test", stretsh=2.0)
    with pytest.raises(InputError, match=r"^stretch: must be above 0, got -1$"):
        create_dataset("blobs", "r", "test", stretch=-1)


def test_a_reader_is_refused_whose_keyword_has_no_default_or_a_taken_name(blobs):
    with pytest.raises(InputError, match="'late': keyword 'level' of its reader has no default; give it one"):
        register_dataset("late", lambda root, split, *, num_points, level, **_: None)
    assert "late" not in list_datasets()
    register_dataset("taken", lambda root, split, *, num_points, augment=False, **_: None)
    content = mapping()
    content["data"]["name"] = "taken"
    (line,) = lines(content)
    assert line.startswith("a.yaml: data.name: has a keyword 'augment', which is a key of every such section")


def test_a_readers_keywords_train_resume_and_are_kept(blobs, tiny_config, tmp_path):
    content = tiny_config("train.epochs=2", "optim.warmup_epochs=0").to_dict()
    content["data"] = {"name": "blobs", "root": "r", "num_points": 64, "side": "y", "stretch": 3.0, "shapes": 16}
    config = parse_config(content, where="a.yaml")
    trainer = Trainer(parse_config(content, where="a.yaml", overrides=["train.max_steps=2"]))
    trainer.fit()
    stored = load_checkpoint(trainer.folder.last)["config"]
    assert stored["data"]["side"] == "y" and stored["data"]["sizes"] == [1.0, 2.0]
    assert parse_config(stored, where="last.pt", overrides=["train.max_steps=null"]) == config
    content["data"]["side"] = "x"
    with pytest.raises(InputError, match=r"was trained with data\.side='y', the config says 'x'"):
        Trainer(parse_config(content, where="a.yaml")).fit(resume=trainer.folder.last)
    finished = Trainer(config)
    finished.fit(resume=trainer.folder.last)
    assert [row["epoch"] for row in finished.history] == [1, 2]


def test_types_are_those_of_annotations_and_else_of_defaults():
    defaults = {"a": 1, "b": None, "c": (1,), "d": None, "e": 0.5, "f": print, "g": None}
    plain = keyword_fields(defaults)
    assert [*plain] == ["a", "b", "c", "d", "e", "g"] and [default for _, default in plain.values()] == [
        default for default in defaults.values() if default is not print
    ]
    annotations = {"a": float, "b": int, "c": Sequence[float], "d": Path, "e": "float", "g": bool | None}
    declared = keyword_fields(defaults, annotations)
    own = {key: keyword_fields({key: default}, {})[key] for key, default in {"a": 0.0, "c": (0.5,)}.items()}
    assert declared["a"][0] == own["a"][0] and declared["c"][0] == own["c"][0]
    assert declared["d"] == plain["d"] and declared["e"] == plain["e"], "other annotations are as if not there"
    assert type(None) in declared["b"][0].__args__ and type(None) in declared["g"][0].__args__


# What config/ knows of data sets and models


def test_config_names_no_data_set_and_no_model():
    names = {*list_datasets(), *models.list_models()}
    names |= {name for name, kind in vars(models).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert {"shapes", "scanobjectnn", "point_bert", "PointBERT"} <= names
    for path in Path(s2d3d.config.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            said = {
                ast.Constant: lambda n: n.value, ast.Name: lambda n: n.id, ast.Attribute: lambda n: n.attr,
                ast.alias: lambda n: n.name,
            }.get(type(node), lambda n: None)(node)  # fmt: skip
            assert not isinstance(said, str) or said not in names, f"{path.name}: {said}"
    assert {"variant", "background"}.isdisjoint(Config.model_fields["data"].annotation.model_fields)


# Older configs: every data set had `variant` and `background`, null for all but one


@pytest.mark.parametrize("name", ["modelnet40", "shapes", "blobs"])
def test_null_keys_of_another_data_set_are_left_out(blobs, name):
    content = mapping() | {"data": {"name": name, "root": "r"}}
    old = content | {"data": {**content["data"], "variant": None, "background": None}}
    assert parse_config(old, where="last.pt") == parse_config(content, where="last.pt")
    assert old["data"]["variant"] is None, "the mapping of a checkpoint is not changed"
    old["data"]["background"] = True
    assert lines(old) == [f"a.yaml: data.background: only scanobjectnn has one, '{name}' has not; remove it"]


def test_null_keys_of_its_own_are_kept(blobs):
    old = mapping() | {"data": {"name": "scanobjectnn", "root": "r", "variant": None, "background": None}}
    assert parse_config(old, where="last.pt").data.kwargs == {"variant": None, "background": None}
    register_dataset("mine", lambda root, split, *, variant="soft", **_: None)
    old["data"] = {"name": "mine", "root": "r", "variant": None}
    assert lines(old) == ["a.yaml: data.variant: must be text, got null"]


# Channels


def test_a_reader_of_channels_is_asked_for_them_and_others_are_refused(blobs):
    def colored(root, split, *, num_points, channels="xyz", **_):
        points = torch.rand(4, num_points, 6 if channels == "xyz+rgb" else 3)
        return PointCloudDataset(points, torch.zeros(4), ["a"], split=split, num_points=num_points, channels=channels)

    register_dataset("colored", colored)
    assert create_dataset("colored", "x", "train", num_points=8, channels="xyz+rgb").channels == "xyz+rgb"
    assert create_dataset("colored", "x", "train", num_points=8).points.shape == (4, 8, 3)
    with pytest.raises(
        InputError, match=r"^x: data set 'blobs' gives xyz, asked for are xyz\+rgb; set data.channels=xyz$"
    ):
        create_dataset("blobs", "x", "train", num_points=8, channels="xyz+rgb")
    register_dataset("plain", lambda root, split, *, num_points, transform, up_axis, classes, fraction, seed, cache_dir,
                     memory_budget_gb: read_blobs(root, split, num_points=num_points))  # fmt: skip
    assert create_dataset("plain", "x", "train", num_points=8).channels == "xyz"
    with pytest.raises(InputError, match=r"^data set 'plain' has no channels beyond xyz, asked for are xyz\+rgb; set"):
        create_dataset("plain", "x", "train", num_points=8, channels="xyz+rgb")
