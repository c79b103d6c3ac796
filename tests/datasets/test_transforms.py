import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2d3d.datasets import build_augmentation
from s2d3d.datasets.transforms import (
    Compose,
    Jitter,
    PointDropout,
    RotateVertical,
    Scale,
    Shift,
    normalize_stored,
    normalize_unit_sphere,
    turn,
    turn_up_axis,
)
from s2d3d.errors import InputError

ALL = [Scale(), Shift(), RotateVertical(), RotateVertical(up_axis="y"), Jitter(), PointDropout()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def points():
    return torch.randn(5, 33, 3, generator=generator(9)) + 1


def test_y_up_is_turned_by_a_rotation_that_lifts_y():
    cloud = torch.tensor([[1.0, 2.0, 3.0]])
    assert turn_up_axis(cloud, "y", "z").tolist() == [[1.0, -3.0, 2.0]]
    assert turn_up_axis(turn_up_axis(cloud, "y", "z"), "z", "y").equal(cloud)
    matrix = turn_up_axis(torch.eye(3), "y", "z")
    assert matrix.T.matmul(matrix).equal(torch.eye(3)) and torch.det(matrix) == 1
    copy = turn_up_axis(cloud, "z", "z")
    assert copy.equal(cloud) and copy.data_ptr() != cloud.data_ptr()


@pytest.mark.parametrize("axes", [("x", "z"), ("y", "Z"), ("", "y")])
def test_another_axis_is_an_error(axes):
    with pytest.raises(InputError, match="must be 'y' or 'z'"):
        turn_up_axis(torch.zeros(1, 3), *axes)


def test_normalise_against_a_loop(points):
    for cloud, got in zip(points, normalize_unit_sphere(points)):
        centered = cloud - sum(cloud) / len(cloud)
        expected = centered / max(math.dist(p, (0, 0, 0)) for p in centered.tolist())
        torch.testing.assert_close(got, expected)


def test_normalise_of_equal_points_is_zero_and_keeps_float16():
    got = normalize_unit_sphere(torch.full((2, 4, 3), 3.0, dtype=torch.float16))
    assert got.dtype == torch.float16 and not got.any()


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_a_new_tensor_from_the_explicit_generator_alone(transform, points):
    before, state = points.clone(), torch.get_rng_state()
    got = transform(points, generator(1))
    assert got.equal(transform(points, generator(1)))
    assert points.equal(before) and got.data_ptr() != points.data_ptr() and not got.equal(points)
    assert torch.get_rng_state().equal(state)
    assert got.shape == points.shape and got.dtype == points.dtype
    assert not got.equal(transform(points, generator(2)))


def test_scale_multiplies_each_axis_of_each_cloud_by_one_factor_in_range(points):
    points = points.repeat(200, 1, 1)
    factor = Scale(0.5, 2.0)(points, generator()) / points
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))
    factor = factor[:, 0]
    assert 0.5 <= factor.min() < 0.51 and 1.99 < factor.max() <= 2.0001
    assert abs(factor.mean() - 1.25) < 0.03
    assert factor.flatten().unique().numel() == factor.numel()


def test_shift_adds_to_each_axis_of_each_cloud_one_offset_in_range(points):
    points = points.repeat(200, 1, 1)
    offset = Shift(0.2)(points, generator()) - points
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset), atol=1e-5, rtol=0)
    offset = offset[:, 0]
    assert -0.2001 <= offset.min() < -0.198 and 0.198 < offset.max() <= 0.2001 and abs(offset.mean()) < 0.01


@pytest.mark.parametrize(("axis", "up"), [("z", 2), ("y", 1)])
def test_rotation_against_a_loop(points, axis, up):
    got = RotateVertical(up_axis=axis)(points, generator(3))
    angles = (torch.rand(5, 1, generator=generator(3)) * 2 - 1) * math.pi
    for cloud, angle, turned in zip(points, angles.flatten().tolist(), got):
        # Rodrigues' formula about the unit vector of the vertical axis
        k = torch.zeros(3)
        k[up] = 1
        for p, q in zip(cloud, turned):
            expected = (
                p * math.cos(angle) + torch.linalg.cross(k, p) * math.sin(angle) + k * p[up] * (1 - math.cos(angle))
            )
            torch.testing.assert_close(q, expected, atol=1e-5, rtol=1e-5)


def test_rotation_limit(points):
    turned = RotateVertical(limit=0.1)(points.repeat(50, 1, 1), generator())
    before = points.repeat(50, 1, 1)
    angle = torch.atan2(turned[..., 1], turned[..., 0]) - torch.atan2(before[..., 1], before[..., 0])
    angle = torch.atan2(angle.sin(), angle.cos()).abs()
    assert 0.09 < angle.max() <= 0.1001


def test_jitter_has_the_deviation_and_is_cut():
    noise = Jitter(0.1, 0.15)(torch.zeros(50, 100, 3), generator())
    assert noise.abs().max() == pytest.approx(0.15)
    noise = Jitter(0.1)(torch.zeros(50, 100, 3), generator())
    assert noise.std().item() == pytest.approx(0.1, rel=0.02) and noise.abs().max() <= 0.5


def test_dropout_replaces_by_the_first_point_at_a_rate_of_each_cloud(points):
    points = points.repeat(100, 4, 1)
    got = PointDropout(0.8)(points, generator())
    kept = (got == points).all(-1)
    assert (got == points[:, :1]).all(-1).logical_or(kept).all()
    rate = 1 - kept.float().mean(1)
    assert rate.mean().item() == pytest.approx(0.4, abs=0.04) and rate.min() < 0.1 and 0.7 < rate.max() < 0.95


def test_float64_and_compose(points):
    chain = Compose((Scale(2, 2), Shift(0.0), Scale(0.5, 0.5)))
    torch.testing.assert_close(chain(points.double(), generator()), points.double())
    assert Compose()(points, generator()) is points


def test_build_augmentation_keeps_the_order_and_leaves_out_what_is_off():
    full = build_augmentation(rotate=True, jitter=0.01, dropout=0.5)
    kinds = [type(transform) for transform in full.transforms]
    assert kinds == [RotateVertical, Scale, Shift, Jitter, PointDropout]
    assert [type(transform) for transform in build_augmentation().transforms] == [Scale, Shift]
    assert build_augmentation(scale=None, shift=0.0).transforms == ()
    assert build_augmentation(scale=[0.9, 1.1]).transforms[0] == Scale(0.9, 1.1)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (dict(scale=(1.5, 0.5)), "scale"),
        (dict(scale=(0.0, 1.0)), "scale"),
        (dict(scale=(1.0, math.inf)), "scale"),
        (dict(scale=(1.0,)), "pair"),
        (dict(shift=-0.1), "shift"),
        (dict(shift=math.nan), "shift"),
        (dict(jitter=-1e-9), "jitter"),
        (dict(dropout=1.0), "dropout"),
        (dict(dropout=-0.5), "dropout"),
    ],
)
def test_ranges(arguments, word):
    with pytest.raises(InputError, match=word):
        build_augmentation(**arguments)


@given(batch=st.integers(1, 4), num_points=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_any_size_stays_finite(batch, num_points, seed):
    cloud = torch.randn(batch, num_points, 3, generator=generator(seed))
    got = build_augmentation(rotate=True, jitter=0.02, dropout=0.9)(cloud, generator(seed))
    assert got.shape == cloud.shape and got.isfinite().all()


# Normals and colours


def triangles(count: int = 40, channels: str = "xyz+normal+rgb") -> torch.Tensor:
    """Make two clouds of corners of triangles, three in a row; each corner has the triangle's normal and a colour."""
    corners = torch.randn(2, count, 3, 3, generator=generator(4))
    normals = facing(corners).unsqueeze(2).expand_as(corners)
    rgb = torch.rand(corners.shape, generator=generator(5))
    wanted = {"xyz": corners, "normal": normals, "rgb": rgb}
    return torch.cat([wanted[group] for group in channels.split("+")], -1).flatten(1, 2)


def facing(corners: torch.Tensor) -> torch.Tensor:
    """Return the unit normals of triangles (..., 3, 3)."""
    a, b, c = corners.unbind(-2)
    return torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1)


@pytest.mark.parametrize("channels", ["xyz+normal", "xyz+normal+rgb"])
def test_augmented_normals_are_those_of_the_augmented_surface(channels):
    augment = build_augmentation(rotate=True, scale=(0.3, 3.0), shift=0.5, channels=channels)
    before = triangles(channels=channels)
    after = augment(before, generator())
    expected = facing(after[..., :3].unflatten(1, (-1, 3)))
    torch.testing.assert_close(after[..., 3:6].unflatten(1, (-1, 3)), expected.unsqueeze(2).expand(-1, -1, 3, -1))
    assert (after[..., 3:6] - before[..., 3:6]).abs().max() > 0.5
    assert after[..., 6:].equal(before[..., 6:]), "colours stay"


@pytest.mark.parametrize("channels", ["xyz+normal", "xyz+rgb", "xyz+normal+rgb"])
def test_coordinates_do_not_depend_on_the_channels(channels):
    """The same random numbers: a run with normals sees the points of a run without."""
    options = dict(rotate=True, jitter=0.01, dropout=0.5)
    cloud = triangles(channels=channels)
    after = build_augmentation(**options, channels=channels)(cloud, generator())
    plain = build_augmentation(**options)(cloud[..., :3].contiguous(), generator())
    assert after[..., :3].equal(plain) and after.shape == cloud.shape


def test_dropout_replaces_all_channels_of_a_point():
    cloud = triangles()
    after = PointDropout(0.8)(cloud, generator())
    rows = (after.unsqueeze(2) == cloud.unsqueeze(1)).all(-1).int().argmax(2)
    assert after.equal(torch.stack([own[chosen] for own, chosen in zip(cloud, rows)])) and (rows == 0).sum() > 20


def test_turning_normalising_and_reflecting_with_normals():
    cloud = triangles()
    turned = turn_up_axis(cloud, "y", channels="xyz+normal+rgb")
    assert turned.equal(
        torch.cat([turn_up_axis(part, "y") for part in cloud[..., :6].split(3, -1)] + [cloud[..., 6:]], -1)
    )
    moved = normalize_stored(cloud + torch.tensor([5.0, 0, 0, 0, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(moved[..., :3], normalize_unit_sphere(cloud[..., :3]), atol=1e-5, rtol=0)
    assert moved[..., 3:].equal(cloud[..., 3:])
    mirrored = turn(cloud, "xyz+normal+rgb", lambda vectors: vectors * torch.tensor([-1.0, 1, 1]))
    assert mirrored[..., 0].equal(-cloud[..., 0]) and mirrored[..., 3].equal(-cloud[..., 3])
    assert mirrored[..., 4:].equal(cloud[..., 4:])


def test_an_unknown_normal_stays_zero():
    cloud = torch.cat([torch.rand(1, 4, 3), torch.zeros(1, 4, 3)], -1)
    augment = build_augmentation(rotate=True, channels="xyz+normal")
    assert not augment(cloud, generator())[..., 3:].any()


def test_clouds_of_other_channels_are_refused():
    with pytest.raises(InputError, match="clouds have 6 channels, xyz are 3"):
        build_augmentation()(torch.rand(2, 8, 6), generator())
    with pytest.raises(InputError, match="channels is 'normal'"):
        build_augmentation(channels="normal")
