"""Two splits whose verticals differ are told apart from two that agree."""

import pytest
import torch

from s2d3d import create_dataset
from s2d3d.datasets import PointCloudDataset
from s2d3d.datasets.orientation import look_turned


def test_a_turned_test_split_is_noticed(shapes_root):
    train, test, turned = (
        create_dataset("shapes", shapes_root, split, num_points=128, up_axis=axis)
        for split, axis in (("train", None), ("test", None), ("test", "y"))
    )
    assert look_turned(train, turned) and look_turned(turned, train)
    assert not look_turned(train, test) and not look_turned(turned, turned)


@pytest.mark.parametrize("seed", range(5))
def test_shapes_without_a_vertical_are_not_suspected(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 4
    first, second = (
        PointCloudDataset(torch.randn(40, 32, 3, generator=generator), labels, list("abcd"), split=split, num_points=32)
        for split in ("train", "test")
    )
    assert not look_turned(first, second)
