"""The examples run for a few steps as a user runs them: merging changes nothing, the result fits the stock class."""

import importlib.util
import re

import pytest

EXPECTED = {
    "timm_vit_s2d": ("blocks.1.mlp, blocks.3.mlp", 40, 0.4),
    "hf_bert_s2d": ("bert.encoder.layer.1, bert.encoder.layer.3", 6, 0.10),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_example_trains_merges_and_loads_into_the_stock_class(name, repository, capsys):
    pytest.importorskip({"timm_vit_s2d": "sklearn", "hf_bert_s2d": "transformers"}[name])
    experts, steps, chance = EXPECTED[name]
    spec = importlib.util.spec_from_file_location(f"examples_{name}", repository / "examples" / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(["--steps", str(steps)]) == 0

    first, *rows = capsys.readouterr().out.splitlines()
    assert first == f"experts in {experts}"
    read = (re.fullmatch(r"(.+?) +([\d,.]+)(?: %.*)?", row) for row in rows)
    values = {match[1]: float(match[2].replace(",", "")) for match in read}
    assert values.keys() == {
        "dense baseline",
        "S2D before merge",
        "S2D merged",
        "parameters while training",
        "parameters after",
    }
    assert values["S2D before merge"] == values["S2D merged"]
    assert 100 * chance < values["S2D merged"] <= 100
    assert values["parameters while training"] > values["parameters after"]
    # The example itself loads the merged weights strictly; what it counts afterwards is the stock model.
    assert values["parameters after"] == sum(p.numel() for p in example.build_model().parameters())
