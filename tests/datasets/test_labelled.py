"""The base of data sets: labels, names, subsets and fingerprints do not depend on what a sample is."""

import numpy as np
import pytest
import torch

from s2d3d.datasets import (
    BatchLoader,
    LabelledDataset,
    PointCloudDataset,
    create_dataset,
    require_clouds,
    same_data,
)  # fmt: skip
from s2d3d.errors import InputError


class Grids(LabelledDataset):
    """Samples (1, 2, 3) whose values tell their row."""

    noun = "grids"

    def sample(self, indices, generator=None):
        rows = self._rows[indices]
        noise = 0.0 if generator is None else torch.rand(len(rows), 1, 1, 1, generator=generator)
        return rows.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 3) + noise, self._storage_labels[rows]


def grids(count=7, **options):
    return Grids(torch.arange(count) % 2, ["even", "odd"], **options)


def test_a_subset_keeps_rows_labels_and_names_together():
    part = grids(split="test").subset([5, 2]).subset([0, 1, 1])
    samples, labels = part.batch(torch.tensor([2, 0]))
    assert samples[:, 0, 0, 0].tolist() == [2, 5] and labels.tolist() == [0, 1]
    assert part.names == ["test_00005", "test_00002", "test_00002"] and part.labels.tolist() == [1, 0, 0]
    assert isinstance(part, Grids) and len(part) == 3


def test_training_is_random_and_transformed_and_a_test_is_plain():
    def negate(samples, generator):
        return -samples

    train, test = grids(transform=negate), grids(split="test")
    assert (train[1][0] < -1).all() and (test[1][0] == 1).all()
    assert (train.batch(torch.tensor([1]), augment=False)[0] == 1).all()
    batches = [torch.cat([samples for samples, _ in BatchLoader(train, 3, shuffle=True, seed=4)]) for _ in range(2)]
    assert torch.equal(*batches) and batches[0].shape == (7, 1, 2, 3)


def test_a_fingerprint_tells_sets_apart():
    assert same_data(grids().fingerprint(), grids().fingerprint())
    assert not same_data(grids().fingerprint(), grids(8).fingerprint()), "size"
    assert not same_data(grids().fingerprint(), grids().subset([6, 1, 2, 3, 4, 5, 0]).fingerprint()), "order"


def test_a_fingerprint_tells_a_set_from_its_mirror_image():
    clouds = torch.rand(70, 20, 3, generator=torch.Generator().manual_seed(0))
    options = {"split": "test", "num_points": 16}
    plain, mirrored = (
        PointCloudDataset(points, torch.zeros(70), ["a"], **options).fingerprint()
        for points in (clouds, clouds * torch.tensor([1.0, 1.0, -1.0]))
    )
    torch.testing.assert_close(plain["clouds"], mirrored["clouds"])
    assert not same_data(plain, mirrored)
    old = {key: mirrored[key] for key in ("labels", "clouds")}
    assert same_data(old, plain), "checkpoints of older versions are resumed"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_fingerprint_knows_every_file_of_both_splits(tmp_path, split):
    """Of 80 training clouds, the numbers of 64 at most are compared."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 2)):
        for kind in ("a", "b", "c"):
            (tmp_path / part / kind).mkdir(parents=True)
            for number in range(count):
                np.save(tmp_path / part / kind / f"{number:02d}.npy", rng.random((40, 3)))
    before = create_dataset("files", tmp_path, "train", num_points=16).fingerprint()
    assert same_data(before, create_dataset("files", tmp_path, "train", num_points=16).fingerprint())
    np.save(tmp_path / split / "a" / "01.npy", rng.random((40, 3)))
    after = create_dataset("files", tmp_path, "train", num_points=16).fingerprint()
    other, changed = (create_dataset("files", tmp_path, "train", num_points=16, classes=[c, "c"]) for c in "ab")
    np.save(tmp_path / split / "b" / "00.npy", rng.random((40, 3)))
    assert same_data(
        other.fingerprint(),
        create_dataset("files", tmp_path, "train", num_points=16, classes=["a", "c"]).fingerprint(),
    ), "a class that is not chosen does not matter"
    again = create_dataset("files", tmp_path, "train", num_points=16, classes=["b", "c"]).fingerprint()
    assert not same_data(changed.fingerprint(), again)
    assert not same_data(before, after) and before["labels"] == after["labels"]
    if split == "test":
        assert before["clouds"] == after["clouds"]


def test_the_fingerprint_of_clouds_is_that_of_older_checkpoints():
    """Weighted mean squares over points and axes, and a hash of size, points and classes."""
    import hashlib

    points = torch.rand(70, 20, 3)
    clouds = PointCloudDataset(points, torch.arange(70) % 2, ["a", "b"], split="test", num_points=16, normalize=False)
    found = clouds.fingerprint()
    stored = clouds.points[torch.arange(64)][:, :16].double()
    expected = (stored.square() * torch.tensor([1.0, 2.0, 3.0])).mean(dim=(1, 2))
    torch.testing.assert_close(torch.tensor(found["clouds"], dtype=torch.float64), expected)
    digest = hashlib.blake2b(b"70 16 ['a', 'b']", digest_size=12)
    digest.update(clouds.labels.numpy().data)
    assert found["labels"] == digest.hexdigest()


def test_what_needs_clouds_says_what_it_got():
    clouds = PointCloudDataset(torch.rand(2, 8, 3), torch.zeros(2), ["any"], num_points=8)
    assert require_clouds(clouds, "a picture") is clouds
    with pytest.raises(InputError, match=r"^here: holds grids, a picture needs point clouds$"):
        require_clouds(grids(source="here"), "a picture")
    loader = BatchLoader(grids(split="test", source="here"), 4)
    assert [len(labels) for _, labels in loader.vote(0)] == [4, 3]
    with pytest.raises(InputError, match=r"^here: holds grids, a vote needs point clouds$"):
        loader.vote(1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: grids(0), "data set: no grids in split 'train'"),
        (lambda: grids().subset([]), "data set: a subset of no grids"),
        (lambda: grids().subset([7]), "data set: a subset index is outside the 7 grids of split 'train'"),
    ],
)
def test_impossible_sets_are_refused(make, message):
    with pytest.raises(InputError) as refused:
        make()
    assert str(refused.value) == message
