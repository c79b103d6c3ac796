"""predict and evaluate with an exported .onnx file: the answers of the model in PyTorch; one line for what is wrong."""

import json

import numpy as np
import pytest
from tiny_onnx import POINTS, Tiny, write_tiny_model

from s2d3d import create_dataset, evaluate
from s2d3d.config.data import build_test_loader
from s2d3d.config.load import load_config
from s2d3d.datasets.files import read_cloud
from s2d3d.prepare.shapes import make_shape


@pytest.fixture
def shapes(shapes_root):
    return create_dataset("shapes", shapes_root, "test", num_points=POINTS)


@pytest.fixture
def model(tmp_path, shapes, trained):
    """The file, with the sections of a config that tools/export.py writes."""
    config = load_config(trained.config).to_dict()
    data = {key: value for key, value in config["data"].items() if key not in ("root", "cache_dir", "allow_links")}
    path = tmp_path / "tiny.onnx"
    write_tiny_model(path, shapes.class_names, config={"seed": 3, "data": data, "eval": config["eval"]})
    return path


def test_predict_gives_the_answers_of_the_network(call, model, shapes, tmp_path):
    files = [tmp_path / f"{index}.npy" for index in range(5)]
    for index, path in enumerate(files):
        np.save(path, 3 * make_shape(1, "test", index, 90 if index else 40) + 7)
    output = tmp_path / "said.json"
    result = call("predict", "--checkpoint", model, *files, "--output", output)
    assert result.code == 0 and "holds 40 points, the model takes 64; all are used" in result.err
    network, said = Tiny(12), json.loads(output.read_text())["predictions"]
    for path, entry in zip(files, said, strict=True):
        shares = network(read_cloud(path, POINTS, least=16)[None]).softmax(1)[0].tolist()
        assert entry["probabilities"] == pytest.approx(dict(zip(shapes.class_names, shares)), abs=1e-5)
    assert len({entry["class"] for entry in said}) > 1


@pytest.mark.parametrize("votes", [1, 3])
def test_evaluate_scores_it_as_the_network(call, model, shapes, shapes_root, trained, tmp_path, votes):
    output = tmp_path / "report.json"
    result = call(
        "evaluate", "--checkpoint", model, f"data.root={shapes_root}", "--votes", votes, "--output", output
    )  # fmt: skip
    assert result.code == 0, result.err
    loader = build_test_loader(shapes, load_config(trained.config).data, batch_size=64, seed=3)
    expected = evaluate(Tiny(12), loader, device="cpu", votes=votes, progress=False)
    found = json.loads(output.read_text())
    assert found["confusion"] == expected.confusion and found["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert found["votes"] == votes and 0 < sum(map(bool, map(sum, zip(*found["confusion"])))) > 1


def test_what_is_missing_or_wrong_is_one_line(refuses, model, shapes, shapes_root, tmp_path):
    line = refuses("evaluate", "--checkpoint", model)
    assert line == f"{model}: an exported model does not say where its data set lies; add data.root=DIR"
    cloud = tmp_path / "a.xyz"
    cloud.write_text("0 0 1\n" * 3)
    line = refuses("predict", "--checkpoint", model, cloud, "--device", "cuda")
    assert line == f"device 'cuda': {model} is run by ONNX Runtime on the CPU; use device cpu or auto"
    bare = tmp_path / "bare.onnx"
    write_tiny_model(bare, shapes.class_names, class_names=None, min_points=None)
    line = refuses("predict", "--checkpoint", bare, cloud)
    assert line == f"{bare}: its metadata lack class_names, min_points; write it with tools/export.py"
    for key, value in (("num_points", -3), ("normalize", "cube"), ("in_channels", 6), ("class_names", [3])):
        write_tiny_model(bare, shapes.class_names, **{key: value})
        line = refuses("predict", "--checkpoint", bare, cloud)
        assert line == f"{bare}: its {key} is not one that can be used here; write it with tools/export.py"
    write_tiny_model(bare, shapes.class_names, class_names=["one", "two"])
    line = refuses("evaluate", "--checkpoint", bare, "data.name=shapes", f"data.root={shapes_root}")
    assert "was trained on 2 classes, this set has 12" in line
    cloud.write_text("".join(f"{x} {y} 1\n" for x in range(9) for y in range(9)))
    line = refuses("predict", "--checkpoint", bare, cloud)
    assert line == f"{bare}: gives numbers of shape (1, 12), not one for each of 2 classes"
    bare.write_bytes(model.read_bytes()[:200])
    line = refuses("predict", "--checkpoint", bare, cloud)
    assert line.startswith(f"{bare}: not an ONNX file that this ONNX Runtime reads (")


@pytest.mark.slow
def test_a_trained_checkpoint_and_its_export_say_the_same(call, trained, shapes_root, tmp_path):
    exported = tmp_path / "model.onnx"
    assert call("export", "--checkpoint", trained.merged, "--output", exported, "--clouds", 4).code == 0
    cloud = tmp_path / "chair.npy"
    np.save(cloud, make_shape(5, "test", 2, 500))
    said = []
    for number, (path, more) in enumerate(((trained.merged, ()), (exported, (f"data.root={shapes_root}",)))):
        answer, report = tmp_path / f"answer{number}.json", tmp_path / f"report{number}.json"
        assert call("predict", "--checkpoint", path, cloud, "--output", answer).code == 0
        assert call("evaluate", "--checkpoint", path, *more, "--output", report).code == 0
        said.append((json.loads(answer.read_text())["predictions"][0], json.loads(report.read_text())))
    (ours, our_report), (theirs, their_report) = said
    assert ours["class"] == theirs["class"] and ours["probabilities"] == pytest.approx(
        theirs["probabilities"], abs=1e-4
    )
    assert our_report["confusion"] == their_report["confusion"]


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "--output", "m.pt"],
        ["export", "--output", "m.pt"],
        ["visualize", "--output", "m.png"],
        ["linear_probe"],
    ],
)
def test_commands_that_need_a_checkpoint_say_so(refuses, model, command):
    tool, *rest = command
    line = refuses(tool, "--checkpoint", model, *rest)
    assert line == f"{model}: is an exported program, not a checkpoint; name merged.pt of the run, or weights"


def test_a_training_cannot_begin_with_an_export(refuses, model, trained, tmp_path):
    line = refuses("train", trained.config, f"model.pretrained={model}", f"output_dir={tmp_path}/run")
    assert line == f"{model}: is an exported program, not a checkpoint; name merged.pt of the run, or weights"
