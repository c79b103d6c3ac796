"""The page on own data: its commands as they stand, on a small folder of scans."""

import re
import shlex

import numpy as np
import pytest
import torch

from s2d3d.console import main

SHORT = [
    "train.epochs=2", "data.num_points=64", "model.channels=[8, 16]", "model.depths=[0, 2]", "model.strides=[1, 4]",
    "model.num_neighbors=[4, 4]", "model.share_planes=4",
    "log.report=false",
]  # fmt: skip


@pytest.fixture
def scans(tmp_path, monkeypatch, repository):
    """Balls and rods in mixed formats, and a folder with a new one; the working directory has them and configs."""
    rng = np.random.default_rng(0)
    for name, size in (("ball", (1, 1, 1)), ("rod", (0.1, 0.1, 2))):
        for index in range(10):
            cloud, path = rng.normal(size=(80, 3)) * size, tmp_path / "scans" / name / str(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            if index % 2:
                np.save(path.with_suffix(".npy"), cloud)
            else:
                np.savetxt(path.with_suffix(".xyz"), cloud)
    (tmp_path / "new").mkdir()
    np.savetxt(tmp_path / "new" / "unknown.csv", cloud, delimiter=",")
    (tmp_path / "configs").symlink_to(repository / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_page(scans, repository, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (repository / "docs" / "own_data.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(compile(block, "docs/own_data.md", "exec"), names)
    said, scored = capsys.readouterr().out.splitlines()
    assert said == "scans: split train, 16 clouds of 64 points of 76 stored, 3 channels, 2 classes (ball, rod)"
    assert re.fullmatch(r"OA \S+ %, mAcc \S+ % \(4 samples\)", scored)
    assert len(names["loader"]) == 4 and names["points"].shape == (4, 64, 3) and names["labels"].dtype == torch.int64
    state = next(iter(names["optimizer"].state.values()))
    assert int(state["step"]) == 4


@pytest.mark.parametrize("skipped", [("export",), pytest.param((), marks=pytest.mark.slow)])
def test_the_five_commands_of_the_page(skipped, scans, repository, capsys):
    page = (repository / "docs" / "own_data.md").read_text()
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("    s2d3d ")]
    assert [command[0] for command in commands] == [
        "train", "evaluate", "predict", "report", "export", "train"
    ]  # fmt: skip
    for command in commands[:5]:
        if command[0] in skipped:
            continue
        extra = SHORT if command[0] == "train" else []
        assert main([*command, *extra]) == 0, shlex.join(command)
    out = capsys.readouterr().out
    assert "(4 samples)" in out and "unknown.csv: " in out
    assert (scans / "report.html").is_file() and (scans / "scans.onnx").is_file() == ("export" not in skipped)
    assert main(commands[5]) == 0
    assert "all 2 epochs were trained" in capsys.readouterr().err
    assert main([*commands[5], "--extend", "200"]) == 1
    assert "model.pretrained=runs/scans/merged.pt" in capsys.readouterr().err
    checkpoint = ["--checkpoint", "runs/scans/merged.pt"]
    assert main(["evaluate", *checkpoint, "--files", "scans"]) == 0, "the cache in the folder is hidden"
    assert "(20 samples)" in capsys.readouterr().out
    for index in range(10, 40):
        np.save(scans / "scans" / "rod" / f"{index}.npy", np.random.default_rng(index).normal(size=(80, 3)))
    for command in ("evaluate", *checkpoint), ("report", "runs/scans", "--output", "again.html"):
        assert main([*command]) == 1
        error = capsys.readouterr().err
        assert re.search(r"scans: \d+ of its 10 test files were trained on by runs/scans/merged\.pt", error), error
    assert not (scans / "again.html").exists()


def test_files_are_read_with_the_vertical_axis_of_the_training(scans, capsys):
    setting = ["data.root=scans", "output_dir=runs/y", "data.up_axis=y", *SHORT]
    assert main(["train", "configs/files.yaml", *setting]) == 0
    checkpoint = ["--checkpoint", "runs/y/merged.pt"]
    capsys.readouterr()
    assert main(["evaluate", *checkpoint, "--files", "scans", "--output", "y.json"]) == 0
    assert main(["evaluate", *checkpoint, "--files", "scans", "--up-axis", "y", "--output", "also_y.json"]) == 0
    assert (scans / "y.json").read_text() == (scans / "also_y.json").read_text()
    answers = []
    for extra in ([], ["--up-axis", "y"], ["--up-axis", "z"]):
        assert main(["predict", *checkpoint, "new", *extra]) == 0
        answers.append(capsys.readouterr().out.splitlines()[-2:])
    assert answers[0] == answers[1] and answers[0][1].endswith("up axis y") and answers[2][1].endswith("up axis z")


def test_a_run_does_not_write_into_its_data(scans, capsys):
    assert main(["train", "configs/files.yaml", "data.root=scans", "output_dir=scans/runs", *SHORT]) == 1
    assert "output_dir: scans/runs lies inside data.root" in capsys.readouterr().err
    assert not (scans / "scans" / "runs").exists()


def test_one_class_is_refused_whether_chosen_or_all_there_is(scans, capsys):
    setting = ["configs/files.yaml", "data.root=scans", "output_dir=runs/one", *SHORT]
    assert main(["train", *setting, "data.classes=[ball]"]) == 1
    assert capsys.readouterr().err.endswith(
        "error: scans: one class, 'ball', is left to train on; a classifier needs two, see data.classes\n"
    )
    assert main(["visualize", "--config", *setting, "data.classes=[ball]", "--output", "ball.png"]) == 0, (
        "to draw it will do"
    )
    (scans / "scans" / "rod").rename(scans / "rod")
    assert main(["train", *setting]) == 1
    assert "scans: holds one class, 'ball'; the files of at least two classes are needed" in capsys.readouterr().err
    assert not (scans / "runs").exists()
