"""Simulated scans: geometry against closed forms, and what a whole set promises."""

import dataclasses
import sys

import h5py
import numpy as np
import pytest
import torch

from s2d3d.datasets import create_dataset
from s2d3d.datasets.scanobjectnn import BACKGROUND, VARIANTS
from s2d3d.datasets.surface import sample_by_area
from s2d3d.errors import InputError
from s2d3d.prepare import scan, scan_view
from s2d3d.prepare.perturbations import PERTURBATIONS
from s2d3d.prepare.scan import ScanOptions, ShapeSet, read_shapes, scan_shapes, write_scans
from s2d3d.prepare.scan_view import OBJECT, fit_box, perturb, simulate_view, turned, unit_sphere


@pytest.fixture(autouse=True, scope="module")
def _open3d():
    """Not at the top: every process that collects the tests would import it, for seconds."""
    pytest.importorskip("open3d")


def sphere(count, seed=0):
    points = np.random.default_rng(seed).normal(size=(count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def brick(count, seed=0, size=(1.0, 0.4, 0.7)):
    """Points on the surface of a box, uniform by area; no two sides are equally long."""
    rng = np.random.default_rng(seed)
    size = np.array(size)
    area = np.array([size[1] * size[2], size[0] * size[2], size[0] * size[1]])
    points = rng.uniform(-1, 1, size=(count, 3))
    axis = rng.choice(3, size=count, p=area / area.sum())
    points[np.arange(count), axis] = np.sign(points[np.arange(count), axis])
    return points * size


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(scan_view, "NOISE", (0.0, 0.0))


def rng(seed=0):
    return np.random.default_rng(seed)


def in_scene(view):
    """Return the points of a view where they stood in the scene, beside the turned object."""
    return view.points * view.scale + view.center


def as_given(view):
    """Return the points of a view in the coordinates of the cloud that was scanned."""
    return turned(in_scene(view), -view.heading)


def camera_in_scene(view):
    return view.camera * view.scale + view.center


def nearest_distance(points, to):
    return np.linalg.norm(points[:, None] - to[None], axis=2).min(axis=1)


# Visibility


@pytest.mark.parametrize("count", [512, 2048])
def test_hidden_point_removal_keeps_the_near_cap_of_a_sphere(count):
    points = sphere(count)
    camera = np.array([0.0, 3.0, 0.0])
    seen = scan_view.visible(points, camera, scan_view.HIDDEN_RADIUS * count / 1024)
    cap = points[:, 1] > 1 / 3  # where the tangent passes through the camera
    assert seen[cap].all()
    assert not seen[points[:, 1] < 0].any()
    assert cap.sum() <= seen.sum() < 1.25 * cap.sum()


def test_what_stands_behind_is_hidden_too():
    front, behind = sphere(1024), sphere(300, 1) * 0.5 - [2.5, 0, 0]
    seen = scan_view.visible(np.concatenate([front, behind]), np.array([4.0, 0, 0]), scan_view.HIDDEN_RADIUS)
    assert seen[: len(front)].any() and not seen[len(front) :].any()


def _block(low, high):
    """Triangles (12, 3, 3) of the surface of an upright box."""
    low, high = np.array(low, float), np.array(high, float)
    corners = np.array([[(low, high)[bit][axis] for axis, bit in enumerate(bits)] for bits in np.ndindex(2, 2, 2)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return np.concatenate([corners[[[a, b, c], [a, c, d]]] for a, b, c, d in quads])


@pytest.mark.parametrize("count", [1024, 4096])
def test_hidden_point_removal_agrees_with_ray_casting_on_a_chair(count):
    legs = [(x, y) for x in (-0.5, 0.4) for y in (-0.5, 0.4)]
    chair = [_block((-0.5, -0.5, 0), (0.5, 0.5, 0.1)), _block((-0.5, 0.4, 0.1), (0.5, 0.5, 1))]
    triangles = np.concatenate([*chair, *(_block((x, y, -0.8), (x + 0.1, y + 0.1, 0)) for x, y in legs)])
    import open3d

    core = open3d.core
    caster = open3d.t.geometry.RaycastingScene()
    vertices = core.Tensor(triangles.reshape(-1, 3).astype(np.float32))
    caster.add_triangles(vertices, core.Tensor(np.arange(len(triangles) * 3, dtype=np.uint32).reshape(-1, 3)))
    kept, right, truth = 0, 0, 0
    for seed in range(6):
        points = sample_by_area(triangles, count, rng(seed))
        camera, _ = scan_view.place_camera(rng(seed))
        length = np.linalg.norm(points - camera, axis=1)
        rays = np.concatenate([np.tile(camera, (count, 1)), (points - camera) / length[:, None]], axis=1)
        hit = caster.cast_rays(core.Tensor(rays.astype(np.float32)))["t_hit"].numpy()
        really = hit > length - 1e-3
        seen = scan_view.visible(points, camera, scan_view.HIDDEN_RADIUS * count / 1024)
        kept, right, truth = kept + seen.sum(), right + (seen & really).sum(), truth + really.sum()
    assert 0.3 < truth / (6 * count) < 0.5
    assert right / kept > 0.75 and right / truth > 0.85


@pytest.mark.parametrize("seed", range(5))
def test_the_object_is_seen_from_the_cameras_side_only(no_noise, seed):
    view = simulate_view(sphere(1024), [], rng(seed), num_points=1024)
    camera = camera_in_scene(view)
    distance = np.linalg.norm(camera)
    assert 2.5 <= distance <= 4 and np.radians(15) <= np.arcsin(camera[2] / distance) <= np.radians(55)
    toward = in_scene(view)[view.mask == OBJECT] @ camera / distance
    assert toward.min() > 1 / distance - 0.2, "a sphere's visible cap, and a rim as wide as the spacing of the points"


@pytest.mark.parametrize("seed", range(5))
def test_the_object_casts_a_shadow_on_the_plane(no_noise, seed):
    view = simulate_view(sphere(1024), [], rng(seed), num_points=1024)
    camera = camera_in_scene(view)
    plane = in_scene(view)[view.mask == BACKGROUND]
    assert len(plane) > 100
    ray = (plane - camera) / np.linalg.norm(plane - camera, axis=1, keepdims=True)
    along = -(ray @ camera)  # the point of each ray that is nearest to the centre of the sphere
    miss = np.linalg.norm(camera + along[:, None] * ray, axis=1)
    blocked = (miss < 0.8) & (along < np.linalg.norm(plane - camera, axis=1))
    assert not blocked.any(), "no ray passes through the sphere, but for a rim"


# Mask, plane, clutter, noise


@pytest.mark.parametrize("variant", PERTURBATIONS)
def test_object_points_are_stored_points_and_no_two_alike(no_noise, variant):
    cloud = unit_sphere(brick(1024))
    view = simulate_view(cloud, [unit_sphere(sphere(1024, 1))], rng(3), num_points=1024, variant=variant)
    assert view.points.shape == (1024, 3) and view.points.dtype == np.float32
    assert set(np.unique(view.mask)) == {OBJECT, BACKGROUND}
    points = as_given(view)[view.mask == OBJECT]
    distance = np.linalg.norm(points[:, None] - cloud[None], axis=2)
    assert distance.min(axis=1).max() < 1e-6
    assert len(np.unique(distance.argmin(axis=1))) == len(points)
    assert len(np.unique(view.points, axis=0)) == 1024


def test_background_is_the_plane_below_and_the_clutter(no_noise):
    cloud = unit_sphere(brick(1024))
    alone = simulate_view(cloud, [], rng(1), num_points=1024)
    floor = as_given(alone)[alone.mask == BACKGROUND][:, 2]
    assert np.ptp(floor) < 1e-6 and -0.0101 < floor[0] - cloud[:, 2].min() <= 0
    found = 0
    for seed in range(6):
        view = simulate_view(cloud, [unit_sphere(sphere(1024, 1))] * 3, rng(seed), num_points=1024)
        background = as_given(view)[view.mask == BACKGROUND]
        floor = background[:, 2].min()
        clutter = background[background[:, 2] > floor + 0.02]
        found += len(clutter)
        if len(clutter):
            assert nearest_distance(clutter, cloud).min() > 0.5 * scan_view.CLUTTER_GAP[0], "clutter stands apart"
    assert found > 100


def test_noise_is_along_the_ray_and_grows_with_distance(monkeypatch):
    cloud = unit_sphere(brick(1024))
    monkeypatch.setattr(scan_view, "NOISE", (0.0, 0.0))
    clean = [simulate_view(cloud, [], rng(seed), num_points=1024) for seed in range(8)]
    monkeypatch.setattr(scan_view, "NOISE", (0.005, 0.005))
    noisy = [simulate_view(cloud, [], rng(seed), num_points=1024) for seed in range(8)]
    along, across, distance = [], [], []
    for before, after in zip(clean, noisy):
        assert (before.mask == after.mask).all()
        ray = in_scene(before) - camera_in_scene(before)
        length = np.linalg.norm(ray, axis=1)
        offset = in_scene(after) - in_scene(before)
        component = (offset * ray).sum(1) / length
        along.append(component)
        across.append(np.linalg.norm(offset - component[:, None] * ray / length[:, None], axis=1))
        distance.append(length / np.linalg.norm(camera_in_scene(before)))
    along, across, distance = map(np.concatenate, (along, across, distance))
    expected = 0.005 * distance**2
    # Along the ray both kinds of noise add up; across it are two components of the lateral kind.
    assert np.std(along / expected) == pytest.approx(np.sqrt(1 + scan_view.LATERAL_NOISE**2), rel=0.05)
    assert np.sqrt(np.mean((across / expected) ** 2)) == pytest.approx(np.sqrt(2) * scan_view.LATERAL_NOISE, rel=0.05)
    assert np.abs(along).max() < 6 * expected.max()


def test_a_scan_is_centred_in_the_unit_sphere_and_in_random_order():
    view = simulate_view(unit_sphere(brick(512)), [], rng(), num_points=512)
    np.testing.assert_allclose(view.points.mean(axis=0), 0, atol=1e-5)
    assert np.linalg.norm(view.points, axis=1).max() == pytest.approx(1, abs=1e-5)
    first, second = (view.mask[part] == OBJECT for part in (slice(256), slice(256, None)))
    assert abs(first.mean() - second.mean()) < 0.15, "a prefix is a fair sample"


def test_where_points_abound_all_surfaces_have_one_density(no_noise):
    cloud = unit_sphere(brick(8192, size=(1.0, 1.0, 1.0)))
    view = simulate_view(cloud, [], rng(5), num_points=512, variant="OBJ_BG")
    points = as_given(view)
    top = points[(view.mask == OBJECT) & (points[:, 2] > 0.999 * cloud[:, 2].max())]
    plane = points[view.mask == BACKGROUND]
    inner = np.abs(top[:, :2]).max(axis=1) < 0.5
    assert inner.sum() > 20
    top_density = inner.sum() / 1.0
    nearest = np.sort(np.linalg.norm(plane[:, None, :2] - plane[None, :, :2], axis=2), axis=1)[:, 1]
    plane_density = 1 / (4 * nearest.mean() ** 2)
    assert 0.4 < plane_density / top_density < 2.5


def test_a_shape_that_cannot_fill_a_scan_is_an_error_and_not_filled_up(monkeypatch):
    monkeypatch.setattr(scan_view, "MAX_DENSER", 0)
    with pytest.raises(InputError, match="no box around the object holds 1024 visible points; lower num_points"):
        simulate_view(sphere(128), [], rng(), num_points=1024)


# Boxes


@pytest.mark.parametrize(
    ("variant", "shift", "turns", "stretch"),
    [("OBJ_BG", 0, False, 0), ("PB_T25", 0.25, False, 0), ("PB_T25_R", 0.25, True, 0), ("PB_T50_R", 0.5, True, 0),
     ("PB_T50_RS", 0.5, True, 0.25)],
)  # fmt: skip
def test_boxes_are_perturbed_as_the_variant_says(variant, shift, turns, stretch):
    cloud = brick(500)
    box = fit_box(cloud, 0.3)
    assert box.contains(turned(cloud, 0.3)).all() and not box.contains(turned(cloud * 1.3, 0.3)).all()
    generator = rng()
    drawn = [perturb(box, PERTURBATIONS[variant], 1.0, generator) for _ in range(300)]
    moves = np.abs([(other.center - box.center) / (2 * box.half) for other in drawn])
    factors = np.array([other.half / box.half for other in drawn])
    angles = np.array([other.heading - box.heading for other in drawn])
    assert moves.max(axis=0) == pytest.approx(shift, rel=0.05) and moves.max() <= shift
    assert factors.min() == pytest.approx(1 - stretch, rel=0.02) and factors.max() == pytest.approx(
        1 + stretch, rel=0.02
    )
    assert np.ptp(angles) == pytest.approx(2 * np.pi if turns else 0, rel=0.05)
    still = perturb(box, PERTURBATIONS[variant], 0.0, generator)
    np.testing.assert_allclose([*still.center, *still.half, still.heading], [*box.center, *box.half, box.heading])
    assert set(PERTURBATIONS) == set(VARIANTS) - {"OBJ_ONLY"}


def test_a_box_contains_what_lies_between_its_faces():
    box = scan_view.Box(np.array([1.0, 2, 3]), np.array([0.5, 0.1, 0.2]), np.pi / 2)  # its long side lies along y
    points = np.array([[1, 2, 3], [1, 2.45, 3], [1.2, 2, 3], [1, 2, 3.25], [1.05, 1.6, 2.9]])
    assert box.contains(points).tolist() == [True, True, False, False, True]


def test_a_scan_keeps_half_of_the_visible_object_and_lies_in_a_box(no_noise):
    cloud = unit_sphere(brick(1024))
    shares = []
    for seed in range(12):
        # Same draws up to the box: heading, camera, floor; the unperturbed scan shows what is visible at all.
        whole = simulate_view(cloud, [], rng(seed), num_points=1024, variant="OBJ_BG")
        part = simulate_view(cloud, [], rng(seed), num_points=1024)
        shares.append((part.mask == OBJECT).sum() / (whole.mask == OBJECT).sum())
        limit = fit_box(cloud, 0.0)
        assert limit.contains(as_given(whole)).all()
        reach = np.abs(as_given(part) - limit.center).max(axis=0)
        assert (reach[:2] <= np.linalg.norm(2.25 * limit.half[:2])).all() and reach[2] <= 2.25 * limit.half[2]
    assert min(shares) > 0.4 and min(shares) < 0.8, "the plane, other in each box, hides a few points"


# Upsampling


def test_upsampled_points_lie_near_a_curved_surface_and_are_no_copies():
    stored = sphere(1024)
    more = scan_view.upsample(stored, 4096, rng())
    assert more.shape == (4096, 3)
    np.testing.assert_array_equal(more[:1024], stored)
    assert len(np.unique(more.round(9), axis=0)) == 4096
    radius = np.linalg.norm(more[1024:], axis=1)
    assert np.abs(radius - 1).max() < 0.02
    # Not flat: chords between these neighbours lie below the sphere, their mean depth is this.
    near = scan_view.neighbours(stored, stored, 9)[0]
    chords = 1 - np.linalg.norm(stored[near[:, [0, 2, 5]]].mean(axis=1), axis=1)
    assert np.abs(radius - 1).mean() < 0.5 * chords.mean() and abs((radius - 1).mean()) < 0.2 * chords.mean()
    assert nearest_distance(more[1024:], stored).max() < 0.2, "within the spacing of the stored points"


def test_upsampled_points_lie_in_a_plane_and_fill_it():
    stored = rng().uniform(-1, 1, size=(300, 3)) * [1, 1, 0]
    more = scan_view.upsample(stored, 1000, rng(1))
    assert np.abs(more[:, 2]).max() < 1e-12 and np.abs(more).max() <= 1
    assert len(np.unique(more.round(9), axis=0)) == 1000
    counts = np.histogram2d(more[300:, 0], more[300:, 1], bins=4, range=[[-1, 1]] * 2)[0]
    assert counts.min() > 10


def test_surface_density_of_a_sphere():
    assert scan_view.surface_density(sphere(2000)) == pytest.approx(2000 / (4 * np.pi), rel=0.1)


# A set


def toy(split="train", count=8, num_points=128, order=None):
    order = range(count) if order is None else order
    clouds = [brick(num_points, seed=index, size=(1, 0.3 + 0.1 * index, 0.6)) for index in order]
    names = [f"{split}_brick_{index}" for index in order]
    return ShapeSet(split, names, np.array(list(order)), points=np.stack(clouds))


OPTIONS = ScanOptions(num_points=128)


def test_a_view_depends_on_seed_and_name_and_not_on_the_order_of_the_shapes():
    points, mask = scan_shapes(toy(), OPTIONS, workers=1)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    other_points, other_mask = scan_shapes(toy(order=order), OPTIONS, workers=1)
    np.testing.assert_array_equal(other_points, points[order])
    np.testing.assert_array_equal(other_mask, mask[order])
    seeded, _ = scan_shapes(toy(), dataclasses.replace(OPTIONS, seed=1), workers=1)
    assert (np.abs(seeded - points).max(axis=(1, 2)) > 0.1).all()
    renamed = dataclasses.replace(toy(), names=["z_renamed", *toy().names[1:]])
    assert np.abs(scan_shapes(renamed, OPTIONS, workers=1)[0][0] - points[0]).max() > 0.1


def test_more_views_contain_the_first():
    one, _ = scan_shapes(toy(count=3), OPTIONS, workers=1)
    three, mask = scan_shapes(toy(count=3), dataclasses.replace(OPTIONS, views=3), workers=1)
    assert three.shape == (9, 128, 3) and mask.shape == (9, 128)
    np.testing.assert_array_equal(three[::3], one)
    assert np.abs(three[1] - three[0]).max() > 0.1


def test_the_number_of_processes_does_not_matter():
    alone, together = (scan_shapes(toy(count=20), OPTIONS, workers=workers) for workers in (1, 2))
    np.testing.assert_array_equal(alone[0], together[0])
    np.testing.assert_array_equal(alone[1], together[1])


def test_clutter_comes_from_other_shapes_of_the_same_split(shapes_root, monkeypatch, tmp_path):
    scanned = []

    def watch(cloud, others, generator, **options):
        scanned.append((cloud, others))
        return simulate_view(cloud, others, generator, **options)

    monkeypatch.setattr(scan, "simulate_view", watch)
    write_scans(shapes_root, tmp_path / "scan", workers=1)
    _, shape_sets = read_shapes(shapes_root)
    keys = [{unit_sphere(cloud).tobytes() for cloud in shapes.points} for shapes in shape_sets]
    assert not keys[0] & keys[1] and [len(part) for part in keys] == [96, 36] and len(scanned) == 132
    used = set()
    for index, (cloud, others) in enumerate(scanned):
        own = keys[index >= 96]
        assert cloud.tobytes() in own and 1 <= len(others) <= 3
        assert len({other.tobytes() for other in others} - {cloud.tobytes()}) == len(others)
        for other in others:
            assert other.tobytes() in own
            used.add(other.tobytes())
    assert len(used) > 66, "clutter is drawn from the whole split"


@pytest.fixture(scope="module")
def scanned(shapes_root, tmp_path_factory):
    root = tmp_path_factory.mktemp("scan") / "scan"
    assert write_scans(shapes_root, root, seed=3, workers=1) == {"train": 96, "test": 36}
    return root


def test_the_loader_reads_what_was_scanned(shapes_root, scanned):
    class_names, shape_sets = read_shapes(shapes_root)
    for shapes in shape_sets:
        dataset = create_dataset("scanobjectnn", scanned, shapes.split, num_points=128)
        assert dataset.class_names == class_names and len(class_names) == 12
        assert dataset.labels.tolist() == shapes.labels.tolist() and dataset.names == list(shapes.names)
        assert dataset.stored_points == 128 and set(dataset.mask.unique().tolist()) == {OBJECT, BACKGROUND}
        points, mask = scan_shapes(shapes, ScanOptions(num_points=128, seed=3), workers=1)
        np.testing.assert_array_equal(dataset.points.numpy(), points)  # stored y up, turned back z up
        np.testing.assert_array_equal(dataset.mask.numpy(), mask)


def test_the_files_say_that_they_are_simulated(scanned):
    files = sorted(path.relative_to(scanned).as_posix() for path in scanned.rglob("*.h5"))
    assert files == [f"main_split/{split}_objectdataset_augmentedrot_scale75.h5" for split in ("test", "training")]
    for name in files:
        with h5py.File(scanned / name) as file:
            assert file.attrs["simulated"] and not file.attrs["upsampled"]
            assert (file.attrs["up_axis"], file.attrs["variant"]) == (b"y", b"PB_T50_RS")
            assert (file.attrs["seed"], file.attrs["source"]) == (3, b"shapes")
            assert file["data"].dtype == np.float32 and set(np.unique(file["mask"])) == {-1, 1}


def test_only_the_scanned_variant_is_there(scanned):
    with pytest.raises(InputError, match="no such file, variant OBJ_BG needs it"):
        create_dataset("scanobjectnn", scanned, "test", num_points=128, variant="OBJ_BG")
    with pytest.raises(InputError, match=r"no folder main_split_nobg in it \(a simulated set has background only\)"):
        create_dataset("scanobjectnn", scanned, "test", num_points=128, background=False)


def test_more_points_than_stored_need_upsampling(shapes_root, tmp_path, monkeypatch):
    with pytest.raises(InputError) as caught:
        write_scans(shapes_root, tmp_path / "scan", num_points=129)
    assert "\n" not in str(caught.value) and not (tmp_path / "scan").exists()
    assert f"{shapes_root}: 128 points stored for each shape, num_points asks for 129" in str(caught.value)
    assert "--upsample" in str(caught.value)
    _, (_, test) = read_shapes(shapes_root)
    few = ShapeSet("test", test.names[:4], test.labels[:4], points=test.points[:4])
    monkeypatch.setattr(scan, "read_shapes", lambda source, up_axis: (read_shapes(source, up_axis)[0], [few]))
    write_scans(shapes_root, tmp_path / "scan", num_points=200, upsample=True, variant="OBJ_BG", workers=1)
    with h5py.File(tmp_path / "scan" / "main_split" / "test_objectdataset.h5") as file:
        assert file.attrs["upsampled"] and file["data"].shape == (4, 200, 3)
        for cloud in file["data"]:
            assert len(np.unique(cloud, axis=0)) == 200


def test_stored_orientation_is_respected(tmp_path, modelnet_folder, monkeypatch):
    root = modelnet_folder(up_axis="y", num_points=64)
    _, (train, _) = read_shapes(root)
    _, (as_z, _) = read_shapes(root, "z")
    x, y, z = as_z.points[0].T
    np.testing.assert_array_equal(train.points[0], np.stack([x, -z, y], axis=1))


# Meshes


def write_off(path, size, corners=(-1, 1)):
    x, y, z = size
    vertices = [(i * x, j * y, k * z) for i in corners for j in corners for k in corners]
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    lines = [f"OFF{len(vertices)} {len(quads)} 0", *(f"{a} {b} {c}" for a, b, c in vertices)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, *("4 " + " ".join(map(str, quad)) for quad in quads)]) + "\n")


@pytest.fixture
def off_root(tmp_path):
    for kind, height in (("tower", 5), ("tile", 0.2)):
        for split in ("train", "test"):
            for number in range(2):
                write_off(
                    tmp_path / "off" / kind / split / f"{kind}_{split}_{number}.off", (1 + 0.1 * number, 1, height)
                )
    return tmp_path / "off"


def test_meshes_are_scanned_with_as_many_points_as_wanted(off_root, tmp_path, no_noise):
    root = tmp_path / "scan"
    assert write_scans(off_root, root, num_points=300, variant="OBJ_BG", workers=1) == {"train": 4, "test": 4}
    dataset = create_dataset("scanobjectnn", root, "train", num_points=300, variant="OBJ_BG")
    assert dataset.class_names == ["tile", "tower"] and dataset.labels.tolist() == [0, 0, 1, 1]
    assert dataset.names == ["tile_train_0", "tile_train_1", "tower_train_0", "tower_train_1"]
    for points, mask, label in zip(dataset.points, dataset.mask, dataset.labels):
        extent = points[mask == OBJECT].amax(0) - points[mask == OBJECT].amin(0)
        assert (extent[2] > extent[:2].max()) == bool(label), "towers stand, tiles lie"
        assert len(points.unique(dim=0)) == 300


def test_mesh_errors_name_the_file(off_root, tmp_path):
    bad = off_root / "tile" / "train" / "tile_train_0.off"
    bad.write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n")
    with pytest.raises(InputError, match=r"tile_train_0\.off: all triangles have area 0"):
        write_scans(off_root, tmp_path / "scan", num_points=64, workers=1)
    with pytest.raises(InputError, match="meshes can be sampled at any density; --upsample is for stored points"):
        write_scans(off_root, tmp_path / "scan", upsample=True)
    assert not (tmp_path / "scan").exists()


# What goes wrong


def test_a_failure_names_the_shape_and_leaves_nothing(shapes_root, tmp_path, monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise InputError("no box")
        return simulate_view(*args, **kwargs)

    monkeypatch.setattr(scan, "simulate_view", fail)
    with pytest.raises(InputError, match=r"^shape 'cylinder_00004' of split 'train': no box$"):
        write_scans(shapes_root, tmp_path / "scan", workers=1)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_fails_says_the_same():
    flat = dataclasses.replace(toy(count=3), points=None, paths=["a.off", "b.off", "c.off"])
    with pytest.raises(InputError, match=r"^[abc]\.off: no such file$"):
        scan_shapes(flat, OPTIONS, workers=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "OBJ_ONLY"}, "cannot imitate variant 'OBJ_ONLY'; a simulated scan always has background"),
        ({"variant": "PB_T50"}, "cannot imitate variant 'PB_T50'; did you mean 'PB_T50_R"),
        ({"num_points": 63}, "num_points is 63, must be at least 64"),
        ({"views": 0}, "views is 0, must be at least 1"),
        ({"seed": -1}, "seed is -1, must be at least 0"),
        ({"workers": 0}, "workers is 0, must be at least 1"),
        ({"up_axis": "x"}, "up_axis is 'x'"),
    ],
)
def test_arguments_out_of_range(shapes_root, tmp_path, options, words):
    with pytest.raises(InputError) as caught:
        write_scans(shapes_root, tmp_path / "scan", **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_sources_that_are_none(tmp_path, modelnet_folder):
    with pytest.raises(InputError, match=r"nowhere: no such folder; --from names"):
        write_scans(tmp_path / "nowhere", tmp_path / "scan")
    with pytest.raises(InputError, match=r"neither ModelNet layout \(shape_names.txt\) nor OFF meshes"):
        write_scans(tmp_path, tmp_path / "scan")
    root = modelnet_folder(num_points=64)
    with pytest.raises(InputError, match="is the folder to read from; choose another --output"):
        write_scans(root, root, force=True)
    twins = modelnet_folder("twins", num_points=64, names=["same"] * 6)
    with pytest.raises(InputError, match="split 'train' has two shapes named 'same'"):
        write_scans(twins, tmp_path / "scan")


def test_the_tool(tool, shapes_root, tmp_path, capsys, monkeypatch):
    main = tool("prepare_data").main
    arguments = ["scan", "--from", str(shapes_root), "--output", str(tmp_path / "scan"), "--workers", "1"]
    assert main([*arguments, "--variant-like", "PB_T25", "--num-points", "64", "--seed", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'scan'}: 96 training and 36 test simulated scans\n"
    dataset = create_dataset("scanobjectnn", tmp_path / "scan", "test", num_points=64, variant="PB_T25")
    assert len(dataset) == 36 and torch.isfinite(dataset.points).all()
    assert main(arguments) == 1
    assert "exists; choose another --output, or --force to replace it" in capsys.readouterr().err
    assert main([*arguments, "--num-points", "4096", "--force"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "pass --upsample" in line
    monkeypatch.setitem(sys.modules, "open3d", None)
    assert main([*arguments, "--force"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "scanning needs Open3D" in line and line.endswith("pip install open3d")
    assert len(create_dataset("scanobjectnn", tmp_path / "scan", "test", num_points=64, variant="PB_T25")) == 36
