"""The latency tables: every form computes the same, the ratios refer to the dense architecture."""

import re

import pytest
import torch

from benchmarks import latency
from benchmarks.latency import AGAIN, DENSE, FOLDED, MERGED, latency_page, measure_latency, without_ties
from s2d3d import create_model
from s2d3d.errors import InputError

TINY = dict(trans_dim=24, depth=1, num_group=4, group_size=8, encoder_dims=16, encoder_width=8)


@pytest.fixture(autouse=True)
def _in_short(monkeypatch):
    monkeypatch.setattr(latency, "MIN_SECONDS", 0.0)


@pytest.fixture
def model():
    return create_model("point_bert_tiny", num_classes=4, **TINY).eval()


def test_the_page_has_every_form_and_batch(model, monkeypatch):
    monkeypatch.setattr(latency, "FORMATS", {"torchscript": ".pt"})  # the others take their time to export
    payload = {"model": {"name": "point_bert_tiny", "num_classes": 4, "in_channels": 3, "kwargs": TINY}}
    page = latency_page(model, payload, torch.rand(3, 64, 3), rounds=1)
    titles = re.findall(r"^\*\*(\d+ clouds? of \d+ points), ", page, flags=re.MULTILINE)
    assert titles == ["1 cloud of 64 points", "32 clouds of 64 points"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    deviation = cells[0].index("deviation")
    rows = {name: [row for row in cells if row[0] == name] for name in (DENSE, AGAIN, MERGED, FOLDED, "TorchScript")}
    assert all(len(found) == 2 for found in rows.values())
    for name, value in ((DENSE, "base"), (AGAIN, "0.0e+00"), (MERGED, "0.0e+00")):
        assert all(row[deviation] == value for row in rows[name])
    assert all(float(row[deviation]) < 1e-4 for row in rows["TorchScript"])
    assert page.startswith("# Latency of point_bert_tiny\n") and "onnxruntime " in page
    assert "- processor: " in page and "load average before" in page


def test_other_weights_are_refused_and_a_tie_is_left_out(model):
    points = torch.rand(16, 64, 3)

    def ties(batch):
        return model(batch) + (batch[:, :1, 0] == points[5, 0, 0]).float() * 1e-2

    kept = without_ties({"model": model, "ties": ties}, points)
    assert torch.equal(kept, points[[index for index in range(16) if index != 5]])
    comparison, *_ = measure_latency({"model": model, "ties": ties}, kept, rounds=2, batches=(4, 20))
    assert len(comparison.times["ties"]) == 2 and comparison.base == "model"

    other = create_model("point_bert_tiny", num_classes=4, **TINY).eval()
    forms = {"model": model, "other": other}
    assert torch.equal(without_ties(forms, points), points), "so many are no ties"
    with pytest.raises(InputError, match="results of 'other' differ from those of 'model'"):
        measure_latency(forms, points, rounds=1)
