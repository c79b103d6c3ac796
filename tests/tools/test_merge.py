"""tools/merge.py: its file is the merged model of the run, and one line for each mistake."""

import shutil

import pytest
import torch

from s2d3d import create_model, is_sparse, load_checkpoint, load_model, save_checkpoint


def test_process_gives_exactly_the_merged_model_of_the_run(fork, trained, tmp_path):
    output = tmp_path / "dense.pt"
    process = fork("merge", "--checkpoint", trained.last, "--output", output)
    assert (process.returncode, process.stderr) == (0, "")
    ours, theirs, sparse = (load_checkpoint(path) for path in (output, trained.merged, trained.last))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    assert {key: ours[key] for key in ours if key != "state_dict"} == {
        key: theirs[key] for key in theirs if key != "state_dict"
    }, "and no training state"

    # The file fits a model that never heard of experts; they differed, so that the mean is no single one of them.
    dense = create_model("point_bert_tiny", num_classes=12, **ours["model"]["kwargs"])
    dense.load_state_dict(ours["state_dict"], strict=True)
    experts = sparse["state_dict"]["blocks.blocks.1.mlp.fc1.weight"]
    merged = ours["state_dict"]["blocks.blocks.1.mlp.fc1.weight"]
    assert all(not torch.equal(expert.t(), merged) for expert in experts)
    torch.testing.assert_close(merged, experts.mean(0).t(), atol=1e-7, rtol=1e-6)

    before, after = (sum(p.numel() for p in load_model(path).parameters()) for path in (trained.last, output))
    assert process.stdout.splitlines() == [
        f"point_bert_tiny: {before:,} parameters with experts, {after:,} merged", f"written to {output}",
    ]  # fmt: skip
    assert not is_sparse(load_model(output))


def test_process_refuses_a_dense_checkpoint(fork, trained, tmp_path):
    process = fork("merge", "--checkpoint", trained.merged, "--output", tmp_path / "dense.pt")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        f"error: {trained.merged}: is dense, a sparse checkpoint is needed, such as checkpoints/last.pt of an S2D run\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_the_output(call, refuses, trained, tmp_path):
    output = tmp_path / "dense.pt"
    output.write_text("mine")
    line = refuses("merge", "--checkpoint", trained.last, "--output", output)
    assert line == f"{output}: exists already; choose another output or pass --force"
    assert call("merge", "--checkpoint", trained.last, "--output", output, "--force").code == 0
    assert load_checkpoint(output)["s2d"] is None


@pytest.mark.parametrize("missing", ["--checkpoint", "--output"])
def test_wrong_arguments_exit_with_2(refuses, missing):
    arguments = {"--checkpoint": "a.pt", "--output": "b.pt"}
    del arguments[missing]
    line = refuses("merge", *(text for pair in arguments.items() for text in pair), code=2)
    assert line == f"the following arguments are required: {missing}; see merge.py --help"


@pytest.mark.parametrize("name", ["merge", "apply_ewa"])
def test_outputs_that_cannot_be(refuses, trained, unwritable, tmp_path, name):
    """apply_ewa.py writes as merge.py does."""
    (tmp_path / "file").write_text("mine")
    own = shutil.copy(trained.last, tmp_path / "own.pt")
    (tmp_path / "link.pt").symlink_to(own)
    for output, message in {
        "": "--output: is empty; name a file",
        tmp_path: f"{tmp_path}: is a folder; name a file, such as {tmp_path}/FILE",
        tmp_path / "no" / "out.pt": f"{tmp_path}/no/out.pt: folder {tmp_path}/no does not exist; create it first",
        tmp_path / "file" / "out.pt": f"{tmp_path}/file: is a file, a folder is needed here; choose another place",
        unwritable / "out.pt": f"{unwritable}: cannot be written to (",
        own: f"{own}: is what is read; choose another output",
        tmp_path / "link.pt": f"{tmp_path}/link.pt: is what is read; choose another output",
    }.items():
        rate = ["--share-rate", 0.3] if name == "apply_ewa" else []
        assert refuses(name, "--checkpoint", own, "--output", output, "--force", *rate).startswith(message)


def test_broken_checkpoints(refuses, broken_checkpoint, tmp_path):
    path, message = broken_checkpoint
    line = refuses("merge", "--checkpoint", path, "--output", tmp_path / "dense.pt")
    assert line.startswith(f"{path}: ") and (message or f"is a folder; name the file, such as {path}/merged.pt") in line


def test_weights_that_are_not_finite(refuses, trained, tmp_path):
    payload = load_checkpoint(trained.last)
    payload["state_dict"]["blocks.blocks.1.mlp.fc2.bias"][2, 3] = float("nan")
    path = save_checkpoint(tmp_path / "diverged.pt", payload)
    line = refuses("merge", "--checkpoint", path, "--output", tmp_path / "dense.pt")
    assert line == (
        f"{path}: merging 'blocks.blocks.1.mlp' gives non-finite weights in fc2.bias: the training has diverged"
    )


def test_safetensors_are_the_same_model(call, trained, tmp_path):
    output = tmp_path / "dense.safetensors"
    assert call("merge", "--checkpoint", trained.last, "--output", output).code == 0
    ours, theirs = load_checkpoint(output), load_checkpoint(trained.merged)
    assert ours["class_names"] == theirs["class_names"] and ours["config"] == theirs["config"]
    points = torch.rand(2, 128, 3)
    assert torch.equal(load_model(output)(points), load_model(trained.merged)(points))
