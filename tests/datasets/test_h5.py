import errno
import fcntl
import os
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2d3d.datasets import h5_checks
from s2d3d.datasets.h5 import inspect_h5, read_h5, read_rows, write_h5
from s2d3d.errors import InputError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.h5"


@pytest.fixture
def write(path, clouds):
    """Write a raw file with h5py, so that the reader is not tested against our own writer only."""

    def make(attrs=None, **datasets):
        content = {"data": clouds(4, 8), "label": np.arange(4) % 3, **datasets}
        with h5py.File(path, "w") as file:
            for key, value in content.items():
                if value is not None:
                    file[key] = value
            file.attrs.update(attrs or {})
        return path

    return make


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_points_keep_their_values_and_float16_its_type(write, clouds, dtype):
    data = clouds(4, 8).astype(dtype)
    points = read_h5(write(data=data)).points
    assert points.dtype == (np.float16 if dtype == np.float16 else np.float32)
    np.testing.assert_array_equal(points, data.astype(points.dtype))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u8", ">i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("num_classes", [None, 3, 100_000])
@pytest.mark.filterwarnings("error")
def test_labels_of_every_shape_and_type_become_int64(write, shape, dtype, num_classes):
    label = read_h5(write(label=np.array([2, 0, 1, 2]).reshape(shape).astype(dtype)), num_classes=num_classes).label
    assert label.dtype == np.int64 and label.tolist() == [2, 0, 1, 2]


def test_optional_datasets(write, clouds):
    normal, mask = clouds(4, 8, seed=5), np.arange(32).reshape(4, 8) % 2
    full = read_h5(write(normal=normal, mask=mask, name=np.array([b"a", b"b", b"c", "ü".encode()]), faceId=np.zeros(7)))
    np.testing.assert_array_equal(full.normal, normal)
    np.testing.assert_array_equal(full.mask, mask)
    assert full.names == ["a", "b", "c", "ü"]
    bare = read_h5(write())
    assert bare.names is bare.normal is bare.mask is bare.up_axis is None


def test_variable_length_names(write):
    assert read_h5(write(name=["one", "two", "three", "four"])).names == ["one", "two", "three", "four"]


@pytest.mark.parametrize("value", ["y", "z", np.bytes_("y")])
def test_up_axis_attribute(write, value):
    assert read_h5(write(attrs={"up_axis": value})).up_axis == (value if isinstance(value, str) else "y")


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        (dict(label=None), ["dataset 'label' missing, found ['data']", "data/README.md"]),
        (dict(data=None), ["dataset 'data' missing, found ['label']"]),
        (dict(data=np.zeros((4, 8))), ["'data'", "(4, 8)", "(shapes, points, 3)"]),
        (dict(data=np.zeros((4, 8, 6))), ["'data'", "(4, 8, 6)"]),
        (dict(data=np.zeros((0, 8, 3)), label=np.zeros(0, int)), ["'data'", "empty"]),
        (dict(data=np.zeros((4, 0, 3))), ["'data'", "empty"]),
        (dict(data=np.zeros((4, 8, 3), int)), ["'data'", "int64", "float32"]),
        (dict(data=[[["a"] * 3] * 8] * 4), ["'data'", "dtype"]),
        (dict(label=np.arange(3)), ["'label' has 3 entries", "4 shapes"]),
        (dict(label=np.zeros((4, 2), int)), ["'label'", "(4, 2)"]),
        (dict(label=np.zeros((1, 4), int)), ["'label'", "(1, 4)"]),
        (dict(label=np.array([b"a"] * 4)), ["'label'", "integer"]),
        (dict(label=np.ones(4, bool)), ["'label'", "bool"]),
        (dict(label=np.array([0, 1, 3, 0])), ["'label' holds 3 in sample 2", "[0, 3)"]),
        (dict(label=np.array([0, -1, 0, 0])), ["'label' holds -1 in sample 1"]),
        (dict(label=np.array([0, 2**63, 0, 0], np.uint64)), ["'label' holds 9223372036854775808 in sample 1"]),
        (dict(label=np.array([0, 0.5, 1, 1])), ["'label' holds 0.5 in sample 1", "whole"]),
        (dict(label=np.array([0, 1, 1, np.nan])), ["'label' holds nan in sample 3"]),
        (dict(name=np.array([b"a"] * 3)), ["'name'", "4 strings"]),
        (dict(name=np.arange(4)), ["'name'", "4 strings"]),
        (dict(name=np.array([b"a", b"b", b"c", b"\xff"])), ["'name'", "UTF-8"]),
        (dict(normal=np.zeros((4, 7, 3))), ["'normal'", "(4, 7, 3)", "(4, 8, 3)"]),
        (dict(mask=np.zeros((4, 9))), ["'mask'", "(4, 9)", "(4, 8)"]),
        (dict(mask=np.full((4, 8), np.nan)), ["'mask'", "NaN"]),
        (dict(attrs={"up_axis": "x"}), ["attribute 'up_axis'", "'x'"]),
        (dict(attrs={"up_axis": 2}), ["attribute 'up_axis'", "2"]),
    ],
)
def test_what_is_wrong_is_named_on_one_line(write, datasets, words):
    path = write(**datasets)
    with pytest.raises(InputError) as caught:
        read_h5(path, num_classes=3)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_sample_that_is_not_finite_is_named(write, clouds, bad, dtype):
    points = clouds(4, 8, dtype)
    points[2, 5, 1] = bad
    with pytest.raises(InputError, match="'data' holds NaN or infinity in sample 2"):
        read_h5(write(data=points))


def test_infinities_that_cancel_and_overflowing_float64_are_found(write, clouds):
    points = clouds(4, 8)
    points[1, 0, 0], points[1, 0, 1] = np.inf, -np.inf
    with pytest.raises(InputError, match="sample 1"):
        read_h5(write(data=points))
    with pytest.raises(InputError, match="sample 0"):
        read_h5(write(data=np.full((4, 8, 3), 1e300)))


def test_large_finite_values_are_not_taken_for_infinity(write):
    assert np.isfinite(read_h5(write(data=np.full((4, 8, 3), 60000, np.float16))).points).all()


def test_a_foreign_file_a_truncated_one_and_none_at_all(write, path, tmp_path):
    whole = write().read_bytes()
    for content in (b"", b"not hdf5", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.h5: not an HDF5 file, truncated or damaged"):
            read_h5(path)
    with pytest.raises(InputError, match="no such file"):
        read_h5(tmp_path / "absent.h5")


def test_links_groups_and_outside_storage_are_refused(write, path, tmp_path, clouds):
    write()
    os.rename(path, tmp_path / "other.h5")
    for link in (h5py.ExternalLink(str(tmp_path / "other.h5"), "data"), h5py.SoftLink("/elsewhere")):
        with h5py.File(path, "w") as file:
            file["elsewhere"], file["label"], file["data"] = clouds(4, 8), np.zeros(4, int), link
        with pytest.raises(InputError, match="'data' is a link"):
            read_h5(path)
    with h5py.File(path, "w") as file:
        file.create_group("data")
    with pytest.raises(InputError, match="'data' is a group"):
        read_h5(path)
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (4, 8, 3), "f4", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
    with pytest.raises(InputError, match="values in other files"):
        read_h5(path)
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((4, 8, 3), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "data", (4, 8, 3))
        file.create_virtual_dataset("data", layout)
    with pytest.raises(InputError, match="values in other files"):
        read_h5(path)


def test_a_huge_declared_shape_is_refused_before_it_is_read(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (10**9, 1024, 3), "f4", chunks=(1, 1024, 3))
    with pytest.raises(InputError, match="declares shape"):
        read_h5(path)
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (10**6, 1024, 3), "f4", chunks=(1, 1024, 3))
    with pytest.raises(InputError, match="next to nothing"):
        read_h5(path)


def test_a_dataset_may_take_the_bytes_of_the_limit_and_no_more(write, monkeypatch):
    monkeypatch.setattr(h5_checks, "MAX_BYTES", 4 * 8 * 3 * 4)
    assert len(read_h5(write()).points) == 4
    monkeypatch.setattr(h5_checks, "MAX_BYTES", 383)
    with pytest.raises(InputError, match="above 383 bytes"):
        read_h5(write())


@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_is_an_input_error_or_harmless(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "damaged.h5"
    points = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)
    write_h5(path, points, [0, 1, 2, 0], names=list("abcd"), normal=points, up_axis="y")
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(content)
    try:
        assert np.isfinite(read_h5(path, num_classes=3).points).all()
    except InputError as error:
        assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_write_then_read(path, clouds, dtype):
    points, normal, mask = clouds(5, 8, dtype), clouds(5, 8, dtype, seed=1), np.arange(40).reshape(5, 8)
    write_h5(path, points, [0, 2, 1, 1, 0], names=list("abcdé"), normal=normal, mask=mask, up_axis="y")
    back = read_h5(path, num_classes=3)
    for expected, got in ((points, back.points), (normal, back.normal), (mask, back.mask)):
        np.testing.assert_array_equal(expected, got)
    assert back.points.dtype == dtype
    assert (back.label.tolist(), back.names, back.up_axis) == ([0, 2, 1, 1, 0], list("abcdé"), "y")
    small = read_h5(path, extras=False)
    assert small.normal is small.mask is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, clouds):
    write_h5(path, clouds(2, 8), [0, 1])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_h5(path, clouds(2, 8), [0, 1], mask=np.array([object()]))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_write_refuses_an_unknown_axis(path, clouds):
    with pytest.raises(InputError, match="up_axis is 'x'"):
        write_h5(path, clouds(1, 8), [0], up_axis="x")
    assert not path.exists()


def test_a_full_disk_is_an_error_that_names_the_file(path, clouds):
    """A limit on the size of files stands for the disk; HDF5's own writer loses such errors, or crashes."""
    write_h5(path, clouds(2, 8), [0, 1])
    before = path.read_bytes()
    child = os.fork()
    if not child:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            write_h5(path, clouds(400, 64), [0] * 400)
        except OSError as error:
            code = 0 if error.filename == str(path) and "cannot be written" in error.strerror else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# Why a file cannot be opened


def test_a_file_that_another_program_writes_is_not_called_damaged(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["data"], file["label"] = np.ones((2, 8, 3), np.float32), [0, 1]
        file.swmr_mode = True
        file.flush()
        (tmp_path / "b.h5").write_bytes(path.read_bytes())  # as a program that was killed leaves it
    with pytest.raises(InputError, match=r"b\.h5: another program is writing it, or ended before it closed it; wait"):
        read_h5(tmp_path / "b.h5")


def test_a_file_that_is_locked_is_read(tmp_path):
    """Reading takes no lock: some file systems have none, and a reader elsewhere holds one for no harm."""
    path = tmp_path / "a.h5"
    write_h5(path, np.ones((2, 8, 3), np.float32), [0, 1])
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            h5py.File(path, "r", locking=True)
        assert read_h5(path).label.tolist() == [0, 1]


def test_a_file_without_permission_says_so(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    write_h5(path, np.ones((2, 8, 3), np.float32), [0, 1])
    real = Path.open

    def refused(self, *arguments, **options):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InputError, match=r"a\.h5: cannot be read \(Permission denied\); change its permissions"):
        read_h5(path)


def test_channels_stand_behind_the_points(write, clouds):
    data, normal = clouds(4, 8), clouds(4, 8, seed=5)
    rgb = np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    unit = normal / np.linalg.norm(normal, axis=2, keepdims=True)
    path = write(data=data, normal=normal, rgb=rgb)
    for channels, expected in (
        ("xyz", [data]), ("xyz+normal", [data, unit]), ("xyz+rgb", [data, rgb / 255]),
        ("xyz+normal+rgb", [data, unit, rgb / 255]),
    ):  # fmt: skip
        found = read_h5(path, channels=channels, extras=False)
        assert found.points.dtype == np.float32 and found.normal is None
        np.testing.assert_allclose(found.points, np.concatenate(expected, 2), rtol=1e-6, atol=1e-7)
        layout = inspect_h5(path, channels=channels)
        assert layout.shape == found.points.shape
        np.testing.assert_array_equal(read_rows(layout, 1, 3), found.points[1:3])
    np.testing.assert_array_equal(read_h5(path).rgb, rgb)
    write_h5(path, data, [0] * 4, rgb=rgb)
    assert read_h5(path).rgb.dtype == np.uint8


@pytest.mark.parametrize(
    ("channels", "datasets", "text"),
    [
        ("xyz+normal", {}, r"holds no normals \(no dataset 'normal'\), which data.channels=xyz\+normal needs; set "
         r"data.channels=xyz for a training, add them with: prepare_data.py modelnet40 --from DIR --estimate-normals"),
        ("xyz+normal+rgb", {"normal": np.ones((4, 8, 3))}, r"holds no colours \(no dataset 'rgb'\), which .*; set "
         r"data.channels=xyz\+normal for a training, or use other files$"),
        ("xyz+normal", {"normal": np.ones((4, 7, 3))}, r"dataset 'normal' is \(4, 7, 3\) float64, must be"),
        ("xyz+normal", {"normal": np.full((4, 8, 3), np.nan)}, "normal 0, 0 is not three finite numbers"),
        ("xyz+rgb", {"rgb": np.full((4, 8, 3), 3.0)}, r"colours hold 3, must be in \[0, 1\]"),
        ("xyz+rgb", {"rgb": np.full((4, 8, 3), 3)}, r"dataset 'rgb' is \(4, 8, 3\) int64, must be"),
    ],
)  # fmt: skip
def test_missing_and_wrong_channels_are_one_line(write, channels, datasets, text):
    path = write(**datasets)
    for read in (read_h5, lambda file, channels: read_rows(inspect_h5(file, channels=channels), 0, 4)):
        with pytest.raises(InputError, match=f"^{path}: .*{text}"):
            read(path, channels=channels)
