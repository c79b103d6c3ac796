"""Folders in the hub's layout: the model that comes back is the one that was saved, and its card tells its run."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import quick

from s2d3d import PointCloudClassifier, Trainer, create_model, list_models, load_model, save_checkpoint
from s2d3d.errors import InputError, UnreadableError
from s2d3d.integrations.model_card import DATA_LICENCES
from s2d3d.runs.checkpoint import load_checkpoint, model_payload
from s2d3d.runs.folder import RunFolder

SMALLER = {
    "point_bert": dict(depth=1, trans_dim=24, num_heads=2), "point_mae": dict(depth=1, trans_dim=384, num_heads=2),
    "point_transformer": dict(depths=(0, 1, 0, 0, 1)),
}  # fmt: skip
"""What makes the full-size models small enough for a test."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished S2D run on the procedural shapes."""
    from s2d3d import load_config
    from s2d3d.prepare.shapes import write_shapes

    root = tmp_path_factory.mktemp("hub")
    write_shapes(root / "shapes", num_train=48, num_test=24, num_points=64, seed=0)
    changes = (
        f"data.root={root / 'shapes'}", f"output_dir={root / 'run'}", "data.num_points=64", "model.depth=2",
        "model.trans_dim=24", "model.num_heads=2", "model.num_group=8", "model.group_size=8", "train.epochs=2",
        "optim.warmup_epochs=1", "train.batch_size=16",
    )  # fmt: skip
    Trainer(load_config(Path(__file__).parents[2] / "configs" / "demo.yaml", changes)).fit()
    return RunFolder(root / "run")


def clouds(count=3, points=64):
    return torch.rand(count, points, 3, generator=torch.Generator().manual_seed(1)) - 0.5


def test_a_run_comes_back_with_equal_logits_and_all_that_predict_needs(run, tmp_path):
    PointCloudClassifier.from_checkpoint(run.merged).save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    original, found = load_model(run.merged), PointCloudClassifier.from_pretrained(tmp_path / "model")
    assert not found.training and torch.equal(found(clouds()), original(clouds()))
    stored = load_checkpoint(run.merged)
    assert (found.num_points, found.normalize, found.up_axis) == (64, True, "z")
    assert found.class_names == stored["class_names"] and found.description["model"] == stored["model"]
    assert torch.equal(load_model(tmp_path / "model")(clouds()), original(clouds())), "without the hub's library"
    found.save_pretrained(tmp_path / "again")
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_the_weights_have_the_keys_of_the_bare_model(run, tmp_path):
    from safetensors.torch import load_file

    PointCloudClassifier.from_checkpoint(run.merged).save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == load_model(run.merged).state_dict().keys()


def test_the_card_tells_the_record_of_the_run(run, tmp_path):
    from huggingface_hub import ModelCard

    PointCloudClassifier.from_checkpoint(run.merged).save_pretrained(tmp_path / "model")
    metrics = json.loads(run.metrics.read_text())
    final = metrics[metrics["kept"]]
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "s2d3d" and card.data.license == "mit"
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"OA": final["oa"], "mAcc": final["macc"]}
    (row,) = re.findall(r"^\| shapes \|.*$", card.text, flags=re.MULTILINE)
    low, high = score_interval(round(final["oa"] * 24), 24)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "shapes", "test", "24", f"{100 * final['oa']:.2f}", f"[{100 * low:.1f}, {100 * high:.1f}]",
        f"{100 * final['macc']:.2f}", str(metrics["seed"]), "last epoch",
    ]  # fmt: skip
    environment = json.loads(run.environment.read_text())
    for needed in (f"torch {environment['packages']['torch']}", "4 experts", "box, capsule, chair", "no segmentation"):
        assert needed in card.text, needed


def score_interval(correct, total):
    """Return the shares p0 at which (p - p0)^2 = z^2 p0 (1 - p0) / n, by the formula for quadratic equations."""
    share, z = correct / total, 1.959964
    roots = np.roots([1 + z**2 / total, -2 * share - z**2 / total, share**2])
    return sorted(float(root.real) for root in roots)


def test_a_checkpoint_that_no_run_ended_with_has_no_figures(run, tmp_path):
    model = PointCloudClassifier.from_checkpoint(run.last, merge=True)
    assert "The accuracy of this model is not known" in model.card and "%" not in model.card.split("## Limits")[0]
    save_checkpoint(tmp_path / "copy.pt", load_checkpoint(run.merged))
    assert "The accuracy of this model is not known" in PointCloudClassifier.from_checkpoint(tmp_path / "copy.pt").card


def test_no_path_of_the_machine_is_shared(run, tmp_path):
    PointCloudClassifier.from_checkpoint(run.merged).save_pretrained(tmp_path / "model")
    for name in ("README.md", "config.json"):
        assert str(run.root.parent) not in (tmp_path / "model" / name).read_text()
    config = json.loads((tmp_path / "model" / "config.json").read_text())["config"]
    assert (config["data"]["root"], config["output_dir"]) == ("shapes", "run")


@pytest.mark.parametrize(
    "name", quick(3, sorted(list_models(task="classify"), key=lambda name: not name.endswith("tiny")))
)
def test_every_backbone_comes_back(name, tmp_path):
    kwargs = SMALLER.get(name, {})
    model = create_model(name, num_classes=3, in_channels=4, **kwargs).eval()
    data = {"name": "shapes", "root": "x", "num_points": 512}
    config = {"output_dir": "run", "data": data, "model": {"name": name}, "s2d": {"kind": "none"}}
    payload = model_payload(
        model, name=name, in_channels=4, kwargs=kwargs, class_names=["a", "b", "c"], mof=None, config=config
    )
    save_checkpoint(tmp_path / "model.pt", payload)
    PointCloudClassifier.from_checkpoint(tmp_path / "model.pt").save_pretrained(tmp_path / "model")
    points = torch.rand(1, 512, 4)
    with torch.no_grad():
        assert torch.equal(PointCloudClassifier.from_pretrained(tmp_path / "model")(points), model(points))


def test_sparse_models_are_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"last\.pt: has experts, which only training needs; pass --merge"):
        PointCloudClassifier.from_checkpoint(run.last)
    with pytest.raises(InputError, match="merge it first with merge_experts"):
        PointCloudClassifier(load_model(run.last), {}, "")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def test_nothing_is_ever_unpickled(run, tmp_path):
    folder = tmp_path / "model"
    PointCloudClassifier.from_checkpoint(run.merged).save_pretrained(folder)
    bomb = pickle.dumps(Bomb())
    (folder / "pytorch_model.bin").write_bytes(bomb)
    assert PointCloudClassifier.from_pretrained(folder).num_points == 64
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(UnreadableError, match="cannot be read as safetensors"):
        PointCloudClassifier.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is a folder; name the file"):
        PointCloudClassifier.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"), ("{}", "not a checkpoint of s2d3d"),
        ('{"format": "s2d3d", "format_version": 2}', "incomplete, model, s2d, class_names, config missing"),
    ],
)  # fmt: skip
def test_damaged_configs(run, tmp_path, content, message):
    PointCloudClassifier.from_checkpoint(run.merged).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        PointCloudClassifier.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("damage", ["classes", "points", "section", "axis"])
def test_configs_that_do_not_fit(run, tmp_path, damage):
    PointCloudClassifier.from_checkpoint(run.merged).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    if damage == "classes":
        content["class_names"].pop()
    elif damage == "points":
        content["config"]["data"]["num_points"] = "x"
    elif damage == "section":
        content["config"]["model"] = 3
    else:
        content["model"]["up_axis"] = "y"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"class_names|num_points|model"):
        PointCloudClassifier.from_pretrained(tmp_path / "model")


def test_an_id_needs_the_network_and_says_so(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, reason in (
        ("nobody/nothing", "it cannot be reached, and no copy is in the cache"),
        ("no id", "Repo id "),
    ):
        with pytest.raises(
            InputError, match=rf"^{name}: no such folder, and not to be had from the hub \({reason}.*\)$"
        ):
            PointCloudClassifier.from_pretrained(name)


def test_an_id_is_read_from_the_files_that_the_hub_gives(run, tmp_path, monkeypatch):
    """The hub's client is replaced: it copies from a folder, as a cache would."""
    from s2d3d.integrations import hub

    PointCloudClassifier.from_checkpoint(run.merged).save_pretrained(tmp_path / "model")
    asked = []

    def fetch(repo_id=None, filename=None, *rest, **options):
        asked.append(filename)
        return str(tmp_path / "model" / filename)

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", fetch)
    found = PointCloudClassifier.from_pretrained("somebody/shapes", revision="main")
    assert torch.equal(found(clouds()), load_model(run.merged)(clouds()))
    assert set(asked) == {"config.json", "model.safetensors", "README.md"}


def test_a_model_is_not_replaced_unasked(run, tmp_path):
    model = PointCloudClassifier.from_checkpoint(run.merged)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"README\.md: exists already; choose another folder or pass --force"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    model.save_pretrained(tmp_path, force=True)
    assert "mine" not in (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match=r"README\.md: is no folder"):
        model.save_pretrained(tmp_path / "README.md")
    with pytest.raises(InputError, match="does not exist; create it first"):
        model.save_pretrained(tmp_path / "no" / "such")


def test_licences_are_those_of_the_data_page(repository):
    page = (repository / "data" / "README.md").read_text()
    for name, licence in DATA_LICENCES.items():
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(licence)} \|$", page, flags=re.MULTILINE), name
