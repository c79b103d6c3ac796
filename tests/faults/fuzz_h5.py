"""Fuzzing of data sets: HDF5 files and the text files that list them."""

import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from faults.damage import damage
from faults.fuzz import Outcome, accepted, refused
from faults.values import TEXTS, pick
from s2d3d.datasets import create_dataset
from s2d3d.errors import InputError

COUNT, POINTS, CLASSES = 6, 16, ("apple", "boat", "chair")
SECRET = 0.3141592
"""Coordinate of the clouds that lie outside the data folder."""
DTYPES = ("i1", "u2", ">i4", "i8", "u8", "f2", ">f2", "f4", ">f4", "f8", "c8", "?", "S3", "V5", "f16")


class H5Cases:
    """Damaged and hostile data folders, read as a training split in memory or streamed."""

    def __init__(self, folder: Path) -> None:
        self.outside, self.root = folder / "outside", folder / "root"
        self.outside.mkdir(exist_ok=True)
        with h5py.File(self.outside / "secret.h5", "w") as file:
            file["data"], file["label"] = np.full((COUNT, POINTS, 3), SECRET, np.float32), np.zeros(COUNT, np.int64)
        (self.outside / "secret.raw").write_bytes(np.full((COUNT, POINTS, 3), SECRET, np.float32).tobytes())
        (self.outside / "train_files.txt").write_text("secret.h5\n")

    def run(self, rng: random.Random) -> Outcome:
        """Make one folder, read it, and look for what must not have happened."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        what = self._make(rng)
        before = {path: path.stat().st_size for path in self.root.rglob("*") if not path.is_symlink()}
        outside = sorted(self.outside.iterdir())
        budget, points = rng.choice([(0.25, POINTS), (1e-9, POINTS), (0.25, 8), (1e-9, 8)])
        try:
            dataset = create_dataset(
                "modelnet40", self.root, "train", num_points=points, normalize=False, memory_budget_gb=budget,
                up_axis="z",
            )  # fmt: skip
            clouds, labels = dataset.batch(torch.arange(len(dataset))[:64], augment=False)
        except InputError as error:
            outcome = refused(str(error), (str(self.root), "train: "), what)
        else:
            fine = clouds.isfinite().all() and clouds.shape[1:] == (points, 3) and (labels >= 0).all()
            fine = fine and (labels < len(dataset.class_names)).all()
            leaked = bool((clouds == SECRET).any())
            outcome = accepted(bool(fine) and not leaked, f"leaked={leaked}, shape={tuple(clouds.shape)}", what)
        shutil.rmtree(self.root / ".fps_cache", ignore_errors=True)
        after = {path: path.stat().st_size for path in self.root.rglob("*") if not path.is_symlink()}
        if outcome.kind != "failed" and (after != before or sorted(self.outside.iterdir()) != outside):
            return Outcome("failed", f"files were made or changed: {what}")
        return outcome

    def _make(self, rng: random.Random) -> str:
        (self.root / "shape_names.txt").write_text("\n".join(CLASSES) + "\n")
        (self.root / "train_files.txt").write_text("a.h5\n")
        path = self.root / "a.h5"
        change = pick(rng, CHANGES)
        with h5py.File(path, "w", libver=rng.choice(["earliest", "latest", None])) as file:
            _write_good(file, rng)
            if change in IN_FILE:
                change(file, rng, self.outside)
        if change not in IN_FILE:
            change(self.root, rng, self.outside)
        return change.__name__


def _write_good(file: h5py.File, rng: random.Random) -> None:
    points = np.random.default_rng(rng.getrandbits(32)).normal(size=(COUNT, POINTS, 3)).astype(np.float32)
    options = rng.choice(
        [
            {},
            dict(chunks=(2, POINTS, 3), compression="gzip", shuffle=True),
            dict(chunks=(4, 5, 2), compression="lzf", fletcher32=True),
            dict(chunks=(1, POINTS, 3), maxshape=(None, POINTS, 3)),
        ]
    )
    file.create_dataset("data", data=points, **options)
    file["label"] = np.arange(COUNT).reshape(-1, 1) % len(CLASSES)
    if rng.random() < 0.5:
        file["name"] = [f"shape {index}" for index in range(COUNT)]
    if rng.random() < 0.5:
        file.attrs["up_axis"] = rng.choice(["y", np.bytes_("z")])


def _replace(file: h5py.File, key: str) -> None:
    if key in file:
        del file[key]


# Changes inside the file


def shape(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Wrong ranks, counts and empty dimensions."""
    key = rng.choice(["data", "data", "label", "name", "normal", "mask"])
    _replace(file, key)
    dims = tuple(rng.choice([0, 1, 2, 3, COUNT, POINTS]) for _ in range(rng.randrange(6)))
    file[key] = np.zeros(dims, rng.choice(["f4", "i8", "S4"]))


def dtype(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Every kind of type under every key."""
    key = rng.choice(["data", "label", "name", "normal", "mask"])
    _replace(file, key)
    dims = {"data": (COUNT, POINTS, 3), "normal": (COUNT, POINTS, 3), "mask": (COUNT, POINTS)}.get(key, (COUNT,))
    kind = rng.choice([*DTYPES, "vlen", "text", "reference", "compound", "enum", "array"])
    special = {
        "vlen": h5py.vlen_dtype(np.int32), "text": h5py.string_dtype(), "reference": h5py.ref_dtype,
        "compound": np.dtype([("x", "f4"), ("y", "i2")]), "enum": h5py.enum_dtype({"A": 0, "B": 1}),
        "array": np.dtype(("f4", (3,))),
    }  # fmt: skip
    file.create_dataset(key, dims, special.get(kind) or np.dtype(kind))


def huge(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Declared sizes far beyond the file."""
    key = rng.choice(["data", "data", "label", "name", "normal", "mask"])
    _replace(file, key)
    first = rng.choice([10**5, 10**9, 2**31, 2**40, 2**60])
    dims = {"data": (first, POINTS, 3), "normal": (first, POINTS, 3), "mask": (first, POINTS)}.get(key, (first,))
    if rng.random() < 0.3:
        dims = (dims[0] if rng.random() < 0.5 else COUNT, rng.choice([2**31, 10**9]), 3)[: len(dims)]
    chunks = tuple(min(size, limit) for size, limit in zip(dims, (rng.choice([1, 64, 4096]), 4096, 3)))
    packing = rng.choice([None, "gzip"])
    file.create_dataset(key, dims, rng.choice(["f4", "i8", "f2"]), chunks=chunks, compression=packing)
    if key != "label" and rng.random() < 0.5:
        _replace(file, "label")
        file.create_dataset("label", (first,), "i8", chunks=(min(first, 4096),))


def bomb(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """A megabyte or two that unpacks to hundreds."""
    _replace(file, "data")
    rows = rng.choice([20_000, 100_000, 400_000])
    data = file.create_dataset("data", (rows, 512, 3), "f4", chunks=(2000, 512, 3), compression="gzip")
    piece = zlib.compress(bytes(2000 * 512 * 3 * 4), 9)
    for start in range(0, rng.choice([0, 2000, rows]), 2000):
        data.id.write_direct_chunk((start, 0, 0), piece)
    _replace(file, "label")
    file.create_dataset("label", (rows,), "i8", chunks=(rows,), compression="gzip")


def link(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Links of every kind that lead out of the file or in circles."""
    key = rng.choice(["data", "label", "name", "mask", "normal"])
    _replace(file, key)
    secret = str(outside / "secret.h5")
    target = rng.choice(
        [
            h5py.ExternalLink(secret, "data"), h5py.ExternalLink("../outside/secret.h5", "/data"),
            h5py.ExternalLink(secret, key), h5py.SoftLink("/"), h5py.SoftLink("/label"), h5py.SoftLink(f"/{key}"),
            h5py.SoftLink("../../../etc/passwd"), h5py.SoftLink("nowhere"), h5py.ExternalLink("/etc/passwd", "/"),
            h5py.ExternalLink("/dev/zero", "/"), file["/"],
        ]
    )  # fmt: skip
    file[key] = target


def storage(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Values that lie in other files."""
    key = rng.choice(["data", "label"])
    _replace(file, key)
    dims = (COUNT, POINTS, 3) if key == "data" else (COUNT,)
    if rng.random() < 0.5:
        raw = rng.choice([str(outside / "secret.raw"), "../outside/secret.raw", "/dev/zero", "/etc/passwd"])
        file.create_dataset(key, dims, "f4", external=[(raw, 0, h5py.h5f.UNLIMITED)])
    else:
        layout = h5py.VirtualLayout(dims, "f4")
        layout[:] = h5py.VirtualSource(str(outside / "secret.h5"), "data", (COUNT, POINTS, 3))[
            (slice(None),) * 3 if key == "data" else (slice(None), 0, 0)
        ]
        file.create_virtual_dataset(key, layout)


def labels(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Gaps, numbers out of range, fractions."""
    _replace(file, "label")
    values = [rng.choice([0, 1, 2, 3, -1, 2**31, 2**62, 0.5, float("nan"), float("inf"), 1e300]) for _ in range(COUNT)]
    kind = rng.choice(["f8", "f4", "i8", "u8", "i1"])
    with np.errstate(all="ignore"):
        array = np.array(values, "f8").astype(kind)
    file["label"] = array.reshape(rng.choice([(COUNT,), (COUNT, 1), (1, COUNT)]))


def values(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Coordinates that are not finite, or too large to be squared."""
    bad = rng.choice([float("nan"), float("inf"), float("-inf"), 1e38, -1e30, 1e19, 1e-45, 0.0])
    if rng.random() < 0.2:
        file["data"][...] = bad
    else:
        file["data"][rng.randrange(COUNT), rng.randrange(POINTS), rng.randrange(3)] = bad


def keys(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Missing keys, extra keys, groups and named types in their place."""
    key = rng.choice(["data", "label", "name", "extra", "normal", "mask", "x" * 500, "a/b/c/d", "é"])
    _replace(file, key)
    kind = rng.randrange(5)
    if kind == 0:
        file.create_group(key)
    elif kind == 1:
        file[key] = np.dtype("f8")
    elif kind == 2:
        file[key] = h5py.Empty("f4")
    elif kind == 3:
        file[key] = rng.choice(TEXTS).replace("\x00", "").encode(errors="replace").decode()


def attribute(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Odd values of `up_axis`."""
    odd = ["x", "", "Y", b"\xff", np.bytes_("z"), 2, 1.5, True, [1, 2, 3], ["y", "z"], np.zeros(5000), "y" * 900]
    value = rng.choice(odd)
    file.attrs["up_axis"] = h5py.Empty("S1") if rng.random() < 0.1 else value


def names(file: h5py.File, rng: random.Random, outside: Path) -> None:
    """Names that are no text."""
    _replace(file, "name")
    pool = [b"a", b"", b"\xff\xfe", "é".encode(), b"x" * 300, b"a\nb", b"../../a"]
    file["name"] = np.array([rng.choice(pool) for _ in range(COUNT)], dtype="S300")


# Changes to the folder


def file_bytes(root: Path, rng: random.Random, outside: Path) -> None:
    """Damage to the HDF5 file itself; half of it where its structure lies."""
    content = (root / "a.h5").read_bytes()
    if rng.random() < 0.5:
        head = content[:2200]
        content = damage(head, rng) + content[2200:]
    else:
        content = damage(content, rng)
    (root / "a.h5").write_bytes(content)


def whole_file(root: Path, rng: random.Random, outside: Path) -> None:
    """Something else under its name."""
    path = root / "a.h5"
    path.unlink()
    kind = rng.randrange(7)
    if kind == 0:
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 7, 100, 5000])))
    elif kind == 1:
        path.write_text("not HDF5\n" * 100)
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to(outside / "secret.h5")
    elif kind == 4:
        path.symlink_to(path)
    elif kind == 5:
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + rng.randbytes(rng.choice([0, 8, 100, 3000])))


def lists(root: Path, rng: random.Random, outside: Path) -> None:
    """Entries that lead out of the folder, twice to the same file, or nowhere."""
    entries = [
        "../outside/secret.h5", str(outside / "secret.h5"), "/etc/passwd", "a.h5", "./a.h5", "b.h5", "", "..", ".", "~",
        "a.h5\x00", "C:\\x\\a.h5", "..\\outside\\secret.h5", "sub/../../outside/secret.h5", "x" * 5000, "é.h5",
        "folder", "out/secret.h5", "data/elsewhere/a.h5", "file:///etc/passwd",
    ]  # fmt: skip
    (root / "folder").mkdir()
    (root / "out").symlink_to(outside)
    chosen = [rng.choice(entries) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    (root / "train_files.txt").write_text("\n".join(chosen) + rng.choice(["", "\n", "\r\n"]), encoding="utf-8")


def texts(root: Path, rng: random.Random, outside: Path) -> None:
    """Lists and class names that are no text, empty, repeated, links or folders."""
    path = root / rng.choice(["shape_names.txt", "train_files.txt"])
    content = path.read_bytes()
    path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        path.write_bytes(damage(content, rng))
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        path.write_bytes(content * 3)
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.symlink_to(rng.choice([outside / "train_files.txt", Path("/etc/passwd"), path]))


def unreadable(root: Path, rng: random.Random, outside: Path) -> None:
    """A pipe in place of a file: reading it would wait for ever."""
    path = root / rng.choice(["a.h5", "train_files.txt", "shape_names.txt"])
    path.unlink()
    os.mkfifo(path)


IN_FILE: list[Callable] = [shape, dtype, huge, bomb, link, storage, labels, values, keys, attribute, names]
IN_FOLDER: list[Callable] = [*[file_bytes] * 8, whole_file, lists, lists, texts, unreadable]
CHANGES: list[Callable] = [*IN_FILE, link, storage, shape, dtype, *IN_FOLDER]
