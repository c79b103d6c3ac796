"""tools/train.py: what a run prints and leaves, and one line for each mistake, before anything is written."""

import csv
import json
import re
import shutil

import pytest
from weights import assert_same_weights

from s2d3d import load_checkpoint, load_config
from s2d3d.runs.folder import RunFolder


def accuracies(table: str) -> dict[str, str]:
    """Rows of the table that ends a run: title -> accuracy as printed."""
    return {line[:34].rstrip(): line[34:] for line in table.splitlines() if "OA" in line}


# What works


def test_process_trains_merges_and_reports(trained):
    folder, metrics = trained.folder, json.loads(trained.folder.metrics.read_text())
    merged = metrics["merged"]
    assert merged["oa"] > 0.2, "twice chance: results of a model that tells nothing would compare equal for nothing"
    printed = accuracies(trained.process.stdout)
    expected = f"OA {100 * merged['oa']:.2f} %, mAcc {100 * merged['macc']:.2f} % (36 samples)"
    assert printed == {"before merge (sparse, eval mode)": expected, "after merge": expected}
    assert metrics["sparse"] == merged

    sparse, dense = (load_checkpoint(path)["state_dict"] for path in (trained.last, trained.merged))
    is_weight = [key for key in dense if "running_" not in key and "num_batches" not in key]
    before, after = (sum(weights[key].numel() for key in is_weight) for weights in (sparse, dense))
    assert metrics["parameters"] == {"training": before, "merged": after}
    for row in (f"{before:,}", f"{after:,}", str(trained.merged), str(folder.root)):
        assert any(line.endswith(f" {row}") for line in trained.process.stdout.splitlines()), row

    names = {path.relative_to(folder.root).as_posix() for path in folder.root.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml", "environment.json", "log.csv", "metrics.json", "merged.pt", "checkpoints/last.pt",
        "checkpoints/best.pt", "checkpoints/previous.pt",
    }  # fmt: skip
    with open(folder.log) as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(epoch) for epoch in range(1, 11)]
    assert load_config(folder.config) == load_config(trained.config)
    environment = json.loads(folder.environment.read_text())
    assert environment["command"] == ["train.py", str(trained.config)]
    lines = trained.process.stderr.splitlines()
    assert len(lines) == 11 and "96 training and 36 test shapes" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == [f"epoch {epoch}/10" for epoch in range(1, 11)]


def test_without_torch_scatter_the_run_is_the_same(trained, fork, tmp_path):
    without = "assert 'torch_scatter' not in sys.modules; sys.modules['torch_scatter'] = None"
    process = fork("train", trained.config, f"output_dir={tmp_path / 'run'}", prelude=without)
    assert process.returncode == 0, process.stderr
    folder = RunFolder(tmp_path / "run")
    warning = [line for line in process.stderr.splitlines() if "torch-scatter is not usable" in line]
    assert len(warning) == 1 and "pip install --no-build-isolation torch-scatter" in warning[0]
    assert "torch-scatter is not usable" not in trained.process.stderr
    assert_same_weights(folder.last, trained.last)
    assert_same_weights(folder.merged, trained.merged)
    assert accuracies(process.stdout) == accuracies(trained.process.stdout)
    ours, theirs = (json.loads(path.read_text()) for path in (folder.metrics, trained.folder.metrics))
    assert ours["merged"] == theirs["merged"]


def test_dry_run_prints_the_resolved_config_and_writes_nothing(call, snapshot, trained, tmp_path):
    before = snapshot(tmp_path, trained.folder.root)
    result = call("train", trained.config, "--dry-run", "train.epochs=7", f"output_dir={tmp_path / 'run'}")
    assert (result.code, result.err) == (0, "")
    assert snapshot(tmp_path, trained.folder.root) == before
    (tmp_path / "printed.yaml").write_text(result.out)
    expected = load_config(trained.config, ["train.epochs=7", f"output_dir={tmp_path / 'run'}"])
    assert load_config(tmp_path / "printed.yaml") == expected


def test_resuming_a_finished_run_changes_no_result(call, trained, tmp_path):
    root = shutil.copytree(trained.folder.root, tmp_path / "run")
    result = call("train", trained.config, f"output_dir={root}", "--resume", root)
    assert result.code == 0
    assert accuracies(result.out) == accuracies(trained.process.stdout)
    assert_same_weights(RunFolder(root).merged, trained.merged)
    assert RunFolder(root).last.read_bytes() == trained.last.read_bytes()


def test_a_run_continues_in_another_folder_and_leaves_the_first_alone(call, snapshot, trained, tmp_path):
    before = snapshot(trained.folder.root)
    result = call("train", trained.config, f"output_dir={tmp_path / 'copy'}", "--resume", trained.folder.root)
    assert result.code == 0 and snapshot(trained.folder.root) == before
    assert_same_weights(RunFolder(tmp_path / "copy").merged, trained.merged)


def test_force_replaces_the_run_and_nothing_else(call, trained, tmp_path):
    root = shutil.copytree(trained.folder.root, tmp_path / "run")
    (root / "notes.txt").write_text("mine")
    result = call("train", trained.config, f"output_dir={root}", "--force", "train.max_steps=3", "seed=5")
    assert (result.code, result.out) == (0, "") and "--resume" in result.err.splitlines()[-1]
    folder = RunFolder(root)
    assert load_config(folder.config).seed == 5
    assert (root / "notes.txt").read_text() == "mine"
    assert not folder.merged.exists() and not folder.metrics.exists(), "results of the run that was replaced"


def test_device_flag_is_the_config_key(call, trained):
    result = call("train", trained.config, "--dry-run", "--device", "cpu", "train.device=cuda")
    assert re.search(r"^  device: cpu$", result.out, re.MULTILINE)


# Mistakes


def test_process_without_data_names_the_folder_and_the_command(fork, repository, tmp_path):
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(repository / name, target_is_directory=True)
    process = fork("train", "configs/modelnet_s2d.yaml", prelude=f"os.chdir({str(tmp_path)!r})")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        "error: data/modelnet40: no such folder; put ModelNet40 there (see data/README.md) or run: "
        "python tools/prepare_data.py modelnet40 --from DIR --output data/modelnet40\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "tools"]


def test_debug_shows_the_traceback(tool, trained, tmp_path):
    from s2d3d.errors import InputError

    with pytest.raises(InputError, match="no such folder"):
        tool("train").main([str(trained.config), f"output_dir={tmp_path / 'run'}", "data.root=nowhere", "--debug"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: CONFIG, or --resume RUN; see train.py --help"),
        (["{config}", "--epochs", "5"], "unrecognized arguments: --epochs 5; see train.py --help"),
        (["{config}", "--resume"], "argument --resume: expected one argument; see train.py --help"),
    ],
)
def test_wrong_arguments_exit_with_2(refuses, trained, arguments, message):
    assert refuses("train", *(text.format(config=trained.config) for text in arguments), code=2) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("s2d.num_expert=4", "s2d.num_expert: unknown key; did you mean 'num_experts'?"),
        ("sd2.num_experts=4", "sd2: unknown key; did you mean 's2d'?"),
        ("train.epochs=many", "train.epochs: must be a whole number, got 'many'"),
        ("train.epochs=1.5", "train.epochs: must be a whole number, got 1.5"),
        ("train.batch_size=-8", "train.batch_size: must be at least 1, got -8"),
        ("optim.lr=-1e-3", "optim.lr: must be greater than 0, got -0.001"),
        ("s2d.share_rate=1.5", "s2d.share_rate: must be at most 1, got 1.5"),
        ("s2d.share_rate=0.9", "s2d.share_rate: must be at most 0.75 = (4 - 1) / 4"),
        ("eval.votes=0", "eval.votes: must be at least 1, got 0"),
        ("data.name=modelnet", "data.name: unknown dataset 'modelnet'; did you mean 'modelnet40'?"),
        ("model.name=point_brt", "model.name: unknown model 'point_brt'; did you mean 'point_bert'?"),
        ("train.device=gpu", "train.device: must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        ("more", "expected section.key=value"),
    ],
)
def test_bad_values(refuses, trained, tmp_path, override, message):
    line = refuses("train", trained.config, f"output_dir={tmp_path / 'run'}", override)
    assert line.startswith(f"override '{override}': {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty, expected a config"),
        (b"# nothing\n", "the file is empty, expected a config"),
        (b"- a\n- b\n", "must be a mapping of sections, got ['a', 'b']"),
        (bytes(range(256)), "line 2: not UTF-8 text"),
        (b"seed: [1\n", "line 2: not valid YAML"),
        (b"\x80\x02}q\x00.", "line 1: not UTF-8 text"),
    ],
)
def test_files_that_are_no_config(refuses, tmp_path, content, message):
    path = tmp_path / "my.yaml"
    if content is not None:
        path.write_bytes(content)
    assert refuses("train", path).startswith(f"{path}: {message}")


def test_config_that_is_a_folder(refuses, tmp_path):
    assert refuses("train", tmp_path) == f"{tmp_path}: is a directory, expected a YAML file"


def test_all_mistakes_of_a_config_come_together(call, trained, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(trained.config.read_text().replace("epochs: 10", "epoch: 10").replace("seed: 0", "seed: -1"))
    result = call("train", path, "eval.votes=0", f"output_dir={tmp_path / 'run'}")
    assert (result.code, result.out) == (1, "") and not (tmp_path / "run").exists()
    assert sorted(result.err.splitlines()) == [
        f"error: {path}: seed: must be at least 0, got -1",
        f"error: {path}: train.epoch: unknown key; did you mean 'epochs'?",
        "error: override 'eval.votes=0': eval.votes: must be at least 1, got 0",
    ]


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there(refuses, trained, tmp_path, no_gpu, name):
    line = refuses("train", trained.config, f"output_dir={tmp_path / 'run'}", "--device", name)
    assert line == f"device '{name}': this machine has 0 CUDA devices; use device cpu or auto"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.num_points=500", "{data}: 128 points stored for each shape, num_points asks for 500; lower data."),
        ("data.classes=[torus, tours]", "unknown class 'tours'; did you mean 'torus'?"),
        ("train.batch_size=100", "batch_size is 100, more than the 96 shapes of split 'train': no full batch is left"),
        ("model.num_group=129", "a batch of 8 clouds of 128 points does not pass through point_bert_tiny: 128 points"),
        (
            "s2d.num_experts=137",
            "a batch of 8 clouds of 128 points does not pass through point_bert_tiny: expert layer "
            "'blocks.blocks.1.mlp': 136 tokens",
        ),
    ],
)
def test_values_that_do_not_fit_the_data(refuses, trained, shapes_root, tmp_path, override, message):
    line = refuses("train", trained.config, f"output_dir={tmp_path / 'run'}", override)
    assert line.startswith(message.format(data=shapes_root))


def test_the_smallest_batch_of_an_epoch_counts(refuses, trained, tmp_path):
    """96 shapes in batches of 19 leave one shape, 17 tokens: too few for 18 experts, many updates after the start."""
    overrides = ["train.batch_size=19", "train.drop_last=false", "s2d.num_experts=18"]
    line = refuses("train", trained.config, f"output_dir={tmp_path / 'run'}", *overrides)
    assert line.startswith("a batch of 1 clouds of 128 points does not pass") and "17 tokens" in line


def test_broken_data(refuses, trained, broken_data, tmp_path):
    root, message, advice = broken_data
    line = refuses("train", trained.config, f"data.root={root}", f"output_dir={tmp_path / 'run'}")
    assert line.startswith(message) and advice in line


def test_data_that_is_not_there(refuses, trained, tmp_path):
    line = refuses("train", trained.config, f"data.root={tmp_path / 'no'}", f"output_dir={tmp_path / 'run'}")
    assert (
        line
        == f"{tmp_path}/no: no such folder; make it with: python tools/prepare_data.py shapes --output {tmp_path}/no"
    )


def test_output_that_holds_a_run(refuses, trained):
    root = trained.folder.root
    assert refuses("train", trained.config) == (
        f"{root}: holds a run already; continue it with --resume {root}, choose another output_dir, "
        "or pass --force to replace it"
    )


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_output_that_is_a_file(refuses, trained, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    line = refuses("train", trained.config, f"output_dir={tmp_path}/file{below}")
    assert line == f"{tmp_path}/file: is a file, a folder is needed here; choose another place"


def test_output_that_cannot_be_written(refuses, trained, unwritable):
    line = refuses("train", trained.config, f"output_dir={unwritable}/run")
    assert line.startswith(f"{unwritable}/run: cannot be written to (") and line.endswith("; choose another place")


# Mistakes with --resume


def test_resuming_from_a_broken_checkpoint(refuses, trained, broken_checkpoint, tmp_path):
    path, message = broken_checkpoint
    line = refuses("train", trained.config, f"output_dir={tmp_path / 'run'}", "--resume", path)
    named = path / "checkpoints" / "last.pt" if path.is_dir() else path
    assert line.startswith(f"{named}: ") and message in line


def test_resuming_a_model_without_training_state(refuses, trained, tmp_path):
    line = refuses("train", trained.config, f"output_dir={tmp_path / 'run'}", "--resume", trained.merged)
    assert line == f"{trained.merged}: holds a model but no training state; resume from checkpoints/last.pt"


@pytest.mark.parametrize(
    ("override", "theirs", "ours"),
    [("model.trans_dim=32", "model.trans_dim=24", "32"), ("s2d.kind=none", "s2d.kind='rup'", "'none'")],
)
def test_resuming_another_model(refuses, trained, tmp_path, override, theirs, ours):
    arguments = ["--resume", trained.last, f"output_dir={tmp_path / 'run'}", override]
    assert refuses("train", trained.config, *arguments) == (
        f"{trained.last}: was trained with {theirs}, the config says {ours}; resume with the run's own config.yaml"
    )


def test_resuming_on_a_set_of_other_classes(refuses, trained, renamed_data, tmp_path):
    difference = "class 11 is 'torus' there and 'doughnut' here"
    arguments = ["--resume", trained.last, f"output_dir={tmp_path / 'run'}", f"data.root={renamed_data}"]
    assert refuses("train", trained.config, *arguments) == (
        f"{renamed_data}: {trained.last} was trained on other classes than this set has ({difference}); "
        "give the data set of its training by data.root=DIR"
    )


def test_resuming_on_a_set_of_another_size(refuses, trained, fewer_shapes, tmp_path):
    arguments = ["--resume", trained.last, f"output_dir={tmp_path / 'run'}", f"data.root={fewer_shapes}"]
    assert refuses("train", trained.config, *arguments) == (
        f"{trained.last}: was trained on more or fewer shapes than {fewer_shapes} has; resume on its own data"
    )


def test_resuming_into_the_folder_of_another_run(refuses, trained, tmp_path):
    other = shutil.copytree(trained.folder.root, tmp_path / "other")
    line = refuses("train", trained.config, f"output_dir={other}", "--resume", trained.last)
    assert line.startswith(f"{other}: holds a run already, and {trained.last} is not of it; choose another output_dir")


# Mistakes with model.pretrained


def test_pretrained_weights_with_experts_name_the_command_that_merges(refuses, trained, tmp_path):
    line = refuses("train", trained.config, f"output_dir={tmp_path / 'run'}", f"model.pretrained={trained.last}")
    assert line == (
        f"{trained.last}: has experts, pretrained weights must be dense; merge it first: "
        f"python tools/merge.py --checkpoint {trained.last} --output FILE"
    )


def test_pretrained_weights_that_cannot_be_read(refuses, trained, broken_checkpoint, tmp_path):
    path, message = broken_checkpoint
    if "format" in message or "not a checkpoint of s2d3d" in message or "incomplete" in message:
        pytest.skip("pretrained weights need not come from this package")
    line = refuses("train", trained.config, f"output_dir={tmp_path / 'run'}", f"model.pretrained={path}")
    assert str(path) in line and (message in line or line.startswith("model.pretrained: no such file"))
