"""Clouds that stay in their files: the samples of a set in memory, bit for bit, in bounded memory."""

import os
import pickle
import threading

import h5py
import numpy as np
import pytest
import torch

from s2d3d.datasets import BatchLoader, create_dataset, split_train_validation
from s2d3d.datasets import stream as module
from s2d3d.datasets.h5 import inspect_h5, read_rows, write_h5
from s2d3d.datasets.stream import StreamedClouds, exceeds_budget
from s2d3d.datasets.transforms import normalize_stored
from s2d3d.errors import InputError

TINY_GB = 1e-9
"""One byte: nothing fits, so that everything is streamed and the cache holds one piece."""


@pytest.fixture
def pair(modelnet_folder):
    """Make the same set twice: in memory and streamed."""

    def make(split="train", *, budget=TINY_GB, root=None, **options):
        root = root or modelnet_folder(num_points=40, per_file=70, up_axis="y")
        memory = create_dataset("modelnet40", root, split, num_points=40, **options)
        return memory, create_dataset("modelnet40", root, split, memory_budget_gb=budget, num_points=40, **options)

    return make


def assert_same_batches(first, second, **options):
    for epoch in range(2):
        loaders = [BatchLoader(dataset, 16, seed=3, **options) for dataset in (first, second)]
        for loader in loaders:
            loader.set_position(epoch)
        for (points, labels), (other_points, other_labels) in zip(*loaders, strict=True):
            assert torch.equal(points, other_points) and torch.equal(labels, other_labels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("normalize", [True, False])
def test_batches_are_those_of_the_set_in_memory(modelnet_folder, pair, dtype, normalize):
    root = modelnet_folder(num_points=40, per_file=70, up_axis="y", dtype=dtype)
    memory, streamed = pair(root=root, normalize=normalize)
    assert isinstance(streamed._storage, StreamedClouds) and isinstance(memory._storage, torch.Tensor)
    assert streamed.names == memory.names and torch.equal(streamed.labels, memory.labels)
    assert_same_batches(memory, streamed, shuffle=True)
    assert torch.equal(streamed.points, memory.points) and streamed._storage.dtype == memory._storage.dtype
    assert streamed.fingerprint() == memory.fingerprint()


def test_files_of_two_precisions_give_the_wider(modelnet_folder, clouds, pair):
    root = modelnet_folder(num_points=40, per_file=70, up_axis="y")
    write_h5(root / "ply_data_train1.h5", clouds(70, 40, np.float16), np.arange(70) % 3, up_axis="z")
    memory, streamed = pair(root=root)
    assert streamed._storage.dtype == torch.float32
    assert_same_batches(memory, streamed, shuffle=True)


def test_farthest_point_prefixes_are_the_same(modelnet_folder):
    root = modelnet_folder(num_points=60, per_file=20)
    sets = [
        create_dataset("modelnet40", root, "test", num_points=24, memory_budget_gb=budget) for budget in (1, TINY_GB)
    ]
    assert sets[1]._storage.shape == (20, 28, 3)
    assert_same_batches(*sets)
    assert_same_batches(*sets, augment=lambda points, generator: points)


def test_parts_of_a_streamed_set(pair):
    memory, streamed = pair(classes=["chair", "apple"], fraction=0.5)
    assert_same_batches(memory, streamed, shuffle=True)
    for part, other in zip(split_train_validation(memory, 0.2), split_train_validation(streamed, 0.2)):
        assert_same_batches(part, other)
    assert torch.equal(memory.subset([5, 2]).points, streamed.subset([5, 2]).points)


@pytest.mark.parametrize("num_points", [32, 24])
def test_masks_follow_their_points(tmp_path, clouds, num_points):
    (tmp_path / "main_split").mkdir()
    for name in ("training", "test"):
        mask = np.random.default_rng(1).integers(-1, 3, (30, 32))
        path = tmp_path / "main_split" / f"{name}_objectdataset_augmentedrot_scale75.h5"
        write_h5(path, clouds(30, 32), np.arange(30) % 15, mask=mask)
    sets = [
        create_dataset("scanobjectnn", tmp_path, "test", num_points=num_points, memory_budget_gb=gb)
        for gb in (1, TINY_GB)
    ]
    indices = torch.tensor([29, 0, 7])
    assert torch.equal(*(dataset.batch(indices)[0] for dataset in sets))
    assert torch.equal(*(dataset.sample_mask(indices) for dataset in sets))
    generators = [torch.Generator().manual_seed(4) for _ in sets]
    assert torch.equal(*(d.sample_mask(indices, g) for d, g in zip(sets, generators)))
    assert torch.equal(sets[0].mask, sets[1].mask)


def test_normalising_does_not_depend_on_the_other_clouds_of_a_piece(clouds):
    """What makes streamed and stored clouds equal whatever is read together."""
    for dtype, count in ((np.float32, 1024), (np.float16, 333)):
        points = torch.from_numpy(clouds(70, count, dtype))
        whole = normalize_stored(points)
        for size in (1, 3, 64):
            assert torch.equal(torch.cat([normalize_stored(part) for part in points.split(size)]), whole)


def test_the_cache_stays_within_its_bound_and_saves_reading(modelnet_folder, monkeypatch):
    root = modelnet_folder(num_points=40, per_file=200, dtype=np.float32)
    piece = 64 * 40 * 3 * 4
    read = []
    monkeypatch.setattr(module, "read_rows", lambda *key: (read.append(key[1:]), read_rows(*key))[1])
    dataset = create_dataset("modelnet40", root, "train", num_points=40, memory_budget_gb=3 * piece / 1e9)
    cache = dataset._storage._cache
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    for part in rows.split(10):
        dataset.batch(part)
        assert cache._bytes == sum(piece.nbytes for piece in cache._pieces.values()) <= 3 * piece
    assert len(read) < 400, "pieces are read again, but not for each shape"
    before = len(read)
    dataset.batch(torch.tensor([0, 1, 63]))
    dataset.batch(torch.tensor([62, 2]))
    assert len(read) <= before + 1
    assert max(stop - start for start, stop in read) == 64


def test_the_budget_decides(modelnet_folder):
    root = modelnet_folder(num_points=40, per_file=70, dtype=np.float32)
    num_bytes = 2 * 70 * 40 * 3 * 4
    files = [root / f"ply_data_train{number}.h5" for number in range(2)]
    assert not exceeds_budget(files, num_bytes / 1e9) and exceeds_budget(files, (num_bytes - 1) / 1e9)
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"memory_budget_gb is .*, must be above 0"):
            create_dataset("modelnet40", root, "train", num_points=40, memory_budget_gb=bad)


def test_a_file_that_is_cut_short_or_replaced_while_it_is_in_use(pair, modelnet_folder, clouds):
    root = modelnet_folder(num_points=40, per_file=70)
    path = root / "ply_data_train1.h5"
    whole = path.read_bytes()
    for change in (
        lambda: path.write_bytes(whole[:-5000]),
        lambda: write_h5(path, clouds(70, 40, seed=9), np.arange(70) % 3),
        path.unlink,
    ):
        path.write_bytes(whole)
        _, streamed = pair(root=root)
        streamed.batch(torch.tensor([139]))
        change()
        with pytest.raises(InputError, match=r"ply_data_train1\.h5: (has changed since it was opened|no such file)"):
            streamed.batch(torch.tensor([70, 1]))
        assert streamed.batch(torch.tensor([1]))[0].shape == (1, 40, 3), "other files can still be read"


def test_a_shape_that_is_not_finite_is_named_when_it_is_read(pair, modelnet_folder):
    root = modelnet_folder(num_points=40, per_file=70)
    with h5py.File(root / "ply_data_train1.h5", "a") as file:
        file["data"][66, 3, 1] = np.nan
    streamed = create_dataset("modelnet40", root, "train", num_points=40, memory_budget_gb=TINY_GB)
    assert streamed.batch(torch.tensor([3]))[0].isfinite().all()
    with pytest.raises(InputError, match=r"ply_data_train1\.h5: dataset 'data' holds NaN or infinity in sample 66"):
        streamed.batch(torch.tensor([70 + 66]))


def test_files_of_different_sizes_are_refused(modelnet_folder, clouds):
    root = modelnet_folder(num_points=40, per_file=6)
    write_h5(root / "ply_data_train1.h5", clouds(6, 41), np.arange(6) % 3)
    with pytest.raises(InputError, match=r"train1\.h5: 41 points a shape, the files before it 40"):
        create_dataset("modelnet40", root, "train", num_points=40, memory_budget_gb=TINY_GB)


def test_pieces_too_large_to_be_read_one_by_one_are_refused(tmp_path, monkeypatch, clouds):
    monkeypatch.setattr("s2d3d.datasets.h5_checks.MAX_PIECE", 1000)
    write_h5(tmp_path / "a.h5", clouds(8, 40), [0] * 8)
    with pytest.raises(InputError, match=r"is stored in chunks .*data\.memory_budget_gb"):
        inspect_h5(tmp_path / "a.h5")


def test_large_clouds_are_written_in_small_pieces(tmp_path):
    """100,000 points: 64 clouds to a piece would be 77 MB."""
    points = np.zeros((9, 100_000, 3), np.float32)
    points[:, 0] = 1
    write_h5(tmp_path / "a.h5", points, [0] * 9)
    layout = inspect_h5(tmp_path / "a.h5")
    assert layout.rows_per_read == 6 and np.prod(layout.shape) * layout.dtype.itemsize == points.nbytes
    np.testing.assert_array_equal(read_rows(layout, 6, 9), points[6:])


def test_threads_copies_and_forked_processes_read_the_same(pair):
    memory, streamed = pair()
    rows = torch.arange(0, 140, 7)
    expected = memory.batch(rows, augment=False)[0]
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(streamed.batch(rows, augment=False)[0])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.append(pickle.loads(pickle.dumps(streamed)).batch(rows, augment=False)[0])
    assert len(results) == 5 and all(torch.equal(result, expected) for result in results)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(streamed.batch(rows, augment=False)[0], expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_rows_give_no_clouds_of_the_same_shape_as_a_tensor_would(modelnet_folder):
    root = modelnet_folder(num_points=60, per_file=20)
    memory, streamed = (
        create_dataset("modelnet40", root, "test", num_points=24, memory_budget_gb=budget) for budget in (1, TINY_GB)
    )
    none = torch.empty(0, dtype=torch.int64)
    assert streamed._storage[none].shape == memory._storage[none].shape == (0, 28, 3)
    assert streamed._storage[none].dtype == memory._storage.dtype
    assert streamed.batch(none)[0].shape == memory.batch(none)[0].shape == (0, 24, 3)


@pytest.mark.parametrize(("dtype", "num_points"), [(np.float16, 40), (np.float32, 24)])
def test_channels_are_those_of_the_set_in_memory(modelnet_folder, clouds, dtype, num_points):
    rgb = np.random.default_rng(0).integers(0, 256, (70, 40, 3), dtype=np.uint8)
    extras = dict(normal=clouds(70, 40, dtype, seed=8), rgb=rgb)
    root = modelnet_folder(num_points=40, per_file=70, up_axis="y", dtype=dtype, **extras)
    options = dict(num_points=num_points, channels="xyz+normal+rgb")
    memory = create_dataset("modelnet40", root, "train", **options)
    streamed = create_dataset("modelnet40", root, "train", memory_budget_gb=TINY_GB, **options)
    assert isinstance(streamed._storage, StreamedClouds) and streamed.points.shape[2] == 9
    assert_same_batches(memory, streamed, shuffle=True)
    assert streamed.fingerprint() == memory.fingerprint()


def test_the_budget_counts_all_channels(modelnet_folder, clouds):
    root = modelnet_folder(num_points=40, normal=clouds(6, 40, seed=8))
    file = root / "ply_data_test0.h5"
    size = 6 * 40 * 3 * 4 / 1e9
    assert not exceeds_budget([file], 1.5 * size) and exceeds_budget([file], 1.5 * size, "xyz+normal")
