"""Reading files of points: the package's readers beside plyfile, pandas and NumPy, on the same files."""

import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from s2d3d.datasets.files import read_points

from .interleave import Contestant, Skip, Task, interleave
from .section import Section, Settings, new_section

OURS = "s2d3d"
NOT_FASTER = "checks every row and the whole cloud as well"
_HEADER = "ply\nformat {}\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
_MEMORY = """
import sys
from s2d3d.datasets.files import read_points
import pandas
def peak():  # of this process; that of getrusage begins with what the process had that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
before = peak()
read_points(sys.argv[1], 1024)
print(peak() - before)
"""


def measure(settings: Settings) -> Section:
    """Measure a binary PLY, an ascii PLY and a wide table. Points are compared before anything is timed.

    plyfile is not measured on the ascii file: it parses line by line, twenty times slower.
    """
    section = new_section("files", "Files of points", settings)
    rng = np.random.default_rng(settings.seed)
    count = settings.pick(1_000_000, 500)
    points = rng.normal(size=(count, 3)).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        binary, ascii, table = (folder / name for name in ("binary.ply", "ascii.ply", "table.csv"))
        binary.write_bytes(_HEADER.format("binary_little_endian 1.0", count).encode() + points.tobytes())
        rows = io.StringIO()
        np.savetxt(rows, points, fmt="%.6f")
        ascii.write_text(_HEADER.format("ascii 1.0", count) + rows.getvalue())
        lines = ["{:.6f},{:.6f},{:.6f},255,0,128\n".format(*row) for row in points.tolist()]
        with open(table, "w") as file:
            for _ in range(settings.pick(3, 1)):
                file.writelines(lines)
        for key, path, others in (
            ("binary_ply", binary, {"plyfile": _plyfile}),
            ("ascii_ply", ascii, {"pandas": partial(_pandas, " ", 7), "loadtxt": partial(_loadtxt, " ", 7)}),
            ("table", table, {"pandas": partial(_pandas, ",", 0), "loadtxt": partial(_loadtxt, ",", 0)}),
        ):  # fmt: skip
            _compare(section, settings, key, path, others)
    return section


def _compare(
    section: Section, settings: Settings, key: str, path: Path, others: Mapping[str, Callable[[Path], np.ndarray]]
) -> None:
    def contestant(name: str, read: Callable[[Path], np.ndarray], note: str) -> Contestant:
        def build() -> Task:
            points = torch.from_numpy(np.ascontiguousarray(read(path), dtype=np.float64))
            return Task(lambda: read(path), outputs=lambda: [points])

        return Contestant(name, build, note=note)

    ours = contestant(OURS, lambda file: read_points(file, 1024), NOT_FASTER)
    size = path.stat().st_size
    comparison = interleave(
        f"files, {key}", [ours, *(contestant(name, read, "") for name, read in others.items())],
        title=f"{path.name}, {size / 1e6:.0f} MB", start=settings.here(), **settings.interleaving(7, warmup=1),
    )  # fmt: skip
    section.comparisons.append(comparison)
    for name in others:
        section.add_ratio(f"{key}.over_{name}", comparison, OURS, name)
    if Path("/proc/self/status").is_file():
        section.add(f"{key}.memory_over_file", memory_taken(path) / size)


def memory_taken(path: Path) -> int:
    """Return by how many bytes the peak of a process grows that reads a file; on Linux."""
    program = [sys.executable, "-c", _MEMORY, str(path)]
    return int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)


def _plyfile(path: Path) -> np.ndarray:
    try:
        from plyfile import PlyData
    except ImportError as error:
        raise Skip("plyfile is not installed") from error
    vertices = PlyData.read(str(path))["vertex"]
    return np.column_stack([vertices[axis] for axis in "xyz"])


def _pandas(separator: str, skip: int, path: Path) -> np.ndarray:
    try:
        from pandas import read_csv
    except ImportError as error:
        raise Skip("pandas is not installed") from error
    return read_csv(path, sep=separator, header=None, skiprows=skip, dtype=np.float64).to_numpy()[:, :3]


def _loadtxt(separator: str, skip: int, path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=None if separator == " " else separator, skiprows=skip)[:, :3]
