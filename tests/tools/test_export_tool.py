"""tools/export.py: dense checkpoints become files, sparse ones only when asked to merge."""

import torch

from s2d3d import create_dataset, load_model
from s2d3d.export import load_exported


def test_merged_and_sparse_checkpoints_give_the_same_file(fork, trained, shapes_root, tmp_path):
    results = {}
    for name, source in (("merged", (trained.merged,)), ("sparse", (trained.last, "--merge"))):
        output = tmp_path / f"{name}.pt"
        latency = ("--latency", "--rounds", 2) if name == "merged" else ()
        process = fork("export", "--checkpoint", *source, "--output", output, *latency)
        assert process.returncode == 0 and "error" not in process.stderr, process.stderr
        assert (
            process.stdout.startswith(f"written to {output}: torchscript, ")
            and "free: batch and points" in process.stdout
        )
        results[name] = process.stdout
    for name in ("checkpoint", "fresh dense", "BatchNorm folded", "exported"):
        assert results["merged"].count(f"| {name} ") == 2
    assert "| exported" not in results["sparse"]
    dataset = create_dataset("shapes", shapes_root, "test", num_points=128)
    points, _ = dataset.batch(torch.arange(len(dataset)), augment=False)
    expected = load_model(trained.merged)(points)
    for name in results:
        exported = load_exported(tmp_path / f"{name}.pt")
        assert (exported(points) - expected).abs().max() < 1e-4
        assert exported.metadata["class_names"] == dataset.class_names
        assert (exported.metadata["num_points"], exported.metadata["normalize"]) == (128, "unit_sphere")


def test_what_it_refuses(refuses, trained, tmp_path):
    model = ("export", "--checkpoint", trained.merged)
    line = refuses("export", "--checkpoint", trained.last, "--output", tmp_path / "a.onnx")
    assert line == f"{trained.last}: has experts, which only training needs; pass --merge to merge them"
    line = refuses(*model, "--output", tmp_path / "a.bin")
    assert line == f"--output {tmp_path}/a.bin: the name must end in .onnx, .pt, .pt2"
    line = refuses(*model, "--output", tmp_path / "a.pt", "--format", "onnx")
    assert line == f"--output {tmp_path}/a.pt: the name must end in .onnx"
    assert refuses(*model, "--output", tmp_path / "a.pt", "--num-points", 0) == "--num-points is 0, must be at least 1"
    line = refuses(*model, "--output", tmp_path / "a.pt", "--num-points", 4)
    assert line.startswith(
        "clouds of 4 points do not pass through the model: 4 points per cloud are too few for num_group"
    )
    assert (
        refuses(*model, "--output", trained.merged, "--force")
        == f"{trained.merged}: is what is read; choose another output"
    )
