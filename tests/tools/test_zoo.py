"""The compatibility page: no family trains wrong, and what the page says of each."""

import importlib

import pytest
import torch
from torch import nn

from benchmarks.training_pass import Residual
from benchmarks.zoo import DEFAULT, examine_named, families
from benchmarks.zoo.check import Row, examine
from benchmarks.zoo.family import Family
from benchmarks.zoo.page import page

FAMILIES = {family.title: family for family in families()}
EXPECTED = {"timm:convnextv2_atto": "refused", "transformers:mixtral": "refused"}
"""Of the families tried by default, those that are not exact."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", DEFAULT)
def test_cheap_families_of_every_kind(title):
    row = examine_named(title)
    assert row.status == EXPECTED.get(title, "exact"), row.line()
    if row.status == "exact":
        assert row.num_ffns > 0 and row.strict and row.training_error < 1e-4 and row.merge_error < 1e-4
    else:
        assert row.reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_family_trains_wrong():
    rows = [examine(family) for family in FAMILIES.values()]
    assert [row.line() for row in rows if row.status == "wrong"] == []
    assert len({(row.source, row.name) for row in rows}) >= 150


def test_names_are_distinct_and_at_least_150():
    assert len(FAMILIES) == len(families()) >= 150


def plain():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def family(make, inputs=lambda batch: torch.randn(batch, 7, 8)):
    return Family("here", "net", lambda: nn.Sequential(Residual(make())), inputs, ("*.mlp",))


def test_a_fault_of_the_training_pass_is_called_wrong(monkeypatch):
    check = importlib.import_module("benchmarks.zoo.check")
    monkeypatch.setattr(check, "pass_error", lambda *_, **__: 0.02)
    assert examine(family(plain)).status == "wrong"


def test_what_cannot_be_built_or_converted_says_why():
    def missing():
        raise ImportError("No module named 'nowhere'")

    assert examine(family(missing)).line() == "here:net 0 not built No module named 'nowhere'"
    row = examine(family(lambda: nn.Sequential(nn.Linear(8, 8), nn.Softmax(1), nn.Linear(8, 8))))
    assert row.status == "refused" and "mixes tokens" in row.reason


def test_page_has_a_row_for_each_family_and_counts_them():
    rows = [
        Row("timm", "vit", "default", "exact", "", 2, 3e-16, 0.0, True),
        Row("timm", "odd", "*.mlp", "refused", "module 'a|b' mixes"),
    ]
    text = page(rows, "abc123")
    assert "| vit | default | 2 | 3e-16 | 0 | yes | exact |" in text
    assert "| odd | \\*.mlp |  |  |  |  | refused: module 'a\\|b' mixes |" in text
    assert "2 families, 2 of them built: 1 exact, 1 refused, 0 no FFN found, 0 wrong, 0 not built" in text
    assert "commit abc123" in text


def test_the_command_writes_the_page_and_refuses_to_replace_it(tmp_path, tool, capsys):
    main = tool("zoo").main
    output = tmp_path / "page.md"
    assert main(["--only", "torch:TransformerEncoder", "--output", str(output)]) == 0
    assert "| TransformerEncoder | default | 2 |" in output.read_text()
    assert main(["--only", "torch:*", "--output", str(output)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["--only", "nothing"]) == 1
    assert "no family matches nothing" in capsys.readouterr().err


def test_the_page_in_docs_has_every_family_and_none_is_wrong(repository):
    text = (repository / "docs" / "compatibility.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for name in FAMILIES.values():
        assert any(line.startswith(f"| {name.name} |") for line in rows), name.title
    assert ", 0 wrong," in text and not any("| wrong |" in line or "| wrong:" in line for line in rows[12:])
