"""Run folders read back."""

import json

import pytest

from s2d3d.config.load import dump_config
from s2d3d.datasets.corruptions import CORRUPTIONS
from s2d3d.errors import InputError
from s2d3d.runs.folder import RunFolder
from s2d3d.runs.record import FORMS, final_form, find_reference, read_robustness, read_runs

LOG = "epoch,updates,train_loss,val_oa,test_oa\n1,6,2.5,,\n2,12,1.25,,0.5\n3,18,nan,,inf\n"


@pytest.fixture
def make_run(tiny_config, tmp_path):
    def make(path="run", log=LOG, **files):
        folder = RunFolder(tmp_path / path)
        folder.root.mkdir(parents=True)
        folder.config.write_text(dump_config(tiny_config("seed=7")))
        folder.log.write_text(log)
        for name, content in files.items():
            (folder.root / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return make


def test_a_run_is_read_as_it_was_written(make_run, tiny_config):
    robustness = {
        "clean": {"oa": 0.5},
        "corruptions": {name: {"oa": [0.25] * 5} for name in CORRUPTIONS},
        "mean_oa": 0.25,
    }
    folder = make_run(metrics={"merged": {"oa": 0.5}}, environment={"python": "3"}, robustness=robustness)
    folder.merged.touch()
    (record,) = read_runs([folder.root])
    assert record.config == tiny_config("seed=7").to_dict() and record.name == "run"
    assert record.log == [
        {"epoch": 1, "updates": 6, "train_loss": 2.5},
        {"epoch": 2, "updates": 12, "train_loss": 1.25, "test_oa": 0.5},
        {"epoch": 3, "updates": 18},
    ]
    assert record.metrics == {"merged": {"oa": 0.5}} and record.environment == {"python": "3"}
    assert record.robustness == robustness and record.analysis is None and record.checkpoint == folder.merged
    folder.final.touch()
    assert read_runs([folder.root])[0].checkpoint == folder.final, "of a routed run"


def test_a_run_under_way_has_no_metrics_yet(make_run):
    (record,) = read_runs([str(make_run().root)])
    assert record.metrics == {} and record.environment == {} and record.checkpoint is None


def test_equal_names_are_told_apart_by_their_paths(make_run):
    folders = [make_run(path).root for path in ("a/run", "b/run", "b/other")]
    assert [record.name for record in read_runs(folders)] == [str(folders[0]), str(folders[1]), "other"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder.config.unlink(), "run: holds no config.yaml; the folder of a run is needed"),
        (lambda folder: folder.log.unlink(), "log.csv: holds no epoch; wait for the end of the first"),
        (lambda folder: folder.log.write_text("epoch,lr\n"), "log.csv: holds no epoch"),
        (lambda folder: (folder.merged.touch(), folder.log.unlink()), "log.csv: holds no epoch; was it removed?"),
        (lambda folder: folder.log.write_text("a,b\n1,2\n"), "log.csv: line 2 has no number in column 'epoch'"),
        (lambda folder: folder.log.write_bytes(b"epoch\n\xff\xfe"), "log.csv: not a CSV file"),
        (lambda folder: folder.metrics.write_text("{"), "metrics.json: not a JSON file"),
        (lambda folder: folder.metrics.write_text("[1]"), "metrics.json: holds no JSON object"),
        (lambda folder: folder.config.write_text("seed: x\n"), "seed"),
        (
            lambda folder: folder.robustness.write_text('{"corruption": ["jitter", 3]}'),
            "it needs a file that --corruption all",
        ),
        (
            lambda folder: folder.analysis.write_text('{"epochs": []}'),
            r"analysis.json: checkpoints is missing; write it again with tools/analyze.py",
        ),
    ],
)
def test_damage_is_named(make_run, spoil, message):
    folder = make_run()
    spoil(folder)
    with pytest.raises(InputError, match=message):
        read_runs([folder.root])


def test_each_run_once_and_only_folders(make_run, tmp_path):
    folder = make_run()
    with pytest.raises(InputError, match="is named twice"):
        read_runs([folder.root, folder.root / "."])
    for missing in (tmp_path / "none", folder.log):
        with pytest.raises(InputError, match="no such folder; the folder of a run is needed"):
            read_runs([missing])


@pytest.mark.parametrize(
    ("metrics", "form"),
    [
        ({"kept": "merged", "merged": {}, "recalibrated": {}}, "merged"),
        ({"kept": "recalibrated", "sparse": {}, "merged": {}, "recalibrated": {}, "voting": {}}, "recalibrated"),
        ({"sparse": {}, "merged": {}, "recalibrated": {}, "voting": {}, "ema": {}}, "recalibrated"),
        ({"sparse": {}, "merged": {}, "voting": {}, "ema": {}}, "merged"),
        ({"routed": {}, "voting": {}, "ema": {}}, "routed"),
        ({"routed": {}, "recalibrated": {}}, "recalibrated"),
    ],
)
def test_the_final_form_is_the_one_that_was_saved(metrics, form):
    assert final_form(metrics) == form and form in FORMS


@pytest.mark.parametrize("metrics", [{}, {"kept": "recalibrated", "merged": {}}, {"voting": {}}, {"seed": 1}])
def test_without_a_saved_form_there_is_none(metrics):
    with pytest.raises(InputError, match="no accuracy of a finished model among"):
        final_form(metrics)


def robustness(oa: float) -> dict:
    """What `tools/evaluate.py --corruption all` writes, with one accuracy everywhere."""
    return {
        "num_points": 1024, "num_samples": 100, "votes": 1, "seed": 0, "clean": {"oa": 0.9, "macc": 0.9},
        "corruptions": {name: {"oa": [oa] * 5, "macc": [oa] * 5} for name in CORRUPTIONS}, "mean_oa": oa,
    }  # fmt: skip


def test_dense_twin_is_the_folder_beside(tmp_path):
    twin = tmp_path / "modelnet_dense_small" / "robustness.json"
    for checkpoint in ("modelnet_s2d_small/merged.pt", "modelnet_s2d_small/checkpoints/last.pt"):
        assert find_reference(tmp_path / checkpoint) is None
    assert find_reference("model.onnx") is None, "a file here"
    twin.parent.mkdir()
    twin.write_text("{}")
    for checkpoint in ("modelnet_s2d_small/merged.pt", "modelnet_s2d_small/checkpoints/last.pt"):
        assert find_reference(tmp_path / checkpoint) == twin
    for checkpoint in ("modelnet_s2d/merged.pt", "modelnet_dense_small/merged.pt", "other/merged.pt"):
        assert find_reference(tmp_path / checkpoint) is None


def test_reading_gives_back_what_was_written_and_refuses_the_rest(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(robustness(0.5)))
    assert read_robustness(path) == robustness(0.5)
    with pytest.raises(InputError, match=r"none.json: no such file; make it with .*--corruption all"):
        read_robustness(tmp_path / "none.json")
    bad = {"five": robustness(0.5), "range": robustness(0.5), "text": robustness(0.5)}
    bad["five"]["corruptions"]["rotate"]["oa"] = [0.5] * 4
    bad["range"]["corruptions"]["rotate"]["oa"] = [0.5, 0.5, 0.5, 0.5, 50.0]
    bad["text"]["corruptions"]["rotate"]["oa"] = "0.5"
    for content in bad.values():
        path.write_text(json.dumps(content))
        with pytest.raises(
            InputError, match=r"corruptions\.rotate\.oa(\.4)? is .*; it needs a file that --corruption all wrote"
        ):
            read_robustness(path)
    lacking = robustness(0.5)
    del lacking["corruptions"]["rotate"]
    for text in ("[]", "{}", '{"corruptions": []}', '{"oa": 0.9}', json.dumps(lacking)):
        path.write_text(text)
        with pytest.raises(InputError, match="--corruption all"):
            read_robustness(path)
    path.write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        read_robustness(path)
