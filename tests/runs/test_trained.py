"""A checkpoint opened: the model, config and data set are those of the run."""

import pytest
import torch

from s2d3d import create_dataset, load_checkpoint, load_model, save_checkpoint
from s2d3d.errors import InputError
from s2d3d.runs.trained import open_trained
from s2d3d.s2d import is_sparse
from s2d3d.training.trainer import Trainer


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
