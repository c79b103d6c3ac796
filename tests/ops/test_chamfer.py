"""Chamfer distance against every difference at once, in double precision."""

import pytest
import torch
from reference.point_mae_pretrain import chamfer

from s2d3d.ops import chamfer as module
from s2d3d.ops.chamfer import chamfer_distance


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (40, 32, 32), (2, 300, 1)])
def test_value_and_gradients_equal_the_plain_form(norm, shape):
    clouds, points, others = shape
    first = torch.randn(clouds, points, 3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(clouds, others, 3, dtype=torch.float64, requires_grad=True)
    ours, theirs = chamfer_distance(first, second, norm=norm), chamfer(first, second, norm)
    torch.testing.assert_close(ours, theirs)
    for own, other in zip(torch.autograd.grad(ours, (first, second)), torch.autograd.grad(theirs, (first, second))):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("cached", [1, 1000, 2**30])
def test_the_size_of_the_parts_changes_nothing(cached, monkeypatch):
    first, second = torch.randn(2, 9, 20, 3)
    expected = chamfer(first.double(), second.double())
    monkeypatch.setattr(module, "CACHED_DISTANCES", cached)
    assert float(chamfer_distance(first, second)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_equal_clouds_have_distance_and_gradient_zero(norm):
    cloud = torch.randn(3, 16, 3, requires_grad=True)
    loss = chamfer_distance(cloud, cloud.detach(), norm=norm)
    assert loss == 0 and torch.equal(torch.autograd.grad(loss, cloud)[0], torch.zeros_like(cloud))


def test_half_precision_is_computed_in_float32():
    first, second = torch.randn(2, 4, 16, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chamfer_distance(first, second)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(chamfer(first.double(), second.double())), rel=1e-6)


def test_far_from_the_origin_the_nearest_points_are_exact():
    """The product form of the distance would lose them in float32."""
    first, second = torch.randn(2, 5, 20, 3) + 1000
    exact = chamfer(first.double(), second.double())
    assert float(chamfer_distance(first, second)) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize(
    ("shapes", "norm", "message"),
    [
        (((2, 3, 3), (3, 3, 3)), "l2", r"\(2, 3, 3\) and \(3, 3, 3\), must be \(P, N, 3\) and \(P, M, 3\)"),
        (((2, 0, 3), (2, 3, 3)), "l2", "not empty"),
        (((2, 3, 4), (2, 3, 4)), "l2", "must be"),
        (((2, 3, 3), (2, 3, 3)), "l3", "norm is 'l3', must be one of l2, l1"),
    ],
)
def test_refused(shapes, norm, message):
    with pytest.raises(ValueError, match=message):
        chamfer_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]), norm=norm)
