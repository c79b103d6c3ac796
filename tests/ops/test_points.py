"""Point operations against naive loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import s2d3d.ops.points as points_module
from s2d3d.ops.points import ORIGIN_RADIUS_SQ, farthest_point_sample, gather_points, group_points, nearest_neighbours


def clouds(batch=3, count=40, seed=0):
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(seed))


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b))


def naive_fps(cloud, number, skip_origin=False):
    """The definition: each point maximises the distance to its nearest selected point; of equals the first."""
    selected = [0]
    while len(selected) < number:
        best, best_distance = 0, -1.0
        for index, point in enumerate(cloud):
            if skip_origin and squared_distance(point, (0, 0, 0)) <= ORIGIN_RADIUS_SQ:
                continue
            distance = min(squared_distance(point, cloud[other]) for other in selected)
            if distance > best_distance:
                best, best_distance = index, distance
        selected.append(best)
    return selected


@pytest.mark.parametrize("batch", [0, 2])
def test_no_query_has_no_neighbours(batch):
    assert nearest_neighbours(torch.zeros(batch, 0, 3), clouds(2)[:batch], 4).shape == (batch, 0, 4)
    assert nearest_neighbours(clouds(2)[:batch], clouds(2)[:batch], 4).shape == (batch, 40, 4)


def test_transforms_of_functions_pass_through():
    points = clouds()

    def spread(cloud):
        return group_points(cloud, 5, 3)[0].square().sum()

    expected = points.clone().requires_grad_()
    spread(expected).backward()
    torch.testing.assert_close(torch.func.grad(spread)(points), expected.grad)
    _, change = torch.func.jvp(spread, (points,), (torch.ones_like(points),))
    torch.testing.assert_close(change, expected.grad.sum())


# Farthest point sampling


@pytest.mark.parametrize("skip_origin", [False, True])
@pytest.mark.parametrize("number", [1, 2, 17, 40])
def test_fps_equals_the_naive_loop(number, skip_origin):
    points = clouds()
    points[:, 5:9] *= 0.01  # some within the radius about the origin
    points[2, 0] = 0.0
    selected = farthest_point_sample(points, number, skip_origin=skip_origin)
    assert selected.dtype == torch.int64
    assert selected.tolist() == [naive_fps(cloud, number, skip_origin) for cloud in points.tolist()]


@given(st.lists(st.tuples(*[st.integers(-4, 4)] * 3), min_size=1, max_size=12), st.booleans(), st.data())
def test_fps_of_lattice_points_breaks_ties_as_the_naive_loop(cloud, skip_origin, data):
    """Small integers make ties and duplicates common and every distance exact."""
    number = data.draw(st.integers(1, len(cloud)))
    selected = farthest_point_sample(torch.tensor([cloud], dtype=torch.float32), number, skip_origin=skip_origin)
    assert selected[0].tolist() == naive_fps(cloud, number, skip_origin)


def test_fps_prefix_is_the_shorter_selection():
    points = clouds(count=100)
    long = farthest_point_sample(points, 100)
    for number in (1, 2, 31, 99):
        assert farthest_point_sample(points, number).equal(long[:, :number])


def test_fps_selects_every_distinct_point_once():
    selected = farthest_point_sample(clouds(count=50), 50)
    assert selected.sort(dim=1).values.equal(torch.arange(50).expand(3, 50))


def test_fps_takes_duplicates_only_after_all_distinct_points():
    points = clouds(batch=1, count=10).repeat(1, 3, 1)
    selected = farthest_point_sample(points, 12)
    assert sorted(selected[0, :10].remainder(10).tolist()) == list(range(10))


def test_fps_of_equal_points_gives_valid_indices():
    assert farthest_point_sample(torch.ones(2, 9, 3), 5).tolist() == [[0] * 5] * 2


def test_skip_origin_never_selects_a_point_near_the_origin_but_index_0():
    limit = math.sqrt(ORIGIN_RADIUS_SQ)
    points = torch.tensor([[[0.0, 0, 0], [0.99 * limit, 0, 0], [0, 1.01 * limit, 0], [0, 0, 1]]])
    assert farthest_point_sample(points, 4, skip_origin=True).tolist() == [[0, 3, 2, 2]]
    assert farthest_point_sample(points, 4).tolist() == [[0, 3, 2, 1]]


def test_skip_origin_with_nothing_else_repeats_index_0():
    points = torch.zeros(1, 6, 3)
    points[0, 3] = 0.01
    assert farthest_point_sample(points, 4, skip_origin=True).tolist() == [[0] * 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fps_of_other_types_measures_in_float32(dtype):
    points = clouds().to(dtype)
    assert farthest_point_sample(points, 20).equal(farthest_point_sample(points.float(), 20))


def test_fps_leaves_its_input_and_the_random_state_alone():
    points, before = clouds(), torch.get_rng_state()
    copy = points.clone()
    assert farthest_point_sample(points, 20).equal(farthest_point_sample(points, 20))
    assert points.equal(copy) and torch.get_rng_state().equal(before)


def test_fps_does_not_depend_on_the_other_clouds_or_on_layout():
    points = clouds()
    together = farthest_point_sample(points, 20)
    for cloud, selected in zip(points, together):
        assert farthest_point_sample(cloud[None], 20)[0].equal(selected)
    strided = points.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous() and farthest_point_sample(strided, 20).equal(together)


# Nearest neighbours


@pytest.mark.parametrize("number", [1, 7, 40])
def test_knn_equals_brute_force(number):
    points, query = clouds(), clouds(count=11, seed=1)
    found = nearest_neighbours(query, points, number)
    assert found.shape == (3, 11, number) and found.dtype == torch.int64
    for b, q in ((b, q) for b in range(3) for q in range(11)):
        order = sorted(range(40), key=lambda p: squared_distance(query[b, q].tolist(), points[b, p].tolist()))
        assert sorted(found[b, q].tolist()) == sorted(order[:number])


def test_knn_of_a_point_of_the_cloud_contains_it():
    points = clouds()
    assert nearest_neighbours(points, points, 1)[..., 0].equal(torch.arange(40).expand(3, 40))


def test_knn_of_equal_points_are_distinct_indices():
    found = nearest_neighbours(torch.ones(1, 2, 3), torch.ones(1, 8, 3), 5)
    assert all(len(set(row)) == 5 and max(row) < 8 for row in found[0].tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_knn_of_other_types_measures_in_float32(dtype):
    points = clouds().to(dtype)
    found, expected = (nearest_neighbours(p[:, :5], p, 6).sort().values for p in (points, points.float()))
    assert found.equal(expected)


@pytest.mark.parametrize(("count", "neighbors"), [(1024, 8), (2048, 32)])
def test_knn_under_autocast_finds_the_neighbours_of_float32(count, neighbors):
    """Coordinates rounded to bf16 in the matrix product have other neighbours, off centre most of all."""
    points = clouds(2, count) + 0.5
    expected = nearest_neighbours(points, points, neighbors).sort().values
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_neighbours(points, points, neighbors).sort().values
    assert found.equal(expected)


@pytest.mark.parametrize(("count", "neighbors"), [(64, 64), (64, 1), (64, 33), (2000, 20)])
@pytest.mark.parametrize("lattice", [False, True])
def test_knn_has_the_distances_of_a_sort(count, neighbors, lattice):
    """Of ties, which a lattice is full of, any may be chosen: the distances decide, and no index is there twice."""
    points = clouds(2, count)
    points = (2 * points).round() if lattice else points
    found = nearest_neighbours(points[:, :30], points, neighbors)
    assert all(len(set(row)) == neighbors for row in found.flatten(0, 1).tolist())
    near = (gather_points(points, found) - points[:, :30, None]).square().sum(-1).sort(-1).values
    every = (points[:, :30, None] - points[:, None]).square().sum(-1).sort(-1).values
    assert torch.allclose(near, every[..., :neighbors], atol=1e-5)


def test_knn_of_points_that_are_not_numbers_are_valid_indices():
    points = clouds(2, 30)
    points[0, 3:20] = torch.nan
    points[1] = torch.inf
    found = nearest_neighbours(clouds(2, 4, seed=1), points, 16)
    assert all(len(set(row)) == 16 and min(row) >= 0 and max(row) < 30 for row in found.flatten(0, 1).tolist())


def test_knn_of_large_clouds_keeps_few_distances_at_a_time(monkeypatch):
    """The memory of a search is bounded: no table of all distances, whatever the size of the clouds."""
    queries, others = clouds(2, 70), clouds(2, 90, seed=1)
    expected = nearest_neighbours(queries, others, 9).sort().values
    sizes, search = [], points_module._nearest

    def noting(query, points, number):
        sizes.append(query.shape[0] * query.shape[1] * points.shape[1])
        return search(query, points, number)

    monkeypatch.setattr(points_module, "CACHED_DISTANCES", 1000)
    monkeypatch.setattr(points_module, "SEARCHED_DISTANCES", 200)
    monkeypatch.setattr(points_module, "_nearest", noting)
    assert nearest_neighbours(queries, others, 9).sort().values.equal(expected)
    assert sum(sizes) == 2 * 70 * 90 and max(sizes) <= 1000


@pytest.mark.parametrize("fill", [None, torch.nan, torch.inf])
def test_numpy_and_torch_sample_the_same_points(monkeypatch, fill):
    """Where numpy searches the maximum and where torch does: the first one, and the first that is not a number."""
    points = (4 * clouds(3, 200)).round()
    if fill is not None:
        points[1, 50:53] = fill
    found = farthest_point_sample(points, 90)
    monkeypatch.setattr(points_module, "_can_use_numpy", lambda tensor: False)
    assert farthest_point_sample(points, 90).equal(found)


# Gather and group


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (3, 2, 2, 2), (3, 0)])
def test_gather_equals_indexing(shape):
    features = torch.randn(3, 9, 6)
    index = torch.randint(9, shape)
    assert gather_points(features, index).equal(torch.stack([f[i] for f, i in zip(features, index)]))


def test_gather_sums_gradients_of_a_row_taken_twice():
    features = torch.zeros(1, 4, 2, requires_grad=True)
    gather_points(features, torch.tensor([[1, 3, 1]])).sum().backward()
    assert features.grad[0, :, 0].tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("skip_origin", [False, True])
def test_groups_are_the_neighbours_of_farthest_points_relative_to_them(skip_origin):
    points = torch.cat([clouds(), torch.randn(3, 40, 2)], dim=-1)
    points[:, 5:9, :3] *= 0.01
    groups, centers = group_points(points, 7, 6, skip_origin=skip_origin)
    assert groups.shape == (3, 7, 6, 5) and centers.shape == (3, 7, 3)
    for b in range(3):
        chosen = naive_fps(points[b, :, :3].tolist(), 7, skip_origin)
        for g, center in enumerate(chosen):
            xyz = points[b, :, :3]
            assert centers[b, g].equal(xyz[center])
            nearest = (xyz - xyz[center]).square().sum(-1).topk(6, largest=False).indices
            expected = torch.cat([xyz[nearest] - xyz[center], points[b, nearest, 3:]], dim=-1)
            assert sorted(groups[b, g].tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_groups_keep_the_type(dtype):
    groups, centers = group_points(clouds().to(dtype), 4, 5)
    assert groups.dtype == centers.dtype == dtype


def test_gradients_flow_to_grouped_coordinates_and_features():
    points = torch.cat([clouds(), torch.randn(3, 40, 2)], dim=-1).requires_grad_()
    groups, centers = group_points(points, 4, 5)
    (groups[..., 3:].sum() + centers.sum()).backward()
    xyz = points.detach()[..., :3]
    selected = farthest_point_sample(xyz, 4)
    near = nearest_neighbours(gather_points(xyz, selected), xyz, 5)
    counts = torch.stack([row.flatten().bincount(minlength=40) for row in near]).float()
    assert points.grad[..., 3].equal(counts) and counts.sum() == 3 * 4 * 5
    assert points.grad[..., 0].equal(torch.zeros(3, 40).scatter(1, selected, 1.0))


def test_a_shift_of_the_cloud_does_not_change_its_groups():
    points = clouds(count=64)
    groups, centers = group_points(points, 8, 4)
    shifted, shifted_centers = group_points(points + 8.0, 8, 4)
    assert torch.allclose(shifted_centers, centers + 8.0, atol=1e-5)
    assert torch.allclose(shifted.norm(dim=-1).sort().values, groups.norm(dim=-1).sort().values, atol=1e-5)


# Errors

POINTS = torch.zeros(2, 8, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: farthest_point_sample(POINTS, 0), "num_samples is 0, must be between 1 and the 8 points of a cloud"),
        (lambda: farthest_point_sample(POINTS, 9), "num_samples is 9, must be between 1 and the 8 points"),
        (lambda: farthest_point_sample(POINTS[0], 1), r"points has shape \(8, 3\), must be \(B, N, 3\)"),
        (lambda: farthest_point_sample(POINTS[..., :2], 1), r"points has shape \(2, 8, 2\), must be \(B, N, 3\)"),
        (lambda: nearest_neighbours(POINTS, POINTS, 0), "num_neighbors is 0, must be between 1 and the 8 points"),
        (lambda: nearest_neighbours(POINTS, POINTS, 9), "num_neighbors is 9, must be between 1 and the 8 points"),
        (lambda: nearest_neighbours(POINTS[0], POINTS, 1), r"query has shape \(8, 3\), must be \(B, N, 3\)"),
        (lambda: nearest_neighbours(POINTS, POINTS[..., :1], 1), r"points has shape \(2, 8, 1\)"),
        (lambda: group_points(POINTS, 9, 2), "num_samples is 9"),
        (lambda: group_points(POINTS, 2, 9), "num_neighbors is 9"),
    ],
)
def test_what_cannot_be_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
