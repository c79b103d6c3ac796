"""--files: evaluate.py scores files whose folders name their classes, visualize.py draws any."""

import json

import numpy as np
import pytest
import torch

from s2d3d import create_dataset, load_model
from s2d3d.datasets.files import SUFFIXES
from s2d3d.datasets.transforms import normalize_unit_sphere

CUBE = [(x, y, z) for x in (0, 1) for y in (0, 2) for z in (0, 1)]
SQUARES = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
CLOUDS = (".npy", ".txt", ".xyz", ".ply", ".pcd")


@pytest.fixture
def labelled(shapes_root, tmp_path):
    """A test cloud in each format of clouds, and a box in each of meshes, in folders named after their classes."""
    dataset = create_dataset("shapes", shapes_root, "test", num_points=128)
    points, labels = dataset.batch(torch.arange(len(CLOUDS)), augment=False)
    for cloud, label, suffix in zip(points.double().numpy() * 3 + 1, labels.tolist(), CLOUDS):
        folder = tmp_path / "mine" / dataset.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        rows = "\n".join(" ".join(f"{value:.9g}" for value in point) for point in cloud) + "\n"
        head = {
            ".ply": "ply\nformat ascii 1.0\nelement vertex 128\nproperty float x\nproperty float y\nproperty float z\n"
            "end_header\n",
            ".pcd": "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 128\nHEIGHT 1\n"
            "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS 128\nDATA ascii\n",
        }
        path = folder / f"cloud{suffix}"
        np.save(path, cloud) if suffix == ".npy" else path.write_text(head.get(suffix, "") + rows)
    boxes = tmp_path / "mine" / "box"
    boxes.mkdir(exist_ok=True)
    corners = [" ".join(map(str, corner)) for corner in CUBE]
    faces = [" ".join(map(str, face)) for face in SQUARES]
    (boxes / "mesh.off").write_text("\n".join(["OFF8 6 0", *corners, *(f"4 {face}" for face in faces)]) + "\n")
    faces = [" ".join(str(index + 1) for index in face) for face in SQUARES]
    (boxes / "mesh.obj").write_text("\n".join([*(f"v {c}" for c in corners), *(f"f {f}" for f in faces)]) + "\n")
    return tmp_path / "mine", points, labels


def test_files_are_scored_as_the_same_clouds_of_a_data_set(call, trained, labelled, tmp_path):
    folder, points, labels = labelled
    output = tmp_path / "report.json"
    result = call("evaluate", "--checkpoint", trained.merged, "--files", folder, "--output", output)
    assert result.code == 0, result.err
    report = json.loads(output.read_text())
    assert report["num_samples"] == len(CLOUDS) + 2
    with torch.no_grad():
        guesses = load_model(trained.merged)(points).argmax(1)
    found = np.array(report["confusion"])
    names = report["class_names"]
    found[names.index("box")] = 0  # the two meshes are there too, and perhaps a cloud
    expected = np.zeros_like(found)
    for label, guess in zip(labels.tolist(), guesses.tolist()):
        expected[label, guess] += names[label] != "box"
    assert found.tolist() == expected.tolist() and expected.sum() >= 4
    again = call("evaluate", "--checkpoint", trained.merged, "--files", *sorted(folder.rglob("*.*")))
    assert again.out.splitlines()[-1] == result.out.splitlines()[-2], "meshes are sampled from a seed"


def test_files_without_labels_are_drawn_and_named(call, drawing, trained, labelled, tmp_path):
    folder, points, _ = labelled
    loose = tmp_path / "loose"
    loose.mkdir()
    for number, path in enumerate(sorted(folder.rglob("*.*"))):
        path.rename(loose / f"{number}{path.suffix}")
    output = tmp_path / "files.png"
    result = call("visualize", "--checkpoint", trained.merged, "--output", output, "--size", 32, "--files", loose)
    assert result.code == 0 and output.read_bytes().startswith(b"\x89PNG"), result.err
    *rows, last = result.out.splitlines()
    assert last == f"written to {output}" and len(rows) == len(CLOUDS) + 2
    with torch.no_grad():
        shares = load_model(trained.merged)(points).softmax(1)
    names = torch.load(trained.merged, weights_only=True)["class_names"]
    wanted = {f"{names[int(share.argmax())]}, {100 * float(share.max()):.0f} %" for share in shares}
    assert wanted <= {row.split(": ")[1] for row in rows}
    for kind in ("patches", "saliency", "corruptions"):
        result = call(
            "visualize", "--checkpoint", trained.merged, "--kind", kind, "--size", 16, "--output",
            tmp_path / f"{kind}.ply", "--files", loose / sorted(p.name for p in loose.iterdir())[0],
        )  # fmt: skip
        assert result.code == 0, result.err
    gallery = ("--config", trained.config, "--files", loose, "--output", tmp_path / "g.ply")
    assert call("visualize", *gallery).code == 0
    comments = {path.read_bytes()[:200].split(b"comment ")[1].split(b"\n")[0] for path in tmp_path.glob("g_*.ply")}
    assert comments == {path.name.encode() for path in loose.iterdir()}


def test_what_is_refused(refuses, trained, tmp_path):
    evaluate = ("evaluate", "--checkpoint", trained.merged)
    (tmp_path / "Downloads").mkdir()
    np.save(tmp_path / "Downloads" / "a.npy", np.zeros((200, 3)))
    line = refuses(*evaluate, "--files", tmp_path / "Downloads")
    assert line == (
        f"{tmp_path}/Downloads/a.npy: its folder 'Downloads' is none of the 12 classes of {trained.merged}; name "
        "folders after classes, or classify without labels: tools/predict.py"
    )
    (tmp_path / "empty").mkdir()
    line = refuses(*evaluate, "--files", tmp_path / "empty")
    assert line == f"{tmp_path}/empty: holds no file of {', '.join(SUFFIXES)}"
    assert refuses(*evaluate, "--up-axis", "y") == "--up-axis: is for --files only; that of a data set is data.up_axis"
    assert refuses(*evaluate, "--refuse-missing").startswith(
        "--refuse-missing: is for --files only; data sets leave out"
    )
    line = refuses(*evaluate, "data.up_axis=y", "--files", "any")
    assert line == "data.up_axis: has no effect with --files; use --up-axis"
    line = refuses("visualize", "--checkpoint", trained.merged, "--output", tmp_path / "a.png", "--files", "no.ply")
    assert line == "no.ply: no such file; name a file with points"
    cloud = tmp_path / "Downloads" / "a.npy"
    np.save(cloud, np.random.default_rng(0).normal(size=(200, 3)))
    line = refuses(
        "visualize", "--checkpoint", trained.merged, "--output", tmp_path / "a.png", "--files", cloud, "--num-clouds", 0
    )
    assert line.startswith("--num-clouds is 0, must be between 1 and")


def test_files_with_fewer_points_are_scored_with_what_they_have(call, trained, shapes_root, tmp_path):
    """Each cloud as the model sees it alone, with its own number of points, and that is said."""
    dataset = create_dataset("shapes", shapes_root, "test", num_points=128)
    points, labels = dataset.batch(torch.arange(6), augment=False)
    model, expected, names = load_model(trained.merged), [], dataset.class_names
    for place, (cloud, label) in enumerate(zip(points, labels.tolist())):
        few = cloud[: (128, 100, 60)[place % 3]].double().numpy()
        folder = tmp_path / "mine" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{place}.npy", few)
        with torch.no_grad():
            one = normalize_unit_sphere(torch.from_numpy(few).float()[None])
            expected.append((label, int(model(one).argmax())))
    output = tmp_path / "report.json"
    result = call("evaluate", "--checkpoint", trained.merged, "--files", tmp_path / "mine", "--output", output)
    assert result.code == 0 and result.err.count("points, the model takes 128; all are used") == 4
    content = json.loads(output.read_text())
    files = sorted((tmp_path / "mine").glob("*/*.npy"))
    right = {str(place): str(int(label == guess)) for place, (label, guess) in enumerate(expected)}
    assert content["correct"] == "".join(right[file.stem] for file in files), "in the order of the files"
    found = np.array(content["confusion"])
    wanted = np.zeros_like(found)
    for label, guess in expected:
        wanted[label, guess] += 1
    assert found.tolist() == wanted.tolist()
    np.save(folder / "tiny.npy", points[0, :4].double().numpy())
    result = call("evaluate", "--checkpoint", trained.merged, "--files", folder)
    assert result.code == 1 and "tiny.npy: 4 points are fewer than the 16 that the model needs" in result.err
