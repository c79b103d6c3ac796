"""The end of a small run: statistics that few updates leave, and a doubt that names its cause."""

import torch
from torch import nn

from s2d3d import Trainer, create_model
from s2d3d.datasets import PointCloudDataset
from s2d3d.evaluation.batchnorm import unsettled_norms
from s2d3d.training.ending import doubt


def two_shapes(split, *, swapped=False, count=24):
    """Balls and plates; swapped ones have each other's label."""
    generator = torch.Generator().manual_seed(len(split))
    points = torch.randn(2 * count, 128, 3, generator=generator)
    points[count:, :, 2] *= 0.05
    labels = torch.tensor([0] * count + [1] * count)
    return PointCloudDataset(points, 1 - labels if swapped else labels, ["ball", "plate"], split=split, num_points=128)


def fit(tiny_config, *overrides, swapped=False):
    config = tiny_config("train.epochs=8", "optim.lr=5e-3", *overrides)
    trainer = Trainer(config, datasets=(two_shapes("train"), two_shapes("test", swapped=swapped)))
    trainer.fit()
    return trainer


def test_statistics_of_few_updates_are_re_estimated(tiny_config):
    """24 updates leave 8 % of the initial variance of 1, where the activations have 1e-3."""
    reports = fit(tiny_config).reports
    assert reports["recalibrated"].oa >= 0.9


def test_layers_are_unsettled_until_the_initial_values_are_forgotten():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=0.01), nn.BatchNorm1d(3, momentum=None))
    assert unsettled_norms(model, 109) == [model[0], model[1]]
    assert unsettled_norms(model, 110) == [model[1]] and unsettled_norms(model, 1146) == []
    assert len(unsettled_norms(create_model("point_bert_tiny", num_classes=2), 50)) > 0


def test_doubt_names_clouds_that_differ(tiny_config, caplog):
    trainer = fit(tiny_config, swapped=True)
    assert trainer.reports["recalibrated"].oa < 0.5
    (line,) = [record.message for record in caplog.records if record.message.startswith("warning: the model learned")]
    assert "training and test clouds differ" in line and "near chance" in line


def test_doubt_names_a_model_that_differs_in_evaluation(tiny_config):
    class Stuck(nn.Module):
        def forward(self, points):
            return torch.tensor([[1.0, 0.0]]).expand(len(points), 2)

    trainer = fit(tiny_config, "train.epochs=2")
    reports = {"merged": trainer.task.evaluate(Stuck(), trainer.data.scored)}
    line = doubt(Stuck(), reports, "merged", trainer.data, trainer.task, 0.9)
    assert "what its layers do differs between training and evaluation" in line
    assert "50 % on its training clouds" in line
    assert doubt(Stuck(), reports, "merged", trainer.data, trainer.task, 0.55) == "", "it has learned nothing"


def test_no_doubt_about_a_model_that_works(tiny_config, caplog):
    fit(tiny_config)
    assert "warning: the model" not in caplog.text
