"""Contestants in turn: who runs when, what is measured, and what is refused."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.comparison import Comparison
from benchmarks.interleave import Contestant, Skip, Task, deviation, interleave, local, order
from benchmarks.stats import STARTS
from benchmarks.timing import CPU as CPU_CLOCK
from benchmarks.timing import WALL, Timing, make_timer
from s2d3d.errors import InputError

CPU = torch.device("cpu")


class World:
    """A clock that only contestants move, and a diary of who ran."""

    def __init__(self):
        self.now, self.diary, self.built = 0.0, [], []

    def start(self):
        return local(make_timer(CPU, clock=lambda: self.now, cpu_clock=lambda: self.now / 2))

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
    interleave("turns", both, start=world.start(), rounds=7, warmup=2, restart=False)
    turns = ["".join(part) for part in itertools.batched(world.diary, 3)] if hasattr(itertools, "batched") else [
        "".join(world.diary[first : first + 3]) for first in range(0, len(world.diary), 3)
    ]  # fmt: skip
    assert turns[:2] == ["abc", "abc"], "warming up"
    assert turns[2:] == ["abc", "bca", "cab", "cba", "acb", "bac", "abc"]


@pytest.mark.parametrize(("rounds", "starts"), [(8, [2, 2, 1, 1, 1, 1]), (4, [1, 1, 1, 1]), (13, [3, 2, 2, 2, 2, 2])])
def test_fixed_rounds_are_divided_among_starts(world, rounds, starts):
    both = [world.contestant(name, lambda n: 1.0) for name in "ab"]
    result = interleave("starts", both, start=world.start(), rounds=rounds, warmup=0)
    assert result.starts == starts and world.built == ["a", "b"] * len(starts)
    assert len(result.times["a"]) == rounds


def test_each_place_is_taken_equally_often():
    firsts = [order("abcd", index) for index in range(8)]
    for place in range(4):
        assert sorted(turn[place] for turn in firsts) == sorted("abcd" * 2)


def test_ratio_is_that_of_single_rounds(world):
    """A disturbance of a round slows both down and leaves the ratio alone; a ratio of medians would not be 2."""
    disturbed = [1.0, 50.0, 1.0, 10.0, 3.0]
    base = world.contestant("base", lambda n: disturbed[n])
    other = world.contestant("other", lambda n: 2 * disturbed[n] + (7.0 if n == 2 else 0.0))
    result = interleave("ratios", [base, other], start=world.start(), rounds=5, warmup=0)
    assert result.times == {"base": disturbed, "other": [2.0, 100.0, 9.0, 20.0, 6.0]}
    assert result.ratio("other").value == pytest.approx(2.0) and result.ratio("other").high > 2.0
    assert result.ratio("base").value == 1.0
    assert result.time("other").median == 9.0 and result.time("base").median == 3.0
    assert result.ratio("base", "other").value == pytest.approx(0.5)


def test_short_work_is_repeated_and_its_mean_is_the_time(world):
    short = [world.contestant(name, lambda n, s=s: s) for name, s in (("a", 0.25), ("b", 0.5), ("c", 3.0))]
    result = interleave("short", short, start=world.start(), rounds=2, warmup=1, min_seconds=1.0, restart=False)
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
    result = Comparison(
        "n",
        "t",
        "a",
        {"a": [1.0, 2.0]},
        1e-4,
        {"a": None},
        {},
        {"b": "why"},
        {},
        {"a": 3},
        32,
        {"a": [2.0, 3.0]},
        CPU_CLOCK,
    )
    assert Comparison(**result.to_dict()) == result


def test_deviation_is_the_largest_of_all_tensors():
    a = [torch.zeros(2, 2), torch.tensor([1.0, -1.0])]
    b = [torch.tensor([[0.0, 0.5], [0.0, 0.0]]), torch.tensor([1.0, -3.0])]
    assert deviation(a, b) == 2.0 and deviation(a, a) == 0.0


def test_the_timer_divides_by_the_runs():
    ticks = iter([10.0, 16.0])
    calls = []
    timer = make_timer(CPU, clock=partial(next, ticks), cpu_clock=partial(next, iter([1.0, 4.0])))
    assert timer(lambda: calls.append(1), 3) == Timing(wall=2.0, cpu=1.0)
    assert len(calls) == 3


def test_processor_time_stands_beside_wall_time_and_can_be_what_ratios_refer_to(world):
    def measured(clock):
        both = [world.contestant(name, lambda n, s=s: s) for name, s in (("a", 1.0), ("b", 3.0))]
        return interleave("clocks", both, start=world.start(), rounds=2, warmup=0, clock=clock)

    result = measured(CPU_CLOCK)
    assert result.times == {"a": [1.0] * 2, "b": [3.0] * 2} and result.cpu_times == {"a": [0.5] * 2, "b": [1.5] * 2}
    assert result.seconds("b") == [1.5, 1.5] and result.seconds("b", WALL) == [3.0, 3.0]
    assert measured(WALL).seconds("b") == [3.0, 3.0]
    result.cpu_times["b"] = [5.0, 5.0]
    assert [result.ratio("b", clock=clock).value for clock in (None, WALL)] == pytest.approx([10.0, 3.0])
    assert result.rate("b", items=10).value == pytest.approx(2.0)


# As many rounds as the interval needs


def noisy(world, name, deviation, seed, factor=1.0):
    """Make a contestant whose runs take about `factor` seconds."""
    draws = np.random.default_rng(seed)
    return world.contestant(name, lambda n: factor * float(np.exp(deviation * draws.standard_normal())))


@pytest.mark.parametrize("restart", [True, False])
def test_a_comparison_goes_on_until_its_ratio_is_resolved(world, restart):
    def measured(deviation):
        both = [noisy(world, "a", deviation, 1), noisy(world, "b", deviation, 2, factor=1.1)]
        return interleave("resolve", both, start=world.start(), rounds=4, warmup=0, resolve=0.01, restart=restart)

    calm, wild = measured(0.002), measured(0.02)
    for result in (calm, wild):
        assert result.ratio("b").half_width <= 0.01 and result.ratio("b").low < 1.1 < result.ratio("b").high
        assert sum(result.starts) == len(result.times["a"]) == len(result.cpu_times["b"])
    assert len(calm.times["a"]) < len(wild.times["a"])
    if restart:
        assert calm.starts == [4] * STARTS, "a full cycle of orders by each start"
        assert world.built == ["a", "b"] * (len(calm.starts) + len(wild.starts))
    else:
        assert calm.starts == [4] and len(wild.starts) == 1 and world.built == ["a", "b"] * 2


def test_the_time_over_ends_a_comparison_that_does_not_resolve(world):
    both = [noisy(world, name, 0.5, seed) for seed, name in enumerate("ab")]
    result = interleave("budget", both, start=world.start(), rounds=6, warmup=0, resolve=1e-6, budget=0.0)
    assert result.starts == [4] * STARTS, "fewer starts decide nothing, whatever the budget"
    assert result.ratio("b").half_width > 1e-6


def test_only_the_given_pairs_must_be_resolved(world):
    listed = [noisy(world, "a", 0.001, 1), noisy(world, "b", 0.001, 2), noisy(world, "wild", 1.0, 3)]
    result = interleave("pairs", listed, start=world.start(), warmup=0, resolve=0.01, pairs=[("b", "a"), ("x", "a")])
    assert result.ratio("b").half_width <= 0.01 < result.ratio("wild").half_width


def test_who_could_not_start_again_is_an_error(world):
    names = iter("aba")

    def gone():
        if next(names, None) is None:
            raise Skip("memory is gone")
        return Task(lambda: None)

    with pytest.raises(InputError, match=r"^again: took part before, and cannot again: memory is gone$"):
        interleave(
            "again", [Contestant("a", gone), Contestant("b", gone)], start=local(lambda run, n: Timing(1.0, 1.0)),
            resolve=0.01, rounds=1,
        )  # fmt: skip


# The same against itself


def shared_machine(seed):
    """Return the seconds of work number n on a machine with drift, steps of frequency and bursts of other programs."""
    draws = np.random.default_rng(seed)
    state = {"slow": 1.0, "busy": 0}

    def seconds(n):
        if draws.random() < 0.02:
            state["slow"] = draws.uniform(0.9, 1.2)
        if not state["busy"] and draws.random() < 0.05:
            state["busy"] = draws.geometric(0.3)
        state["busy"] = max(0, state["busy"] - 1)
        burst = draws.uniform(1.2, 3.0) if state["busy"] else 1.0
        return (1 + 1e-3 * n) * state["slow"] * burst * float(np.exp(0.02 * draws.standard_normal()))

    return seconds


def test_the_same_against_itself_is_1_within_its_interval(world):
    """On 40 simulated machines with drift and bursts: 95 % of the intervals hold 1, and they are narrow."""
    inside, widths = 0, []
    for seed in range(40):
        seconds, turn = shared_machine(seed), itertools.count()
        both = [world.contestant(name, lambda n, seconds=seconds, turn=turn: seconds(next(turn))) for name in "ab"]
        ratio = interleave("itself", both, start=world.start(), rounds=80, warmup=0, restart=False).ratio("b")
        inside += ratio.low <= 1 <= ratio.high
        widths.append(ratio.half_width)
        assert abs(ratio.value - 1) < 0.03
    assert inside >= 35, "of 38 expected"
    assert float(np.median(widths)) < 0.015


def test_one_percent_is_found_where_medians_of_times_differ_by_more(world):
    """1 % between two contestants, under a drift of 8 % and bursts: the interval holds 1.01 and excludes 1."""
    seconds, turn = shared_machine(7), itertools.count()
    pair = [
        world.contestant(name, lambda n, factor=factor: factor * seconds(next(turn)))
        for name, factor in (("a", 1.0), ("b", 1.01))
    ]
    ratio = interleave("one", pair, start=world.start(), warmup=0, rounds=9, resolve=0.006, restart=False).ratio("b")
    assert 1 < ratio.low < 1.01 < ratio.high and ratio.half_width <= 0.006


def test_a_real_step_against_itself():
    """A tiny piece of real work by processor time. One interval in 20 may miss 1; three in a row mean a fault."""
    work = torch.rand(96, 96)
    both = [Contestant(name, lambda: Task(lambda: work @ work)) for name in "ab"]

    def holds_1():
        start = local(make_timer(CPU))
        ratio = interleave("real", both, start=start, rounds=24, min_seconds=2e-3, clock=CPU_CLOCK).ratio("b")
        return ratio.low <= 1 <= ratio.high

    assert any(holds_1() for _ in range(3))
