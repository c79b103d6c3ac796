"""tools/benchmark.py latency: the forms of a trained model, timed in turn."""

import re

import pytest

from benchmarks import latency


@pytest.fixture(autouse=True)
def _in_short(monkeypatch):
    monkeypatch.setattr(latency, "FORMATS", {"torchscript": ".pt"})  # the others take their time to export
    monkeypatch.setattr(latency, "MIN_SECONDS", 0.0)


def test_the_tables_of_a_merged_and_a_sparse_checkpoint(call, trained, tmp_path):
    page = tmp_path / "latency.md"
    result = call(
        "benchmark", "latency", "--checkpoint", trained.merged, "--rounds", 1, "--clouds", 20, "--output", page
    )
    assert result.code == 0 and "error" not in result.err, result.err
    for name in ("dense", "dense again", "merged", "merged, BatchNorm folded", "TorchScript"):
        assert len(re.findall(rf"^\| {name} +\|", page.read_text(), flags=re.MULTILINE)) == 2
    assert page.read_text() in result.out and result.out.endswith(f"written to {page}\n")
    assert page.read_text().endswith("\n\nmeasured on 20 test clouds of shapes\n")
    sparse = ("benchmark", "latency", "--checkpoint", trained.last, "--merge", "--num-points", 64, "--rounds", 1)
    result = call(*sparse, "--clouds", 3)
    assert result.code == 0 and "1 cloud of 64 points" in result.out and "| merged" in result.out, result.err


def test_what_it_refuses(refuses, trained, tmp_path):
    timed = ("benchmark", "latency", "--checkpoint")
    needs = "has experts, which only training needs; pass --merge to merge them"
    assert refuses(*timed, trained.last) == f"{trained.last}: {needs}"
    assert refuses(*timed, trained.merged, "--rounds", 0) == "--rounds is 0, must be at least 1"
    assert refuses(*timed, trained.merged, "train.epochs=3").startswith("override 'train.epochs=3': has no effect")
    assert refuses(*timed, trained.merged, "data.root=gone", "--num-points", 64).startswith("gone")
    output = ("--output", trained.merged, "--force")
    assert refuses(*timed, trained.merged, *output) == f"{trained.merged}: is what is read; choose another output"
