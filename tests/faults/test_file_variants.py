"""Every variant of a file gives the points of an independent reader, or one line that refuses it."""

import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from faults.variants import COUNT, Variant, damaged
from faults.variants_clouds import las, pcd
from faults.variants_meshes import obj, off, stl
from faults.variants_ply import ply
from faults.variants_tables import arrays, tables
from s2d3d.datasets.files import _MESHES, read_points
from s2d3d.errors import InputError

MAX_SECONDS, MAX_BYTES = 10, 20 * 2**20


def all_variants(seed: int, thorough: bool = False) -> Iterator[Variant]:
    """Yield the whole and the damaged variants of every format."""
    rng = np.random.default_rng(seed)
    for make in (ply, pcd, tables, arrays, off, obj, stl, las):
        for variant in make(rng):
            yield variant
            yield from damaged(variant, rng, 12 if thorough else 2)


def found_by_us(path) -> np.ndarray:
    """Return points, or the corners of a mesh's triangles: what `read_points` draws from."""
    points = read_points(path, COUNT)
    if path.suffix in _MESHES:
        vertices, faces = _MESHES[path.suffix](path)
        if faces is not None and len(faces):
            return vertices[faces]
    return points


def complaint(variant: Variant, path) -> str | None:
    """Return what is wrong with our reading of a variant."""
    try:
        found = found_by_us(path)
    except InputError as error:
        text = str(error)
        if variant.expected is not None:
            return f"refused: {text}"
        ours = text.startswith(f"{path}") and "\n" not in text and len(text) < 600 and "numpy" not in text
        return None if ours else f"is not one line of ours: {text}"
    if variant.expected is None:
        return f"read: {found[:2].tolist()}"
    if found.dtype != np.float64 or not np.array_equal(found, variant.expected):
        return f"other points: {found[:2].tolist()}, {variant.expected[:2].tolist()}"
    if variant.oracle and not np.allclose(found, variant.oracle(path), rtol=1e-12, atol=0):
        return f"other points than the independent reader: {found[:2].tolist()}"
    return None


def check(variants, folder) -> tuple[int, int, list[str]]:
    """Return how many variants were to be read and to be refused, and what is wrong with our reading."""
    read, refused, wrong = 0, 0, []
    for variant in variants:
        read, refused = read + (variant.expected is not None), refused + (variant.expected is None)
        path = folder / f"file{variant.suffix}"
        path.write_bytes(variant.content)
        start, lies = time.perf_counter(), "illion" in variant.name or "liar" in variant.name
        if lies:  # what a file announces is no reason to take memory
            tracemalloc.start()
        what = complaint(variant, path)
        if lies and tracemalloc.get_traced_memory()[1] > MAX_BYTES:
            what = "takes much memory"
        tracemalloc.stop()
        if time.perf_counter() - start > MAX_SECONDS:
            what = "takes long"
        if what:
            wrong.append(f"{variant.name}: {what}")
    return read, refused, wrong


def test_variants_are_read_as_by_others_or_refused(tmp_path, record):
    read, refused, wrong = check(all_variants(seed=0), tmp_path)
    record("input: files of points", read + refused, failures=wrong, read=read, refused=refused)
    assert not wrong, f"{len(wrong)} of {read + refused}:\n" + "\n".join(wrong[:60])
    assert read > 400 and refused > 1000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_more_variants(tmp_path, seed):
    read, refused, wrong = check(all_variants(seed, thorough=True), tmp_path)
    assert not wrong, f"{len(wrong)} of {read + refused}:\n" + "\n".join(wrong[:60])
