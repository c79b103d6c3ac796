"""Targets: hit, missed, not measured; and that every one of them names a measure that exists."""

import pytest

from benchmarks.section import Measure
from benchmarks.targets import AT_LEAST, AT_MOST, EQUALS, PLACEHOLDER, TARGETS, Target, fill, format_bound, judge


def state(sense, bound, value, low=None, high=None, level=None):
    return judge(Target("k.s.x", "T", sense, bound), {"k.s.x": Measure(value, low, high, level=level)}).state


def test_bounds_from_both_sides():
    assert state(AT_MOST, 1.03, 1.03) == "hit" and state(AT_MOST, 1.03, 1.031) == "missed"
    assert state(AT_LEAST, 1.5, 1.5) == "hit" and state(AT_LEAST, 1.5, 1.499) == "missed"
    assert state(EQUALS, 1.0, 1.009) == "hit" and state(EQUALS, 1.0, 0.98) == "missed"


@pytest.mark.parametrize(
    ("sense", "bound", "low", "high", "expected"),
    [
        (AT_MOST, 1.03, 0.99, 1.03, "hit"),
        (AT_MOST, 1.03, 0.99, 1.04, "undecided"),
        (AT_MOST, 1.03, 1.02, 1.20, "undecided"),
        (AT_MOST, 1.03, 1.04, 1.20, "missed"),
        (AT_LEAST, 1.5, 1.5, 1.9, "hit"),
        (AT_LEAST, 1.5, 1.4, 1.9, "undecided"),
        (AT_LEAST, 1.5, 1.3, 1.49, "missed"),
        (EQUALS, 1.0, 0.995, 1.009, "hit"),
        (EQUALS, 1.0, 0.995, 1.02, "undecided"),
        (EQUALS, 1.0, 0.9, 1.1, "undecided"),
        (EQUALS, 1.0, 1.02, 1.08, "missed"),
    ],
)
def test_the_interval_decides_and_not_the_number_inside_it(sense, bound, low, high, expected):
    for value in (low, (low + high) / 2, high):
        assert state(sense, bound, value, low, high, level=0.95) == expected


def test_quartiles_and_one_round_decide_nothing():
    assert state(AT_MOST, 1.03, 0.5, 0.4, 0.6) == "undecided", "quartiles are no interval of the estimate"
    assert state(AT_MOST, 1.03, 0.5, level=0.95) == "undecided"
    target = Target("k.s.x", "T", AT_MOST, 1.0)
    assert judge(target, {"k.s.x": Measure(0.5, level=0.95)}).measured == "0.50x (one round)"


def test_what_was_not_measured_says_why():
    target = Target("cuda.gpu.x", "T", AT_MOST, 1.0)
    assert judge(target, {}).measured == "not measured: no GPU was at hand"
    assert judge(target, {"cuda.gpu.x": Measure(reason="no bf16 unit")}).measured == "not measured: no bf16 unit"
    assert judge(Target("cpu.step.x", "T", AT_MOST, 1.0), {}).measured.startswith("not measured: section 'step'")
    assert judge(target, {}).state == "not measured"


def test_reasons_are_filled_with_measured_numbers():
    target = Target("k.s.x", "T", AT_LEAST, 2.0, why="limit {k.s.limit:.1f}x, {k.s.gone:.1f}", missed="sad")
    measures = {"k.s.x": Measure(1.0, 0.9, 1.1, level=0.95), "k.s.limit": Measure(1.26)}
    verdict = judge(target, measures)
    assert verdict.why == "50 % short of the bound; limit 1.3x, (not measured); sad"
    assert verdict.measured == "1.00x (0.90-1.10)"
    measures["k.s.x"] = Measure(2.5)
    assert judge(target, measures).why == "limit 1.3x, (not measured)"


@pytest.mark.parametrize(
    ("unit", "bound", "value", "texts"),
    [
        ("x", 1.03, Measure(1.0249), ("at most 1.03x", "1.02x")),
        ("samples/s", 10000.0, Measure(12345.6), ("at most 10,000 samples/s", "12,346 samples/s")),
    ],
)
def test_units(unit, bound, value, texts):
    target = Target("k", "T", AT_MOST, bound, unit=unit)
    assert (format_bound(target), judge(target, {"k": value}).measured) == texts


def test_keys_are_distinct_and_every_placeholder_is_replaced():
    assert len({target.key for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        for text in (target.why, target.missed):
            left = fill(text, {match[1]: Measure(1.0) for match in PLACEHOLDER.finditer(text)})
            assert "{" not in left and "}" not in left, text
