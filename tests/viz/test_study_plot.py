"""The figure of a study: what its artists hold is what the summary says, in points."""

import pytest

from s2d3d.viz.plots import study_figure


def comparison(name, differences, half):
    mean = sum(differences.values()) / len(differences)
    known = half is not None
    return {
        "name": name, "reference": "dense", "n": len(differences), "differences": differences, "mean": mean,
        "t_low": mean - half if known else None, "t_high": mean + half if known else None,
        "bootstrap_low": mean - half / 2 if known else None, "bootstrap_high": mean + half / 2 if known else None,
    }  # fmt: skip


@pytest.fixture
def summary():
    return {
        "study": "made", "split": "validation", "seeds": [0, 1, 2], "along": None,
        "rows": [{"name": name, "along": value} for name, value in (("dense", 4), ("b", 60), ("a", 15), ("c", 60))],
        "comparisons": [
            comparison("b", {"0": 0.01, "1": 0.03}, 0.05), comparison("a", {"0": -0.02}, None),
            {**comparison("c", {"0": 0.0}, None), "n": 0, "differences": {}, "mean": None},
        ],
    }  # fmt: skip


def lines(figure):
    """Data of every line of the only panel: ((x, ...), (y, ...)), rounded."""
    (panel,) = figure.axes
    return [tuple(tuple(round(float(v), 6) for v in axis) for axis in line.get_data()) for line in panel.lines]


def test_dots_and_intervals_are_the_numbers_in_points(summary):
    figure = study_figure(summary)
    drawn = lines(figure)
    assert ((2.0,), (1.0,)) in drawn and ((-2.0,), (0.0,)) in drawn, "means; the first comparison stands on top"
    assert ((-3.0, 7.0), (1.0, 1.0)) in drawn, "t interval"
    assert any(x == (-0.5, 4.5) for x, _ in drawn), "bootstrap interval"
    assert any(x == (1.0, 3.0) for x, _ in drawn), "seeds"
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["a - dense (n=1)", "b - dense (n=2)"], "without the empty comparison"


def test_along_a_key_the_values_are_in_order(summary):
    figure = study_figure(summary | {"along": "train.epochs"})
    drawn = lines(figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["15", "60"]
    assert ((0.0,), (-2.0,)) in drawn and ((1.0,), (2.0,)) in drawn and ((1.0, 1.0), (-3.0, 7.0)) in drawn
    assert figure.axes[0].get_xlabel() == "train.epochs"


def test_a_study_without_pairs_says_so(summary):
    for along in (None, "train.epochs"):
        figure = study_figure(summary | {"comparisons": summary["comparisons"][2:], "along": along})
        assert [text.get_text() for text in figure.axes[0].texts] == ["no finished pair yet"]
