"""Corruptions: counts, geometry, bounds and distribution of each, and that a shape's depends on its number alone."""

import math

import pytest
import torch
from cases import quick

from s2d3d.datasets import BatchLoader, PointCloudDataset, build_augmentation
from s2d3d.datasets.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    CorruptedDataset,
    corrupt,
    corrupted_size,
    parse_corruption,
)
from s2d3d.datasets.transforms import normalize_unit_sphere, turn_up_axis
from s2d3d.errors import InputError

ALL = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]


def ball(count: int, seed: int = 0) -> torch.Tensor:
    """Make a cloud inside the unit sphere, off centre and longer than wide."""
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([0.1, 0.2, 0.4])
    return points / points.norm(dim=1).max() * 0.9


def clouds(count: int, num_points: int = 128) -> torch.Tensor:
    return torch.stack([ball(num_points, seed) for seed in range(count)])


@pytest.fixture
def test_set():
    return PointCloudDataset(clouds(9), torch.arange(9) % 3, list("abc"), split="test", num_points=128)


def is_subset(part: torch.Tensor, whole: torch.Tensor) -> bool:
    rows = {tuple(row) for row in whole.tolist()}
    found = {tuple(row) for row in part.tolist()}
    return found <= rows and len(found) == len(part)


# Counts


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("scale", [1024] * 5),
        ("jitter", [1024] * 5),
        ("rotate", [1024] * 5),
        ("drop_global", [768, 640, 512, 384, 256]),
        ("drop_local", [924, 824, 724, 624, 524]),
        ("add_global", [1034, 1044, 1054, 1064, 1074]),
        ("add_local", [1124, 1224, 1324, 1424, 1524]),
    ],
)
def test_counts_are_the_published_ones_at_1024_points(name, sizes):
    assert [corrupted_size(1024, name, severity) for severity in SEVERITIES] == sizes
    assert len(corrupt(ball(1024), name, 3, seed=0, index=0)) == sizes[2]


def test_counts_scale_with_the_number_of_points():
    assert [corrupted_size(256, "drop_local", s) for s in SEVERITIES] == [231, 206, 181, 156, 131]
    assert [corrupted_size(256, "add_global", s) for s in SEVERITIES] == [258, 261, 264, 266, 268]
    assert [corrupted_size(2048, "add_local", s) for s in SEVERITIES] == [2248, 2448, 2648, 2848, 3048]


@pytest.mark.parametrize(("name", "severity"), ALL)
def test_every_cloud_has_the_announced_size_and_is_finite(name, severity):
    for num_points in (1, 5, 100):
        for index in range(5):
            result = corrupt(ball(num_points), name, severity, seed=1, index=index)
            assert result.shape == (corrupted_size(num_points, name, severity), 3)
            assert result.dtype == torch.float32 and bool(result.isfinite().all())


# Geometry


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jitter_is_normal_noise_of_a_hundredth_per_severity(severity):
    points = ball(4096)
    noise = corrupt(points, "jitter", severity, seed=0, index=0) - points
    std = 0.01 * severity
    assert noise.std() == pytest.approx(std, rel=0.03)  # 12288 draws: 0.6 % is one deviation
    assert noise.mean().abs() < 5 * std / math.sqrt(noise.numel())
    assert (noise.abs() > 2 * std).float().mean() == pytest.approx(0.0455, abs=0.008)  # normal, not uniform or clipped


@pytest.mark.parametrize("severity", SEVERITIES)
def test_scale_stretches_each_axis_and_normalises(severity):
    high = 1.5 + 0.1 * severity
    largest, points = 0.0, ball(200)
    for index in range(150):
        result = corrupt(points, "scale", severity, seed=0, index=index)
        assert result.mean(0).abs().max() < 1e-6
        assert result.norm(dim=1).max() == pytest.approx(1, abs=1e-6)
        factors = []
        for axis in range(3):
            before, after = points[:, axis] - points[:, axis].mean(), result[:, axis]
            slope = float((before @ after) / (before @ before))
            assert torch.allclose(after, slope * before, atol=1e-5)
            factors.append(slope)
        largest = max(largest, max(factors) / min(factors))
    assert 0.7 * high**2 < largest <= high**2 + 1e-4


def matrix_of(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Find R with after = before R^T."""
    return torch.linalg.lstsq(before.double(), after.double()).solution.T


def euler(matrix: torch.Tensor) -> tuple[float, float, float]:
    """Angles a, b, c of Rx(a) Rz(b) Ry(c)."""
    m = matrix.tolist()
    return math.atan2(m[2][1], m[1][1]), -math.asin(m[0][1]), math.atan2(m[0][2], m[0][0])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_rotate_turns_rigidly_within_its_angles(severity):
    limit, points, seen = math.pi / 30 * severity, ball(50), []
    for index in range(150):
        matrix = matrix_of(points, corrupt(points, "rotate", severity, seed=0, index=index))
        assert torch.allclose(matrix @ matrix.T, torch.eye(3).double(), atol=1e-5)
        assert torch.det(matrix) == pytest.approx(1, abs=1e-5)
        seen.append(euler(matrix))
    angles = torch.tensor(seen)
    assert (angles.abs() <= limit + 1e-5).all()
    assert (angles.amax(0) > 0.9 * limit).all() and (angles.amin(0) < -0.9 * limit).all()  # all three, both ways


def test_rotate_is_the_published_turn_of_y_up_clouds():
    points = ball(50)
    ours = corrupt(points, "rotate", 5, seed=0, index=3)
    a, b, c = euler(matrix_of(points, ours))
    # Published: rows times Rz Ry Rx, y up. Our z is their y, our -y is their z, and rows turn the other way.
    (sx, cx), (sy, cy), (sz, cz) = ((math.sin(t), math.cos(t)) for t in (-a, -b, c))
    about_x = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    theirs = turn_up_axis(turn_up_axis(points, "z", "y") @ (about_z @ about_y @ about_x), "y", "z")
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_drop_global_keeps_each_point_with_the_same_chance():
    points = ball(64)
    kept = torch.zeros(64)
    for index in range(300):
        result = corrupt(points, "drop_global", 2, seed=0, index=index)
        assert is_subset(result, points)
        kept += (points.unsqueeze(1) == result.unsqueeze(0)).all(-1).any(1)
    expected = 300 * 40 / 64
    assert ((kept - expected).abs() < 5 * math.sqrt(expected * 24 / 64)).all()


def drops_one_ball(points: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether the points that are gone are the nearest ones of one of them."""
    gone = ~(points.unsqueeze(1) == result.unsqueeze(0)).all(-1).any(1)
    distance = torch.cdist(points[gone], points)
    return bool((distance[:, gone].amax(1) < distance[:, ~gone].amin(1)).any())


def test_drop_local_drops_balls():
    points = ball(256)
    results = [corrupt(points, "drop_local", 3, seed=0, index=index) for index in range(140)]
    assert all(is_subset(result, points) for result in results)
    single = sum(drops_one_ball(points, result) for result in results)
    assert 9 <= single <= 40  # one cluster in one of seven: 20 of 140 expected, deviation 4, and a few by chance
    anywhere = [corrupt(points, "drop_global", 1, seed=0, index=index) for index in range(20)]
    assert not any(drops_one_ball(points, result) for result in anywhere)


def test_add_global_is_uniform_in_the_unit_ball():
    points = ball(1024)
    added = []
    for index in range(80):
        result = corrupt(points, "add_global", 5, seed=0, index=index)
        assert torch.equal(result[:1024], points)
        added.append(result[1024:])
    extra = torch.cat(added)  # 4000
    radius = extra.norm(dim=1)
    assert radius.max() <= 1 + 1e-6
    for within in (0.3, 0.5, 0.8):
        assert (radius < within).float().mean() == pytest.approx(within**3, abs=0.03)
    assert extra.mean(0).abs().max() < 5 * math.sqrt(0.2 / 4000)  # variance of a coordinate is 1/5


def test_add_local_puts_normal_clusters_around_points():
    center = torch.tensor([0.3, -0.2, 0.1])
    added = []
    for index in range(60):
        result = corrupt(center.expand(1024, 3), "add_local", 2, seed=0, index=index)
        assert torch.equal(result[:1024], center.expand(1024, 3))
        added.append(result[1024:] - center)
    extra = torch.cat(added)
    variance = (0.075**2 + 0.075 * 0.125 + 0.125**2) / 3  # mean square of U(0.075, 0.125)
    assert extra.square().mean() == pytest.approx(variance, rel=0.06)
    assert extra.mean(0).abs().max() < 0.01


def test_add_local_forms_at_most_seven_clusters_with_deviations_of_their_own():
    # 64 places far apart, each with 16 points: a cluster is around one place.
    grid = torch.cartesian_prod(*[torch.linspace(-0.55, 0.55, 4)] * 3)
    points = grid.repeat_interleave(16, 0)
    counts = []
    for index in range(40):
        extra = corrupt(points, "add_local", 5, seed=0, index=index)[1024:]
        nearest = torch.cdist(extra, grid).argmin(1).bincount(minlength=64)
        counts.append(int((nearest > 20).sum()))
    # A wide cluster reaches the neighbouring places (0.37 away, three deviations), hence a margin of two.
    assert min(counts) <= 2 and max(counts) <= 9 and len(set(counts)) >= 4


def test_add_local_mirrors_what_falls_outside_the_unit_sphere():
    surface = torch.tensor([1.0, 0, 0]).expand(1024, 3)
    extra = torch.cat([corrupt(surface, "add_local", 5, seed=0, index=i)[1024:] for i in range(10)])
    radius = extra.norm(dim=1)
    assert radius.max() <= 1 + 1e-6
    # More than half of the points fell outside. Mirrored, they are near the sphere, not on it: p / |p|^2, not p / |p|.
    assert (radius > 1 - 1e-4).float().mean() < 0.02
    assert (radius > 0.9).float().mean() > 0.55


@pytest.mark.parametrize(
    ("name", "count", "growth"), quick(2, [("jitter", 50, 4.5), ("rotate", 300, 4), ("scale", 800, 1.05)])
)
def test_displacement_grows_with_severity(name, count, growth):
    points = torch.nn.functional.normalize(torch.randn(64, 3), dim=1)
    moved = [
        sum(float((corrupt(points, name, s, seed=0, index=i) - points).norm(dim=1).mean()) for i in range(count))
        for s in SEVERITIES
    ]
    assert moved == sorted(moved) and moved[0] > 0 and moved[-1] > growth * moved[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_clouds_that_are_not_normalised_are_corrupted_in_a_frame_of_their_own(name):
    unit = normalize_unit_sphere(clouds(3))
    place, size = torch.tensor([0.3, 0.0, 0.2]), 0.4
    sets = [
        PointCloudDataset(points, torch.arange(3), list("abc"), split="test", num_points=128, normalize=normalize)
        for points, normalize in ((unit, True), (unit * size + place, False))
    ]
    plain, moved = (CorruptedDataset(each, name, 3).batch(torch.arange(3))[0] for each in sets)
    assert torch.allclose(moved, plain * size + place, atol=1e-5)


# Determinism


@pytest.mark.parametrize(("name", "severity"), [(name, 4) for name in CORRUPTIONS])
def test_a_shape_does_not_depend_on_its_batch(test_set, name, severity):
    corrupted = CorruptedDataset(test_set, name, severity, seed=5)
    whole, labels = corrupted.batch(torch.arange(9))
    assert labels.tolist() == test_set.labels.tolist()
    assert whole.shape == (9, corrupted_size(128, name, severity), 3)
    for size in (1, 2, 4):
        assert torch.equal(torch.cat([points for points, _ in BatchLoader(corrupted, size)]), whole)
    assert torch.equal(corrupted.batch(torch.tensor([7, 2]))[0], whole[[7, 2]])
    assert torch.equal(corrupted[3][0], whole[3])
    assert torch.equal(corrupted.subset([6, 1])[0][0], whole[6])
    assert torch.equal(CorruptedDataset(test_set.subset([6, 1]), name, severity, seed=5)[1][0], whole[1])
    ranks = [list(BatchLoader(corrupted, 4, rank=rank, world_size=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([points for pair in zip(*ranks) for points, _ in pair]), whole[:8])
    assert torch.equal(CorruptedDataset(test_set, name, severity, seed=5).batch(torch.arange(9))[0], whole)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shapes_seeds_and_severities_differ(name):
    points = ball(1024)
    size = min(corrupted_size(1024, name, 3), corrupted_size(1024, name, 4))
    first = corrupt(points, name, 3, seed=0, index=0)[-size:]
    for severity, seed, index in ((3, 0, 1), (3, 1, 0), (4, 0, 0)):
        assert not torch.equal(corrupt(points, name, severity, seed=seed, index=index)[-size:], first)
    state = torch.get_rng_state()
    kept = points.clone()
    corrupt(points, name, 5, seed=0, index=0)
    assert torch.equal(points, kept) and torch.equal(torch.get_rng_state(), state)


def test_severity_0_is_the_clean_set(test_set):
    for name in CORRUPTIONS:
        clean = CorruptedDataset(test_set, name, 0)
        assert torch.equal(clean.batch(torch.arange(9))[0], test_set.batch(torch.arange(9))[0])
        assert corrupted_size(128, name, 0) == 128


def test_the_clean_set_is_left_alone(test_set):
    before = test_set.batch(torch.arange(9))[0]
    for name, severity in ALL:
        CorruptedDataset(test_set, name, severity).batch(torch.arange(9))
    assert torch.equal(test_set.batch(torch.arange(9))[0], before)


def test_fewer_points_than_stored_are_corrupted_after_sampling():
    dataset = PointCloudDataset(clouds(3, 200), torch.zeros(3), ["any"], split="test", num_points=50)
    result, _ = CorruptedDataset(dataset, "add_local", 1)[2]
    assert torch.equal(result[:50], dataset[2][0]) and len(result) == corrupted_size(50, "add_local", 1)


def test_votes_shuffle_and_augment_the_same_corrupted_cloud(test_set):
    corrupted = CorruptedDataset(test_set, "add_global", 5)
    plain, _ = corrupted.batch(torch.arange(9))
    loader = BatchLoader(corrupted, 9, augment=build_augmentation(scale=None, shift=0.0))
    (shuffled, _), *rest = list(loader.vote(1))
    assert not rest and not torch.equal(shuffled, plain)
    for before, after in zip(plain, shuffled):
        assert sorted(before.tolist()) == sorted(after.tolist())


# Refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jiter:1", "unknown corruption 'jiter'; did you mean 'jitter'?"),
        ("jitter", "corruption 'jitter': write NAME:SEVERITY"),
        ("jitter:", "corruption 'jitter:': write NAME:SEVERITY"),
        ("jitter:-1", "corruption 'jitter:-1': write NAME:SEVERITY"),
        ("jitter:6", "severity is 6, must be 1 .. 5"),
        ("jitter:0", "severity must be 1 .. 5"),
    ],
)
def test_what_the_command_line_refuses(text, message):
    with pytest.raises(InputError) as error:
        parse_corruption(text)
    assert message in str(error.value)


def test_training_sets_and_second_corruptions_are_refused(test_set):
    training = PointCloudDataset(clouds(2), torch.zeros(2), ["any"], split="train", num_points=128)
    with pytest.raises(InputError, match="is a training set"):
        CorruptedDataset(training, "jitter", 1)
    with pytest.raises(InputError, match="corrupted already"):
        CorruptedDataset(CorruptedDataset(test_set, "jitter", 1), "scale", 1)
    with pytest.raises(InputError, match="severity is 9"):
        CorruptedDataset(test_set, "jitter", 9)


# Normals and colours


def cloud_with_channels(count: int = 300) -> torch.Tensor:
    """Make a sphere: normals equal positions; the colour of a point is its number."""
    normals = torch.nn.functional.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(3)), dim=1)
    number = torch.arange(count)[:, None].expand(-1, 3) / count
    return torch.cat([normals, normals, number], 1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_coordinates_do_not_depend_on_the_channels(name):
    cloud = cloud_with_channels()
    both = [corrupt(part, name, 4, seed=1, index=2, channels=channels) for part, channels in (
        (cloud, "xyz+normal+rgb"), (cloud[:, :3].contiguous(), "xyz"),
    )]  # fmt: skip
    assert both[0][:, :3].equal(both[1]) and both[0].shape[1] == 9
    torch.testing.assert_close(both[0][:, 3:6].norm(dim=1), torch.ones(len(both[0])))


def test_normals_follow_the_corrupted_surface_and_rows_stay_together():
    cloud = cloud_with_channels()

    def corrupted(name):
        return corrupt(cloud, name, 5, seed=0, index=0, channels="xyz+normal+rgb")

    turned = corrupted("rotate")
    torch.testing.assert_close(turned[:, 3:6], turned[:, :3])
    scaled = corrupted("scale")  # an ellipsoid x = f n: its normals go with x / f^2 = n / f
    factors = (scaled[:, :3] - scaled[:, :3].mean(0)).std(0) / cloud[:, :3].std(0)
    expected = torch.nn.functional.normalize(cloud[:, :3] / factors, dim=1)
    torch.testing.assert_close(scaled[:, 3:6], expected, atol=1e-4, rtol=0)
    assert corrupted("jitter")[:, 3:].equal(cloud[:, 3:])
    for name in ("drop_global", "drop_local"):
        kept = corrupted(name)
        assert kept.equal(cloud[(kept[:, 6] * len(cloud)).round().long()]), name
    for name in ("add_global", "add_local"):
        more = corrupted(name)
        assert more[: len(cloud)].equal(cloud), name
        added = more[len(cloud) :]
        assert added[:, 3:].equal(cloud[(added[:, 6] * len(cloud)).round().long(), 3:]), name
        assert len(added[:, 6].unique()) > 1, name


def test_a_corrupted_set_keeps_its_channels_also_without_normalisation():
    cloud = cloud_with_channels(64) * torch.tensor([2.0] * 3 + [1.0] * 6)
    options = dict(split="test", num_points=64, normalize=False)
    test = PointCloudDataset(cloud[None], torch.zeros(1), ["a"], channels="xyz+normal+rgb", **options)
    plain = PointCloudDataset(cloud[None, :, :3], torch.zeros(1), ["a"], **options)
    points, others = (CorruptedDataset(part, "rotate", 2).batch(torch.tensor([0]))[0] for part in (test, plain))
    assert points[..., :3].equal(others)
    around = points - points.mean(1, keepdim=True)  # it is turned about its own centre
    torch.testing.assert_close(around[..., 3:6], around[..., :3] / 2)
