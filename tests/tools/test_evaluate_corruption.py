"""tools/evaluate.py --corruption: one corruption, all of them, and the mCE against a reference."""

import json

import pytest
import torch

from s2d3d import create_dataset, create_model, save_checkpoint
from s2d3d.datasets.corruptions import CORRUPTIONS
from s2d3d.runs.checkpoint import model_payload


@pytest.fixture
def checkpoint(tiny_config, shapes_root, tmp_path):
    """A model whose answers vary with its input: untrained, without preference for a class."""
    config = tiny_config()
    dataset = create_dataset("shapes", shapes_root, "test", num_points=128)
    names = dataset.class_names
    model = create_model(config.model.name, num_classes=len(names), **config.model.kwargs).eval()
    with torch.no_grad():
        model.cls_head_finetune[3].bias -= model(dataset.batch(torch.arange(36))[0]).mean(0)
    path = tmp_path / "my_s2d_run" / "merged.pt"
    path.parent.mkdir()
    payload = model_payload(
        model, name=config.model.name, in_channels=3, kwargs=config.model.kwargs, class_names=names, mof=None,
        config=config.to_dict(),
    )  # fmt: skip
    return save_checkpoint(path, payload)


@pytest.fixture
def evaluate(tool, capsys, checkpoint, tmp_path):
    """Run the tool; return its exit code, stdout, stderr, and the JSON it wrote."""
    count = iter(range(100))

    def run(*arguments):
        output = tmp_path / f"{next(count)}.json"
        code = tool("evaluate").main(["--checkpoint", str(checkpoint), "--output", str(output), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, json.loads(output.read_text()) if output.exists() else None

    return run


@pytest.fixture(scope="module")
def found():
    """What the first call with all corruptions gave; the others of the module would give the same."""
    return []


@pytest.fixture
def own(evaluate, found):
    """Exit code, stdout, stderr and JSON of all corruptions of the checkpoint, without a reference."""
    found[:] = found or evaluate("--corruption", "all")
    return found


def test_all_corruptions(evaluate, own):
    code, out, _, result = own
    assert code == 0 and "mCE: no reference" in out
    assert list(result["corruptions"]) == list(CORRUPTIONS)
    every = [oa for row in result["corruptions"].values() for oa in row["oa"]]
    assert len(every) == 35 and result["mean_oa"] == pytest.approx(sum(every) / 35)
    assert len(set(every)) > 2  # the corruptions reach the model
    assert (result["num_points"], result["num_samples"], result["votes"], result["seed"]) == (128, 36, 1, 0)

    # The clean row is the plain evaluation, a cell is the single corruption.
    _, _, _, plain = evaluate()
    assert result["clean"] == {"oa": plain["oa"], "macc": plain["macc"]}
    for name, severity in (("jitter", 5), ("drop_local", 3)):
        code, out, _, single = evaluate("--corruption", f"{name}:{severity}")
        assert code == 0 and single["corruption"] == f"{name}:{severity}" and "36 samples" in out
        row = result["corruptions"][name]
        assert (row["oa"][severity - 1], row["macc"][severity - 1]) == (single["oa"], single["macc"])

    # Neither the batch size nor the seed of the run changes the clouds.
    _, _, _, again = evaluate("--corruption", "all", "eval.batch_size=5", "seed=3")
    assert again == result


def test_mce_against_a_reference_named_found_or_unusable(evaluate, own, tmp_path):
    own = own[3]
    reference = tmp_path / "reference.json"
    other = json.loads(json.dumps(own))
    for row in other["corruptions"].values():
        row["oa"] = [1 - (1 - oa) / 2 for oa in row["oa"]]  # half of the errors: every CE is 2
    reference.write_text(json.dumps(other))
    code, out, _, result = evaluate("--corruption", "all", "--reference", reference)
    assert code == 0 and result["mce"] == pytest.approx(2) and result["ce"]["jitter"] == pytest.approx(2)
    assert "mCE 2.0000 relative to" in out and result["reference"] == str(reference)

    twin = tmp_path / "my_dense_run"
    twin.mkdir()
    (twin / "robustness.json").write_text(json.dumps(own))
    code, out, _, result = evaluate("--corruption", "all")
    assert code == 0 and result["mce"] == pytest.approx(1) and str(twin) in out

    code, out, error, result = evaluate("--corruption", "all", "data.num_points=100")
    assert code == 1 and result is None and not out
    assert error.startswith("error: the reference was measured with num_points 128, this model with 100")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corruption", "jiter:2"], "unknown corruption 'jiter'; did you mean 'jitter'?"),
        (["--corruption", "jitter:7"], "severity is 7"),
        (["--corruption", "jitter:1", "--reference", "r.json"], "--reference: is for --corruption all only"),
        (["--corruption", "all", "--reference", "none.json"], "none.json: no such file"),
        (["--corruption", "all", "data.num_points=40"], "corruptions leave 10 of 40 points"),
    ],
)
def test_what_is_refused(evaluate, arguments, message):
    code, out, error, result = evaluate(*arguments)
    assert code == 1 and not out and result is None
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
