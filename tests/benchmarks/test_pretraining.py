"""The section on pre-training compares steps that compute the same."""

from functools import partial

import pytest
import torch

from benchmarks.pretraining import QUICK, build_step, measure
from benchmarks.section import Settings


def test_steps_of_reference_and_ours_have_the_same_losses():
    build = partial(build_step, QUICK, 2, 32)
    ours, reference, slow, sparse = (
        build(), build(source="reference"), build(source="reference", fused=False), build(experts=2)
    )  # fmt: skip
    starts = [task.outputs()[0] for task in (ours, reference, slow, sparse)]
    for start in starts[1:]:
        torch.testing.assert_close(start, starts[0], rtol=1e-4, atol=1e-6)
    losses = [[float(task.run()) for _ in range(3)] for task in (ours, reference, slow)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][2] < losses[0][0]


def test_the_section_holds_speedup_and_throughput(monkeypatch):
    monkeypatch.setattr(Settings, "apart", Settings.here)
    section = measure(Settings(torch.device("cpu"), num_threads=1, quick=True, rounds=1))
    for key in ("A", "B", "s2d", "samples_per_second", "reference_samples_per_second"):
        assert section.measures[f"cpu.pretraining.{key}"].value > 0, key
