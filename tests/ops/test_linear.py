"""The linear layer over many rows: equal to the ordinary product in all derivatives, and used only where it pays."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from s2d3d.ops import linear as ops_linear
from s2d3d.ops.linear import MIN_COLUMNS, MIN_ROWS, PART, narrow_linear, tall_linear

needs_onednn = pytest.mark.skipif(not ops_linear._HAS_ONEDNN, reason="this torch was built without oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """The products that took the way of oneDNN."""
    seen = []
    real = ops_linear._onednn
    monkeypatch.setattr(ops_linear, "_onednn", lambda x, weight: seen.append(x.shape) or real(x, weight))
    return seen


def operands(rows=MIN_ROWS, inputs=24, outputs=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, 2 * inputs, generator=generator).to(dtype)
    return x, weight[:, inputs:]  # not contiguous, as in the encoder


@needs_onednn
@pytest.mark.parametrize("x_learns", [False, True])
@pytest.mark.parametrize("weight_learns", [False, True])
def test_equals_the_product_in_float64(calls, x_learns, weight_learns):
    x, weight = operands()
    exact = [t.double().detach().requires_grad_(learns) for t, learns in ((x, x_learns), (weight, weight_learns))]
    ours = [t.detach().requires_grad_(learns) for t, learns in ((x, x_learns), (weight, weight_learns))]
    expected, result = F.linear(*exact), tall_linear(*ours)
    assert calls == [x.shape]
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)
    if not (x_learns or weight_learns):
        assert not result.requires_grad
        return
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(upstream.double())
    result.backward(upstream)
    for leaf, reference in zip(ours, exact):
        if reference.grad is None:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-4, atol=1e-3)


@needs_onednn
def test_second_derivatives(calls):
    """The gradient of a squared gradient norm, as in a gradient penalty."""

    def penalty(linear, dtype):
        x, weight = (t.detach().requires_grad_() for t in operands(dtype=dtype))
        (slope,) = torch.autograd.grad(linear(x, weight).tanh().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return weight.grad.double()

    torch.testing.assert_close(
        penalty(tall_linear, torch.float32), penalty(F.linear, torch.float64), rtol=1e-3, atol=1e-2
    )
    assert calls


@pytest.mark.parametrize(
    "case",
    ["few rows", "few inputs", "few outputs", "float64", "autocast", "switched off", "compiling", "tracing"],
)
def test_elsewhere_it_is_the_ordinary_layer(calls, monkeypatch, case):
    x, weight = operands(
        rows=MIN_ROWS - 1 if case == "few rows" else MIN_ROWS,
        inputs=MIN_COLUMNS - 1 if case == "few inputs" else 24,
        outputs=MIN_COLUMNS - 1 if case == "few outputs" else 40,
        dtype=torch.float64 if case == "float64" else torch.float32,
    )
    if case == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if case == "tracing":
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    if case == "switched off":
        monkeypatch.setattr(ops_linear, "_HAS_ONEDNN", False)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        torch.testing.assert_close(tall_linear(x, weight), F.linear(x, weight), rtol=0, atol=0)
    assert not calls


@needs_onednn
def test_the_group_encoder_uses_it(calls):
    """Three of its products, once in the forward pass and, for the inputs' gradients, once in the backward pass."""
    from s2d3d.models.layers import GroupEncoder

    encoder = GroupEncoder(3, 32, encoder_width=16)
    encoder(torch.randn(2, MIN_ROWS // 16, 8, 3)).sum().backward()
    assert len(calls) == 6


@needs_onednn
def test_operations_are_counted(calls):
    x, weight = (t.requires_grad_() for t in operands())
    with FlopCounterMode(display=False) as counter:
        tall_linear(x, weight).sum().backward()
    assert calls
    assert counter.get_total_flops() == 3 * 2 * x.shape[0] * weight.numel()


@pytest.mark.parametrize("rows", [4 * PART, 4 * PART + 1, PART - 1, 0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_few_columns_equal_the_ordinary_layer(rows, with_bias):
    x, weight = (t.double().detach().requires_grad_() for t in operands(rows=rows, inputs=3, outputs=20))
    bias = torch.linspace(-1, 1, 20, dtype=torch.float64, requires_grad=True) if with_bias else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    upstream = torch.randn(rows, 20, generator=torch.Generator().manual_seed(1)).double()
    slopes = []
    for linear in (F.linear, narrow_linear):
        result = linear(x, weight, bias)
        slopes.append([result, *torch.autograd.grad((result.tanh() * upstream).sum(), leaves)])
    for expected, found in zip(*slopes):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
