"""tools/evaluate.py: the numbers of the run, before and after merging, and one line for each mistake."""

import json
import shutil

import pytest

from s2d3d import load_checkpoint, save_checkpoint


@pytest.fixture
def report(call, tmp_path):
    """Evaluate; return stdout and what the JSON holds."""

    def run(checkpoint, *arguments):
        output = tmp_path / "report.json"
        result = call("evaluate", "--checkpoint", checkpoint, "--output", output, "--force", *arguments)
        assert (result.code, result.err) == (0, "")
        assert result.out.endswith(f"written to {output}\n")
        return result.out, json.loads(output.read_text())

    return run


def test_process_gives_the_numbers_of_the_run(fork, trained, tmp_path):
    output = tmp_path / "report.json"
    process = fork("evaluate", "--checkpoint", trained.last, "--output", output)
    assert (process.returncode, process.stderr) == (0, "")
    metrics = json.loads(trained.folder.metrics.read_text())
    content = json.loads(output.read_text())
    assert content.pop("checkpoint") == str(trained.last)
    assert content == metrics["sparse"]
    assert set(content) == {
        "oa", "macc", "loss", "per_class", "confusion", "class_names", "num_samples", "votes", "correct",
    }  # fmt: skip

    # The table is the confusion matrix of the file.
    lines = process.stdout.splitlines()
    assert len(lines) == 1 + 12 + 1 + 2 + 12 + 1 + 2
    for line, name, row in zip(lines[1:13], content["class_names"], content["confusion"]):
        words = line.split()
        correct = row[content["class_names"].index(name)]
        assert words[:4] == [name, str(sum(row)), str(correct), f"{100 * content['per_class'][name]:.1f}"]
        assert content["per_class"][name] == correct / sum(row)
        wrong = {other: count for other, count in zip(content["class_names"], row) if other != name and count}
        if wrong:
            assert (
                words[5] in wrong and words[6] == f"({max(wrong.values())})" and wrong[words[5]] == max(wrong.values())
            )
        else:
            assert len(words) == 5
    assert content["num_samples"] == sum(map(sum, content["confusion"])) == 36
    assert content["oa"] == sum(content["confusion"][index][index] for index in range(12)) / 36
    assert content["macc"] == pytest.approx(sum(content["per_class"].values()) / 12)
    assert lines[14].startswith("confusion counts, rows: true class")
    counts = [[int(word.replace(".", "0")) for word in line.split()[2:]] for line in lines[16:28]]
    assert counts == content["confusion"]
    assert lines[29] == f"OA {100 * content['oa']:.2f} %, mAcc {100 * content['macc']:.2f} % (36 samples)"


def test_process_refuses_a_missing_checkpoint(fork, tmp_path):
    process = fork("evaluate", "--checkpoint", tmp_path / "no.pt", "--output", tmp_path / "report.json")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"error: {tmp_path}/no.pt: no such checkpoint file\n" and list(tmp_path.iterdir()) == []


def test_sparse_and_merged_give_identical_numbers_and_those_of_the_run(report, trained):
    (sparse_text, sparse), (merged_text, merged) = report(trained.last), report(trained.merged)
    assert sparse_text == merged_text
    assert sparse.pop("checkpoint") != merged.pop("checkpoint")
    assert sparse == merged == json.loads(trained.folder.metrics.read_text())["merged"]


def test_voting_is_repeatable_and_differs_from_the_plain_pass(report, trained):
    options = ["data.augment.scale=[0.8, 1.25]", "data.augment.shift=0.1"]
    _, plain = report(trained.merged, *options)
    text, voted = report(trained.merged, "--votes", "3", *options)
    assert report(trained.merged, "--votes", "3", *options) == (text, voted)
    assert report(trained.merged, "eval.votes=3", *options)[1] == voted
    assert (plain["votes"], voted["votes"]) == (1, 3) and "36 samples, 3 votes" in text
    assert voted["loss"] != plain["loss"]
    assert report(trained.merged, "--votes", "3", "seed=1", *options)[1]["loss"] != voted["loss"]
    assert report(trained.merged, "--votes", "1", "eval.votes=3")[1]["votes"] == 1


def test_overrides(report, trained, data_copy):
    _, plain = report(trained.merged)
    assert report(trained.merged, f"data.root={data_copy}")[1] == plain
    _, small = report(trained.merged, "eval.batch_size=5", "log.progress=false")
    assert small["confusion"] == plain["confusion"] and small["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert report(trained.merged, "data.num_points=64", f"data.root={data_copy}")[1]["loss"] != plain["loss"]


def test_a_closed_pipe_ends_quietly(tool, trained, monkeypatch, capfd):
    """As in `evaluate.py ... | head -1`."""
    import os
    import sys

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert tool("evaluate").main(["--checkpoint", str(trained.merged)]) == 141
    assert capfd.readouterr().err == ""


# Mistakes


@pytest.mark.parametrize("votes", ["0", "-3"])
def test_votes_out_of_range(refuses, trained, tmp_path, votes):
    arguments = ["--checkpoint", trained.last, f"--votes={votes}", "--output", tmp_path / "report.json"]
    assert refuses("evaluate", *arguments) == f"--votes is {votes}, must be at least 1"


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "xpu", "cpu:1", "cuda:-1", "cuda:x", "", "CPU"])
def test_unknown_device(refuses, trained, name):
    line = refuses("evaluate", "--checkpoint", trained.last, f"--device={name}")
    assert line == f"device '{name}' is unknown; use auto, cpu, cuda or cuda:N"


def test_a_gpu_that_is_not_there(refuses, trained, no_gpu):
    line = refuses("evaluate", "--checkpoint", trained.last, "--device", "cuda")
    assert line == "device 'cuda': this machine has 0 CUDA devices; use device cpu or auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --checkpoint; see evaluate.py --help"),
        (
            ["--checkpoint", "a.pt", "--votes", "many"],
            "argument --votes: invalid int value: 'many'; see evaluate.py --help",
        ),
        (["--checkpoint", "a.pt", "--merged"], "unrecognized arguments: --merged; see evaluate.py --help"),
    ],
)
def test_wrong_arguments_exit_with_2(refuses, arguments, message):
    assert refuses("evaluate", *arguments, code=2) == message


@pytest.mark.parametrize(
    "override",
    [
        "model.depth=4",
        "s2d.kind=none",
        "optim.lr=1",
        "train.device=cpu",
        "output_dir=x",
        "eval.recalibrate_batchnorm=true",
    ],
)
def test_overrides_that_would_be_ignored(refuses, trained, override):
    line = refuses("evaluate", "--checkpoint", trained.last, override)
    known = "data.*, eval.batch_size, eval.votes, log.*, seed"
    assert line == f"override '{override}': has no effect on a checkpoint; what can be replaced here is {known}"


def test_a_validation_part_is_not_taken_for_the_test_split(refuses, trained):
    line = refuses("evaluate", "--checkpoint", trained.last, "eval.split=validation")
    assert line == ("eval.split: has no effect here, the test split is scored; training scores a validation part")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.num_pints=64", "data.num_pints: unknown key; did you mean 'num_points'?"),
        ("date.root=x", "date: unknown key; did you mean 'data'?"),
        ("eval.batch_size=zero", "eval.batch_size: must be a whole number, got 'zero'"),
        ("x", "expected section.key=value"),
    ],
)
def test_bad_overrides(refuses, trained, override, message):
    line = refuses("evaluate", "--checkpoint", trained.last, override)
    assert line.startswith(f"override '{override}': {message}")


def test_more_points_than_stored(refuses, trained, shapes_root):
    line = refuses("evaluate", "--checkpoint", trained.last, "data.num_points=129")
    assert line.startswith(f"{shapes_root}: 128 points stored for each shape, num_points asks for 129; lower")


def test_outputs_that_cannot_be(refuses, trained, unwritable, tmp_path):
    own = shutil.copy(trained.merged, tmp_path / "own.pt")
    old = tmp_path / "old.json"
    old.write_text("{}")
    assert refuses("evaluate", "--checkpoint", own, "--output", old) == (
        f"{old}: exists already; choose another output or pass --force"
    )
    for output, message in {
        "": "--output: is empty; name a file",
        tmp_path: f"{tmp_path}: is a folder; name a file",
        tmp_path / "no" / "a.json": f"{tmp_path}/no/a.json: folder {tmp_path}/no does not exist; create it first",
        old / "a.json": f"{old}: is a file, a folder is needed here",
        unwritable / "a.json": f"{unwritable}: cannot be written to (",
        own: f"{own}: is what is read; choose another output",
    }.items():
        assert refuses("evaluate", "--checkpoint", own, "--output", output, "--force").startswith(message)


def test_broken_data(refuses, trained, broken_data):
    root, message, advice = broken_data
    if "train" in message:
        (root / "ply_data_test0.h5").write_bytes((root / "ply_data_train0.h5").read_bytes())  # the split that is read
        message = message.replace("train0", "test0")
    line = refuses("evaluate", "--checkpoint", trained.merged, f"data.root={root}")
    assert line.startswith(message) and advice in line


def test_data_that_is_not_there(refuses, trained, tmp_path):
    line = refuses("evaluate", "--checkpoint", trained.merged, f"data.root={tmp_path}/no")
    assert (
        line
        == f"{tmp_path}/no: no such folder; make it with: python tools/prepare_data.py shapes --output {tmp_path}/no"
    )


def test_another_data_set(refuses, trained, renamed_data):
    advice = "; give the data set of its training by data.root=DIR"
    assert refuses("evaluate", "--checkpoint", trained.merged, f"data.root={renamed_data}") == (
        f"{renamed_data}: {trained.merged} was trained on other classes than this set has "
        f"(class 11 is 'torus' there and 'doughnut' here){advice}"
    )
    assert refuses("evaluate", "--checkpoint", trained.merged, "data.classes=[torus, box]").endswith(
        f": {trained.merged} was trained on 12 classes, this set has 2{advice}"
    )


def test_broken_checkpoints(refuses, broken_checkpoint):
    path, message = broken_checkpoint
    line = refuses("evaluate", "--checkpoint", path)
    assert line.startswith(f"{path}: ") and (message or "is a folder; name the file") in line


def test_weights_of_another_model(refuses, trained, tmp_path):
    payload = load_checkpoint(trained.merged)
    payload["model"]["kwargs"]["depth"] = 3
    path = save_checkpoint(tmp_path / "odd.pt", payload)
    line = refuses("evaluate", "--checkpoint", path)
    assert line.startswith(
        f"{path}: does not fit the model: 11 weights missing (such as 'blocks.blocks.2.attn.proj.bias')"
    )


def test_weights_that_are_not_finite(refuses, trained, tmp_path):
    payload = load_checkpoint(trained.merged)
    payload["state_dict"]["norm.weight"][0] = float("nan")
    path = save_checkpoint(tmp_path / "diverged.pt", payload)
    line = refuses("evaluate", "--checkpoint", path)
    assert line == (
        "the model's output is not finite for 36 of 36 samples; its training has diverged, or the checkpoint is damaged"
    )
