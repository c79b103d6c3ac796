"""Clouds one after another: several share a pass, and each has the answer that it has alone."""

import pytest
import torch
from torch import nn

from s2d3d.errors import InputError
from s2d3d.evaluation.classify import classify_clouds


class Model(nn.Module):
    """Logits from the largest coordinates of a cloud; notes the size of each pass."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, points):
        self.passes.append(tuple(points.shape[:2]))
        return points.amax(1)


def clouds(*sizes):
    draws = torch.Generator().manual_seed(0)
    return [(str(index), torch.rand(size, 3, generator=draws)) for index, size in enumerate(sizes)]


def test_clouds_of_equal_size_share_passes_and_keep_order_and_answers():
    model, given = Model(), clouds(8, 8, 8, 8, 8, 5, 5, 8, 30)
    found = list(classify_clouds(model, given, device="cpu", points_at_once=24))
    assert model.passes == [(3, 8), (2, 8), (2, 5), (1, 8), (1, 30)], "three of 8 fill a pass; 30 points pass alone"
    assert [name for name, _ in found] == [name for name, _ in given]
    for (_, shares), (_, cloud) in zip(found, given):
        assert shares.dtype == torch.float64 and shares.equal(cloud.amax(0).double().softmax(0))
    assert list(classify_clouds(model, [], device="cpu")) == []


def test_answers_come_before_the_next_cloud_where_clouds_come_slowly():
    """A cloud that took longer than the patience does not wait for others."""
    model, now, diary = Model(), [0.0], []

    def slow():
        for name, cloud in clouds(4, 4, 4, 4):
            diary.append(f"read {name}")
            yield name, cloud
            now[0] += {"1": 2.0}.get(name, 0.6)

    for name, _ in classify_clouds(model, slow(), device="cpu", patience=1.0, clock=lambda: now[0]):
        diary.append(f"answer {name}")
    assert diary == [
        "read 0", "read 1", "read 2", "answer 0", "answer 1", "answer 2", "read 3", "answer 3"
    ]  # fmt: skip


def test_an_output_that_is_not_finite_is_named_after_the_answers_before_it():
    given = clouds(4, 4, 4)
    given[1][1][0] = torch.nan
    answers = classify_clouds(Model(), given, device="cpu", where="a.pt: ")
    assert next(answers)[0] == "0"
    with pytest.raises(InputError, match=r"^a\.pt: the model's output for 1 is not finite$"):
        next(answers)
