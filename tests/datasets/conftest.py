"""Small folders in ModelNet layout."""

import numpy as np
import pytest

from s2d3d.datasets.h5 import write_h5

CLASSES = ("apple", "boat", "chair")


@pytest.fixture
def clouds():
    """Make (n, P, 3) random clouds, no two alike, none centred."""

    def make(count: int, num_points: int, dtype=np.float32, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return (rng.normal(size=(count, num_points, 3)) * [1, 2, 3] + rng.normal(size=(count, 1, 3))).astype(dtype)

    return make


@pytest.fixture
def modelnet_folder(tmp_path, clouds):
    """Write a folder of two training files and one test file; labels take turns over three classes."""

    def make(name="set", *, num_points=16, dtype=np.float32, up_axis=None, per_file=6, entry="{file}", **extras):
        root = tmp_path / name
        root.mkdir()
        (root / "shape_names.txt").write_text("\n".join(CLASSES) + "\n")
        for split, files in (("train", 2), ("test", 1)):
            lines = []
            for number in range(files):
                file = f"ply_data_{split}{number}.h5"
                points = clouds(per_file, num_points, dtype, seed=10 * files + number)
                write_h5(root / file, points, np.arange(per_file) % 3, up_axis=up_axis, **extras)
                lines.append(entry.format(file=file, name=name))
            (root / f"{split}_files.txt").write_text("\n".join(lines) + "\n")
        return root

    return make
