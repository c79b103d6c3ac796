"""Batches are a function of seed, epoch, step and rank, whatever prepares them."""

import itertools

import pytest
import torch

from s2d3d.datasets import BatchLoader, PointCloudDataset, build_augmentation
from s2d3d.errors import InputError


def shapes(count=22, training=True):
    """Clouds that can be told apart: point 0 of cloud i lies at (i, i, i)."""
    points = torch.rand(count, 48, 3, generator=torch.Generator().manual_seed(3))
    points += torch.arange(count).view(-1, 1, 1)
    augmentation = build_augmentation(scale=(0.5, 2.0), shift=0.1) if training else None
    return PointCloudDataset(
        points, torch.arange(count), [str(i) for i in range(count)], num_points=32,
        split="train" if training else "test", transform=augmentation, normalize=False,
    )  # fmt: skip


def assert_equal(first, second):
    for (points, labels), (other_points, other_labels) in zip(first, second, strict=True):
        assert torch.equal(points, other_points) and torch.equal(labels, other_labels)


@pytest.mark.parametrize("prefetch", [1, 2, 7, 100])
def test_a_background_thread_changes_nothing(prefetch):
    plain = BatchLoader(shapes(), 4, shuffle=True, seed=5)
    ahead = BatchLoader(shapes(), 4, shuffle=True, seed=5, prefetch=prefetch)
    for _ in range(2):  # two epochs
        assert_equal(list(ahead), list(plain))


def test_an_epoch_has_every_shape_once_and_the_next_another_order():
    loader = BatchLoader(shapes(), 4, shuffle=True)
    first, second = (torch.cat([labels for _, labels in loader]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(22)) and first != second
    assert [len(labels) for _, labels in loader] == [4, 4, 4, 4, 4, 2]
    dropped = BatchLoader(shapes(), 4, shuffle=True, drop_last=True)
    assert len(dropped) == 5 and [len(labels) for _, labels in dropped] == [4] * 5


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("step", [0, 1, 3, 6])
def test_an_epoch_continues_in_its_middle(step, prefetch):
    whole = BatchLoader(shapes(), 4, shuffle=True, seed=1)
    whole.set_position(epoch=3)
    expected = list(whole)
    resumed = BatchLoader(shapes(), 4, shuffle=True, seed=1, prefetch=prefetch)
    resumed.set_position(3, step)
    assert_equal(list(resumed), expected[step:])
    following, reference = next(iter(resumed)), BatchLoader(shapes(), 4, shuffle=True, seed=1)
    reference.set_position(4)
    assert_equal([following], [next(iter(reference))])


@pytest.mark.parametrize("world_size, shuffle", list(itertools.product([2, 3], [True, False])))
def test_ranks_share_the_global_batches(world_size, shuffle):
    batch = 2 * world_size
    ranks = [
        [labels for _, labels in BatchLoader(shapes(), batch, shuffle=shuffle, rank=rank, world_size=world_size)]
        for rank in range(world_size)
    ]
    alone = [labels for _, labels in BatchLoader(shapes(), batch, shuffle=shuffle)]
    for step, labels in enumerate(alone):
        parts = [rank[step] for rank in ranks if step < len(rank)]
        assert torch.equal(torch.cat(parts), labels)
    assert not shuffle or len({len(rank) for rank in ranks}) == 1


def test_the_seed_alone_makes_points_and_augmentation():
    first, again, other = (list(BatchLoader(shapes(), 4, shuffle=True, seed=seed)) for seed in (1, 1, 2))
    assert_equal(first, again)
    assert not torch.equal(first[0][0], other[0][0])


def test_a_stopped_iteration_leaves_no_trace():
    loader = BatchLoader(shapes(), 4, shuffle=True, prefetch=3)
    for _ in zip(range(2), loader):
        pass
    loader.set_position(0)
    assert_equal(list(loader), list(BatchLoader(shapes(), 4, shuffle=True)))


def test_an_error_of_the_background_thread_reaches_the_consumer():
    data = shapes()

    def broken(points, generator):
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        list(BatchLoader(data, 4, shuffle=True, prefetch=2, augment=broken))


def test_votes_are_other_points_of_the_same_shapes():
    loader = BatchLoader(shapes(training=False), 4, seed=2, augment=build_augmentation(scale=(0.5, 2.0), shift=0.1))
    plain, first, again, second = (list(loader.vote(index)) for index in (0, 1, 1, 2))
    assert_equal(plain, list(loader))
    assert_equal(first, again)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, first, strict=True))
    assert not torch.equal(first[0][0], second[0][0]) and not torch.equal(first[0][0], plain[0][0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(batch_size=0), "batch_size is 0, must be a positive multiple of the 1 processes"),
        (dict(batch_size=3, world_size=2), "batch_size is 3, must be a positive multiple of the 2 processes"),
        (dict(batch_size=4, rank=2, world_size=2), r"rank is 2 of world_size 2, must be in \[0, world_size\)"),
        (dict(batch_size=30, drop_last=True), "more than the 22 shapes of split 'train': no full batch is left"),
        (dict(batch_size=4, prefetch=-1), "prefetch is -1, must be at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        BatchLoader(shapes(), **arguments)


def test_bad_positions_and_votes_are_named():
    loader = BatchLoader(shapes(), 4, shuffle=True)
    with pytest.raises(InputError, match="position is epoch 0, step 7; an epoch has 6 steps"):
        loader.set_position(0, 7)
    with pytest.raises(InputError, match="votes need a loader that does not shuffle"):
        loader.vote(1)


@pytest.mark.gpu
def test_pinned_batches_are_the_same():
    pinned = list(BatchLoader(shapes(), 4, shuffle=True, prefetch=2, pin_memory=True))
    assert all(points.is_pinned() and labels.is_pinned() for points, labels in pinned)
    assert_equal(pinned, list(BatchLoader(shapes(), 4, shuffle=True)))
