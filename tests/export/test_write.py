"""Exported files compute what the model computes, for other numbers of clouds and points than they were made with."""

import copy
import functools
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from s2d3d import EWA, MoFConfig, convert_to_mof_, create_dataset, create_model, export_model, merge_experts
from s2d3d.errors import InputError
from s2d3d.export.check import compare_exported
from s2d3d.export.write import FORMATS, fewest_points, load_exported
from s2d3d.prepare.shapes import make_shape

MODELS = {
    "point_bert_tiny": dict(trans_dim=48, depth=1, num_group=8),
    "point_bert_small": {},  # as it is
    "point_mae": dict(
        trans_dim=48, encoder_dims=48, depth=2, num_heads=2, num_group=16, group_size=16, encoder_width=16, init_std=0.1
    ),
    "point_transformer_tiny": dict(
        channels=(16, 32), depths=(0, 1), strides=(1, 8), num_neighbors=(8, 8), head_dims=(32,)
    ),
}  # fmt: skip
POINTS = dict.fromkeys(MODELS, 256) | {"point_bert_small": 1024}
UPDATES = dict.fromkeys(MODELS, 20) | {"point_bert_small": 6}
METADATA = {"class_names": ["a", "b", "c", "d"], "up_axis": "z", "normalize": "unit_sphere"}


def clouds(count, num_points):
    return torch.from_numpy(np.stack([make_shape(0, "test", index, num_points) for index in range(count)])).float()


@functools.cache
def training_data():
    """Four classes, 16 clouds of each: of the real set where there is one, procedural otherwise."""
    root = os.environ.get("S2D3D_MODELNET40")
    if not root:
        return clouds(4, 1024).repeat(16, 1, 1), torch.arange(64) % 4
    dataset = create_dataset("modelnet40", root, "train")
    labels = torch.as_tensor(dataset.labels)
    chosen = torch.cat([torch.nonzero(labels == label)[:16, 0] for label in range(4)]).reshape(4, 16).T.flatten()
    return dataset.batch(chosen, augment=False)


@functools.cache
def build(name):
    """A sparse model after some real updates with EWA, merged: BatchNorm has statistics, experts differ."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, **MODELS[name])
    convert_to_mof_(model, MoFConfig(num_experts=2, every=1, init="independent"))
    points, labels = training_data()
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=2e-3), []
    ewa = EWA(model, share_rate=0.1, total_steps=UPDATES[name])
    for step in range(UPDATES[name]):
        batch = torch.arange(16) + 16 * (step % 4)
        loss = torch.nn.functional.cross_entropy(model(points[batch, : POINTS[name]]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ewa.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), f"{name} has not learnt: {losses}"
    return merge_experts(model).eval()


@functools.cache
def onnx_file(name, folder):
    """Export to ONNX at the first call; it takes ten seconds and more."""
    return export_model(build(name), folder / f"{name}.onnx", num_points=POINTS[name], metadata=METADATA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


EACH = pytest.mark.parametrize(
    "name",
    ["point_bert_tiny"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("point_transformer_tiny", "point_bert_small", "point_mae")
    ],
)


@EACH
def test_onnx_equals_pytorch_for_any_batch_and_any_number_of_points(folder, name):
    model, exported = build(name), load_exported(onnx_file(name, folder), threads=1)
    least = fewest_points(model)
    assert exported.metadata["free_dimensions"] == ["batch", "points"] and exported.metadata["min_points"] == least
    for batch, num_points in ((1, 256), (5, 256), (3, least), (3, least + 13), (2, 1500)):
        assert compare_exported(model, exported, clouds(batch, num_points)).error.max() < 1e-4
    logits = exported(clouds(12, 256))
    assert (logits.amax(0) - logits.amin(0)).min() > 3e-3, "clouds differ by far more than the tolerance"
    with pytest.raises(InputError, match=rf"clouds of {least - 1} points: the exported model takes {least} or more"):
        exported(clouds(3, 300)[:, : least - 1])
    with pytest.raises(InputError, match=r"points have shape \(3, 300, 2\), the exported model takes \(B, N, 3\)"):
        exported(clouds(3, 300)[:, :, :2])


@pytest.mark.real_data
@EACH
def test_onnx_equals_pytorch_on_real_clouds(folder, modelnet40_root, name):
    dataset = create_dataset("modelnet40", modelnet40_root, "test")
    points, _ = dataset.batch(torch.arange(0, len(dataset), 40), augment=False)
    model, exported = build(name), load_exported(onnx_file(name, folder), threads=1)
    assert len(points) >= 50
    for num_points in (1024, 500):
        agreement = compare_exported(model, exported, points[:, :num_points])
        assert agreement.wrong == 0 and agreement.worst() < 1e-4 and agreement.same_class.all()
        assert int(agreement.tie.sum()) <= (3 if "transformer" in name else 1)


def test_a_tie_is_told_from_a_wrong_file():
    """The first centre has 8 neighbours, and a ninth point that is as far as the eighth; and a model that is off."""
    model = build("point_transformer_tiny")
    points = clouds(6, 256)
    cloud = points[3].double()
    distance = (cloud - cloud[0]).norm(dim=1)
    order = distance.argsort()
    eighth, ninth = order[7], order[8]
    cloud[ninth] = cloud[0] + (cloud[ninth] - cloud[0]) * distance[eighth] / distance[ninth]
    points[3] = cloud.float()
    jitter = 2.0**-23 * torch.randn(16, 256, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        change = (model(points[3] + jitter) - model(points[3:4])).abs().amax(1)
    assert change.max() > 1e-4 > 1e-5 > change.min(), "the logits depend on which of the two is a neighbour"
    nudged = points[3] + jitter[int(change.argmax())]

    def as_rounded_elsewhere(batch):
        return model(torch.where((batch == points[3]).all(2).all(1)[:, None, None], nudged, batch))

    agreement = compare_exported(model, as_rounded_elsewhere, points)
    assert float(agreement.error[3]) > 1e-4 and agreement.wrong == 0
    assert agreement.tie.tolist() == [False, False, False, True, False, False]
    assert "1 of these clouds holds a tie between points" in agreement.summary()
    off = compare_exported(model, lambda batch: model(batch) + 2e-4, points)
    assert off.wrong == 6 and not off.tie.any()
    lost = compare_exported(model, lambda batch: model(batch) * float("nan"), points)
    assert lost.wrong == 6 and lost.worst() == float("inf")


def test_metadata_and_the_model_itself_survive(folder):
    before = copy.deepcopy(build("point_bert_tiny").state_dict())
    metadata = load_exported(onnx_file("point_bert_tiny", folder)).metadata
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert (metadata["num_points"], metadata["num_classes"], metadata["in_channels"]) == (256, 4, 3)
    after = build("point_bert_tiny").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in after)


@pytest.mark.parametrize(
    "name, format",
    [("point_bert_tiny", "torchscript"), ("point_transformer_tiny", "torchscript")]
    + [
        pytest.param(name, format, marks=pytest.mark.slow)
        for name, format in (
            ("point_bert_small", "torchscript"),
            ("point_mae", "torchscript"),
            ("point_bert_tiny", "torch_export"),
            ("point_transformer_tiny", "torch_export"),
        )
    ],
)
def test_other_formats_equal_pytorch(tmp_path, name, format):
    model = build(name)
    path = export_model(model, tmp_path / f"m{FORMATS[format]}", format=format, num_points=64, metadata=METADATA)
    exported = load_exported(path)
    assert exported.metadata["class_names"] == METADATA["class_names"]
    assert compare_exported(model, exported, clouds(5, 64)).error.max() < 1e-4
    if "points" in exported.metadata["free_dimensions"]:
        assert compare_exported(model, exported, clouds(3, 100)).error.max() < 1e-4
    else:
        assert (name, format) == ("point_transformer_tiny", "torchscript")
        with pytest.raises(InputError, match="clouds of 100 points: the exported model takes exactly 64"):
            exported(clouds(3, 100))


class OwnModel(torch.nn.Module):
    """Without `fewest_points`: it says nothing about other numbers of points; one that goes by values has no graph."""

    def __init__(self, by_values):
        super().__init__()
        self.head, self.by_values = torch.nn.Linear(3, 4), by_values

    def forward(self, points):
        if points.shape[1] < 32:
            raise ValueError("too few points")
        if self.by_values and points.sum() > 1e9:
            points = points + 1
        return self.head(points.amax(1))


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_of_ones_own_is_exported_for_its_number_of_points(tmp_path, format):
    path = export_model(OwnModel(False), tmp_path / f"m{FORMATS[format]}", format=format, num_points=64)
    exported = load_exported(path)
    assert (exported.metadata["min_points"], exported.metadata["free_dimensions"]) == (64, ["batch"])
    with pytest.raises(InputError, match="64"):
        exported(torch.rand(2, 20, 3))


def test_a_model_that_has_no_graph_is_one_line(tmp_path):
    with pytest.raises(
        InputError, match=r"^OwnModel cannot be exported as torch_export: .*; correct its forward"
    ) as error:
        export_model(OwnModel(True), tmp_path / "m.pt2", format="torch_export", num_points=64)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_refusals(tmp_path, monkeypatch):
    path, model = tmp_path / "m.onnx", build("point_bert_tiny")
    sparse = create_model("point_bert_tiny", num_classes=4)
    convert_to_mof_(sparse)
    with pytest.raises(InputError, match="merge it first"):
        export_model(sparse, path)
    with pytest.raises(InputError, match="unknown format 'onyx'; did you mean 'onnx'"):
        export_model(model, path, format="onyx")
    with pytest.raises(InputError, match="clouds of 10 points do not pass through the model"):
        export_model(model, path, num_points=10)
    with pytest.raises(InputError, match=r"m\.txt: an exported model ends in one of \.onnx, \.pt, \.pt2"):
        load_exported(tmp_path / "m.txt")
    for suffix in FORMATS.values():
        with pytest.raises(InputError, match="no such file"):
            load_exported(tmp_path / f"none{suffix}")
        (tmp_path / f"bad{suffix}").write_bytes(b"no model")
        with pytest.raises(InputError, match=rf"bad\{suffix}: not a"):
            load_exported(tmp_path / f"bad{suffix}")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r'^ONNX needs onnx .*: pip install "s2d3d\[export\]"$'):
        export_model(model, path)
    assert not path.exists()


# The example: no torch


SQUARE = "4 2 0\n0 0 0\n2 0 0\n2 1 0\n0 1 0\n3 0 1 2\n3 0 2 3\n"
PLY_HEAD = (
    "ply\nformat {}\nelement vertex 1100\nproperty uchar red\nproperty float x\nproperty float y\nproperty float z\n"
    "end_header\n"
)


@pytest.fixture
def files(tmp_path):
    """One cloud of 1100 points in three encodings, and one mesh in two."""
    cloud = clouds(1, 1100)[0].numpy()
    np.save(tmp_path / "cloud.npy", cloud)
    rows = "".join(f"7 {x:.9g} {y:.9g} {z:.9g}\n" for x, y, z in cloud)
    (tmp_path / "ascii.ply").write_text(PLY_HEAD.format("ascii 1.0") + rows)
    packed = np.zeros(1100, np.dtype([("red", "u1"), ("p", ">f4", 3)]))
    packed["p"] = cloud
    (tmp_path / "binary.ply").write_bytes(PLY_HEAD.format("binary_big_endian 1.0").encode() + packed.tobytes())
    (tmp_path / "square.off").write_text("OFF" + SQUARE)
    vertices = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0]], "<f8").tobytes()
    head = "ply\nformat binary_little_endian 1.0\ncomment x\nelement vertex 4\n" + "".join(
        f"property double {axis}\n" for axis in "xyz"
    )
    face = bytes([4]) + np.array([0, 1, 2, 3], "<i4").tobytes()
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    (tmp_path / "square.ply").write_bytes(head.encode() + vertices + face)
    return cloud, {
        name: tmp_path / name for name in ("cloud.npy", "ascii.ply", "binary.ply", "square.off", "square.ply")
    }


def test_the_example_classifies_files_without_torch(folder, files, repository, tmp_path):
    from s2d3d.datasets.prefix import farthest_prefix
    from s2d3d.datasets.transforms import normalize_unit_sphere

    cloud, paths = files
    example = repository / "examples" / "serve_onnx.py"
    broken = tmp_path / "broken.ply"
    broken.write_bytes(paths["binary.ply"].read_bytes()[:500])
    empty = tmp_path / "empty.npy"
    empty.touch()
    program = "import sys, runpy; sys.modules.update(torch=None, open3d=None); sys.argv.pop(0); "
    process = subprocess.run(
        [sys.executable, "-c", program + "runpy.run_path(sys.argv[0], run_name='__main__')",
         example, onnx_file("point_bert_tiny", folder), empty, *paths.values(), broken],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    assert [line.rpartition(": ")[0] for line in process.stderr.splitlines()] == [f"error: {empty}", f"error: {broken}"]
    lines = dict(line.split(": ") for line in process.stdout.splitlines())

    def expected(points):
        with torch.no_grad():
            shares = build("point_bert_tiny")(points[None]).softmax(1)[0]
        return f"{METADATA['class_names'][int(shares.argmax())]} ({100 * float(shares.max()):.1f} %)"

    points = normalize_unit_sphere(torch.from_numpy(cloud)[None])
    thinned = points[0][farthest_prefix(points, POINTS["point_bert_tiny"])[0].long()]
    assert [lines[str(paths[name])] for name in ("cloud.npy", "ascii.ply", "binary.ply")] == [expected(thinned)] * 3
    square = runpy.run_path(str(example))["read_points"](paths["square.off"], POINTS["point_bert_tiny"])
    assert (square.min(0) >= 0).all() and (square.max(0) <= (2, 1, 0)).all() and np.ptp(square, 0)[0] > 1.9
    flat = normalize_unit_sphere(torch.from_numpy(square).float()[None])[0]
    assert lines[str(paths["square.off"])] == lines[str(paths["square.ply"])] == expected(flat)


def test_the_example_keeps_the_shape_of_clouds_far_from_the_origin(repository, tmp_path):
    example = runpy.run_path(str(repository / "examples" / "serve_onnx.py"))
    cloud = np.random.default_rng(0).normal(size=(200, 3)).round(6)
    metadata = {"num_points": 64, "normalize": "unit_sphere"}
    near = example["prepare"](cloud, metadata)
    far = cloud + np.array([691_000, 5_334_000, 520])
    np.save(tmp_path / "far.npy", far)
    found = example["prepare"](example["read_points"](tmp_path / "far.npy", 64), metadata)
    assert found.dtype == np.float32 and np.abs(found - near).max() < 1e-6
    for lost in (far.astype(np.float32), np.ones((200, 3))):
        with pytest.raises(ValueError, match="its shape is lost"):
            example["prepare"](lost, metadata)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.ply", b"ply\nformat ascii 1.0\nelement vertex 9\nproperty float x\nend_header\n1 2", "is cut short, 9"),
        ("huge.ply", b"ply\nformat ascii 1.0\nelement junk 1000000000000\nend_header\n1", "is cut short, 10000"),
        ("far.off", b"OFF 3 1 0 0 0 0 1 0 0 0 1 0 3 0 1 9", "names a vertex outside the 3"),
        ("below.off", b"OFF 3 1 0 0 0 0 1 0 0 0 1 0 3 0 1 -1", "names a vertex outside the 3"),
        ("cut.off", b"OFF 3 1 0 0 0 0 1 0 0 0 1 0 3 0 1", "is cut short"),
        ("flat.off", b"OFF 3 1 0 0 0 0 1 0 0 2 0 0 3 0 1 2", "area 0"),
        ("cloud.off", b"OFF 7 1 0 0 0 0 1 0 0 0 1 0 1 1 1 1 2 1 2 1 1 2 2 2 3 0 1 2", "corners of no face"),
        ("letter.off", b"OFF 8 1 0 0 0 0 3 0 0 3 1 0 1 1 0 1 2 0 3 2 0 3 3 0 0 3 0 8 0 1 2 3 4 5 6 7", "not convex"),
    ],
)  # fmt: skip
def test_the_example_refuses_files_that_contradict_themselves(repository, tmp_path, name, content, message):
    example = runpy.run_path(str(repository / "examples" / "serve_onnx.py"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        example["read_points"](tmp_path / name, 16)


def test_the_example_draws_no_point_outside_a_polygon_that_is_not_convex(repository, tmp_path):
    (tmp_path / "notch.off").write_text("OFF 5 1 0 0 0 0 3 0 0 1 1 0 1 2 0 0 3 0 5 1 2 3 4 0")
    example = runpy.run_path(str(repository / "examples" / "serve_onnx.py"))
    x, y, _ = example["read_points"](tmp_path / "notch.off", 500).T
    assert ((x <= 1) | (y <= (3 - x) / 2 + 1e-9)).all()


def test_the_example_names_a_model_that_it_cannot_use(repository, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    tensor = onnx.helper.make_tensor_value_info("points", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["points"], ["y"])], "g", [tensor], [
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    ])  # fmt: skip
    onnx.save(onnx.helper.make_model(graph, ir_version=10), tmp_path / "foreign.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    main = runpy.run_path(str(repository / "examples" / "serve_onnx.py"))["main"]
    for name, message in (
        ("none", "no such file"),
        ("bad", "not an ONNX file that this ONNX Runtime reads"),
        ("foreign", "does not say how many points it takes"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve_onnx.py", str(tmp_path / f"{name}.onnx"), "chair.ply"])
        with pytest.raises(SystemExit) as stopped:
            main()
        *_, last = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and f"{tmp_path}/{name}.onnx: {message}" in last


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"num_points": "x"},
        {"num_points": "[" * 100_000},
        {"num_points": "1e3"},
        {"num_points": "-5"},
        {"num_points": "true"},
        {"num_points": "1000000000000"},
        {"num_points": "null"},
        {"num_points": "128", "class_names": "{}"},
        {"num_points": "128", "class_names": "[]"},
        {"num_points": "128", "class_names": "[1, 2]"},
        {"num_points": "128", "class_names": '"box"'},
        {"num_points": "128", "up_axis": "w"},
        {"num_points": "128", "normalize": "x" * 1000},
    ],
    ids=lambda texts: str(texts)[:40],
)
def test_the_example_refuses_hostile_descriptions(repository, texts):
    read_metadata = runpy.run_path(str(repository / "examples" / "serve_onnx.py"))["read_metadata"]
    with pytest.raises((ValueError, RecursionError)) as caught:
        read_metadata(texts)
    assert isinstance(caught.value, RecursionError) or len(str(caught.value)) < 200
    good = {"num_points": "128", "class_names": '["box"]', "up_axis": "y", "normalize": "unit_sphere"}
    assert read_metadata(good) == {
        "num_points": 128,
        "class_names": ["box"],
        "up_axis": "y",
        "normalize": "unit_sphere",
    }


def test_the_example_refuses_what_is_no_array_of_points(repository, tmp_path):
    example = runpy.run_path(str(repository / "examples" / "serve_onnx.py"))
    records = np.zeros(5, [("x", "f4"), ("y", "f4"), ("z", "f4")])
    np.save(tmp_path / "records.npy", records)
    np.savez(tmp_path / "zip.npz", records)
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "short.npy").write_bytes((tmp_path / "records.npy").read_bytes()[:40])
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16)
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("records", "zip", "objects", "short", "header", "pipe"):
        with pytest.raises(example["DAMAGED"]):
            example["read_points"](tmp_path / f"{name}.npy", 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["point_bert_tiny", "point_transformer_tiny"])
def test_a_model_of_six_channels(tmp_path, name):
    """The ONNX file reads normals as PyTorch does, and refuses clouds without."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, in_channels=6, **MODELS[name])
    points = clouds(6, 128)
    both = torch.cat([points, torch.nn.functional.normalize(torch.randn(points.shape), dim=-1)], -1)
    for _ in range(5):
        model.train()(both)  # statistics of BatchNorm
    metadata = METADATA | {"channels": "xyz+normal"}
    path = export_model(model.eval(), tmp_path / "m.onnx", num_points=128, in_channels=6, metadata=metadata)
    exported = load_exported(path)
    assert exported.metadata["channels"] == "xyz+normal" and exported.metadata["in_channels"] == 6
    for part in (both, both[:2, :100]):
        assert compare_exported(model, exported, part).wrong == 0
    assert (exported(both) - exported(both.flip(-1))).abs().max() > 1e-3
    with pytest.raises(InputError, match=r"points have shape \(6, 128, 3\), the exported model takes \(B, N, 6\)"):
        exported(points)
