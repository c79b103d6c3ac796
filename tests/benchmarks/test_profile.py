"""The profile of a training step counts its operations and matrix products."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import profile
from benchmarks.presets import PUBLIC_BERT
from benchmarks.section import Settings
from benchmarks.tables import section_text
from benchmarks.training import build_step
from s2d3d.errors import InputError


def recorded(work):
    with profile.Recorder() as recorder:
        work()
    return recorder


def test_products_of_a_linear_layer_are_one_forward_and_two_backward():
    layer, x = nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    recorder = recorded(lambda: layer(x).sum().backward())
    shapes = sorted(
        tuple(tuple(value.shape) for value in arguments if isinstance(value, profile.Operand))
        for _, arguments in recorder.products
    )
    assert shapes == [((5,), (7, 3), (3, 5)), ((5, 7), (7, 3)), ((7, 5), (5, 3))]
    assert recorder.calls["aten.addmm"] == 1 and recorder.seconds["aten.addmm"] > 0


def test_products_of_an_attention_are_two_forward_and_four_backward():
    query, key, value = (torch.randn(2, 3, tokens, 4, requires_grad=True) for tokens in (5, 6, 6))
    recorder = recorded(lambda: F.scaled_dot_product_attention(query, key, value).sum().backward())
    counts = {tuple(operand.shape for operand in operands): n for (_, operands), n in recorder.products.items()}
    assert counts == {((6, 5, 4), (6, 4, 6)): 2, ((6, 5, 6), (6, 6, 4)): 4}


def test_an_expanded_operand_stays_one():
    parts, columns = torch.randn(5, 7, 3), torch.randn(3, 4)
    recorder = recorded(lambda: torch.bmm(parts, columns.expand(5, -1, -1)))
    assert recorded(profile.build_products(recorder.products).run).products == recorder.products
    assert [operand.strides for _, operands in recorder.products for operand in operands] == [(21, 3, 1), (0, 4, 1)]


def test_the_products_are_done_as_often_as_in_the_step_and_alone():
    spec = PUBLIC_BERT.quick
    rows, products = profile.profile(spec, 1)
    alone = recorded(profile.build_products(products).run)
    assert alone.products == products and sum(products.values()) > 50
    shares = [float(row[3].removesuffix(" %")) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.06 * len(rows))
    task = build_step(spec)
    task.run()  # the first step makes the optimizer's state as well
    step = recorded(task.run)
    assert sum(int(row[1].replace(",", "")) for row in rows[:-1]) == sum(step.calls.values())


def test_the_section_holds_shares_and_tables(monkeypatch):
    monkeypatch.setattr(profile, "SMALL_BERT", PUBLIC_BERT)
    section = profile.measure(Settings(torch.device("cpu"), num_threads=1, quick=True, rounds=1))
    for name in ("point_bert", "point_bert_small", "point_bert_s2d"):
        assert section.measures[f"cpu.profile.{name}.attained"].value > 0
    text = section_text(type(section).from_dict(section.to_dict()))
    assert "**point_bert, one training step of batch 2, by operation**\n\n| operation" in text


def test_a_gpu_is_refused():
    with pytest.raises(InputError, match=r"^benchmark profile measures operations of a CPU"):
        profile.measure(Settings(torch.device("cuda"), 1))
