"""One simulated scan: what a depth camera sees of an object that stands on a plane among other things.

All clouds are float64 and z up. See docs/scan.md for what is and is not modelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from ..datasets.scanobjectnn import BACKGROUND
from ..errors import InputError
from ..optional import import_open3d
from .perturbations import PERTURBATIONS, Perturbation

OBJECT = 1
"""Mask value of the object's points."""


# Lengths are in units of the object's bounding sphere, angles in radians.
CAMERA_DISTANCE = (2.5, 4.0)
CAMERA_ELEVATION = (np.radians(15), np.radians(55))
CLEAR_VIEW = np.radians(60)
"""Clutter stands at least this far, as seen from above, from the line between object and camera."""
CLUTTER_SIZE = (0.4, 0.9)
CLUTTER_GAP = (0.02, 0.15)
FLOOR_GAP = 0.01
BOX_MARGIN = (0.1, 0.05)
"""What a box is larger than the object on each side: a share of the half size, and a length."""
MIN_PLANE = 1024
"""Points of the plane that are tested for visibility, at least."""
MAX_DENSER = 16
"""New points of the plane for each that was found visible, at most."""
NOISE = (0.003, 0.01)
"""Deviation along the ray at the object's distance, drawn for each view; it grows with the squared distance."""
LATERAL_NOISE = 0.3
"""Deviation across the ray, as a share of that along it."""
MIN_SHARE = 0.5
"""Share of the visible object that a box must hold."""
ATTEMPTS = 24
HIDDEN_RADIUS = 50
"""Radius of the hidden-point removal for 1024 points, in camera distances; in proportion to the points for others."""


@dataclass(frozen=True)
class View:
    """A scan, and how it was made.

    Attributes:
        points: (N, 3) float32, centred, unit sphere, in random order.
        mask: (N,) int64, OBJECT or BACKGROUND.
        camera: (3,) position of the camera, in the coordinates of `points`.
        heading: the object was turned by this angle about the vertical.
        center: (3,) and
        scale: `turned(points * scale + center, -heading)` are coordinates of the cloud that was given.
    """

    points: np.ndarray
    mask: np.ndarray
    camera: np.ndarray
    heading: float
    center: np.ndarray
    scale: float


@dataclass(frozen=True)
class Box:
    """An upright box: center (3,), half sizes (3,), angle about the vertical."""

    center: np.ndarray
    half: np.ndarray
    heading: float

    def contains(self, points: np.ndarray) -> np.ndarray:
        """(n,) bool for (n, 3) points."""
        return (np.abs(turned(points - self.center, -self.heading)) <= self.half).all(axis=1)


@dataclass(frozen=True)
class Scene:
    """What the camera looks at, without the plane.

    Attributes:
        solid: (n, 3) points of the object, then of the clutter.
        floor: height of the plane.
        camera: (3,) its position.
        radius: see `visible`.
        density: points on a unit of area.
    """

    solid: np.ndarray
    floor: float
    camera: np.ndarray
    radius: float
    density: float


def simulate_view(
    cloud: np.ndarray, others: Sequence[np.ndarray], rng: Generator, *, num_points: int, variant: str = "PB_T50_RS"
) -> View:
    """Scan one object.

    The scene is the object, turned, on a horizontal plane, beside `others` as clutter; a camera looks at it from
    somewhere above the plane; what is hidden from there is removed; a box around the object, perturbed as the variant
    says, is cut out; depth noise is added. All surfaces have the density of the object's; where the box holds fewer
    than `num_points`, the plane is sampled more densely, and where it holds more, points are drawn from all of them.

    Args:
        cloud: (P, 3) points of the object's whole surface, unit sphere.
        others: clouds of shapes that make the clutter, likewise.
        rng: where all randomness comes from.
        num_points: points of the scan, N.
        variant: one of `PERTURBATIONS`.

    Raises:
        InputError: Open3D is missing, or no box holds enough points.

    Source: Katz et al. 2007, "Direct Visibility of Point Sets" (hidden-point removal); Nguyen et al. 2012, "Modeling
    Kinect Sensor Noise" (noise grows with the squared depth); Uy et al. 2019, ScanObjectNN (boxes).
    """
    heading = rng.uniform(0, 2 * np.pi)
    item = turned(cloud, heading)
    camera, bearing = place_camera(rng)
    floor = item[:, 2].min() - rng.uniform(0, FLOOR_GAP)
    solid = np.concatenate([item, *_place_clutter(others, item, floor, bearing, rng)])
    scene = Scene(solid, floor, camera, HIDDEN_RADIUS * len(cloud) / 1024, surface_density(cloud))
    seen = visible(solid, camera, scene.radius)
    fitted = fit_box(cloud, heading)
    for attempt in range(ATTEMPTS):
        # Later draws are milder, the last is the fitted box itself: every shape gets a scan.
        box = perturb(fitted, PERTURBATIONS[variant], min(1.0, 2 - 2 * (attempt + 1) / ATTEMPTS), rng)
        near = seen & box.contains(solid)
        if near[: len(item)].sum() < MIN_SHARE * seen[: len(item)].sum():
            continue
        points, chosen = _choose(scene, near, box, num_points, rng)
        if len(chosen) == num_points:
            break
    else:
        raise InputError(f"no box around the object holds {num_points} visible points; lower num_points")
    mask = np.where(chosen < len(item), OBJECT, BACKGROUND)
    points = _add_noise(points[chosen], camera, rng)
    center = points.mean(axis=0)
    scale = np.linalg.norm(points - center, axis=1).max()
    return View(
        points=((points - center) / scale).astype(np.float32),
        mask=mask,
        camera=(camera - center) / scale,
        heading=heading,
        center=center,
        scale=float(scale),
    )


def visible(points: np.ndarray, camera: np.ndarray, radius: float) -> np.ndarray:
    """Return which points a camera sees, by hidden-point removal.

    Args:
        points: (n, 3).
        camera: (3,).
        radius: of the sphere that points are mirrored at, in units of the camera's distance from the origin. A larger
            one sees more of hollows, and more of what is hidden.

    Returns:
        (n,) bool.

    Raises:
        InputError: Open3D is missing.
    """
    open3d = import_open3d("scanning")
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    _, indices = cloud.hidden_point_removal(camera, radius * float(np.linalg.norm(camera)))
    seen = np.zeros(len(points), dtype=bool)
    seen[np.asarray(indices)] = True
    return seen


def turned(points: np.ndarray, angle: float) -> np.ndarray:
    """Rotate (n, 3) points about the vertical axis z."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y, z = points.T
    return np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=1)


def unit_sphere(points: np.ndarray) -> np.ndarray:
    """Centre (n, 3) points and scale the farthest to distance 1, in float64."""
    points = points.astype(np.float64)
    points = points - points.mean(axis=0)
    return points / max(np.linalg.norm(points, axis=1).max(), np.finfo(np.float64).tiny)


def surface_density(points: np.ndarray) -> float:
    """Estimate the points on a unit of area, for points that lie at random on a surface.

    Source: Clark and Evans 1954: the mean distance to the nearest neighbour is 1 / (2 sqrt(density)).
    """
    nearest, distance = neighbours(points, points[:256], 2)
    return 1 / (4 * max(np.take_along_axis(distance, nearest, axis=1).max(axis=1).mean(), 1e-6) ** 2)


def neighbours(points: np.ndarray, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the `count` nearest points of each query point, in no particular order.

    Element by element and not as a matrix product, whose last bits, and so the order of equal distances, may change
    with the number of threads.

    Returns:
        (q, count) indices; (q, n) distances to all points.
    """
    squared = np.zeros((len(query), len(points)))
    for axis in range(3):
        squared += (query[:, axis, None] - points[None, :, axis]) ** 2
    return np.argpartition(squared, count - 1, axis=1)[:, :count], np.sqrt(squared)


def upsample(points: np.ndarray, count: int, rng: Generator) -> np.ndarray:
    """Add points between stored ones until there are `count`: interpolation in tangent planes, no copies.

    A new point lies in a random triangle of a stored point and two of its nearest. It is moved half of the way to the
    mean of its projections onto the tangent planes of the three corners: onto a smooth surface, up to third order.
    Across gaps and edges narrower than the spacing of the stored points it lies off the surface.

    Args:
        points: (P, 3).
        count: at least P.
        rng: draws the triangles.

    Returns:
        (count, 3): the stored points, then the new ones.

    Source: Boubekeur and Alexa 2008, "Phong Tessellation".
    """
    num_neighbors = min(8, len(points) - 1)  # they span a tangent plane and the triangles
    parts = [points[start : start + 1024] for start in range(0, len(points), 1024)]
    near = np.concatenate([neighbours(points, part, num_neighbors + 1)[0] for part in parts])
    patches = points[near] - points[near].mean(axis=1, keepdims=True)
    normals = np.linalg.eigh(np.einsum("nki,nkj->nij", patches, patches))[1][:, :, 0]
    number = count - len(points)
    rounds = -(-number // len(points))
    base = np.concatenate([rng.permutation(len(points)) for _ in range(rounds)])[:number] if number else np.arange(0)
    columns = rng.random((number, num_neighbors + 1)).argsort(axis=1)[:, :2]
    corners = np.stack([base, *np.take_along_axis(near[base], columns, axis=1).T], axis=1)
    weights = rng.dirichlet(np.ones(3), size=number)
    flat = np.einsum("nc,nci->ni", weights, points[corners])
    height = np.einsum("nci,nci->nc", flat[:, None] - points[corners], normals[corners])
    new = flat - 0.5 * np.einsum("nc,nci->ni", weights * height, normals[corners])
    return np.concatenate([points, new])


def place_camera(rng: Generator) -> tuple[np.ndarray, float]:
    """Draw where the camera is, (3,), and its angle about the vertical; the object is at the origin."""
    distance, elevation = rng.uniform(*CAMERA_DISTANCE), rng.uniform(*CAMERA_ELEVATION)
    bearing = rng.uniform(0, 2 * np.pi)
    flat = np.cos(elevation)
    return distance * np.array([flat * np.cos(bearing), flat * np.sin(bearing), np.sin(elevation)]), bearing


def _place_clutter(
    others: Sequence[np.ndarray], item: np.ndarray, floor: float, bearing: float, rng: Generator
) -> list[np.ndarray]:
    """Stand each of `others` on the floor, in a sector of its own, close to the object but apart from it."""
    sector = (2 * np.pi - 2 * CLEAR_VIEW) / max(len(others), 1)
    placed = []
    for number, other in enumerate(others):
        piece = turned(other, rng.uniform(0, 2 * np.pi)) * rng.uniform(*CLUTTER_SIZE)
        angle = bearing + CLEAR_VIEW + sector * (number + rng.uniform(0.2, 0.8))
        away = np.array([np.cos(angle), np.sin(angle), 0.0])
        offset = (item @ away).max() - (piece @ away).min() + rng.uniform(*CLUTTER_GAP)
        placed.append(piece + away * offset + [0, 0, floor - piece[:, 2].min()])
    return placed


def fit_box(cloud: np.ndarray, heading: float) -> Box:
    """Return the upright box around a cloud, with the margin, turned with the object."""
    low, high = cloud.min(axis=0), cloud.max(axis=0)
    center = turned((low + high)[None] / 2, heading)[0]
    return Box(center, (high - low) / 2 * (1 + BOX_MARGIN[0]) + BOX_MARGIN[1], heading)


def perturb(box: Box, how: Perturbation, strength: float, rng: Generator) -> Box:
    """Draw a perturbed box; `strength` in [0, 1] scales the perturbation, 0 is the box itself."""
    shift = rng.uniform(-how.shift, how.shift, size=3) * 2 * box.half
    turn = rng.uniform(-np.pi, np.pi) if how.turn else 0.0
    stretch = rng.uniform(1 - how.stretch, 1 + how.stretch, size=3)
    return Box(box.center + strength * shift, box.half * stretch**strength, box.heading + strength * turn)


def _choose(scene: Scene, near: np.ndarray, box: Box, num_points: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Put the part of the plane in that the box holds, and choose the points of the scan.

    Args:
        scene: what there is.
        near: (n,) the solid points that are visible and in the box.
        box: where the plane is wanted.
        num_points: how many points to choose.
        rng: draws the plane and the choice.

    Returns:
        (m, 3) points, the solid ones first; the indices of those chosen, fewer than `num_points` where there are not
        enough.
    """
    solid = scene.solid
    if abs(scene.floor - box.center[2]) > box.half[2]:
        return solid, rng.permutation(np.flatnonzero(near))[:num_points]
    natural = round(scene.density * 4 * box.half[0] * box.half[1])
    plane = _on_plane(box, scene.floor, max(natural, MIN_PLANE), rng)
    seen = visible(np.concatenate([solid, plane]), scene.camera, scene.radius)
    solid_seen, lit = np.flatnonzero(seen[: len(solid)] & near), plane[seen[len(solid) :]]
    spacing = float(np.sqrt(4 * box.half[0] * box.half[1] / len(plane)))
    wanted = max(num_points - len(solid_seen), round(len(lit) * natural / len(plane)))
    lit = np.concatenate([lit, _densify(lit, box, spacing, wanted - len(lit), rng)])[:wanted]
    pool = np.concatenate([solid_seen, len(solid) + np.arange(len(lit))])
    return np.concatenate([solid, lit]), rng.permutation(pool)[:num_points]


def _on_plane(box: Box, floor: float, count: int, rng: Generator) -> np.ndarray:
    points = turned(rng.uniform(-1, 1, size=(count, 3)) * box.half, box.heading) + box.center
    points[:, 2] = floor
    return points


def _densify(lit: np.ndarray, box: Box, spacing: float, count: int, rng: Generator) -> np.ndarray:
    """Draw `count` more points of the plane in the box, each within half a spacing of one that is seen.

    None where there are too few of these for that.
    """
    found = np.empty((0, 3))
    while len(found) < count <= MAX_DENSER * len(lit):
        more = rng.permutation(lit)
        more[:, :2] += rng.uniform(-0.5, 0.5, size=(len(more), 2)) * spacing
        found = np.concatenate([found, more[box.contains(more)]])
    return found[:count]


def _add_noise(points: np.ndarray, camera: np.ndarray, rng: Generator) -> np.ndarray:
    ray = points - camera
    distance = np.linalg.norm(ray, axis=1, keepdims=True)
    level = rng.uniform(*NOISE) * (distance / np.linalg.norm(camera)) ** 2
    along = rng.standard_normal((len(points), 1)) * level * ray / distance
    return points + along + rng.standard_normal(points.shape) * LATERAL_NOISE * level
