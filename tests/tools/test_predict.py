"""tools/predict.py: what it says of a file is what the model says of that shape in its data set."""

import json

import numpy as np
import pytest
import torch

from s2d3d import create_dataset, load_model


def test_files_are_classified_as_in_the_evaluation(fork, trained, shapes_root, tmp_path):
    dataset = create_dataset("shapes", shapes_root, "test", num_points=128)
    points, _ = dataset.batch(torch.arange(6), augment=False)
    files = []
    for index, cloud in enumerate(points.numpy()):
        files.append(tmp_path / f"{index}{'.npy' if index % 2 else '.xyz'}")
        np.save(files[-1], 3 * cloud + 1) if index % 2 else np.savetxt(files[-1], 3 * cloud + 1, fmt="%.9g")
    process = fork("predict", "--checkpoint", trained.merged, *files, "--output", tmp_path / "out.json")
    assert (process.returncode, process.stderr) == (0, "")
    with torch.no_grad():
        shares = load_model(trained.merged)(points).softmax(1)
    found = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert len({result["class"] for result in found}) > 1
    for result, file, share in zip(found, files, shares):
        assert result["file"] == str(file) and result["class"] == dataset.class_names[int(share.argmax())]
        ours = [result["probabilities"][name] for name in dataset.class_names]
        assert ours == pytest.approx(share.tolist(), abs=1e-4)
    line = process.stdout.splitlines()[0]
    assert (
        line.startswith(f"{files[0]}: {found[0]['class']} {100 * max(shares[0].tolist()):.1f} %")
        and line.count("%") == 3
    )


def test_what_it_refuses(refuses, trained, tmp_path):
    line = refuses("predict", "--checkpoint", trained.merged, tmp_path / "no.ply")
    assert line == f"{tmp_path}/no.ply: no such file; name a file with points"
    assert refuses("predict", "--checkpoint", tmp_path / "no.pt", "a.ply").startswith(
        f"{tmp_path}/no.pt: no such checkpoint"
    )
    assert refuses("predict", "--checkpoint", trained.merged, "a.ply", "--top", 0) == "--top is 0, must be at least 1"
    assert refuses("predict", "--checkpoint", trained.merged, code=2).startswith(
        "the following arguments are required: FILE"
    )
