"""The gated baseline against a loop over tokens: gates, choices, capacity, balance loss; how EWA and merge treat it."""

import copy
import io
import logging
import math
import sys

import pytest
import torch
from cases import quick
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from s2d3d.s2d import (
    EWA,
    MoFConfig,
    TopKMoE,
    apply_ewa_,
    balance_loss,
    convert_to_mof_,
    is_sparse,
    merge_experts,
)
from s2d3d.s2d.analysis import expert_divergence
from s2d3d.s2d.dispatch import chosen_partition, native_scatter_sum, scatter_backend

FFNS = {
    "mlp": lambda: Mlp(6, 12),
    "glu": lambda: GluMlp(6, 12, bias=False),
    "swiglu_norm": lambda: SwiGLU(6, 12, norm_layer=nn.LayerNorm),
}


@pytest.fixture(params=FFNS)
def ffn(request):
    return FFNS[request.param]().double()


def spread_(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move experts and routers apart, so that choices differ and matter."""
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, TopKMoE)):
            for parameter in layer.expert_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=scale)
            layer.router.weight.normal_()
    return model


def loop(layer: TopKMoE, ffn: nn.Module, x: torch.Tensor, capacity: int | None = None) -> tuple[torch.Tensor, int]:
    """Route every token of x (..., C) by itself; return the outputs and how many choices were dropped."""
    tokens = x.reshape(-1, x.shape[-1])
    gates = [torch.softmax(layer.router.weight @ token, dim=0) for token in tokens]
    choices = [sorted(range(layer.num_experts), key=lambda i, g=gate: -g.tolist()[i])[: layer.top_k] for gate in gates]
    load, dropped = [0] * layer.num_experts, 0
    outputs = [torch.zeros(x.shape[-1], dtype=x.dtype) for _ in tokens]
    for rank in range(layer.top_k):  # first choices are served first
        for index, token in enumerate(tokens):
            expert = choices[index][rank]
            if capacity is not None and load[expert] == capacity:
                dropped += 1
                continue
            load[expert] += 1
            gate = gates[index][expert]
            if layer.renormalize:
                gate = gate / sum(gates[index][i] for i in choices[index])
            outputs[index] = outputs[index] + gate * functional_call(ffn, weights_of(layer, expert), token)
    return torch.stack(outputs).view(x.shape), dropped


def weights_of(layer: TopKMoE, expert: int) -> dict[str, torch.Tensor]:
    """One expert's weights in the layout of the FFN, differentiable views of the layer's own parameters."""
    stacked = {id(parameter) for parameter in layer.expert_parameters()}
    weights = {}
    for name, parameter in layer.named_parameters():
        if id(parameter) in stacked:
            weights[name] = parameter[expert].t() if name.endswith("weight") else parameter[expert]
        elif not name.startswith("router."):
            weights[name] = parameter
    return weights


def gradients(layer: nn.Module, x: torch.Tensor, run) -> tuple[torch.Tensor, list[torch.Tensor]]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = run(x)
    (output * torch.arange(output.numel(), dtype=x.dtype).sin().view_as(output)).sum().backward()
    return output.detach(), [x.grad, *(p.grad.clone() for p in layer.parameters())]


# Against the loop


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("top_k", "renormalize"), quick(3, [(1, None), (2, None), (2, False), (1, True), (4, None)]))
def test_layer_equals_a_loop_over_tokens_forward_and_gradients(top_k, renormalize, mode, ffn):
    layer = spread_(TopKMoE(ffn, 4, top_k, renormalize=renormalize)).train(mode)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    output, grads = gradients(layer, x, layer)
    expected, expected_grads = gradients(layer, x, lambda x: loop(layer, ffn, x)[0])
    torch.testing.assert_close(output, expected)
    for gradient, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(gradient, other)
    # Not a vacuous pass: it matters which expert a token gets.
    assert not torch.allclose(output, ffn(x), atol=1e-2)


@pytest.mark.parametrize("capacity_factor", [0.3, 0.75, 1.0, 4.0])
def test_full_experts_drop_later_tokens_and_second_choices_first(capacity_factor):
    ffn = Mlp(6, 12).double()
    layer = spread_(TopKMoE(ffn, 4, 2, capacity_factor=capacity_factor))
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    capacity = math.ceil(capacity_factor * 2 * 21 / 4)
    expected, dropped = loop(layer, ffn, x, capacity)
    output, grads = gradients(layer, x, layer)
    torch.testing.assert_close(output, expected)
    assert float(layer.dropped_fraction) == pytest.approx(dropped / 42, abs=1e-6)
    assert (dropped > 0) == (capacity_factor < 4)
    _, expected_grads = gradients(layer, x, lambda x: loop(layer, ffn, x, capacity)[0])
    for gradient, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(gradient, other)


def test_evaluation_drops_nothing_so_a_sample_does_not_depend_on_its_batch():
    layer = spread_(TopKMoE(Mlp(6, 12), 4, 1, capacity_factor=0.25))
    x = torch.randn(8, 5, 6)
    layer(x)
    assert layer.dropped_fraction > 0
    together = layer.eval()(x)
    assert layer.dropped_fraction == 0
    torch.testing.assert_close(together[:1], layer(x[:1]))


@given(
    st.integers(1, 6).flatmap(lambda k: st.tuples(st.integers(1, 30), st.just(k), st.integers(1, k))),
    st.one_of(st.none(), st.integers(1, 8)),
    st.integers(0, 1000),
)
def test_partition_gives_slots_in_order_of_choice_and_token(counts, capacity, seed):
    num_tokens, num_experts, top_k = counts
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    partition, served = chosen_partition(chosen, num_experts, capacity)

    slots = [[] for _ in range(num_experts)]
    for rank in range(top_k):
        for token in range(num_tokens):
            expert = int(chosen[token, rank])
            if capacity is None or len(slots[expert]) < capacity:
                slots[expert].append(rank * num_tokens + token)
    size = max(map(len, slots)) if capacity is None else capacity
    idle = num_tokens * top_k
    expected = [choice for choices in slots for choice in choices + [idle] * (size - len(choices))]
    assert served.tolist() == expected
    assert partition.target.tolist() == [num_tokens if c == idle else c % num_tokens for c in expected]
    busy = served < idle
    assert torch.equal(partition.source[busy], partition.target[busy])
    assert ((partition.source >= 0) & (partition.source < num_tokens)).all()


# Against the dense FFN


def test_one_expert_is_the_dense_ffn_forward_and_gradients(ffn):
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    layer = TopKMoE(ffn, 1, 1)
    output, grads = gradients(layer, x, layer)
    dense_output, dense_grads = gradients(ffn, x, ffn)
    torch.testing.assert_close(output, dense_output)
    torch.testing.assert_close(grads[0], dense_grads[0])
    assert float(layer.balance_loss) == 1


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_identical_experts_are_the_dense_ffn_times_the_sum_of_the_chosen_gates(top_k, ffn):
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    plain = TopKMoE(ffn, 4, top_k, renormalize=False)
    gates = torch.softmax(x @ plain.router.weight.t(), -1).topk(top_k).values.sum(-1, keepdim=True)
    torch.testing.assert_close(plain(x), gates * ffn(x))
    torch.testing.assert_close(TopKMoE(ffn, 4, top_k, renormalize=True)(x), ffn(x))


def test_gates_are_renormalised_by_default_where_that_leaves_the_router_a_gradient():
    assert [TopKMoE(Mlp(6, 12), 4, top_k).renormalize for top_k in (1, 2, 4)] == [False, True, True]
    for top_k in (1, 2):
        layer = spread_(TopKMoE(Mlp(6, 12), 4, top_k))
        layer(torch.randn(9, 6)).square().sum().backward()
        assert layer.router.weight.grad.abs().max() > 1e-3


# Balance loss


def test_balance_loss_is_that_of_a_count():
    layer = spread_(TopKMoE(Mlp(6, 12).double(), 4, 2))
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    layer(x)
    probabilities = torch.softmax(x.view(-1, 6) @ layer.router.weight.t(), -1)
    chosen = probabilities.topk(2).indices.flatten().tolist()
    expected = 4 * sum(chosen.count(i) / len(chosen) * probabilities[:, i].mean() for i in range(4))
    torch.testing.assert_close(layer.balance_loss, expected)
    assert layer.balance_loss > 1.01


def test_balance_loss_of_a_uniform_and_of_a_collapsed_router():
    layer = TopKMoE(Mlp(6, 12), 4, 1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer(torch.randn(32, 6))
        assert float(layer.balance_loss) == pytest.approx(1)  # whatever a tie is broken by
        layer.router.weight[2] = 100
        layer(torch.rand(32, 6) + 1)
        assert float(layer.balance_loss) == pytest.approx(4)


def test_balance_loss_alone_brings_a_collapsed_router_back_to_balance():
    layer, x = TopKMoE(Mlp(6, 12), 4, 1), torch.randn(256, 6)
    x[:, 0] = 1
    with torch.no_grad():
        layer.router.weight[1, 0] = 3
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        layer(x)
        layer.balance_loss.backward()
        optimizer.step()
        losses.append(float(layer.balance_loss))
    assert losses[0] > 2.5 and losses[-1] < 1.1
    assert layer.fc1.weight.grad is None  # it teaches the router only


def test_helper_adds_up_the_layers_of_a_model(tiny_vit):
    model = tiny_vit(depth=4)
    convert_to_mof_(model, MoFConfig(kind="topk"))
    layers = [m for m in model.modules() if isinstance(m, TopKMoE)]
    with pytest.raises(ValueError, match="has not run yet: call the model first"):
        balance_loss(model)
    model(torch.randn(2, 3, 16, 16))
    assert len(layers) == 2
    torch.testing.assert_close(balance_loss(model), layers[0].balance_loss + layers[1].balance_loss)
    with pytest.raises(ValueError, match="has no TopKMoE layer"):
        balance_loss(tiny_vit())


# Numerics and machinery


def test_layer_gives_the_same_bits_with_and_without_torch_scatter(monkeypatch):
    pytest.importorskip("torch_scatter")
    layer, x = spread_(TopKMoE(Mlp(6, 12), 4, 2)), torch.randn(2, 5, 6)
    results = []
    for absent in (False, True):
        if absent:
            monkeypatch.setitem(sys.modules, "torch_scatter", None)
        scatter_backend.cache_clear()
        assert (scatter_backend() is native_scatter_sum) == absent
        output, grads = gradients(layer, x, layer)
        results.append([output, *grads])
    scatter_backend.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_router_is_computed_in_float32_at_least(dtype):
    layer = spread_(TopKMoE(Mlp(6, 12).to(dtype), 4, 2))
    wide = torch.promote_types(dtype, torch.float32)
    assert layer.router.weight.dtype == wide
    x = torch.randn(2, 5, 6, dtype=dtype)
    assert layer(x).dtype == dtype and layer.balance_loss.dtype == wide
    exact = torch.softmax(x.view(-1, 6).to(wide) @ layer.router.weight.t(), -1)
    torch.testing.assert_close(layer._gate(x.view(-1, 6)), exact)


def test_autocast_spares_the_router_and_keeps_the_dtype_of_the_dense_ffn():
    ffn, x = Mlp(6, 12), torch.randn(2, 5, 6)
    layer = TopKMoE(ffn, 4, 2)
    layer(x)
    exact = layer.balance_loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        assert output.dtype == ffn(x).dtype == torch.bfloat16
    assert layer.balance_loss.dtype == torch.float32
    torch.testing.assert_close(layer.balance_loss, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.float(), ffn(x), rtol=0.02, atol=0.02)


def test_activation_checkpointing_gives_the_same_gradients():
    layer, x = spread_(TopKMoE(Mlp(6, 12), 4, 2)), torch.randn(3, 7, 6)

    def with_balance(run):
        return lambda x: run(x) + layer.balance_loss

    plain = gradients(layer, x, with_balance(layer))
    recomputed = gradients(layer, x, with_balance(lambda x: checkpoint(layer, x, use_reentrant=False)))
    assert torch.equal(plain[0], recomputed[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], recomputed[1], strict=True))


def test_layer_is_copied_and_saved_after_a_forward_pass_with_gradients():
    layer, x = spread_(TopKMoE(Mlp(6, 12), 4, 2)), torch.randn(3, 6)
    before = layer(x)
    assert layer.balance_loss.requires_grad
    clone = copy.deepcopy(layer)
    assert clone.balance_loss is None and layer.balance_loss is not None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (clone, torch.load(file, weights_only=False)):
        assert torch.equal(other(x), before)


def test_state_dict_holds_stacked_experts_and_the_router():
    shapes = {name: tuple(tensor.shape) for name, tensor in TopKMoE(Mlp(6, 12), 4).state_dict().items()}
    experts = {"fc1.weight": (4, 6, 12), "fc1.bias": (4, 12), "fc2.weight": (4, 12, 6), "fc2.bias": (4, 6)}
    assert shapes == experts | {"router.weight": (4, 6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"top_k is 0, must be in \[1, num_experts\] = \[1, 4\]"),
        ({"top_k": 5}, r"top_k is 5, must be in \[1, num_experts\] = \[1, 4\]"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0, must be greater than 0, or None"),
        ({"capacity_factor": math.inf}, "capacity_factor is inf"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TopKMoE(Mlp(6, 12), 4, **options)
    with pytest.raises(ValueError, match=message):
        MoFConfig(kind="topk", **options)
    MoFConfig(num_experts=1, **options)  # keys of the router do not bind other kinds


def test_no_token_is_an_error():
    with pytest.raises(ValueError, match="0 tokens"):
        TopKMoE(Mlp(6, 12), 4)(torch.randn(0, 6))


# Conversion, averaging, merging


@pytest.fixture
def routed_vit(tiny_vit):
    model = tiny_vit(depth=4)
    dense = copy.deepcopy(model)
    names = convert_to_mof_(model, MoFConfig(num_experts=3, kind="topk", top_k=2, capacity_factor=1.5))
    assert names == ["blocks.1.mlp", "blocks.3.mlp"]
    return spread_(model), dense


def test_conversion_makes_layers_as_configured(routed_vit, tiny_vit):
    model, _ = routed_vit
    layer = model.blocks[1].mlp
    assert isinstance(layer, TopKMoE) and is_sparse(model)
    assert (layer.num_experts, layer.top_k, layer.capacity_factor) == (3, 2, 1.5)
    with pytest.raises(ValueError, match="has experts already"):
        convert_to_mof_(model)
    with pytest.raises(ValueError, match="kind is 'moe', must be one of rup, topk"):
        MoFConfig(kind="moe")


def test_copied_experts_leave_a_converted_model_as_it_was(tiny_vit):
    model, images = tiny_vit(), torch.randn(2, 3, 16, 16)
    before = model(images)
    convert_to_mof_(model, MoFConfig(kind="topk"))
    torch.testing.assert_close(model.train()(images), before)
    torch.testing.assert_close(model.eval()(images), before)


def test_averaging_moves_the_experts_and_leaves_the_routers(routed_vit):
    model, _ = routed_vit
    routers = {n: p.clone() for n, p in model.named_parameters() if "router" in n}
    before = expert_divergence(model)
    assert apply_ewa_(model, 0.2) == 2
    for name, divergence in expert_divergence(model).items():
        assert divergence == pytest.approx(before[name] * (1 - 0.2 * 3 / 2), rel=1e-4)
    ewa = EWA(model, share_rate=2 / 3, schedule="constant", total_steps=1)
    assert len(ewa.layers) == 2
    ewa.step()
    assert max(expert_divergence(model).values()) < 1e-6
    assert len(routers) == 2
    assert all(torch.equal(model.get_parameter(name), router) for name, router in routers.items())


def test_merge_refuses_routed_experts_and_leaves_the_model(routed_vit):
    model, _ = routed_vit
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for inplace in (False, True):
        with pytest.raises(ValueError, match=r"'blocks\.1\.mlp' is a TopKMoE.*allow_average=True .* an approximation"):
            merge_experts(model, inplace=inplace)
    assert is_sparse(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("inplace", [False, True])
def test_allowed_average_is_the_mean_of_the_experts_and_says_that_it_approximates(inplace, routed_vit, caplog):
    model, dense = routed_vit
    images = torch.randn(2, 3, 16, 16)
    routed = model.eval()(images)
    mean = model.blocks[3].mlp.fc1.weight.mean(0).t()
    with caplog.at_level(logging.WARNING, logger="s2d3d"):
        merged = merge_experts(model, inplace=inplace, allow_average=True)
    assert [r.getMessage().count("only approximates") for r in caplog.records] == [1, 1]
    assert not is_sparse(merged) and is_sparse(model) != inplace
    torch.testing.assert_close(merged.blocks[3].mlp.fc1.weight, mean)
    dense.load_state_dict(merged.state_dict(), strict=True)
    assert not torch.allclose(merged(images), routed, atol=1e-3)


def test_average_of_identical_experts_is_no_approximation(tiny_vit):
    model, images = tiny_vit().eval(), torch.randn(2, 3, 16, 16)
    before = model(images)
    convert_to_mof_(model, MoFConfig(kind="topk"))
    torch.testing.assert_close(merge_experts(model, allow_average=True)(images), before)
