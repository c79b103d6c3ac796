"""Exported files compute what the model computes, for other numbers of clouds and points than they were made with."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch

from s2d3d import MoFConfig, convert_to_mof_, create_dataset, create_model, export_model, merge_experts
from s2d3d.datasets.shapes import make_shape
from s2d3d.errors import InputError
from s2d3d.export import FORMATS, export_error, load_exported

TINY = {
    "point_bert_tiny": dict(trans_dim=48, depth=2, num_group=16),
    "point_mae": dict(
        trans_dim=48, encoder_dims=48, depth=2, num_heads=2, num_group=16, group_size=16, encoder_width=16, init_std=0.1
    ),
    "point_transformer_tiny": dict(
        channels=(16, 32), depths=(0, 1), strides=(1, 8), num_neighbors=(8, 8), head_dims=(32,)
    ),
}  # fmt: skip
METADATA = {"class_names": ["a", "b", "c", "d"], "up_axis": "z", "normalize": "unit_sphere"}


def clouds(count, num_points):
    return torch.from_numpy(np.stack([make_shape(0, "test", index, num_points) for index in range(count)])).float()


def build(name):
    """A sparse model that has been used in training mode, merged: BatchNorm has statistics, experts differ."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, **TINY[name])
    convert_to_mof_(model, MoFConfig(num_experts=2, every=1, init="independent"))
    with torch.no_grad():
        for _ in range(3):
            model.train()(clouds(8, 256))
    return merge_experts(model).eval()


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in TINY}


@pytest.fixture(scope="module")
def onnx_file(models, tmp_path_factory):
    """Export to ONNX at the first call; it takes ten seconds and more."""

    @functools.cache
    def export(name):
        path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
        return export_model(models[name], path, num_points=256, metadata=METADATA)

    return export


EACH = pytest.mark.parametrize(
    "name", [name if name == "point_bert_tiny" else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)


@EACH
def test_onnx_equals_pytorch_for_any_batch_and_where_possible_any_number_of_points(models, onnx_file, name):
    exported = load_exported(onnx_file(name), threads=1)
    free = exported.metadata["free_dimensions"]
    assert free == (["batch"] if "transformer" in name else ["batch", "points"])
    for batch in (1, 5):
        assert export_error(models[name], exported, clouds(batch, 256)).max() < 1e-4
    logits = exported(clouds(12, 256))
    assert (logits.amax(0) - logits.amin(0)).min() > 3e-3, "clouds differ by far more than the tolerance"
    if "points" in free:
        for num_points in (64, 300):
            assert export_error(models[name], exported, clouds(3, num_points)).max() < 1e-4
    else:
        with pytest.raises(Exception, match="invalid dimensions"):
            exported(clouds(3, 300))


@pytest.mark.real_data
@EACH
def test_onnx_equals_pytorch_on_real_clouds(models, onnx_file, modelnet40_root, name):
    dataset = create_dataset("modelnet40", modelnet40_root, "test")
    points, _ = dataset.batch(torch.arange(0, len(dataset), 40), augment=False)
    points = points[:, :256] if "transformer" in name else points
    exported = load_exported(onnx_file(name), threads=1)
    assert len(points) >= 50 and export_error(models[name], exported, points).max() < 1e-4


def test_metadata_and_the_model_itself_survive(models, onnx_file):
    metadata = load_exported(onnx_file("point_bert_tiny")).metadata
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert (metadata["num_points"], metadata["num_classes"], metadata["in_channels"]) == (256, 4, 3)
    fresh = build("point_bert_tiny").state_dict()
    kept = models["point_bert_tiny"].state_dict()
    assert kept.keys() == fresh.keys() and all(torch.equal(kept[key], fresh[key]) for key in kept)


@pytest.mark.parametrize(
    "name, format",
    [(name, "torchscript") for name in TINY]
    + [pytest.param("point_bert_tiny", "torch_export", marks=pytest.mark.slow)],
)
def test_other_formats_equal_pytorch(models, tmp_path, name, format):
    path = export_model(models[name], tmp_path / f"m{FORMATS[format]}", format=format, num_points=64, metadata=METADATA)
    exported = load_exported(path)
    assert exported.metadata["class_names"] == METADATA["class_names"]
    assert export_error(models[name], exported, clouds(5, 64)).max() < 1e-4
    if "points" in exported.metadata["free_dimensions"]:
        assert export_error(models[name], exported, clouds(3, 100)).max() < 1e-4


def test_refusals(models, tmp_path, monkeypatch):
    path, model = tmp_path / "m.onnx", models["point_bert_tiny"]
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
    with pytest.raises(InputError, match="needs the package onnx; install it with: pip install onnx onnxruntime"):
        export_model(model, path)
    assert not path.exists()


# The example: no torch


SQUARE = "4 2 0\n0 0 0\n2 0 0\n2 1 0\n0 1 0\n3 0 1 2\n3 0 2 3\n"
PLY_HEAD = (
    "ply\nformat {}\nelement vertex 300\nproperty uchar red\nproperty float x\nproperty float y\nproperty float z\n"
    "end_header\n"
)


@pytest.fixture
def files(tmp_path):
    """One cloud of 300 points in three encodings, and one mesh in two."""
    cloud = clouds(1, 300)[0].numpy()
    np.save(tmp_path / "cloud.npy", cloud)
    rows = "".join(f"7 {x:.9g} {y:.9g} {z:.9g}\n" for x, y, z in cloud)
    (tmp_path / "ascii.ply").write_text(PLY_HEAD.format("ascii 1.0") + rows)
    packed = np.zeros(300, np.dtype([("red", "u1"), ("p", ">f4", 3)]))
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


def test_the_example_classifies_files_without_torch(models, onnx_file, files, repository, tmp_path):
    from s2d3d.datasets.prefix import farthest_prefix
    from s2d3d.datasets.transforms import normalize_unit_sphere

    cloud, paths = files
    broken = tmp_path / "broken.ply"
    broken.write_bytes(paths["binary.ply"].read_bytes()[:500])
    program = "import sys, runpy; sys.modules.update(torch=None, open3d=None); sys.argv.pop(0); "
    process = subprocess.run(
        [sys.executable, "-c", program + "runpy.run_path(sys.argv[0], run_name='__main__')",
         repository / "examples" / "serve_onnx.py", onnx_file("point_bert_tiny"), *paths.values(), broken],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 1 and process.stderr.startswith(f"error: {broken}: "), process.stderr
    assert process.stderr.count("\n") == 1
    lines = dict(line.split(": ") for line in process.stdout.splitlines())

    points = normalize_unit_sphere(torch.from_numpy(cloud)[None])
    points = points[0][farthest_prefix(points, 256)[0].long()][None]
    with torch.no_grad():
        shares = models["point_bert_tiny"](points).softmax(1)[0]
    expected = f"{METADATA['class_names'][int(shares.argmax())]} ({100 * float(shares.max()):.1f} %)"
    assert [lines[str(paths[name])] for name in ("cloud.npy", "ascii.ply", "binary.ply")] == [expected] * 3
    assert lines[str(paths["square.off"])] == lines[str(paths["square.ply"])] != expected
