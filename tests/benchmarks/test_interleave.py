"""Contestants in turn: who runs when, what is measured, and what is refused."""

import itertools
from functools import partial

import pytest
import torch

from benchmarks.interleave import Comparison, Contestant, Skip, Task, deviation, interleave, local, make_timer, order
from s2d3d.errors import InputError

CPU = torch.device("cpu")


class World:
    """A clock that only contestants move, and a diary of who ran."""

    def __init__(self):
        self.now, self.diary, self.built = 0.0, [], []

    def start(self):
        return local(make_timer(CPU, clock=lambda: self.now))

    def contestant(self, name, seconds, outputs=None, **options):
        """One whose n-th run takes `seconds(n)`."""
        count = itertools.count()

        def run():
            self.now += seconds(next(count))
            self.diary.append(name)

        def build():
            self.built.append(name)
            return Task(run, None if outputs is None else lambda: outputs)

        return Contestant(name, build, **options)


@pytest.fixture
def world():
    return World()


def test_every_contestant_runs_once_a_round_another_one_first(world):
    both = [world.contestant(name, lambda n: 1.0) for name in "abc"]
    interleave("turns", both, start=world.start(), rounds=7, warmup=2)
    turns = ["".join(part) for part in itertools.batched(world.diary, 3)] if hasattr(itertools, "batched") else [
        "".join(world.diary[first : first + 3]) for first in range(0, len(world.diary), 3)
    ]  # fmt: skip
    assert turns[:2] == ["abc", "abc"], "warming up"
    assert turns[2:] == ["abc", "bca", "cab", "cba", "acb", "bac", "abc"]


def test_each_place_is_taken_equally_often():
    firsts = [order("abcd", index) for index in range(8)]
    for place in range(4):
        assert sorted(turn[place] for turn in firsts) == sorted("abcd" * 2)


def test_ratio_is_the_median_of_ratios_of_rounds(world):
    """A disturbance of a round slows both down and leaves the ratio alone; a ratio of medians would not be 2."""
    disturbed = [1.0, 50.0, 1.0, 10.0, 3.0]
    base = world.contestant("base", lambda n: disturbed[n])
    other = world.contestant("other", lambda n: 2 * disturbed[n] + (7.0 if n == 2 else 0.0))
    result = interleave("ratios", [base, other], start=world.start(), rounds=5, warmup=0)
    assert result.times == {"base": disturbed, "other": [2.0, 100.0, 9.0, 20.0, 6.0]}
    assert result.ratio("other").median == 2.0 and result.ratio("other").high == 2.0
    assert result.ratio("base").median == 1.0
    assert result.speedup("other").median == 0.5
    assert result.time("other").median == 9.0 and result.time("base").median == 3.0
    assert result.ratio("base", "other").median == 0.5


def test_short_work_is_repeated_and_its_mean_is_the_time(world):
    short = [world.contestant(name, lambda n, s=s: s) for name, s in (("a", 0.25), ("b", 0.5), ("c", 3.0))]
    result = interleave("short", short, start=world.start(), rounds=2, warmup=1, min_seconds=1.0)
    assert result.repeats == {"a": 4, "b": 2, "c": 1}
    assert [world.diary.count(name) for name in "abc"] == [1 + 2 * 4, 1 + 2 * 2, 1 + 2 * 1]
    assert result.times == {"a": [0.25, 0.25], "b": [0.5, 0.5], "c": [3.0, 3.0]}


def test_results_beyond_tolerance_are_not_compared(world):
    good, bad = torch.ones(3), torch.tensor([1.0, 1.0, 1.01])
    listed = [world.contestant("good", lambda n: 1.0, [good]), world.contestant("bad", lambda n: 1.0, [bad])]
    with pytest.raises(InputError) as error:
        interleave("numbers", listed, start=world.start(), tolerance=1e-3)
    assert "'bad' differ from those of 'good' by 0.01, the tolerance is 0.001" in str(error.value)
    assert "\n" not in str(error.value)
    assert world.diary == [], "refused before anything is timed"
    result = interleave("numbers", listed, start=world.start(), tolerance=0.02)
    assert result.deviations == {"good": None, "bad": pytest.approx(0.01)}


@pytest.mark.parametrize("bad", [[torch.tensor([torch.nan])], [torch.ones(2)], [], [torch.ones(1), torch.ones(1)]])
def test_nan_and_other_shapes_are_other_results(world, bad):
    listed = [world.contestant("a", lambda n: 1.0, [torch.ones(1)]), world.contestant("b", lambda n: 1.0, bad)]
    with pytest.raises(InputError, match="differ"):
        interleave("numbers", listed, start=world.start(), tolerance=1e9)


def test_other_mathematics_is_marked_and_a_lower_precision_has_its_own_tolerance(world):
    one, other = [torch.ones(1)], [torch.tensor([1.4])]
    listed = [
        world.contestant("a", lambda n: 1.0, one),
        world.contestant("routed", lambda n: 1.0, other, same_math=False, note="routed"),
        world.contestant("low", lambda n: 1.0, other, tolerance=0.5),
    ]
    result = interleave("numbers", listed, start=world.start(), rounds=1)
    assert result.deviations == {"a": None, "routed": None, "low": pytest.approx(0.4)}
    assert result.notes == {"routed": "routed"}


def test_who_cannot_take_part_is_named_with_the_reason(world):
    def missing():
        raise Skip("not installed")

    listed = [Contestant("first", missing), world.contestant("a", lambda n: 1.0), world.contestant("b", lambda n: 2.0)]
    result = interleave("some", listed, start=world.start(), rounds=1, base="first")
    assert result.base == "a" and list(result.times) == ["a", "b"]
    assert result.skipped == {"first": "not installed"}
    assert result.missing("a", "first") == "not installed" and result.missing("a", "b") is None
    with pytest.raises(InputError, match="no contestant can take part: not installed"):
        interleave("none", [Contestant("first", missing)], start=world.start())


def test_a_refused_comparison_closes_every_contestant(world):
    closed = []

    class Runner:
        def __init__(self, contestant):
            self.name = contestant.name

        def ready(self):
            pass

        def outputs(self):
            return [torch.tensor([float(self.name)])]

        def close(self):
            closed.append(self.name)

    with pytest.raises(InputError):
        interleave("x", [Contestant("1", list), Contestant("2", list)], start=Runner)
    assert closed == ["1", "2"]


@pytest.mark.parametrize(
    ("names", "options", "message"), [("aa", {}, "share a name: a, a"), ("ab", {"rounds": 0}, "rounds is 0, must be")]
)
def test_bad_arguments(world, names, options, message):
    listed = [world.contestant(name, lambda n: 1.0) for name in names]
    with pytest.raises(InputError, match=message):
        interleave("bad", listed, start=world.start(), **options)
    assert world.built == []


def test_comparison_survives_json():
    result = Comparison("n", "t", "a", {"a": [1.0, 2.0]}, 1e-4, {"a": None}, {}, {"b": "why"}, {}, {"a": 3}, 32)
    assert Comparison(**result.to_dict()) == result


def test_deviation_is_the_largest_of_all_tensors():
    a = [torch.zeros(2, 2), torch.tensor([1.0, -1.0])]
    b = [torch.tensor([[0.0, 0.5], [0.0, 0.0]]), torch.tensor([1.0, -3.0])]
    assert deviation(a, b) == 2.0 and deviation(a, a) == 0.0


def test_the_timer_divides_by_the_runs():
    ticks = iter([10.0, 16.0])
    calls = []
    assert make_timer(CPU, clock=partial(next, ticks))(lambda: calls.append(1), 3) == 2.0
    assert len(calls) == 3
