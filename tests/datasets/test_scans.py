"""Files in class folders as a data set: the clouds are those of an independent reading, kept and found again."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from s2d3d import create_dataset
from s2d3d.datasets import files, scans
from s2d3d.errors import InputError


def write(path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, points)
    elif path.suffix == ".off":
        path.write_text(f"OFF\n{len(points)} 0 0\n" + "\n".join(" ".join(map(repr, p)) for p in points.tolist()))
    else:
        np.savetxt(path, points, delimiter="," if path.suffix == ".csv" else " ")
    return points


@pytest.fixture
def clouds(tmp_path):
    """Two classes of six clouds of 40 to 90 points in four formats; return the folder and the points by path."""
    rng, root, points = np.random.default_rng(0), tmp_path / "scans", {}
    for name in ("ball", "rod"):
        for index in range(6):
            suffix = (".npy", ".xyz", ".off", ".csv")[index % 4]
            cloud = rng.normal(size=(40 + 10 * index, 3)) * ((1, 1, 1) if name == "ball" else (0.1, 0.1, 2))
            points[f"{name}/{index}{suffix}"] = write(root / name / f"{index}{suffix}", cloud + np.array([5, -3, 100]))
    return root, points


def unit_sphere(points):
    points = points - points.mean(axis=0)
    return points / np.linalg.norm(points, axis=1).max()


def test_the_clouds_are_those_of_the_files(clouds):
    root, points = clouds
    train, test = (create_dataset("files", root, split, num_points=40) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["ball", "rod"]
    assert sorted([*train.names, *test.names]) == sorted(points) and len(test) == 2
    for dataset in (train, test):
        for index, name in enumerate(dataset.names):
            assert dataset.labels[index] == dataset.class_names.index(name.split("/")[0])
            whole = unit_sphere(points[name])
            own = dataset.points[index].double().numpy()
            nearest = np.linalg.norm(own[:, None] - whole[None], axis=2).min(axis=1)
            assert nearest.max() < 1e-5, name
            assert len(np.unique(own, axis=0)) == min(len(whole), 48), "as many of them as there are, or are asked for"


def test_what_was_read_is_kept_until_a_file_changes(clouds, monkeypatch):
    root, points = clouds
    first = create_dataset("files", root, "train", num_points=40)
    read = []
    monkeypatch.setattr(scans, "read_stored", lambda path, *_: read.append(path))
    assert torch.equal(create_dataset("files", root, "train", num_points=40).points, first.points) and not read
    monkeypatch.undo()
    name = first.names[0]
    write(root / name, points[name] * (1, 2, 1))
    assert not torch.equal(create_dataset("files", root, "train", num_points=40).points[0], first.points[0])


def test_a_folder_that_cannot_be_written_uses_the_users_cache(clouds, tmp_path, monkeypatch):
    root, _ = clouds
    root.chmod(0o555)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        assert len(create_dataset("files", root, "train", num_points=40)) == 10
    finally:
        root.chmod(0o755)
    assert list((tmp_path / "cache" / "s2d3d").glob("files_*/train0.h5")) and not (root / ".fps_cache").exists()


def test_clouds_far_from_the_origin_keep_their_shape(clouds):
    root, points = clouds
    near = create_dataset("files", root, "train", num_points=40)
    for name, cloud in points.items():
        write(root / name, cloud + np.array([500_000, 5_400_000, 300]))
    far = create_dataset("files", root, "train", num_points=40)
    assert torch.allclose(near.points, far.points, atol=1e-5)


def test_up_axis_turns_the_clouds(clouds):
    root, _ = clouds
    z, y = (create_dataset("files", root, "test", num_points=40, up_axis=axis) for axis in ("z", "y"))
    x, up, depth = y.points.unbind(-1)
    assert torch.allclose(z.points, torch.stack([x, depth, -up], -1), atol=1e-6)


def test_short_clouds(clouds, caplog):
    root, _ = clouds  # 40, 50, ..., 90 points; 60 are asked for
    with caplog.at_level(logging.WARNING):
        repeated = create_dataset("files", root, "train", num_points=60)
    assert "4 of 12 files have fewer than 60 points; their points are repeated" in caplog.text
    assert len(repeated) == 10 and not repeated.skipped
    left = create_dataset("files", root, "train", num_points=60, short="skip")
    assert len(left) + len(create_dataset("files", root, "test", num_points=60, short="skip")) == 8
    assert len(left.skipped) == 4 and " points are fewer than data.num_points=60" in left.skipped[0]
    with pytest.raises(InputError, match=r"\d0 points are fewer than data\.num_points=60; lower it"):
        create_dataset("files", root, "train", num_points=60, short="error")


def test_unreadable_files_stop_or_are_named(clouds):
    root, _ = clouds
    (root / "ball" / "0.npy").write_bytes(b"not numpy")
    (root / "rod" / "few.xyz").write_text("0 0 0\n1 0 0\n0 1 0\n")
    with pytest.raises(
        InputError, match=r"(ball/0\.npy|rod/few\.xyz): .*; correct it or remove it, or set data\.skip_unreadable=true"
    ):
        create_dataset("files", root, "train", num_points=40)
    train = create_dataset("files", root, "train", num_points=40, skip_unreadable=True)
    assert sorted(line.split(": ")[0].removeprefix(f"{root}/") for line in train.skipped) == [
        "ball/0.npy",
        "rod/few.xyz",
    ]
    assert not {"ball/0.npy", "rod/few.xyz"} & set(train.names)
    for path in (root / "rod").glob("*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no file of class 'rod' is left to train"):
        create_dataset("files", root, "train", num_points=40, skip_unreadable=True)


def test_a_file_name_that_is_not_utf_8_is_named(clouds):
    root, _ = clouds
    os.rename(root / "ball" / "0.npy", os.fsencode(root / "ball") + b"/\xff.npy")
    with pytest.raises(
        InputError, match=r"ball/\\udcff\.npy: its name is not UTF-8; rename it; correct it or remove it"
    ):
        create_dataset("files", root, "train", num_points=40)
    train = create_dataset("files", root, "train", num_points=40, skip_unreadable=True)
    assert len(train.skipped) == 1 and "its name is not UTF-8" in train.skipped[0]


def test_a_large_set_stays_on_the_disk(clouds):
    root, _ = clouds
    whole = create_dataset("files", root, "train", num_points=40)
    streamed = create_dataset("files", root, "train", num_points=40, memory_budget_gb=1e-9)
    rows = torch.arange(len(whole))
    assert torch.equal(whole.batch(rows, augment=False)[0], streamed.batch(rows, augment=False)[0])


@pytest.mark.parametrize(
    "key, value",
    [("test_fraction", 0.0), ("test_fraction", 1.0), ("split_seed", -1), ("short", "skp"), ("num_points", 0)],
)
def test_values_out_of_range(clouds, key, value):
    with pytest.raises(InputError, match=key):
        create_dataset("files", clouds[0], "train", **{"num_points": 40, key: value})


# Normals and colours


def test_normals_and_colours_go_with_their_points(tmp_path):
    """Thinning, repeating and turning keep rows together."""
    rng, root = np.random.default_rng(0), tmp_path / "scans"
    for name in ("ball", "rod"):
        for index in range(4):
            points = rng.normal(size=(90 if index else 40, 3))
            points /= np.linalg.norm(points, axis=1, keepdims=True)
            write(root / name / f"{index}.npy", np.hstack([5 * points, points, np.abs(points)]))
    options = dict(num_points=50, channels="xyz+normal+rgb", up_axis="y", normalize=False)
    train = create_dataset("files", root, "train", **options)
    assert train.points.shape == (6, 60, 9) and train.channels == "xyz+normal+rgb"
    torch.testing.assert_close(train.points[..., 3:6], train.points[..., :3] / 5)
    torch.testing.assert_close(train.points[..., [6, 8, 7]], train.points[..., 3:6].abs())
    with pytest.raises(InputError, match=r"\.npy: holds no colours \(6 columns without names\), which .*; correct it"):
        create_dataset("files", root, "train", num_points=50, channels="xyz+rgb")


def test_normals_are_estimated_where_asked_for(clouds):
    root, _ = clouds
    options = dict(num_points=40, channels="xyz+normal")
    with pytest.raises(InputError, match=r"data\.estimate_normals=true"):
        create_dataset("files", root, "train", **options)
    train = create_dataset("files", root, "train", **options, estimate_normals=True)
    plain = create_dataset("files", root, "train", num_points=40)
    assert train.points[..., :3].equal(plain.points) and len(list((root / ".fps_cache").glob("files_*"))) == 2
    torch.testing.assert_close(train.points[..., 3:].norm(dim=-1), torch.ones(10, 48))
    with pytest.raises(InputError, match=r"estimate_normals needs data\.channels with normals .*, not xyz$"):
        create_dataset("files", root, "train", num_points=40, estimate_normals=True)


def test_what_is_kept_of_coordinates_has_the_name_that_it_had_before_channels():
    known = "Options(num_points=40, normalize=True, short='repeat', skip_unreadable=False)"
    assert scans.Options(40, True, "repeat", False).described() == known
    assert scans.Options(40, True, "repeat", False, "xyz+rgb").described() != known


def test_a_file_is_the_same_cloud_in_a_data_set_and_by_its_name(tmp_path):
    """Also a mesh, whose points are drawn, and a cloud of so many points that it is thinned first."""
    rng = np.random.default_rng(1)
    corners = "\n".join(" ".join(map(repr, row)) for row in (rng.normal(size=(12, 3)) * (1, 1, 3)).tolist())
    faces = "\n".join(f"3 {i} {(i + 1) % 12} {(i + 5) % 12}" for i in range(12))
    for name in ("box", "mug"):
        write(tmp_path / name / "few.npy", rng.normal(size=(40, 3)))
        write(tmp_path / name / "some.npy", rng.normal(size=(300, 3)))
        write(tmp_path / name / "many.npy", rng.normal(size=(files.MOST_POINTS + 5000, 3)))
        (tmp_path / name / "mesh.off").write_text(f"OFF\n12 12 0\n{corners}\n{faces}\n")
    for split in ("train", "test"):
        dataset = create_dataset("files", tmp_path, split, num_points=40, up_axis="y")
        for index, name in enumerate(dataset.names):
            own = files.read_cloud(tmp_path / name, 40, up_axis="y")
            found = dataset.batch(torch.tensor([index]), augment=False)[0][0]
            if name.endswith("few.npy"):  # its points keep their order
                found, own = found.sort(0).values, own.sort(0).values
            torch.testing.assert_close(found, own, rtol=0, atol=1e-6, msg=name)


def test_copies_between_the_splits_and_between_classes_are_said(clouds, caplog):
    root, _ = clouds
    tested = create_dataset("files", root, "test", num_points=40).names
    for name in tested:
        (root / name).with_name(f"copy_{Path(name).name}").write_bytes((root / name).read_bytes())
    (root / "rod" / f"ball{Path(tested[0]).suffix}").write_bytes((root / tested[0]).read_bytes())
    train, test = (create_dataset("files", root, split, num_points=40) for split in ("train", "test"))
    both = {*train.file_hashes["train"].values()} & {*train.file_hashes["test"].values()}
    said = [record.getMessage() for record in caplog.records]
    assert both and any(f"{root}: {len(both)} files to test are copies of files to train, the first" in t for t in said)
    assert any("1 files are copies of files of another class, the first" in text for text in said)
    assert test.count_trained(train.trained_files()) == 0, "what was in both then is no news"


def test_points_that_are_left_out_are_said_each_time(clouds, caplog):
    root, _ = clouds
    points = np.random.default_rng(0).random((90, 3))
    points[::2] = np.nan
    for name in ("a", "b"):
        np.save(root / "rod" / f"{name}.npy", points)
    for _ in range(2):
        caplog.clear()
        create_dataset("files", root, "train", num_points=40)
        said = [text for text in caplog.messages if "not finite" in text]
        assert len(said) == 1 and said[0].startswith(f"{root}: 2 of ")
        assert said[0].endswith(f"the first: {root}/rod/a.npy: 45 of 90 points are not finite and left out")


def test_the_place_of_what_is_kept_is_no_class(clouds):
    root, _ = clouds
    with pytest.raises(InputError, match=r"^data\.cache_dir: .* lies inside data\.root, where it would be a class"):
        create_dataset("files", root, "train", num_points=40, cache_dir=root / "cache")
    create_dataset("files", root, "train", num_points=40, cache_dir=root / ".cache")


def test_files_that_were_trained_on_are_counted_when_a_folder_has_grown(clouds):
    root, _ = clouds
    train, test = (create_dataset("files", root, split, num_points=40) for split in ("train", "test"))
    known = train.trained_files()
    assert len(known) == len(train) and test.count_trained(known) == 0
    for name in ("ball", "rod"):
        for index in range(6, 30):
            write(root / name / f"{index}.npy", np.random.default_rng(index).normal(size=(50, 3)))
    grown = create_dataset("files", root, "test", num_points=40)
    assert grown.count_trained(known) == len(set(grown.names) & set(train.names)) > 0


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damage_of_what_is_kept_is_told_as_such(clouds, damage):
    root, _ = clouds
    create_dataset("files", root, "train", num_points=40)
    (kept,) = (root / ".fps_cache").glob("files_*")
    file = kept / "train0.h5"
    file.write_bytes(file.read_bytes()[:500]) if damage == "cut" else file.unlink()
    text = f"{kept}: what was read from {root} is damaged; remove this folder, it is made anew"
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        create_dataset("files", root, "train", num_points=40)


@pytest.mark.skipif(os.name != "posix", reason="a forkserver")
def test_a_script_without_the_usual_guard_reads_in_several_processes(clouds, tmp_path):
    """Its processes ran the script again, and waited for the lock of the first."""
    root, _ = clouds
    script = tmp_path / "mine.py"
    script.write_text(
        "from s2d3d.datasets import create_dataset, scans\nscans._workers = lambda paths: 2\n"
        f"print('read', len(create_dataset('files', {str(root)!r}, 'train', num_points=40)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "read 10\n"), done.stderr
