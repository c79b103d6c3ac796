"""A checkpoint opened: the model, config and data set are those of the run."""

from pathlib import Path

import pytest
import torch

from s2d3d import create_dataset, load_checkpoint, load_model, save_checkpoint
from s2d3d.errors import InputError
from s2d3d.runs.trained import open_trained
from s2d3d.s2d import is_sparse
from s2d3d.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("enough_updates")

V1 = Path(__file__).parent / "fixtures" / "checkpoint_v1.pt"


@pytest.fixture
def trainer(tiny_config):
    trainer = Trainer(tiny_config("train.epochs=1", "optim.warmup_epochs=0"))
    trainer.fit()
    return trainer


def test_everything_is_that_of_the_run(trainer, shapes_root):
    trained = open_trained(trainer.folder.merged, ["eval.batch_size=5"])
    assert trained.path == str(trainer.folder.merged) and trained.class_names == trainer.data.class_names
    assert trained.config.eval.batch_size == 5
    assert trained.config.model == trainer.config.model and trained.config.data == trainer.config.data
    dataset, test = trained.dataset(), create_dataset("shapes", shapes_root, "test", num_points=128)
    assert dataset.names == test.names and trained.dataset("train").split == "train"
    points = dataset.batch(torch.arange(3), augment=False)[0]
    with torch.no_grad():
        assert torch.equal(trained.model(points), load_model(trainer.folder.merged)(points))


def test_experts_stay_unless_they_are_merged(trainer):
    assert is_sparse(open_trained(trainer.folder.last).model)
    merged = open_trained(trainer.folder.last, merge=True).model
    assert not is_sparse(merged) and not merged.training
    weights = load_checkpoint(trainer.folder.merged)["state_dict"]
    assert all(torch.equal(value, weights[key]) for key, value in merged.state_dict().items())


def test_what_does_not_belong_together_is_refused(trainer, tmp_path):
    renamed = tmp_path / "renamed.pt"
    payload = load_checkpoint(trainer.folder.merged)
    save_checkpoint(renamed, payload | {"class_names": ["doughnut", *payload["class_names"][1:]]})
    with pytest.raises(InputError, match=r"renamed\.pt"):
        open_trained(renamed).dataset()
    with pytest.raises(InputError, match=r"data\.rot: unknown key; did you mean 'root'"):
        open_trained(renamed, ["data.rot=x"])
    with pytest.raises(InputError, match=r"no\.pt: no such checkpoint"):
        open_trained(tmp_path / "no.pt")


# What a file from elsewhere may decide


def asking(tmp_path, **changes):
    """Return the path of a checkpoint whose config has other values, by dotted key."""
    payload = load_checkpoint(V1)
    for key, value in changes.items():
        section, name = key.split("__")
        payload["config"][section][name] = value
    return save_checkpoint(tmp_path / "asking.pt", payload)


def test_a_checkpoint_does_not_say_where_files_are_written(tmp_path):
    path = asking(tmp_path, data__cache_dir=str(tmp_path / "theirs"))
    assert open_trained(path).config.data.cache_dir is None
    own = open_trained(path, [f"data.cache_dir={tmp_path / 'mine'}"]).config.data.cache_dir
    assert own == str(tmp_path / "mine") and not (tmp_path / "theirs").exists()


def test_a_checkpoint_asks_for_a_bounded_number_of_votes(tmp_path):
    path = asking(tmp_path, eval__votes=10**9)
    with pytest.raises(InputError) as caught:
        open_trained(path)
    asked = "asks for 1000000000 votes, a checkpoint may ask for 1000; give the number yourself by eval.votes=N"
    assert str(caught.value) == f"{path}: eval.votes: {asked}"
    assert open_trained(path, ["eval.votes=2000"]).config.eval.votes == 2000
    assert open_trained(asking(tmp_path, eval__votes=1000)).config.eval.votes == 1000


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("kwargs", "num_heads", 2.0), ("kwargs", "depth", "2"), ("kwargs", "trans_dim", True),
        ("kwargs", "drop_path_rate", "much"), ("model", "num_classes", 12.0), ("model", "in_channels", True),
        ("s2d", "every", 2.0), ("s2d", "num_experts", 4.0),
    ],
)  # fmt: skip
def test_a_description_of_other_types_is_one_line(tmp_path, part, key, value):
    payload = load_checkpoint(V1)
    {"kwargs": payload["model"]["kwargs"], "model": payload["model"], "s2d": payload["s2d"]}[part][key] = value
    path = save_checkpoint(tmp_path / "other.pt", payload)
    with pytest.raises(InputError, match=f"the checkpoint's model description is unusable .{key}: must be a "):
        open_trained(path)


# Channels


def test_a_checkpoint_without_channels_is_of_coordinates(tmp_path):
    assert "channels" not in load_checkpoint(V1)["model"]
    assert open_trained(V1).channels == "xyz" and open_trained(V1).config.data.channels == "xyz"
    with pytest.raises(InputError, match=r"takes xyz, data\.channels asks for xyz\+normal; remove the override"):
        open_trained(V1, ["data.channels=xyz+normal"])


@pytest.mark.parametrize(("value", "text"), [
    ("xyz+normal", r"its 3 channels are not xyz\+normal"), ("xyz+norml", r"channels is 'xyz\+norml'"),
    (5, "channels is 5"),
])  # fmt: skip
def test_channels_that_the_model_does_not_have_are_one_line(tmp_path, value, text):
    payload = load_checkpoint(V1)
    payload["model"]["channels"] = value
    path = save_checkpoint(tmp_path / "other.pt", payload)
    with pytest.raises(InputError, match=f"the checkpoint's model description is unusable .{text}"):
        open_trained(path)
