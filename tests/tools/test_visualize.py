"""tools/visualize.py: the picture of a checkpoint's predictions, the gallery of a data set, and what is refused."""

import logging
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from s2d3d import Trainer, create_dataset, evaluate, load_config, load_model
from s2d3d.datasets import BatchLoader
from s2d3d.datasets.corruptions import CorruptedDataset
from s2d3d.viz.cloud_sheets import point_saliency
from s2d3d.viz.clouds import BACKGROUND
from s2d3d.viz.kinds import choose_clouds
from s2d3d.viz.tokens import trace_experts


@pytest.fixture(autouse=True)
def _handlers(monkeypatch):
    """Take back the tool's log handler, whose stream is gone when the test ends."""
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])


@pytest.fixture(scope="module")
def checkpoint(shapes_root, repository, tmp_path_factory):
    """The sparse checkpoint of a run that learned a little, so that some clouds are right and some are wrong."""
    config = load_config(
        repository / "configs" / "demo.yaml",
        [
            f"data.root={shapes_root}", f"output_dir={tmp_path_factory.mktemp('run') / 'run'}", "data.num_points=128",
            "model.depth=2", "model.trans_dim=24", "model.num_heads=2", "model.num_group=12", "model.group_size=8",
            "model.encoder_dims=16", "model.encoder_width=8", "optim.warmup_epochs=0", "train.epochs=4",
            "train.batch_size=16", "train.num_threads=1", "optim.lr=0.01", "eval.every=0",
        ],
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.fit()
    return trainer.folder.last


@pytest.fixture(scope="module")
def test_set(shapes_root):
    return create_dataset("shapes", shapes_root, "test", num_points=128)


@pytest.fixture
def visualize(tool):
    return tool("visualize")


@pytest.fixture
def sheet_of(visualize):
    """The sheet that a command line draws."""

    def make(*arguments):
        parsed = visualize.build_parser().parse_intermixed_args([str(argument) for argument in arguments])
        visualize.check_flags(parsed)
        return visualize.make_sheet(parsed, load_config(parsed.config, parsed.overrides) if parsed.config else None)

    return make


def grid_of(path):
    """Columns and rows of the tiles of a picture, and the share of it that is neither white nor a tile's background."""
    image = np.rint(255 * imread(path)[..., :3]).astype(int)
    tile = (image == np.rint(255 * np.array(BACKGROUND)).astype(int)).all(-1)
    starts = [int((np.diff((tile.mean(axis) > 0.1).astype(int)) == 1).sum()) for axis in (0, 1)]
    return tuple(starts), float((~tile & (image < 250).any(-1)).mean())


def test_whole_split_has_the_accuracy_of_evaluate(sheet_of, checkpoint, test_set, capsys):
    marks = sheet_of("--checkpoint", checkpoint, "--num-clouds", 36).marks
    *wrong, score = capsys.readouterr().out.splitlines()
    report = evaluate(load_model(checkpoint), BatchLoader(test_set, 36), device="cpu", progress=False)
    right = sum(row[index] for index, row in enumerate(report.confusion))
    assert 0 < right < 36, "both kinds are there"
    assert score == f"{right} of 36 clouds recognised" and marks.count(None) == right
    for line in wrong:
        name, verdict = line.split(": ")
        truth, guess = verdict.split(" (")[0].split(" taken for ")
        assert test_set.class_names[test_set.labels[test_set.names.index(name)]] == truth
        assert report.confusion[test_set.class_names.index(truth)][test_set.class_names.index(guess)]
    assert len(wrong) == 36 - right


def test_captions_say_what_the_model_says_wrong_ones_first(sheet_of, checkpoint, test_set):
    sheet = sheet_of("--checkpoint", checkpoint, "--num-clouds", 20)
    clouds, captions, marks, title = sheet.clouds, sheet.captions, sheet.marks, sheet.title
    model = load_model(checkpoint, merge=True)
    wrong = [mark is not None for mark in marks]
    assert wrong == sorted(wrong, reverse=True) and len(clouds) == 20
    assert title.startswith(f"{20 - sum(wrong)} of 20 clouds recognised\n")
    names, of_truth = test_set.class_names, []
    for cloud, caption, is_wrong in zip(clouds, captions, wrong):
        matches = (test_set.points.float() == cloud).all(-1).all(-1).nonzero().flatten()
        truth = names[test_set.labels[matches.item()]]
        with torch.no_grad():
            probabilities = model(cloud[None]).softmax(1)[0]
        confidence, guess = probabilities.max(0)
        verdict = f"taken for {names[guess]}" if is_wrong else "recognised"
        assert is_wrong == (names[guess] != truth)
        assert caption == f"{truth}\n{verdict}, {100 * confidence:.0f} %"
        of_truth.append((not is_wrong, float(probabilities[names.index(truth)])))
    assert [key for key, _ in of_truth] == sorted(key for key, _ in of_truth)
    for kind in (False, True):
        doubts = [value for key, value in of_truth if key == kind]
        assert doubts == pytest.approx(sorted(doubts), abs=1e-6), "the least probable truth first"


def test_gallery_shows_each_class_once(
    visualize, sheet_of, shapes_root, repository, test_set, drawing, tmp_path, capsys
):
    command = ["--config", str(repository / "configs" / "demo.yaml"), f"data.root={shapes_root}", "data.num_points=128"]
    sheet = sheet_of(*command)
    assert sheet.captions == test_set.class_names and sheet.marks is None
    for index, cloud in enumerate(sheet.clouds):
        matches = (test_set.points.float() == cloud).all(-1).all(-1).nonzero().flatten()
        assert test_set.labels[matches.item()] == index
    output = tmp_path / "gallery.png"
    assert visualize.main([*command[:2], "--output", str(output), *command[2:]]) == 0
    assert capsys.readouterr().out == f"written to {output}\n"
    grid, ink = grid_of(output)
    assert grid == (4, 3) and ink > 0.05


def test_training_clouds_are_drawn_without_augmentation(sheet_of, shapes_root, repository):
    command = [
        "--config", str(repository / "configs" / "demo.yaml"), f"data.root={shapes_root}", "data.num_points=128",
        "--split", "train", "--num-clouds", "24",
    ]  # fmt: skip
    sheet = sheet_of(*command)
    train = create_dataset("shapes", shapes_root, "train", num_points=128)
    assert sheet.captions == [name for name in train.class_names for _ in range(2)]
    for cloud in sheet.clouds:
        assert (train.points.float() == cloud).all(-1).all(-1).sum() == 1


def test_classes_take_turns_and_the_seed_chooses(visualize, test_set):
    twelve, twenty = (choose_clouds(test_set, count, 0) for count in (12, 20))
    assert test_set.labels[twelve].unique().numel() == 12
    assert torch.equal(twenty[:12], twelve), "more clouds are more, not others"
    assert twenty.unique().numel() == 20 and test_set.labels[twenty].bincount().max() == 2
    assert torch.equal(choose_clouds(test_set, 20, 0), twenty)
    assert not torch.equal(choose_clouds(test_set, 20, 1), twenty)


def test_experts_are_those_of_the_same_batch_in_several_passes(sheet_of, checkpoint):
    sheet = sheet_of("--checkpoint", checkpoint, "--kind", "experts", "--num-clouds", 2, "--passes", 3)
    assert sheet.columns == 3 and len(sheet.clouds) == 6
    model = load_model(checkpoint)
    clouds = torch.stack([sheet.clouds[0][:128], sheet.clouds[3][:128]])
    for number, traced in enumerate(trace_experts(model, clouds, passes=3, seed=0)):
        for row in range(2):
            counts = traced.experts[row].bincount(minlength=4).tolist()
            assert sheet.captions[3 * row + number].endswith(f": {', '.join(map(str, counts))}")
    assert sheet_of("--checkpoint", checkpoint, "--kind", "experts", "--seed", 1).captions != sheet.captions


def test_patches_and_saliency_are_of_the_clouds_that_are_named(sheet_of, checkpoint, test_set):
    model = load_model(checkpoint, merge=True)
    patches = sheet_of("--checkpoint", checkpoint, "--kind", "patches", "--num-clouds", 4)
    saliency = sheet_of("--checkpoint", checkpoint, "--kind", "saliency", "--num-clouds", 4)
    assert len(patches.clouds) == len(saliency.clouds) == 4
    for index, cloud in enumerate(saliency.clouds):
        assert torch.equal(patches.clouds[index][:128], cloud) and len(patches.clouds[index]) == 128 + 12
        name = test_set.class_names[
            test_set.labels[(test_set.points.float() == cloud).all(-1).all(-1).nonzero().item()]
        ]
        assert saliency.captions[index].startswith(f"{name}\n") and patches.captions[index].startswith(f"{name}\n")
        guess = test_set.class_names[model(cloud[None]).argmax()]
        assert (f"taken for {guess}" in saliency.captions[index]) == (saliency.marks[index] is not None)
        brightest = int(saliency.colors[index].sum(1).argmax())
        gradient = point_saliency(model, cloud[None])[0]
        assert gradient[brightest] >= gradient.quantile(0.97)


def test_corruptions_need_no_model_but_take_one(sheet_of, checkpoint, shapes_root, repository, test_set):
    options = ["--kind", "corruptions", "--num-clouds", 1, "--severity", 5]
    judged = sheet_of("--checkpoint", checkpoint, *options)
    config = ["--config", repository / "configs" / "demo.yaml", f"data.root={shapes_root}", "data.num_points=128"]
    plain = sheet_of(*config, *options)
    assert len(plain.clouds) == 8 and all(torch.equal(*pair) for pair in zip(plain.clouds, judged.clouds))
    index = int((test_set.points.float() == plain.clouds[0]).all(-1).all(-1).nonzero())
    seen = CorruptedDataset(test_set, "jitter", 5).batch(torch.tensor([index]))[0][0]
    jittered = next(i for i, caption in enumerate(plain.captions) if caption.endswith(", jitter"))
    assert torch.equal(plain.clouds[jittered], seen), "what an evaluation sees"
    assert plain.marks == [None] * 8 and all("recognised" in c or "taken for" in c for c in judged.captions)


def test_other_forms_of_output(visualize, checkpoint, tmp_path, capsys):
    command = ["--checkpoint", str(checkpoint), "--num-clouds", "2", "--kind", "patches", "--output"]
    assert visualize.main([*command, str(tmp_path / "p.ply")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'p_1.ply'} ... p_2.ply\n"
    assert visualize.main([*command, str(tmp_path / "p.html")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"p_1.ply", "p_2.ply", "p.html"}
    capsys.readouterr()
    assert visualize.main([*command, str(tmp_path / "p.ply")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'p_1.ply'}: exists already")


def test_clouds_are_not_written_into_the_scans_that_are_drawn(visualize, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("ball", "rod"):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for number in range(4):
            np.save(tmp_path / "scans" / name / f"{number}.npy", rng.random((64, 3)))
    config = tmp_path / "files.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/run\ndata: {{name: files, root: {tmp_path}/scans, num_points: 64}}\n"
        "model: {name: point_bert_tiny}\n"
    )
    output = tmp_path / "scans" / "ball" / "look.ply"
    for source in (["--config", config], ["--config", config, "--files", tmp_path / "scans"]):
        assert visualize.main([*map(str, source), "--output", str(output)]) == 1
        assert "which is read, and would be one of its clouds" in capsys.readouterr().err
    assert not list(output.parent.glob("*.ply"))


def test_existing_output_stays_unless_forced(visualize, checkpoint, tmp_path, capsys, drawing):
    output = tmp_path / "old.png"
    output.write_bytes(b"old")
    command = ["--checkpoint", str(checkpoint), "--output", str(output), "--num-clouds", "1"]
    assert visualize.main(command) == 1
    assert output.read_bytes() == b"old"
    assert capsys.readouterr().err == f"error: {output}: exists already; choose another output or pass --force\n"
    assert visualize.main([*command, "--force"]) == 0
    assert grid_of(output)[0] == (1, 1)


BAD = {
    "no such checkpoint": (["--checkpoint", "none.pt"], "none.pt: no such checkpoint file"),
    "no checkpoint": (["--checkpoint", "text.pt"], "text.pt: cannot be read as a checkpoint"),
    "no such config": (["--config", "none.yaml"], "none.yaml"),
    "not a png": (
        ["--checkpoint", "GOOD", "--output", "picture.jpg"],
        "picture.jpg: the picture is a PNG, PLY or HTML file",
    ),
    "no folder": (["--checkpoint", "GOOD", "--output", "none/picture.png"], "folder none does not exist"),
    "no cloud": (
        ["--checkpoint", "GOOD", "--num-clouds", "0"],
        "--num-clouds is 0, must be between 1 and the 36 clouds",
    ),
    "too many": (["--checkpoint", "GOOD", "--num-clouds", "37"], "must be between 1 and the 36 clouds of split 'test'"),
    "unknown key": (["--checkpoint", "GOOD", "data.rot=x"], "data.rot: unknown key; did you mean 'root'?"),
    "other classes": (["--checkpoint", "GOOD", "data.classes=[box, mug]"], "was trained on 12 classes, this set has 2"),
    "useless override": (["--checkpoint", "GOOD", "model.depth=5"], "'model.depth=5': has no effect on a checkpoint"),
    "flag of another kind": (
        ["--checkpoint", "GOOD", "--kind", "patches", "--passes", "2"],
        "--passes: is for --kind experts only",
    ),
    "no model": (["--config", "none.yaml", "--kind", "saliency"], "--kind saliency: needs a model; give --checkpoint"),
    "no such layer": (
        ["--checkpoint", "GOOD", "--kind", "experts", "--layer", "blocks"],
        "no expert layer 'blocks'",
    ),
    "no pass": (["--checkpoint", "GOOD", "--kind", "experts", "--passes", "0"], "passes is 0, must be at least 1"),
    "severity": (["--checkpoint", "GOOD", "--kind", "corruptions", "--severity", "6"], "severity is 6, must be 1 .. 5"),
    "size": (["--checkpoint", "GOOD", "--size", "5000"], "--size is 5000, must be between 16 and 1024"),
    "no data": (["--checkpoint", "GOOD", "data.root=none"], "none"),
    "device": (["--checkpoint", "GOOD", "--device", "gpu"], "device 'gpu' is unknown"),
}


def test_experts_of_a_dense_checkpoint(visualize, checkpoint, tmp_path, capsys):
    merged = checkpoint.parent.parent / "merged.pt"
    command = ["--checkpoint", str(merged), "--kind", "experts", "--output", str(tmp_path / "a.png")]
    assert visualize.main(command) == 1
    assert capsys.readouterr().err.startswith(f"error: {merged}: is dense, a sparse checkpoint is needed")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_no_file(visualize, checkpoint, case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("this is no checkpoint")
    arguments, message = BAD[case]
    arguments = [str(checkpoint) if argument == "GOOD" else argument for argument in arguments]
    output = [] if "--output" in arguments else ["--output", "picture.png"]
    assert visualize.main([*arguments, *output]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["text.pt"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--output", "a.png"], 2, "one of the arguments --checkpoint --config is required"),
        (["--checkpoint", "a", "--config", "b", "--output", "a.png"], 2, "not allowed with argument"),
        (["--checkpoint", "a"], 1, "no output; give --output FILE.png, --window or both"),
        (["--checkpoint", "a", "--output", "a.png", "--split", "val"], 2, "invalid choice: 'val'"),
    ],
)
def test_contradictory_arguments(visualize, arguments, code, message, capsys):
    assert visualize.main(arguments) == code
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="DISPLAY is how Linux names a screen")
def test_a_window_without_a_screen_is_one_line(visualize, checkpoint, monkeypatch, capsys):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert visualize.main(["--checkpoint", str(checkpoint), "--window"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no screen for a window") and error.count("\n") == 1


def test_process_draws_and_says_so_and_nothing_else(fork, checkpoint, tmp_path, drawing):
    output = tmp_path / "picture.png"
    done = fork("visualize", "--checkpoint", checkpoint, "--output", output)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    *wrong, score, written = done.stdout.splitlines()
    assert score == f"{12 - len(wrong)} of 12 clouds recognised" and written == f"written to {output}"
    assert all(" taken for " in line for line in wrong)
    assert grid_of(output)[0] == (4, 3)


def test_process_misses_open3d_only_when_it_draws(fork, checkpoint, tmp_path):
    """The package loads, the model classifies; only then is open3d missed, in one line, and no file is left."""
    (tmp_path / "open3d.py").write_text("raise ImportError('libusb-1.0.so.0: cannot open shared object file')\n")
    output = tmp_path / "picture.png"
    without = f"assert 'open3d' not in sys.modules; sys.path.insert(0, {str(tmp_path)!r})"
    done = fork("visualize", "--checkpoint", checkpoint, "--output", output, prelude=without)
    assert done.returncode == 1 and "clouds recognised" in done.stdout
    assert done.stderr.startswith("error: open3d cannot be loaded (libusb-1.0.so.0: ") and done.stderr.count("\n") == 1
    assert "sudo apt-get install libusb-1.0-0 libegl1 libgl1 libgl1-mesa-dri" in done.stderr
    assert not output.exists() and not list(tmp_path.glob("*.tmp"))
