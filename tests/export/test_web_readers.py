"""The readers of the web page, run by Node.js, against those of Python: the same points, or a refusal by both."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cases import quick

from s2d3d.datasets.files import read_points
from s2d3d.errors import InputError
from s2d3d.export.web import PAGE, page_files

DRAWN = 40
RUN = """
import fs from "fs";
import {readPoints} from "./cloud.js";
const {files, facts} = JSON.parse(fs.readFileSync(0));
console.log(JSON.stringify(files.map(file => {
  try { return Array.from(readPoints(file, new Uint8Array(fs.readFileSync(file)), facts).points); }
  catch (error) { return error.constructor.name + ": " + error.message; }
})));
"""


@pytest.fixture(scope="module")
def page_reads(tmp_path_factory):
    """Read files as the page does; each answer is a list of numbers or a line."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js here")
    folder = tmp_path_factory.mktemp("page")
    for name in page_files():
        shutil.copy(PAGE / name, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "run.js").write_text(RUN)
    state = np.random.default_rng(0).bit_generator.state["state"]
    generator = {"state": str(state["state"]), "increment": str(state["inc"])}

    def read(paths: list[Path]) -> list:
        asked = {"files": list(map(str, paths)), "facts": {"num_points": DRAWN // 2, "mesh_generator": generator}}
        done = subprocess.run(
            [node, "run.js"], cwd=folder, input=json.dumps(asked), capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    return read


def compare(page_reads, tmp_path, files: dict[str, str | bytes], *, words: bool = True) -> dict[str, str]:
    """Compare the points of files and the words of refusals; return what the page refuses and Python reads."""
    paths = [tmp_path / name for name in files]
    for path, content in zip(paths, files.values()):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    stricter = {}
    for path, found in zip(paths, page_reads(paths), strict=True):
        try:
            expected = read_points(path, DRAWN)
        except InputError as error:
            assert isinstance(found, str), f"the page reads what Python refuses: {error}"
            assert found.startswith("FileError: ") and "\n" not in found
            assert not words or found == f"FileError: {str(error).removeprefix(f'{path}: ')}"
            continue
        if isinstance(found, str):
            assert found.startswith("FileError: ") and "\n" not in found
            stricter[path.name] = found.removeprefix("FileError: ")
        else:
            np.testing.assert_allclose(np.reshape(found, (-1, 3)), expected, rtol=1e-12, atol=1e-12, err_msg=path.name)
    return stricter


def off(polygon, faces) -> str:
    corners = [f"{x} {y} 0" for x, y in polygon]
    rows = [*corners, *(" ".join(map(str, (len(face), *face))) for face in faces)]
    return f"OFF {len(corners)} {len(faces)} 0\n" + "\n".join(rows)


LETTER = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (3, 2), (3, 3), (0, 3)]
ARROW = [(0, 0), (2, 1), (0, 2), (0.5, 1)]


def test_polygons_that_are_not_convex(page_reads, tmp_path):
    files = {f"arrow{first}.off": off(ARROW[first:] + ARROW[:first], [range(4)]) for first in range(4)}
    files |= {
        "letter.off": off(LETTER, [range(8)]),
        "pentagon.off": off([*ARROW[:3], (-1, 1.5), (-1, 0.5)], [range(5)]),
    }
    stricter = compare(page_reads, tmp_path, files)
    assert stricter == {"letter.off": "face 0 is not convex, and this page cuts no such polygons; save triangles"}


@pytest.mark.parametrize("step", quick(1, [5, 1]))
def test_every_variant_of_a_file_is_read_as_in_python(page_reads, tmp_path, step):
    """Whole and damaged files of tests/faults."""
    from faults.variants import damaged
    from faults.variants_clouds import pcd
    from faults.variants_meshes import obj, off
    from faults.variants_ply import ply
    from faults.variants_tables import tables

    rng = np.random.default_rng(5)
    whole = itertools.chain.from_iterable(make(rng) for make in (ply, pcd, tables, obj, off))
    variants = [
        one for variant in itertools.islice(whole, 0, None, step) for one in (variant, *damaged(variant, rng, 2))
    ]
    files = {
        f"{number}{one.suffix}": one.content
        for number, one in enumerate(variants)
        if one.suffix in (".ply", ".pcd", ".obj", ".off", ".xyz", ".csv", ".txt", ".pts")
    }
    assert len(files) > 1000 / step
    assert compare(page_reads, tmp_path, files, words=False) == {}
