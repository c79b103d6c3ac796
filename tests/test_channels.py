"""The layout of the numbers of a point."""

import numpy as np
import pytest
import torch

from s2d3d.channels import CHANNELS, by_group, check_channels, columns, groups, missing, num_channels
from s2d3d.errors import InputError


def test_every_layout_begins_with_the_coordinates_and_covers_its_columns_once():
    for channels in CHANNELS:
        parts = [columns(channels, group) for group in groups(channels)]
        covered = [column for part in parts for column in range(*part.indices(99))]
        assert covered == list(range(num_channels(channels))) and parts[0] == slice(0, 3)


@pytest.mark.parametrize("library", [np, torch])
def test_groups_are_views_by_group(library):
    cloud = library.arange(18).reshape(2, 9)
    parts = by_group(cloud, "xyz+normal+rgb")
    assert {name: part.tolist() for name, part in parts.items()} == {
        "xyz": [[0, 1, 2], [9, 10, 11]], "normal": [[3, 4, 5], [12, 13, 14]], "rgb": [[6, 7, 8], [15, 16, 17]],
    }  # fmt: skip
    parts["rgb"][0, 0] = 99
    assert cloud[0, 6] == 99


def test_a_wrong_layout_is_one_line():
    with pytest.raises(InputError, match=r"^channels is 'xyz\+norml', did you mean|^channels is 'xyz\+norml'"):
        check_channels("xyz+norml")
    with pytest.raises(InputError, match=r"^clouds have 6 channels, xyz are 3; name their channels$"):
        by_group(torch.zeros(2, 6), "xyz")
    assert str(missing("a.ply", "normal", "xyz+normal+rgb", advice="paint them")) == (
        "a.ply: holds no normals, which data.channels=xyz+normal+rgb needs; set data.channels=xyz+rgb for a training, "
        "paint them, or use other files"
    )
