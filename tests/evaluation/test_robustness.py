"""The mean corruption error in closed form on hand-made results, and what makes two results incomparable."""

import json

import pytest

from s2d3d.datasets.corruptions import CORRUPTIONS, SEVERITIES
from s2d3d.errors import InputError
from s2d3d.evaluation.robustness import (
    add_corruption_errors,
    corruption_errors,
    find_reference,
    read_robustness,
    robustness_table,
)


def measured(accuracies: dict[str, list[float]] | float, **changed) -> dict:
    if isinstance(accuracies, float):
        accuracies = {name: [accuracies] * 5 for name in CORRUPTIONS}
    every = [oa for row in accuracies.values() for oa in row]
    return {
        "num_points": 1024, "num_samples": 100, "votes": 1, "seed": 0, "clean": {"oa": 0.9, "macc": 0.9},
        "corruptions": {name: {"oa": row, "macc": row} for name, row in accuracies.items()},
        "mean_oa": sum(every) / len(every), **changed,
    }  # fmt: skip


def test_mce_is_the_mean_of_error_ratios():
    own = {name: [0.9, 0.8, 0.7, 0.6, 0.5] for name in CORRUPTIONS}  # errors 0.1 .. 0.5: sum 1.5
    theirs = {name: [0.5] * 5 for name in CORRUPTIONS}  # sum 2.5
    theirs["jitter"] = [0.9, 0.9, 0.9, 0.9, 0.4]  # sum 1.0
    own["rotate"] = [1.0] * 5  # sum 0
    result = add_corruption_errors(measured(own), measured(theirs), "twin.json")
    expected = dict.fromkeys(CORRUPTIONS, 0.6) | {"jitter": 1.5, "rotate": 0.0}
    assert result["ce"] == pytest.approx(expected)
    # Ratios of sums and then their mean, not a mean of 35 ratios, nor a ratio of the overall errors.
    assert result["mce"] == pytest.approx((5 * 0.6 + 1.5 + 0.0) / 7)
    assert result["reference"] == "twin.json"


def test_a_model_relative_to_itself_has_mce_1():
    own = measured({name: [0.9 - 0.1 * s for s in range(5)] for name in CORRUPTIONS})
    assert corruption_errors(own, own) == dict.fromkeys(CORRUPTIONS, 1.0)


@pytest.mark.parametrize(("key", "value"), [("num_points", 512), ("num_samples", 99), ("votes", 10), ("seed", 1)])
def test_results_on_other_clouds_are_refused(key, value):
    with pytest.raises(InputError, match=f"measured with {key} {value}"):
        corruption_errors(measured(0.8), measured(0.7, **{key: value}))


def test_a_reference_without_errors_is_refused():
    perfect = {name: [0.5] * 5 for name in CORRUPTIONS} | {"scale": [1.0] * 5}
    with pytest.raises(InputError, match="no error under scale"):
        corruption_errors(measured(0.8), measured(perfect))


def test_table_shows_every_accuracy_its_mean_and_the_ce():
    own = measured({name: [0.9, 0.8, 0.7, 0.6, 0.5] for name in CORRUPTIONS})
    lines = robustness_table(add_corruption_errors(own, measured(0.5), "twin.json")).splitlines()
    assert lines[0].split() == ["clean", "90.00"]
    assert lines[1].split() == ["OA", "%", *map(str, SEVERITIES), "mean", "CE"]
    for line, name in zip(lines[2:9], CORRUPTIONS):
        assert line.split() == [name, "90.00", "80.00", "70.00", "60.00", "50.00", "70.00", "0.600"]
    assert lines[9] == "mean OA over 35 corrupted sets 70.00 %"
    assert lines[10].startswith("mCE 0.6000 relative to twin.json")
    assert "no reference" in robustness_table(own).splitlines()[-1]


def test_dense_twin_is_the_folder_beside(tmp_path):
    twin = tmp_path / "modelnet_dense_small" / "robustness.json"
    for checkpoint in ("modelnet_s2d_small/merged.pt", "modelnet_s2d_small/checkpoints/last.pt"):
        assert find_reference(tmp_path / checkpoint) is None
    twin.parent.mkdir()
    twin.write_text("{}")
    for checkpoint in ("modelnet_s2d_small/merged.pt", "modelnet_s2d_small/checkpoints/last.pt"):
        assert find_reference(tmp_path / checkpoint) == twin
    for checkpoint in ("modelnet_s2d/merged.pt", "modelnet_dense_small/merged.pt", "other/merged.pt"):
        assert find_reference(tmp_path / checkpoint) is None


def test_reading_gives_back_what_was_written_and_refuses_the_rest(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(measured(0.5)))
    assert read_robustness(path) == measured(0.5)
    with pytest.raises(InputError, match=r"none.json: no such file; make it with .*--corruption all"):
        read_robustness(tmp_path / "none.json")
    bad = {"five": measured(0.5), "range": measured(0.5), "text": measured(0.5)}
    bad["five"]["corruptions"]["rotate"]["oa"] = [0.5] * 4
    bad["range"]["corruptions"]["rotate"]["oa"] = [0.5, 0.5, 0.5, 0.5, 50.0]
    bad["text"]["corruptions"]["rotate"]["oa"] = "0.5"
    for content in bad.values():
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"corruptions\.rotate\.oa is not 5 accuracies"):
            read_robustness(path)
    for text in ("[]", "{}", '{"corruptions": []}', '{"oa": 0.9}'):
        path.write_text(text)
        with pytest.raises(InputError, match="--corruption all"):
            read_robustness(path)
    path.write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        read_robustness(path)
