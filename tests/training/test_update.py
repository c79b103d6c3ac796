"""The gradient of a global batch, the sums of an epoch and the watch over both."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s2d3d.datasets import BatchLoader, PointCloudDataset
from s2d3d.runs.log import LOG_COLUMNS, epoch_line, epoch_row
from s2d3d.runs.resume import Progress
from s2d3d.training.task import classification_loss
from s2d3d.training.update import (
    BALANCE,
    CORRECT,
    LOSS,
    NORM,
    SAMPLES,
    FiniteWatch,
    accumulate_gradient,
    clip_gradient_,
)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
def test_parts_add_up_to_loss_gradient_and_counts_of_the_whole_batch(num_parts):
    torch.manual_seed(0)
    model, points, labels = nn.Linear(4, 3), torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def extra(share=1.0):
        return share * model.weight.square().sum()

    expected = F.cross_entropy(model(points), labels, label_smoothing=0.1)
    gradients = torch.autograd.grad(expected + extra(), list(model.parameters()))
    sums = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    smoothed = partial(classification_loss, label_smoothing=0.1)
    loss = accumulate_gradient(model, points, labels, sums=sums, loss=smoothed, num_parts=num_parts, extra_loss=extra)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    correct = int((model(points).argmax(1) == labels).sum())
    assert sums[LOSS].item() == pytest.approx(1 + 7 * expected.item(), rel=1e-6)
    assert (sums[CORRECT], sums[SAMPLES], sums[NORM]) == (2 + correct, 3 + 7, 4)


@pytest.mark.parametrize("count, batch, world_size", [(7, 4, 2), (14, 8, 4), (8, 4, 2), (23, 8, 4)])
def test_the_mean_over_ranks_is_the_gradient_of_each_batch(count, batch, world_size):
    """Also of an incomplete last batch, of which ranks have different numbers of samples."""
    torch.manual_seed(0)
    model, points = nn.Linear(4, 3), torch.randn(count, 64, 4)
    shapes = PointCloudDataset(points[..., :3], torch.arange(count) % 3, ["a", "b", "c"], num_points=64)
    for step in range(len(BatchLoader(shapes, batch, world_size=world_size))):
        found = []
        for rank in range(world_size):
            loader = BatchLoader(shapes, batch, rank=rank, world_size=world_size)
            own = loader.indices(0, step)
            model.zero_grad()
            accumulate_gradient(
                model, points[own, 0], shapes.labels[own], sums=torch.zeros(4, dtype=torch.float64),
                loss=classification_loss, num_parts=2, weight=loader.weight(step),
            )  # fmt: skip
            found.append(model.weight.grad.clone())
        whole = slice(step * batch, (step + 1) * batch)
        loss = F.cross_entropy(model(points[whole, 0]), shapes.labels[whole])
        (expected,) = torch.autograd.grad(loss, [model.weight])
        torch.testing.assert_close(torch.stack(found).mean(0), expected)


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 4.9999995, 5.0, 5.000001, 5.1, math.inf])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_clipping_has_the_bits_of_torch(max_norm, bad):
    """Norms below, at and above the limit: gradients that need no factor are left alone, those that do are scaled."""

    def parameters():
        listed = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        listed[0].grad = torch.tensor([3.0, 0.0])
        listed[1].grad = torch.tensor([0.0, 4.0 if bad is None else bad])
        return listed

    ours, theirs = parameters(), parameters()
    found, expected = clip_gradient_(ours, max_norm), nn.utils.clip_grad_norm_(theirs, max_norm, foreach=True)
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))
    for one, other in zip(ours[:2], theirs[:2]):
        assert torch.equal(one.grad.nan_to_num(-1), other.grad.nan_to_num(-1))
    assert ours[2].grad is None


def test_the_watch_keeps_the_first_bad_update_whatever_follows():
    good, watch = torch.tensor(1.0), FiniteWatch(torch.device("cpu"))
    watch.note(good, good, 0)
    assert watch.first_bad() is None
    watch.note(good, torch.tensor(math.inf), 1)
    watch.note(torch.tensor(math.nan), good, 2)
    watch.note(good, good, 3)
    assert watch.first_bad() == 1


def test_a_bad_first_update_is_number_0():
    watch = FiniteWatch(torch.device("cpu"))
    watch.note(torch.tensor(math.nan), torch.tensor(1.0), 0)
    assert watch.first_bad() == 0


def test_a_row_and_its_line_by_hand():
    sums = torch.tensor([30.0, 15.0, 20.0, 8.0, 4.0, 1.0], dtype=torch.float64)
    progress = Progress(epoch=2, step=4, updates=12, seconds=90.0)
    row = epoch_row(progress, sums, lr=1e-3, share_rate=0.25, steps_per_epoch=4)
    assert row == {
        "epoch": 3, "updates": 12, "lr": 1e-3, "share_rate": 0.25, "train_loss": 1.5, "train_oa": 0.75,
        "grad_norm": 2.0, "seconds": 90.0, "balance_loss": 1.0, "dropped": 0.25,
    }  # fmt: skip
    assert row.keys() < set(LOG_COLUMNS) and sums[BALANCE] == 4
    assert epoch_row(progress, sums[:4], lr=1e-3, share_rate=0.0, steps_per_epoch=4).keys().isdisjoint({"balance_loss"})
    assert epoch_line(row | {"val_oa": 0.5}, 5) == (
        "epoch 3/5: loss 1.5000, train_oa 75.00 %, val_oa 50.00 %, lr 1.00e-03, share_rate 0.250, 90 s, 0:03:00 left"
    )
