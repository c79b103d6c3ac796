"""tools/predict.py: what it says of a file is what the model says of that shape in its data set."""

import json

import numpy as np
import pytest
import torch

from s2d3d import create_dataset, load_model
from s2d3d.datasets.files import read_cloud
from s2d3d.datasets.transforms import normalize_unit_sphere


def test_files_are_classified_as_in_the_evaluation(fork, trained, shapes_root, tmp_path):
    dataset = create_dataset("shapes", shapes_root, "test", num_points=128)
    points, _ = dataset.batch(torch.arange(6), augment=False)
    files = []
    for index, cloud in enumerate(points.numpy()):
        files.append(tmp_path / f"{index}{'.npy' if index % 2 else '.xyz'}")
        np.save(files[-1], 3 * cloud + 1) if index % 2 else np.savetxt(files[-1], 3 * cloud + 1, fmt="%.9g")
    process = fork("predict", "--checkpoint", trained.merged, *files, "--output", tmp_path / "out.json")
    assert (process.returncode, process.stderr) == (0, "")
    with torch.no_grad():  # the set stores float16, normalised up to its rounding; a file is normalised anew
        shares = load_model(trained.merged)(normalize_unit_sphere(points)).softmax(1)
    found = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert len({result["class"] for result in found}) > 1
    for result, file, share in zip(found, files, shares):
        assert result["file"] == str(file) and result["class"] == dataset.class_names[int(share.argmax())]
        ours = [result["probabilities"][name] for name in dataset.class_names]
        assert ours == pytest.approx(share.tolist(), abs=1e-5)
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


@pytest.fixture
def chair(shapes_root):
    """A test cloud of the set, (128, 3) float64."""
    points, _ = create_dataset("shapes", shapes_root, "test", num_points=128)[3]
    return points.double().numpy()


def classes(path):
    return {result["file"]: result for result in json.loads(path.read_text())["predictions"]}


def test_a_bad_file_does_not_stop_the_others(call, trained, chair, tmp_path):
    """Folders, links and single files; what cannot be read is named and the exit code says so."""
    folder, output = tmp_path / "mine", tmp_path / "out.json"
    folder.mkdir()
    np.save(folder / "a.npy", chair)
    (folder / "b.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 3\n")
    (folder / "c.xyz").symlink_to(tmp_path / "gone.xyz")
    np.savetxt(folder / "d.csv", chair, delimiter=",")
    result = call("predict", "--checkpoint", trained.merged, folder, tmp_path / "no.off", "--output", output)
    assert result.code == 1
    assert result.err.splitlines() == [
        f"error: {folder}/b.ply: is cut short: its header has no end_header",
        f"error: {folder}/c.xyz: no such file; name a file with points",
        f"error: {tmp_path}/no.off: no such file; name a file with points",
    ]
    found = classes(output)
    assert list(found) == [f"{folder}/a.npy", f"{folder}/d.csv"]
    assert found[f"{folder}/a.npy"]["probabilities"] == pytest.approx(
        found[f"{folder}/d.csv"]["probabilities"], abs=1e-6
    )
    lines = result.out.splitlines()
    assert [line.split(": ")[0] for line in lines[:2]] == list(found)
    assert lines[2:] == ["2 files classified, 3 not read; up axis z", f"written to {output}"]
    assert json.loads(output.read_text())["up_axis"] == "z"


def test_a_georeferenced_cloud_is_classified_as_at_the_origin(call, trained, chair, tmp_path):
    np.savetxt(tmp_path / "near.xyz", chair, fmt="%.6f")
    np.savetxt(tmp_path / "utm.xyz", chair + np.array([691_000, 5_334_000, 520]), fmt="%.6f")
    output = tmp_path / "out.json"
    files = (tmp_path / "near.xyz", tmp_path / "utm.xyz")
    assert call("predict", "--checkpoint", trained.merged, *files, "--output", output).code == 0
    near, far = (result["probabilities"] for result in classes(output).values())
    assert far == pytest.approx(near, abs=1e-4)


def test_fewer_points_than_in_training_are_used_and_said(call, trained, chair, tmp_path):
    for count in (64, 16, 15):
        np.save(tmp_path / f"{count}.npy", chair[:count])
    files = [tmp_path / f"{count}.npy" for count in (64, 16, 15)]
    result = call("predict", "--checkpoint", trained.merged, *files, "--output", tmp_path / "out.json")
    assert result.code == 1 and len(classes(tmp_path / "out.json")) == 2
    assert result.err.splitlines() == [
        f"{files[0]}: holds 64 points, the model takes 128; all are used",
        f"{files[1]}: holds 16 points, the model takes 128; all are used",
        f"error: {files[2]}: 15 points are fewer than the 16 that the model needs",
    ]
    model = load_model(trained.merged)
    points = torch.from_numpy(chair[:64]).float()
    points = points - points.mean(0)
    with torch.no_grad():
        expected = model((points / points.norm(dim=1).max())[None]).softmax(1).max()
    assert max(classes(tmp_path / "out.json")[str(files[0])]["probabilities"].values()) == pytest.approx(
        float(expected), abs=1e-4
    )


def test_points_that_are_missing_are_left_out_or_refused(call, trained, chair, tmp_path):
    np.save(tmp_path / "depth.npy", np.concatenate([chair, np.full((72, 3), np.nan)]))
    command = ("predict", "--checkpoint", trained.merged, tmp_path / "depth.npy")
    result = call(*command)
    assert result.code == 0
    assert result.err == f"{tmp_path}/depth.npy: 72 of 200 points are not finite and left out\n"
    result = call(*command, "--refuse-missing")
    assert (result.code, result.out) == (1, "")
    assert result.err == f"error: {tmp_path}/depth.npy: point 128 is not three finite numbers; remove it\n"


PLUGIN = """
import torch
from s2d3d import register_dataset
from s2d3d.datasets import PointCloudDataset

def read(root, split, *, num_points, transform=None, **_):
    points = torch.randn(24, 64, 3, generator=torch.Generator().manual_seed(int(split == "train")))
    points[12:, :, 2] *= 0.1
    options = dict(split=split, num_points=num_points, transform=transform)
    return PointCloudDataset(points, torch.tensor([0] * 12 + [1] * 12), ["ball", "plate"], **options)

register_dataset("hers", read)
"""


def test_a_process_without_the_plugin_predicts_with_her_checkpoint(fork, tmp_path):
    (tmp_path / "hers.py").write_text(PLUGIN)
    (tmp_path / "hers.yaml").write_text(
        f"output_dir: {tmp_path / 'run'}\nplugins: [hers.py]\n"
        "data: {name: hers, root: nowhere, num_points: 48}\n"
        "model: {name: point_bert_tiny, depth: 1, trans_dim: 24, num_heads: 2, num_group: 8, group_size: 8}\n"
        "s2d: {every: 1}\noptim: {warmup_epochs: 0}\ntrain: {epochs: 1, batch_size: 8}\n"
    )
    process = fork("train", tmp_path / "hers.yaml")
    assert process.returncode == 0, process.stderr
    (tmp_path / "hers.py").unlink()
    merged, cloud = tmp_path / "run" / "merged.pt", tmp_path / "cloud.xyz"
    cloud.write_text("".join(f"{x} {y} {(x * y) % 3}\n" for x in range(8) for y in range(8)))
    answers = tmp_path / "answers.json"
    process = fork("predict", "--checkpoint", merged, cloud, "--output", answers)
    assert (process.returncode, process.stderr) == (0, "")
    (found,) = json.loads(answers.read_text())["predictions"]
    with torch.no_grad():
        expected = load_model(merged)(read_cloud(cloud, 48)[None]).double().softmax(1)[0]
    assert found["probabilities"] == pytest.approx(dict(zip(["ball", "plate"], expected.tolist())), abs=1e-6)
    process = fork("evaluate", "--checkpoint", merged)
    assert process.returncode == 1 and "--plugin hers.py" in process.stderr and process.stderr.count("\n") == 1


def test_many_files_are_answered_as_each_alone(call, trained, chair, tmp_path):
    """In batches, in order, around a file that cannot be read and one of another size; prints of both are equal."""
    files = []
    for index in range(9):
        files.append(tmp_path / f"{index}.npy")
        turned = chair * (1 + 0.2 * np.sin(index + np.arange(3)))
        np.save(files[-1], turned[:70] if index == 4 else turned)
    files.insert(3, tmp_path / "gone.npy")
    together = call("predict", "--checkpoint", trained.merged, *files, "--output", tmp_path / "all.json")
    assert together.code == 1 and together.err.splitlines()[0].startswith(f"error: {files[3]}: no such file")
    found = classes(tmp_path / "all.json")
    assert list(found) == [str(file) for file in files if file.exists()]
    lines = []
    for file in files[1:6:2]:
        output = tmp_path / "one.json"
        alone = call("predict", "--checkpoint", trained.merged, file, "--output", output, "--force")
        if file.exists():
            lines.append(alone.out.splitlines()[0])
            assert found[str(file)]["probabilities"] == pytest.approx(
                classes(output)[str(file)]["probabilities"], abs=1e-6
            )
    assert set(lines) < set(together.out.splitlines()) and len(lines) == 2
