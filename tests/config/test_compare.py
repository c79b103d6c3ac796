"""Comparing configs: what differs, and which keys a comparison leaves out."""

import pytest

from s2d3d.config import compare
from s2d3d.config.compare import differences, differing_keys, flatten, is_named

LISTS = ("FOLDERS", "SAME_RESULT", "SAME_WEIGHTS", "WHERE_AND_HOW_FAST", "SET_BY_STUDY")


def test_flat_and_nested_mappings_are_one_to_comparisons():
    nested = {"a": {"b": {"c": 1}, "d": [2]}, "e": None, "empty": {}}
    assert flatten(nested) == {"a.b.c": 1, "a.d": [2], "e": None}
    assert flatten(flatten(nested)) == flatten(nested) and not differences(nested, flatten(nested))


def test_differences_of_nested_configs():
    ours, theirs = {"a": {"b": 1, "c": 2}, "d": 3, "log": {"x": 1}}, {"a": {"b": 1, "c": 4}, "e": 5, "log": {"x": 2}}
    expected = {"a.c": (2, 4), "d": (3, None), "e": (None, 5)}
    assert differences(ours, theirs, ("log",)) == expected
    assert differences(theirs, ours, ("log",)) == {key: pair[::-1] for key, pair in expected.items()}
    assert differences(ours, theirs, ("log", "a.c")) == {"d": (3, None), "e": (None, 5)}
    assert differences(ours, theirs, ("lo",)) == expected | {"log.x": (1, 2)}, "not by prefix of a name"


def test_differing_keys_of_several_configs():
    configs = [{"seed": 0, "a": {"b": 1, "c": None}}, {"seed": 1, "a": {"b": 1, "c": None}}, {"seed": 0, "a": {"b": 1}}]
    assert differing_keys(configs) == ["seed", "a.c"]
    assert differing_keys(configs[::2]) == ["a.c"] and differing_keys(configs[:1]) == []


@pytest.mark.parametrize("name", LISTS)
def test_the_lists_name_keys_that_there_are(name, tiny_config):
    config = tiny_config().to_dict()
    keys = flatten(config)
    assert all(name in keys or name in config for name in getattr(compare, name))


def test_what_keeps_the_result_keeps_the_weights():
    assert set(compare.SAME_RESULT) < set(compare.SAME_WEIGHTS)
    assert not any(is_named(key, compare.SAME_RESULT) for key in ("seed", "eval.batch_size", "eval.votes", "optim.lr"))
    assert is_named("eval.batch_size", compare.SAME_WEIGHTS), "a resumed run may be scored otherwise"
