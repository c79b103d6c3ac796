"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
import torch

from s2d3d.datasets.shapes import write_shapes

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def modelnet40_root() -> Path:
    """The real ModelNet40; when the variable is set, its absence is a failure and not a reason to skip."""
    root = os.environ.get("S2D3D_MODELNET40")
    if not root:
        pytest.skip("S2D3D_MODELNET40 does not name a folder with ModelNet40")
    assert (Path(root) / "train_files.txt").is_file(), f"S2D3D_MODELNET40={root} holds no ModelNet40"
    return Path(root)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A small procedural data set: 96 training and 36 test shapes of 12 classes, 128 points."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, num_train=96, num_test=36, num_points=128, seed=0)
    return root
