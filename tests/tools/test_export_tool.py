"""tools/export.py: dense checkpoints become files, sparse ones only when asked to merge."""

import torch

from s2d3d import create_dataset, load_model
from s2d3d.export import write
from s2d3d.export.write import load_exported


def test_merged_and_sparse_checkpoints_give_the_same_file(call, trained, shapes_root, tmp_path):
    for name, source in (("merged", (trained.merged,)), ("sparse", (trained.last, "--merge"))):
        output = tmp_path / f"{name}.pt"
        result = call("export", "--checkpoint", *source, "--output", output, "--clouds", 20)
        assert result.code == 0 and "error" not in result.err, result.err
        first, whole, half, *_ = result.out.splitlines()
        assert first.startswith(f"written to {output}: torchscript, ") and first.endswith("free: batch and points")
        for line, count in ((whole, 128), (half, 64)):
            start = f"20 test clouds of shapes, {count} points: largest difference of a logit "
            assert line.startswith(start) and line.endswith("; the same class for 20 of 20"), line
    dataset = create_dataset("shapes", shapes_root, "test", num_points=128)
    points, _ = dataset.batch(torch.arange(len(dataset)), augment=False)
    expected = load_model(trained.merged)(points)
    for name in ("merged", "sparse"):
        exported = load_exported(tmp_path / f"{name}.pt")
        assert (exported(points) - expected).abs().max() < 1e-4
        assert exported.metadata["class_names"] == dataset.class_names
        assert (exported.metadata["num_points"], exported.metadata["normalize"]) == (128, "unit_sphere")


def test_without_the_data_set_it_compares_on_procedural_clouds_and_says_so(call, trained, tmp_path, monkeypatch):
    content = torch.load(trained.merged, weights_only=True)
    content["config"]["data"]["root"] = "gone"
    moved = tmp_path / "moved.pt"
    torch.save({key: value for key, value in content.items() if key != "checksums"}, moved)
    result = call("export", "--checkpoint", moved, "--output", tmp_path / "a.pt", "--clouds", 3)
    assert result.code == 0, result.err
    assert "3 procedural clouds (gone is not here; name it by data.root=DIR), 128 points: largest" in result.out
    missing = ("--output", tmp_path / "b.pt", "data.root=gone")
    assert call("export", "--checkpoint", moved, *missing).err.endswith(
        "its data lies in 'gone', as seen from where it was trained, and not here; say where by data.root=DIR\n"
    )


def test_a_file_that_computes_something_else_is_named(tool, trained, tmp_path, monkeypatch, capsys):
    export = tool("export")
    right = write.load_exported

    def wrong(path, threads=None):
        exported = right(path, threads=threads)
        run = exported._run
        exported._run = lambda points: run(points) + 1e-3
        return exported

    monkeypatch.setattr(write, "load_exported", wrong)
    output = tmp_path / "a.pt"
    assert export.main(["--checkpoint", str(trained.merged), "--output", str(output), "--clouds", "5"]) == 1
    assert capsys.readouterr().err == f"error: {output}: differs from PyTorch by more than 0.0001; do not use it\n"


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
    output = ("--output", tmp_path / "a.pt")
    assert refuses(*model, *output, "--clouds", 0) == "--clouds is 0, must be at least 1"
    assert refuses(*model, *output, "train.epochs=3").startswith("override 'train.epochs=3': has no effect")


def test_a_folder_in_the_layout_of_the_hub_is_a_checkpoint(call, refuses, trained, shapes_root, tmp_path):
    folder, cloud = tmp_path / "model", tmp_path / "cloud.xyz"
    cloud.write_text("".join("{} {} {}\n".format(*point) for point in torch.rand(200, 3).tolist()))
    result = call("export", "--checkpoint", trained.merged, "--format", "hub", "--output", folder)
    assert (result.code, result.err) == (0, "") and result.out.startswith(f"written to {folder}: weights, config.json")
    for name, rest in (("predict", [cloud]), ("evaluate", [f"data.root={shapes_root}"])):
        ours, theirs = (call(name, "--checkpoint", path, *rest) for path in (folder, trained.merged))
        assert ours.code == 0 and ours.out == theirs.out, name
    assert "The accuracy of this model is not known" not in (folder / "README.md").read_text()
    line = refuses("export", "--checkpoint", trained.merged, "--format", "hub", "--output", folder)
    assert line == f"{folder}/model.safetensors: exists already; choose another folder or pass --force (force=True)"
    new = ("--format", "hub", "--output", tmp_path / "new")
    line = refuses("export", "--checkpoint", trained.last, *new)
    assert line == f"{trained.last}: has experts, which only training needs; pass --merge to merge them"
    line = refuses("export", "--checkpoint", trained.merged, *new, "--num-points", 64)
    assert line == "--num-points: has no effect with --format hub; remove it"
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "name the file, such as" in refuses("predict", "--checkpoint", folder, cloud)
    (folder / "weights.safetensors").rename(folder / "model.safetensors")
    line = refuses("predict", "--checkpoint", folder / "model.safetensors", cloud)
    assert line.endswith(f"holds weights but no description by s2d3d; name its folder, {folder}")
