"""One seed, one result, bit for bit on a CPU, however the batches are prepared."""

import pytest
import torch

from s2d3d import Trainer, load_checkpoint
from s2d3d.datasets import BatchLoader


@pytest.fixture
def train(tiny_config, tmp_path, monkeypatch):
    """Train with a number of prepared batches; return weights and metrics."""

    def run(name: str, prefetch: int, *overrides: str):
        original = BatchLoader.__init__

        def built(self, *arguments, **options):
            original(self, *arguments, **{**options, "prefetch": prefetch})

        with monkeypatch.context() as patch:
            patch.setattr(BatchLoader, "__init__", built)
            trainer = Trainer(tiny_config(f"output_dir={tmp_path / name}", "train.batch_size=32", *overrides))
            trainer.fit()
        assert trainer.data.train.prefetch == prefetch
        return load_checkpoint(trainer.folder.last)["state_dict"], trainer.reports["merged"]

    return run


def test_prefetching_streaming_and_repeating_change_nothing(train):
    weights, report = train("plain", 0)
    variants = {
        "again": (0, ()),
        "one batch ahead": (1, ()),
        "five batches ahead": (5, ()),
        "streamed": (2, ("data.memory_budget_gb=1e-9",)),
        "fewer points": (2, ("data.num_points=100",)),
        "fewer points, streamed": (0, ("data.num_points=100", "data.memory_budget_gb=1e-9")),
    }
    results = {name: train(name, prefetch, *overrides) for name, (prefetch, overrides) in variants.items()}
    for name in ("again", "one batch ahead", "five batches ahead", "streamed"):
        other, other_report = results[name]
        assert other_report == report, name
        assert all(torch.equal(weights[key], other[key]) for key in weights), name
    stored, streamed = results["fewer points"], results["fewer points, streamed"]
    assert stored[1] == streamed[1] and all(torch.equal(stored[0][key], streamed[0][key]) for key in weights)
    assert not all(torch.equal(weights[key], stored[0][key]) for key in weights), "the comparison can fail"
