"""Files of points in many forms and states, generated from a seed, each with what it must give.

A variant that is whole names its points, as the writer rounded them, and an independent reader where there is one:
plyfile or trimesh. Any other variant must be refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COUNT = 60
_MORE = [(corner, corner + 1, corner + 2) for corner in range(15, 36, 3)]  # vertices are corners of faces, most of them
FACES = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [12, 13, 14], *map(list, _MORE)]
TRIANGLES = [(0, 1, 2), (0, 2, 3), (4, 5, 6), (7, 8, 9), (7, 9, 10), (7, 10, 11), (12, 13, 14), *_MORE]


@dataclass(frozen=True)
class Variant:
    """A file, and its points (N, 3) or corners of triangles (F, 3, 3); None: it must be refused."""

    name: str
    suffix: str
    content: bytes
    expected: np.ndarray | None
    oracle: Callable[[Path], np.ndarray] | None = None


def clouds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Clouds of ordinary, tiny, large, and georeferenced coordinates, and of whole numbers; `FACES` are convex."""
    plain = rng.normal(size=(COUNT, 3)).round(6)
    whole = rng.integers(-500, 500, size=(COUNT, 3)).astype(np.float64)
    for face in (face for face in FACES if len(face) > 3):
        angles = np.arange(len(face)) * 2 * np.pi / len(face) + 0.3
        ring = np.stack([np.cos(angles), np.sin(angles), np.cos(angles) / 2], axis=1)
        plain[face], whole[face] = ring.round(6), (400 * ring).round()
    return {
        "plain": plain,
        "tiny": plain * 1e-6,
        "large": plain * 1e6,
        "utm": plain + np.array([691_000.25, 5_334_000.5, 520.125]),
        "whole": whole,
    }


def damaged(variant: Variant, rng: np.random.Generator, count: int) -> Iterator[Variant]:
    """Cut a whole binary file anywhere, a text in the middle of its rows; append bytes to what announces its size."""
    if variant.expected is None:
        return
    content = variant.content
    text = not any(byte < 9 or byte > 126 for byte in content[-200:])
    announced = variant.suffix in (".ply", ".pcd", ".off", ".npy", ".stl", ".las")
    if not announced or content.startswith(b"PK"):  # an archive is read from its end
        return
    for place in rng.integers(len(content) // 4, len(content) - 12, size=count).tolist():
        if text:  # behind a whole row, so that no number is cut, which nobody can notice in a last row
            place = content.rfind(b"\n", 0, place) + 1
        yield Variant(f"{variant.name} cut at {place}", variant.suffix, content[:place], None)
    if variant.suffix != ".las":  # extended records may follow there
        yield Variant(f"{variant.name} with more", variant.suffix, content + b"\n1 2 3 4 5 6 7\n", None)
