"""Procedural shapes: a data set made from a seed, for demonstrations and tests, with no download.

Each shape is a triangle mesh with random proportions, deformed, cut, sampled uniformly by area, disturbed by noise.
It is a function of (seed, split, index), so the splits share no shape and a larger set contains the smaller.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator

from ..datasets.h5 import write_h5
from ..datasets.surface import sample_by_area
from ..errors import InputError
from .folder import new_folder, write_listing

SHAPES_PER_FILE = 2048
_SPLIT_KEYS = {"train": 0, "test": 1}
_FULL = 2 * np.pi


def write_shapes(
    output: str | os.PathLike,
    *,
    num_train: int = 1200,
    num_test: int = 360,
    num_points: int = 1024,
    seed: int = 0,
    force: bool = False,
) -> dict[str, int]:
    """Make the data set, in the layout that `load_modelnet40` reads, z up, float16.

    Args:
        output: folder to make; it appears whole or not at all.
        num_train: training shapes, at least one for each class; classes take turns.
        num_test: test shapes, likewise.
        num_points: points of a shape.
        seed: of everything.
        force: replace a data set that is there.

    Returns:
        Number of shapes of each split.

    Raises:
        InputError: the folder exists, or a number is too small.

    Example:
        >>> write_shapes("data/shapes", num_train=24, num_test=12, num_points=64)  # doctest: +SKIP
        {'train': 24, 'test': 12}
    """
    counts = {"train": num_train, "test": num_test}
    for split, count in counts.items():
        if count < len(SHAPES):
            raise InputError(f"num_{split} is {count}, must be at least {len(SHAPES)}, one for each class")
    if num_points < 1:
        raise InputError(f"num_points is {num_points}, must be at least 1")
    if seed < 0:
        raise InputError(f"seed is {seed}, must be at least 0")
    output = Path(output)
    with new_folder(output, force=force) as folder:
        (folder / "shape_names.txt").write_text("".join(f"{name}\n" for name in SHAPES))
        for split, count in counts.items():
            files = []
            for number, first in enumerate(range(0, count, SHAPES_PER_FILE)):
                indices = range(first, min(first + SHAPES_PER_FILE, count))
                files.append(f"ply_data_{split}{number}.h5")
                write_h5(
                    folder / files[-1],
                    np.stack([make_shape(seed, split, index, num_points) for index in indices]),
                    [index % len(SHAPES) for index in indices],
                    names=[f"{list(SHAPES)[index % len(SHAPES)]}_{index:05d}" for index in indices],
                    up_axis="z",
                )
            write_listing(folder, split, files, name=output.name)
    return counts


def make_shape(seed: int, split: str, index: int, num_points: int) -> np.ndarray:
    """Make one shape of class `index % 12`.

    Args:
        seed: of the data set.
        split: "train" or "test".
        index: number in its split.
        num_points: P.

    Returns:
        (P, 3) float16, z up, centred, unit sphere, points in random order.
    """
    rng = np.random.default_rng([seed, _SPLIT_KEYS[split], index])
    build = list(SHAPES.values())[index % len(SHAPES)]
    triangles = _cut(_deform(np.concatenate(build(rng)), rng), rng)
    points = sample_by_area(triangles, num_points, rng)
    points += rng.normal(scale=rng.uniform(0.005, 0.025), size=points.shape)
    stray = rng.random(num_points) < rng.uniform(0, 0.05)
    points[stray] = rng.uniform(points.min(0), points.max(0), size=(int(stray.sum()), 3))
    points -= points.mean(axis=0)
    radius = np.linalg.norm(points, axis=1).max()
    return (points / max(radius, 1e-12)).astype(np.float16)


# Every builder returns pieces: arrays of triangles (T, 3 corners, 3), z up, about one unit large.
Pieces = list[np.ndarray]


def _surface(
    function: Callable, u_range: tuple[float, float], v_range: tuple[float, float], cells: int = 24
) -> np.ndarray:
    """Triangulate the parametric surface `function(u, v) -> x, y, z` on a grid: (2 cells^2, 3, 3)."""
    u, v = np.meshgrid(np.linspace(*u_range, cells + 1), np.linspace(*v_range, cells + 1), indexing="ij")
    grid = np.stack(function(u, v), axis=-1)
    corners = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    lower, upper = np.stack([corners[i] for i in (0, 1, 2)], axis=2), np.stack([corners[i] for i in (0, 2, 3)], axis=2)
    return np.concatenate([lower.reshape(-1, 3, 3), upper.reshape(-1, 3, 3)])


def _block(low: tuple[float, float, float], high: tuple[float, float, float]) -> np.ndarray:
    """Triangulate the six faces of an axis-parallel box."""
    return np.concatenate([_face(low, high, axis, side[axis]) for axis in range(3) for side in (low, high)])


def _face(low: tuple[float, ...], high: tuple[float, ...], axis: int, level: float) -> np.ndarray:
    """Triangulate the rectangle between two corners at `level` of `axis`."""
    a, b = (axis + 1) % 3, (axis + 2) % 3

    def surface(u: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
        xyz = [np.full_like(u, level)] * 3
        xyz[a], xyz[b] = u, v
        return xyz

    return _surface(surface, (low[a], high[a]), (low[b], high[b]), cells=6)


def _turned(profile: Callable, sides: int = 24, power: float = 1.0) -> np.ndarray:
    """Turn the profile `t in [0, 1] -> radius, z` about z; few sides give a prism or pyramid."""
    angles = np.linspace(0, _FULL, sides + 1)

    def surface(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        radius, z = profile(v)
        return radius * np.interp(u, angles, np.cos(angles)), radius * np.interp(u, angles, np.sin(angles)) * power, z

    return _surface(surface, (0, _FULL), (0, 1), cells=24)


def _tube(center: Callable, radius: float, turns: tuple[float, float], cells: int = 48) -> np.ndarray:
    """Lay a tube of round section around the curve `center(u) -> x, y, z` that winds about z."""

    def surface(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        x, y, z = center(u)
        outward = radius * np.cos(v)
        return x + outward * np.cos(u), y + outward * np.sin(u), z + radius * np.sin(v)

    return _surface(surface, turns, (0, _FULL), cells=cells)


def _ellipsoid(rng: Generator) -> Pieces:
    height, depth = rng.uniform(0.5, 1.5), rng.uniform(0.6, 1.0)
    return [_turned(lambda t: (np.sin(np.pi * t), -height * np.cos(np.pi * t)), power=depth)]


def _box(rng: Generator) -> Pieces:
    x, y, z = rng.uniform(0.3, 1.0, size=3)
    return [_block((-x, -y, -z), (x, y, z))]


def _frustum(rng: Generator, sides: int, top: float) -> Pieces:
    height, depth = rng.uniform(0.5, 1.6), rng.uniform(0.7, 1.0)
    pieces = [
        _turned(lambda t: (1 + (top - 1) * t, height * (2 * t - 1)), sides, depth),
        _turned(lambda t: (t, np.full_like(t, -height)), sides, depth),
    ]
    return pieces + [_turned(lambda t: (top * t, np.full_like(t, height)), sides, depth)] * (top > 0)


def _cylinder(rng: Generator) -> Pieces:
    return _frustum(rng, 24, rng.uniform(0.75, 1.0))


def _cone(rng: Generator) -> Pieces:
    return _frustum(rng, 24, rng.uniform(0.0, 0.35))


def _pyramid(rng: Generator) -> Pieces:
    return _frustum(rng, int(rng.integers(3, 5)), rng.uniform(0.0, 0.35))


def _capsule(rng: Generator) -> Pieces:
    half, depth = rng.uniform(0.4, 1.4), rng.uniform(0.7, 1.0)

    def profile(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.sin(np.pi * t), -np.cos(np.pi * t) + half * np.clip(16 * (t - 0.5), -1, 1)

    return [_turned(profile, power=depth)]


def _torus(rng: Generator) -> Pieces:
    tube, depth = rng.uniform(0.15, 0.45), rng.uniform(0.6, 1.0)
    arc = rng.uniform(0.75, 1.0) * _FULL
    return [_tube(lambda u: (np.cos(u), depth * np.sin(u), np.zeros_like(u)), tube, (0, arc))]


def _spring(rng: Generator) -> Pieces:
    tube, turns, height = rng.uniform(0.06, 0.2), rng.uniform(1.3, 4.0), rng.uniform(0.5, 2.0)
    end = turns * _FULL
    return [_tube(lambda u: (np.cos(u), np.sin(u), height * (2 * u / end - 1)), tube, (0, end), cells=72)]


def _mobius(rng: Generator) -> Pieces:
    width, halves, depth = rng.uniform(0.2, 0.55), rng.choice([1, 1, 2, 3]), rng.uniform(0.6, 1.0)

    def surface(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        radius = 1 + width * v * np.cos(halves * u / 2)
        return radius * np.cos(u), depth * radius * np.sin(u), width * v * np.sin(halves * u / 2)

    return [_surface(surface, (0, _FULL), (-1, 1), cells=48)]


def _legs(x: float, y: float, bottom: float, thick: float) -> Pieces:
    centers = [(sx * (x - thick), sy * (y - thick)) for sx in (-1, 1) for sy in (-1, 1)]
    return [_block((cx - thick, cy - thick, bottom), (cx + thick, cy + thick, 0)) for cx, cy in centers]


def _table(rng: Generator) -> Pieces:
    x, y, height = rng.uniform(0.6, 1.2), rng.uniform(0.5, 0.9), rng.uniform(0.5, 1.3)
    plate, leg = rng.uniform(0.03, 0.15), rng.uniform(0.05, 0.12)
    pieces = [_block((-x, -y, 0), (x, y, plate))]
    if rng.random() < 0.3:  # one pillar on a foot instead of four legs
        pillar = _block((-leg, -leg, -height), (leg, leg, 0))
        return [*pieces, pillar, _block((-x / 2, -y / 2, -height - plate), (x / 2, y / 2, -height))]
    return pieces + _legs(x, y, -height, leg)


def _chair(rng: Generator) -> Pieces:
    x, y, height, back = rng.uniform(0.4, 0.7), rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.9), rng.uniform(0.4, 1.1)
    plate, leg = rng.uniform(0.04, 0.12), rng.uniform(0.04, 0.1)
    open_back = rng.uniform(0.0, 0.5) * back
    pieces = [_block((-x, -y, 0), (x, y, plate)), _block((-x, y - plate, open_back), (x, y, back))]
    return pieces + _legs(x, y, -height, leg)


def _mug(rng: Generator) -> Pieces:
    height, top, handle = rng.uniform(0.6, 1.3), rng.uniform(0.85, 1.3), rng.uniform(0.35, 0.6)

    def grip(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        reach = handle + 0.1 * np.cos(v)
        return 0.95 + reach * np.cos(u), 0.1 * np.sin(v), reach * np.sin(u)

    return [
        _turned(lambda t: (1 + (top - 1) * t, height * (2 * t - 1))),
        _turned(lambda t: (t, np.full_like(t, -height))),
        _surface(grip, (-np.pi / 2, np.pi / 2), (0, _FULL)),
    ]


SHAPES: dict[str, Callable[[Generator], Pieces]] = {
    "box": _box,
    "capsule": _capsule,
    "chair": _chair,
    "cone": _cone,
    "cylinder": _cylinder,
    "ellipsoid": _ellipsoid,
    "mobius": _mobius,
    "mug": _mug,
    "pyramid": _pyramid,
    "spring": _spring,
    "table": _table,
    "torus": _torus,
}
"""Class name -> builder; the order is that of the labels."""


def _deform(triangles: np.ndarray, rng: Generator) -> np.ndarray:
    """Stretch, bend, twist, tilt and turn about the vertical."""
    points = triangles.reshape(-1, 3) * rng.uniform(0.75, 1.3, size=3)
    x, y, z = points.T
    twist = rng.normal(scale=0.2) * z
    x, y = x * np.cos(twist) - y * np.sin(twist), x * np.sin(twist) + y * np.cos(twist)
    x = x + rng.normal(scale=0.12) * z**2
    points = np.stack([x, y, z], axis=1)
    heading = rng.uniform(0, _FULL)
    tilt_x, tilt_y = rng.normal(scale=0.12, size=2)
    return (points @ _rotation(2, heading).T @ _rotation(0, tilt_x).T @ _rotation(1, tilt_y).T).reshape(-1, 3, 3)


def _rotation(axis: int, angle: float) -> np.ndarray:
    matrix = np.eye(3)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix[[a, b], [a, b]] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


def _cut(triangles: np.ndarray, rng: Generator) -> np.ndarray:
    """Take away what lies within a random ball around a point of the surface, as a scan leaves gaps."""
    centers = triangles.mean(axis=1)
    hole = centers[rng.integers(len(centers))]
    distance = np.linalg.norm(centers - hole, axis=1)
    keep = distance > rng.uniform(0.0, 0.3) * distance.max()
    return triangles[keep]
