"""The mean corruption error in closed form on hand-made results, and what makes two results incomparable."""

import pytest

from s2d3d.datasets.corruptions import CORRUPTIONS, SEVERITIES
from s2d3d.errors import InputError
from s2d3d.evaluation.robustness import (
    add_corruption_errors,
    corruption_errors,
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
