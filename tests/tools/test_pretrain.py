"""Pre-training and what follows it on the command line: probes, pictures, reports, and tools that need a classifier."""

import csv
import json

import pytest
import torch

from s2d3d import load_checkpoint, load_model
from s2d3d.evaluation.probe import coordinate_statistics, linear_probe, model_features, random_encoder
from s2d3d.runs.trained import open_trained


def test_a_pre_training_ends_with_a_dense_model_and_a_table(pretrained):
    out = pretrained.process.stdout
    assert "before merge (sparse, eval mode)  reconstruction loss " in out and str(pretrained.merged) in out
    assert "epoch 1/2: loss 0." in pretrained.process.stderr and "test_loss" in pretrained.process.stderr
    assert load_checkpoint(pretrained.merged)["s2d"] is None
    with open(pretrained.folder.log) as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_train_takes_the_same_config_and_pretrain_no_other(call, pretrained, refuses, trained):
    again = call("train", "--resume", pretrained.folder.root)
    assert again.code == 0 and again.out == pretrained.process.stdout
    line = refuses("pretrain", trained.config)
    assert line.startswith(f"{trained.config}: task: is classify, a pre-training has task: pretrain, as configs/pret")


def test_probe_of_a_pre_training_by_hand(call, pretrained, tmp_path):
    output = tmp_path / "probe.json"
    result = call("linear_probe", "--checkpoint", pretrained.merged, "--features", "concat", "--output", output)
    assert result.code == 0, result.err
    found = json.loads(output.read_text())
    trained = open_trained(pretrained.merged, task="pretrain")
    train, test = (trained.dataset(split) for split in ("train", "test"))
    batches = [[part.batch(torch.arange(len(part)), augment=False)] for part in (train, test)]

    def score(model):
        parts = [model_features(model, part, device="cpu", kind="concat", progress=False) for part in batches]
        return linear_probe(*parts, progress=False).oa

    config = trained.config
    fresh = random_encoder(config.model.name, config.model.kwargs, train, seed=0, device=torch.device("cpu"))
    assert found["model"]["oa"] == pytest.approx(score(load_model(pretrained.merged)))
    assert found["random"]["oa"] == pytest.approx(score(fresh))
    (points, labels), (others, truth) = (part[0] for part in batches)
    features, rest = coordinate_statistics(points), coordinate_statistics(others)
    mean, deviation = features.mean(0), features.std(0, correction=0)
    parts = [(rows - mean) / deviation.clamp_min(1e-6) for rows in (features, rest)]
    expected = linear_probe((parts[0], labels), (parts[1], truth), progress=False).oa
    assert found["coordinates"]["oa"] == pytest.approx(expected)
    assert (found["model"]["num_features"], found["coordinates"]["num_features"], found["features"]) == (
        48,
        54,
        "concat",
    )
    assert result.out.splitlines()[0].startswith(
        f"{pretrained.merged}    48 features  OA {100 * found['model']['oa']:.2f} %"
    )
    assert result.out.splitlines()[1].startswith("random encoder")


def test_probe_reads_classifiers_and_names_bad_input(call, refuses, trained, pretrained, tmp_path):
    result = call("linear_probe", "--checkpoint", trained.merged, "eval.batch_size=32")
    assert result.code == 0 and "24 features" in result.out
    existing = tmp_path / "a.json"
    existing.touch()
    assert "exists already" in refuses("linear_probe", "--checkpoint", trained.merged, "--output", existing)
    assert "no such checkpoint" in refuses("linear_probe", "--checkpoint", tmp_path / "no.pt")
    assert "has no effect on a checkpoint" in refuses(
        "linear_probe", "--checkpoint", pretrained.merged, "train.epochs=1"
    )
    refuses("linear_probe", "--checkpoint", pretrained.merged, "--features", "cls", code=2)
    assert "eval.split: has no effect here" in refuses(
        "linear_probe", "--checkpoint", pretrained.merged, "eval.split=validation"
    )


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "--checkpoint", "{file}"),
        ("predict", "--checkpoint", "{file}", "cloud.xyz"),
        ("export", "--checkpoint", "{file}", "--output", "{folder}/a.onnx"),
        ("visualize", "--checkpoint", "{file}", "--output", "{folder}/a.png"),
        ("analyze", "{run}", "--output", "{folder}"),
    ],
    ids=lambda command: command[0],
)
def test_tools_for_classifiers_say_what_to_do_with_a_pre_training(command, refuses, pretrained, tmp_path):
    places = {"file": pretrained.merged, "folder": tmp_path, "run": pretrained.folder.root}
    line = refuses(*(part.format(**places) for part in command))
    assert "is a pre-training, it has no classes; fine-tune it by model.pretrained=" in line
    assert "tools/linear_probe.py" in line


def test_pictures_need_a_pre_training(refuses, trained, tmp_path):
    line = refuses(
        "visualize", "--checkpoint", trained.merged, "--kind", "reconstructions", "--output", tmp_path / "a.png"
    )
    assert line == f"{trained.merged}: is a classifier, a pre-training is needed, as tools/pretrain.py makes it"


def test_merge_takes_a_pre_training(call, pretrained, tmp_path):
    assert call("merge", "--checkpoint", pretrained.last, "--output", tmp_path / "merged.pt").code == 0
    merged, own = (load_checkpoint(path)["state_dict"] for path in (tmp_path / "merged.pt", pretrained.merged))
    norms = [key for key in own if "running" in key or "tracked" in key]
    assert merged.keys() == own.keys() and all(torch.equal(merged[key], own[key]) for key in own if key not in norms)


def test_a_picture_has_four_views_of_each_cloud(call, pretrained, tmp_path):
    result = call(
        "visualize", "--checkpoint", pretrained.merged, "--kind", "reconstructions", "--num-clouds", 2,
        "--output", tmp_path / "a.ply",
    )  # fmt: skip
    assert result.code == 0, result.err
    files = sorted(tmp_path.glob("a_*.ply"))
    sizes = [
        int(line.split()[-1]) for file in files for line in file.read_bytes().split(b"\n")[:12] if b"vertex" in line
    ]
    assert sizes == [128, 5 * 8, 12 * 8, 12 * 8] * 2, "all points; 5 of 12 groups; those with 7 predicted or true ones"


def test_the_report_shows_losses_and_reconstructions(call, pretrained, trained, tmp_path):
    page = tmp_path / "report.html"
    result = call(
        "report", pretrained.folder.root, trained.folder.root, "--output", page, "--plots", tmp_path / "plots"
    )
    assert result.code == 0, result.err
    assert {"training.png", "pretraining.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}
    text = page.read_text()
    data = json.loads(text.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    (made,) = data["rebuilt"]
    assert len(made["clouds"]) == 4 and [step for _, step in made["clouds"][0]["views"]] == [
        "input", "masked", "reconstructed", "original"
    ]  # fmt: skip
    assert len(data["runs"]) == 1, "the matrix is that of the classifier alone"
    metrics = json.loads(pretrained.folder.metrics.read_text())
    assert f"<td>{metrics[metrics['kept']]['loss']:.6f}</td>" in text and "reconstruction loss" in text
