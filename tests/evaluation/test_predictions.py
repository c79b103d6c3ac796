"""Probabilities of single clouds."""

import pytest
import torch
from torch import nn

from s2d3d.datasets import PointCloudDataset
from s2d3d.errors import InputError
from s2d3d.evaluation.accuracy import class_probabilities

DATA = PointCloudDataset(
    torch.rand(10, 8, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(10), ["any"], split="train",
    num_points=8, transform=lambda points, generator: points * 0, normalize=False,
)  # fmt: skip


def test_each_cloud_as_the_model_says_it_without_augmentation():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(24, 3)).train()
    found = class_probabilities(model, DATA, device="cpu", batch_size=4, progress=False)
    assert model.training and not found.requires_grad
    model.eval()
    for index in range(10):
        assert found[index] == pytest.approx(model(DATA.points[index : index + 1])[0].softmax(0).tolist(), abs=1e-6)
    some = class_probabilities(model, DATA, device="cpu", indices=torch.tensor([7, 2]), progress=False)
    assert torch.allclose(some, found[[7, 2]])


def test_outputs_that_are_no_numbers_are_refused():
    class Diverged(nn.Module):
        def forward(self, points):
            return points[:, 0] / (points[:, :1, 0] > points[:, :1, 0].median())

    with pytest.raises(InputError, match=r"not finite for [1-9]\d* of 10 samples; its training has diverged"):
        class_probabilities(Diverged(), DATA, device="cpu", progress=False)
