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


def compare(page_reads, tmp_path, files: dict[str, str | bytes]) -> dict[str, str]:
    """Compare the points of files and the words of refusals; return what the page refuses and Python reads."""
    paths = [tmp_path / name for name in files]
    for path, content in zip(paths, files.values()):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    stricter, read = {}, 0
    for path, found in zip(paths, page_reads(paths), strict=True):
        try:
            expected = read_points(path, DRAWN)
        except InputError as error:
            assert isinstance(found, str), f"the page reads what Python refuses: {error}"
            assert found == f"FileError: {str(error).removeprefix(f'{path}: ')}"
            continue
        if isinstance(found, str):
            assert found.startswith("FileError: ") and "\n" not in found
            stricter[path.name] = found.removeprefix("FileError: ")
        else:
            np.testing.assert_allclose(np.reshape(found, (-1, 3)), expected, rtol=1e-12, atol=1e-12, err_msg=path.name)
            read += 1
    assert read > 3
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
    noise = np.random.default_rng(0).normal(size=400)
    bent = [(x, y, noise[20 * y + x]) for y in range(20) for x in range(20)]
    quads = [(20 * y + x, 20 * y + x + 1, 20 * y + x + 21, 20 * y + x + 20) for y in range(19) for x in range(19)]
    files["noisy.off"] = "\n".join(
        [
            f"OFF 400 {len(quads)} 0",
            *(f"{x} {y} {z!r}" for x, y, z in bent),
            *(f"4 {a} {b} {c} {d}" for a, b, c, d in quads),
        ]
    )
    files["tiny_bow.off"] = off(
        [(0, 0), (0.01, 0.01), (0.01, 0), (0, 0.01), (9, 0), (9, 9), (0, 9)], [range(4), range(3, 7)]
    )
    stricter = compare(page_reads, tmp_path, files)
    assert stricter == {"letter.off": "face 0 is not convex, and this page cuts no such polygons; save triangles"}


ROWS = [[n + 0.5, n + 1.25, n * n + 2.125] for n in range(20)]


def table(rows, separator: str = " ", end: str = "\n") -> str:
    return "".join(separator.join(f"{value:.12g}" for value in row) + end for row in rows)


def first_columns() -> dict[str, np.ndarray]:
    rng, count = np.random.default_rng(0), 300
    jitter = np.cumsum(rng.integers(0, 3, count))
    return {
        "even": np.arange(count), "steps": 9 - 0.25 * np.arange(count), "shuffled": rng.permutation(count),
        "gaps": np.sort(rng.choice(2000, count, False)), "sparse": rng.choice(10**6, count, False),
        "labels": rng.integers(0, 4, count), "one label": np.full(count, 2), "rings": rng.integers(0, 64, count),
        "unix": 1.6e9 + jitter * 1e-3, "unix shuffled": 1.6e9 + rng.permutation(count) * 0.0017,
        "week": 345678.5 + jitter / 64, "week shuffled": 345678.5 + rng.permutation(count) / 64,
        "x": rng.normal(size=count), "x in order": np.sort(rng.normal(size=count)), "x in mm": rng.integers(-9000,
        9000, count),
        "UTM": np.sort(3e5 + rng.random(count)), "a hole": np.where(np.arange(count) == 5, np.nan,
        rng.permutation(count)),
    }  # fmt: skip


def test_first_columns_without_names(page_reads, tmp_path):
    metres = np.random.default_rng(1).normal(size=(300, 3)).round(4)
    others = {
        "m": metres,
        "mm": (metres * 1000).round(),
        "UTM": metres + np.array([3e5, 5.1e6, 100]),
        "grid": metres.round(),
    }
    files = {}
    for name, column in first_columns().items():
        for unit, three in others.items():
            for width in (2, 3):
                files[f"{name} {unit} {width}.txt"] = table(np.column_stack([column, three[:, :width]]))
    files["a count.xyz"] = "20\n" + table(ROWS)
    files["a count of three.xyz"] = "20 3 0\n" + table(ROWS)
    assert compare(page_reads, tmp_path, files) == {}


COMMENTS = [
    "# t x y z ring", "# fields: z x y", "# y[m] x[m] z[m]", "# written as z y x", "# points as x y z r", "// X Y Z",
    "% z y x",
    "# id[-] X[m] Y[m] Z[m]", "# columns: id x y z", "# format y z x", "# x y z of the hull", "# exported: y x z",
    "# größe x y z",
    '# "z";"x";"y"', "# x x y z", "#", "# x y z nx ny nz", "# Fields: id, X, Y, Z",
]  # fmt: skip


def test_comments_that_name_columns(page_reads, tmp_path):
    files = {}
    for place, comment in enumerate(COMMENTS):
        for width in (3, 4, 5):
            rows = table([[*row, *range(width - 3)] for row in ROWS])
            for kind, text in {
                "first": f"{comment}\n{rows}", "behind a count": f"20\n{comment}\n{rows}",
                "inside": rows + comment + "\n" + rows,
                "far": "# much of it\n" * 400 + f"{comment}\n{rows}", "second": f"# made by z y x\n{comment}\n{rows}",
            }.items():  # fmt: skip
                files[f"{place} {width} {kind}.xyz"] = text
    assert compare(page_reads, tmp_path, files) == {}


HEADERS = [
    "", "z y x", "x,y,z", "x;y;z", "x [m];y (m);z [m]", '"z";"y";"x"', "lon lat height", "x y", "x y z r", "sep=;",
    '"sep=,"', "sep=;\nz;y;x",
    "0 1 2", "0,1,2", "0;1;2", "20", "20\nx y z", "x y z\n20", "20 3", "1e3", "größe;x;y;z", "x\ty\tz", "\n\n",
    "//X Y Z", "nan nan nan",
    "20\n20", "x y z\nz y x",
]  # fmt: skip


def test_headers_separators_and_ends_of_lines(page_reads, tmp_path):
    files, number = {}, itertools.count()
    for header, separator in itertools.product(HEADERS, [" ", ",", ";", "\t", ", ", " ; ", "  "]):
        files[f"{next(number)}.csv"] = header + "\n" * bool(header) + table(ROWS, separator)
    for ends in (["\r"], ["\r\n"], ["\r", "\n"], ["\n", "\r", "\r\n"], ["\r\n", "\r"]):
        lines = ["# z y x", *table(ROWS).split("\n")[:-1], "1 x 2"]
        for stop in (None, -1):
            content = "".join(line + ends[n % len(ends)] for n, line in enumerate(lines[:stop]))
            files[f"{next(number)}.xyz"] = content
            files[f"{next(number)}.pts"] = content.encode("utf-16")
    assert compare(page_reads, tmp_path, files) == {}


def test_commas_and_marks_in_numbers(page_reads, tmp_path):
    contents = {
        "thousands.txt": "-232 139 -789\n1,038 12 13\n", "thousands;.csv": "-232;139;-789\n1,038;12;13\n",
        "late.txt": "1,000;1,001;1,002\n" * 60 + "895;120;333\n" * 9,
        "decimals.txt": "1,000;1,001;1,002\n895;1,5;333\n",
        "early.txt": "895 120 333\n" * 60 + "1,000 1,001 1,002\n" * 9, "points.csv": "1,303.16;2.5;3.5\n1,5;2;3\n",
        "both.txt": "7,8, 6,4, 5,1\n1,2, 0,4, 5,7\n" * 9, "quotes.csv": '"1,4","2,3","4,6"\n' * 9,
        "one digit.csv": "".join(f"{n},{n % 7},{3 * n},{n % 9},1,5\n" for n in range(20)),
        "zeros.csv": "0,061234,-0,125,0,0\n" * 9,
        "ind.xyz": table(ROWS) + "1 2 -1.#IND\n", "qnan.csv": "1,2,1.#QNAN\n" * 9,
        "remark.xyz": "0 0 0.# a\n1. 2. 3.# b\n",
        "comma ind.xyz": "1,5 2,5 3,5\n1,5 2,5 3,#IND\n", "wide.xyz": "1 " * 20_000, "wide.csv": "1," * 20_000 + "1",
        "class.txt": "0.5 0.7 0.9 chair\n" * 9, "class.csv": "x,y,z,name\n" + "0.5,0.7,0.9,chair\n" * 9,
        "minus.txt": "\u22121.5 2 3\n1 2 3\n", "space.txt": "1\xa02\xa03\n4\xa05\xa06\n",
        "letter.txt": "1 2 3 à\n4 5 6 à\n",
        "tiny.xyz": "1e-25 2e-25 3e-25\n2e-25 1e-25 0\n" * 5, "huge.xyz": "1e19 0 0\n0 1 0\n",
        "equal.xyz": "1 2 3\n" * 9,
        "far.xyz": "5334000.5 691000.25 520\n5334001 691000.5 520\n" * 9,
        "huge number.xyz": "1e999 0 0\n0 1 0\n3 4 5\n",
        "empty.csv": "", "words.csv": "a b c\nd e f\n", "bom.csv": "\ufeffz;y;x\n1;2;3\n4;5;6\n",
        "nul.xyz": "1 2 3\0\n4 5 6\n",
        "transposed.txt": table(np.transpose(ROWS)), "signs.txt": "+1 -2 +.5\n1. -.25 1e-3\n",
        "hex.txt": "0x1 2 3\n4 5 6\n",
    }  # fmt: skip
    assert compare(page_reads, tmp_path, contents) == {}


PLY = (
    "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
)


def test_meshes(page_reads, tmp_path):
    corners = "0 0 0\n1 0 0\n0 1 0\n"
    contents = {
        f"{word}.off": f"{word}\n{head}3 1 0\n{corners}3 0 1 2\n"
        for word in ("OFF", "off", "nOFF", "noff", "NOFF", "4OFF", "4nOFF", "COFF", "STOFF", "OFF BINARY",
        "nOFF BINARY")
        for head in ("", "3\n")
    } | {
        f"{word} normals.off": f"{word}\n3 1 0\n" + corners.replace("\n",
        " 0 0 1\n") + "3 0 1 2\n" for word in ("noff", "NOFF")
    } | {
        "v.obj": "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3", "capitals.obj": "V 0 0 0\nV 1 0 0\nv 0 1 0 1\nF 1 2 3\n",
        "weight.obj": "v 0 0 0\nv 1 0 0 2\nv 0 1 0\nf 1 2 3",
        "weights of one.obj": "v 0 0 0 1\nv 1 0 0 1.0\nv 0 1 0 0\nf 1 2 3",
        "colours.obj": "v 0 0 0 1 0 0\nv 1 0 0 1 0 0\nv 0 1 0 .1 .2 .3\nf 1 2 3",
        "cut.obj": "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 \\",
        "ind.obj": "v 0 0 0\nv 1 0 -1.#IND\nv 0 1 0\nf 1 2 3", "remark.obj": "v 0. 0. 0.#c\nv 1. 2. 3.#c\n",
        "curve.obj": "v 0 0 0\nv 1 0 0\nv 0 1 0\ncstype bspline\nsurf 0 1 0 1 1 2 3\n",
        "old Mac.obj": "v 0 0 0\rv 1 0 0\rv 0 1 0\rf 1 2 3\r",
        "both.obj": "v 0 0 0\r\nv 1 0 0\rv 0 1 0\nf 1 2 3\r\n", "space.obj": "v 0 0 0\xa0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n",
        "ind.off": "OFF 3 1 0\n0 0 0\n1 0 -1.#IND\n0 1 0\n3 0 1 2\n",
        "tiny.off": "OFF 3 1 0\n0 0 0\n1e-20 0 0\n0 1e-20 0\n3 0 1 2\n",
    }  # fmt: skip
    for unused in (3, 4):
        rest = "".join(f"{n} 5 5\n" for n in range(unused))
        contents[f"{unused} unused.off"] = f"OFF {3 + unused} 1 0\n{corners}{rest}3 0 1 2\n"
        contents[f"{unused} unused.ply"] = f"{PLY}{corners}{rest}3 0 1 2\n".replace("vertex 3", f"vertex {3 + unused}")
    lines = [*corners.splitlines(), "3 0 1 2"]
    for place in range(5):
        for blank in ("", " \r", "# a"):
            contents[f"blank {place} {blank.strip()}.ply"] = (
                PLY + "\n".join([*lines[:place], blank, *lines[place:]]) + "\n"
            )
    contents["ind.ply"] = PLY + "\n".join(lines).replace("0 1 0", "0 1 1.#INF") + "\n"
    assert compare(page_reads, tmp_path, contents) == {}


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
    assert compare(page_reads, tmp_path, files) == {}
