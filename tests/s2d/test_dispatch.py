"""Random uniform partition: sizes, completeness, uniformity, the random stream, and the two ways to put tokens back."""

import logging
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from torch.utils.checkpoint import checkpoint

from s2d3d.s2d import RUPMoF, mof
from s2d3d.s2d.dispatch import (
    Partition,
    combine,
    dispatch,
    native_scatter_sum,
    partition_sizes,
    random_partition,
    scatter_backend,
)


@pytest.fixture
def fresh_backend():
    """Let the test choose the summation anew, and everything after it too."""
    scatter_backend.cache_clear()
    yield
    scatter_backend.cache_clear()


@pytest.fixture(params=["torch_scatter", "native"])
def backend(request, monkeypatch, fresh_backend):
    if request.param == "torch_scatter":
        pytest.importorskip("torch_scatter")
    else:
        monkeypatch.setitem(sys.modules, "torch_scatter", None)
    assert (scatter_backend() is native_scatter_sum) == (request.param == "native")


counts = st.integers(1, 12).flatmap(lambda k: st.tuples(st.integers(k, 60), st.just(k)))


# Sizes and completeness


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "sizes"),
    [(6, 4, [2, 2, 1, 1]), (8, 4, [2, 2, 2, 2]), (5, 1, [5]), (4, 4, [1, 1, 1, 1]), (7, 4, [2, 2, 2, 1])],
)
def test_partition_sizes(num_tokens, num_experts, sizes, groups_of):
    assert partition_sizes(num_tokens, num_experts) == sizes
    assert [len(group) for group in groups_of(random_partition(num_tokens, num_experts))] == sizes


@given(counts)
@settings(deadline=None)
def test_every_token_stands_in_exactly_one_group_and_sizes_differ_by_at_most_one(count):
    num_tokens, num_experts = count
    partition = random_partition(num_tokens, num_experts)
    capacity = -(-num_tokens // num_experts)
    assert partition.source.shape == partition.target.shape == (num_experts * capacity,)
    assert partition.source.dtype == partition.target.dtype == torch.int64

    busy = partition.target < num_tokens
    assert sorted(partition.target[busy].tolist()) == list(range(num_tokens))
    assert torch.equal(partition.source[busy], partition.target[busy])
    sizes = busy.view(num_experts, capacity).sum(1).tolist()
    assert sizes == partition_sizes(num_tokens, num_experts)
    assert max(sizes) - min(sizes) <= 1
    # An idle slot reads a token that exists and writes to the row that is cut off.
    assert (partition.target[~busy] == num_tokens).all()
    assert ((partition.source >= 0) & (partition.source < num_tokens)).all()


@pytest.mark.parametrize("call", [partition_sizes, random_partition])
def test_fewer_tokens_than_experts_is_an_error_that_names_both_and_the_remedy(call):
    with pytest.raises(
        ValueError, match=r"^3 tokens cannot be shared among 4 experts: use a larger batch.*fewer experts$"
    ):
        call(3, 4)
    with pytest.raises(ValueError, match="num_experts is 0, must be at least 1"):
        call(3, 0)


# Dispatch and combine


@given(counts)
@settings(deadline=None)
def test_combine_after_dispatch_is_the_identity(count):
    tokens = torch.randn(count[0], 3)
    partition = random_partition(*count)
    groups = dispatch(tokens, partition)
    assert groups.shape == (count[1], -(-count[0] // count[1]), 3)
    assert torch.equal(combine(groups, partition), tokens)


def test_dispatch_puts_each_token_into_its_slot(groups_of):
    tokens = torch.arange(7.0).unsqueeze(1)
    partition = random_partition(7, 3)
    slots = dispatch(tokens, partition)
    for expert, group in enumerate(groups_of(partition)):
        assert slots[expert, : len(group), 0].tolist() == group


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_combine_matches_a_loop_in_values_and_gradients(backend, dtype):
    partition = random_partition(11, 4)
    outputs = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    weights = torch.randn(11, 5, dtype=dtype)
    result = combine(outputs, partition)
    (result * weights).sum().backward()

    expected, gradient = torch.zeros(11, 5, dtype=dtype), torch.zeros(12, 5, dtype=dtype)
    for slot, token in enumerate(partition.target.tolist()):
        if token < 11:
            expected[token] = outputs.detach().flatten(0, 1)[slot]
            gradient[slot] = weights[token]
    assert result.dtype == dtype
    assert torch.equal(result, expected)
    assert torch.equal(outputs.grad, gradient.view(4, 3, 5))


def test_torch_scatter_and_the_native_summation_agree_where_rows_repeat():
    torch_scatter = pytest.importorskip("torch_scatter")
    index = torch.randint(0, 4, (20, 1)).expand(-1, 3)
    results = []
    for scatter in (
        native_scatter_sum,
        lambda source, index, out: torch_scatter.scatter_sum(source, index, dim=0, out=out),
    ):
        source = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = scatter(source, index, torch.zeros(4, 3))
        out.square().sum().backward()
        results.append((out.detach(), source.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    one_hot = torch.nn.functional.one_hot(index[:, 0], 4).float()
    torch.testing.assert_close(results[0][0], one_hot.t() @ source.detach())


def test_layer_gives_the_same_bits_with_and_without_torch_scatter(monkeypatch, fresh_backend, spread_):
    pytest.importorskip("torch_scatter")
    layer, x = spread_(RUPMoF(Mlp(6, 12), 4)), torch.randn(2, 5, 6)
    results = []
    for absent in (False, True):
        if absent:
            monkeypatch.setitem(sys.modules, "torch_scatter", None)
        scatter_backend.cache_clear()
        assert (scatter_backend() is native_scatter_sum) == absent
        layer.zero_grad()
        torch.manual_seed(3)
        output = layer(x)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_missing_torch_scatter_is_logged_once_with_the_command_that_installs_it(monkeypatch, fresh_backend, caplog):
    monkeypatch.setitem(sys.modules, "torch_scatter", None)
    layer = RUPMoF(Mlp(6, 12), 2)
    with caplog.at_level(logging.WARNING, logger="s2d3d"):
        for _ in range(3):
            layer(torch.randn(5, 6))  # a number that 2 does not divide: the others need no summation
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "torch-scatter is not usable" in messages[0] and "pip install" in messages[0] and "\n" not in messages[0]


@pytest.mark.parametrize(
    "error", ["RuntimeError('compiled with different CUDA versions')", "OSError('a.so:\\nno')", "ImportError"]
)
def test_broken_torch_scatter_falls_back_as_a_missing_one_does(error, monkeypatch, fresh_backend, tmp_path, caplog):
    (tmp_path / "torch_scatter.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_scatter", raising=False)
    with caplog.at_level(logging.WARNING, logger="s2d3d"):
        assert scatter_backend() is native_scatter_sum
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(12, 4), (5, 1), (6, 6)])
def test_equal_sizes_are_permuted_with_the_bits_of_gather_and_summation(num_tokens, num_experts, backend):
    """Where K divides the tokens, forward, gradient and second gradient need no rows of zeros to add to."""
    partition = random_partition(num_tokens, num_experts)
    plain = partition._replace(inverse=None)
    assert partition.inverse is not None and partition.source[partition.inverse].equal(torch.arange(num_tokens))
    tokens, factor = torch.randn(num_tokens, 3), torch.randn(num_experts, num_tokens // num_experts, 3)
    results = []
    for used in (partition, plain):
        x = tokens.clone().requires_grad_()
        slots = dispatch(x, used)
        output = combine(slots.exp() * factor, used)
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((slots, output, first, second))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(combine(dispatch(tokens, partition), partition), tokens)
    mapped = torch.func.vmap(lambda rows: dispatch(rows, partition))(torch.stack([tokens, 2 * tokens]))
    assert mapped.equal(torch.stack([dispatch(tokens, plain), dispatch(2 * tokens, plain)]))


# Randomness


def test_tokens_are_spread_uniformly_and_in_pairs():
    num_tokens, num_experts, draws = 10, 3, 3000
    expert_of = torch.empty(draws, num_tokens, dtype=torch.int64)
    for draw in range(draws):
        partition = random_partition(num_tokens, num_experts)
        busy = partition.target < num_tokens
        owner = torch.arange(num_experts).repeat_interleave(4)
        expert_of[draw, partition.target[busy]] = owner[busy]

    sizes = torch.tensor(partition_sizes(num_tokens, num_experts), dtype=torch.float64)
    landed = torch.nn.functional.one_hot(expert_of, num_experts).sum(0).double()
    expected = draws * sizes / num_tokens
    chi_square = float(((landed - expected) ** 2 / expected).sum())
    assert chi_square < 50  # 18 degrees of freedom: 1 in 10,000 lies above 48

    # A mere rotation of the tokens would pass the first check, not this one.
    together = (expert_of.unsqueeze(1) == expert_of.unsqueeze(2)).double().mean(0)
    probability = float((sizes * (sizes - 1)).sum() / (num_tokens * (num_tokens - 1)))
    pairs = together[~torch.eye(num_tokens, dtype=torch.bool)]
    deviation = (probability * (1 - probability) / draws) ** 0.5
    assert float((pairs - probability).abs().max()) < 5 * deviation


def test_partition_comes_from_the_global_generator_and_changes_with_each_draw():
    torch.manual_seed(5)
    first, second = random_partition(20, 4), random_partition(20, 4)
    assert not torch.equal(first.source, second.source)
    torch.manual_seed(5)
    again = random_partition(20, 4)
    assert torch.equal(first.source, again.source) and torch.equal(first.target, again.target)
    # A private generator would leave the state of the global one as it was.
    state = torch.get_rng_state()
    random_partition(20, 4)
    assert not torch.equal(state, torch.get_rng_state())


def gradients(layer: RUPMoF, x: torch.Tensor, checkpointed: bool) -> list[torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(11)
    output = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    torch.randn(3)  # other modules draw as well before the backward pass recomputes this one
    output.square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in layer.parameters())]


def test_activation_checkpointing_recomputes_the_same_partition(monkeypatch, spread_):
    layer, x = spread_(RUPMoF(Mlp(6, 12, drop=0.1), 4)), torch.randn(3, 7, 6)
    plain, recomputed = gradients(layer, x, False), gradients(layer, x, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))

    # The trap that this guards against: with a private generator the gradients are silently wrong.
    private = torch.Generator()

    def draw_privately(num_tokens: int, num_experts: int, device: torch.device) -> Partition:
        order = torch.randperm(num_tokens - num_tokens % num_experts, generator=private)
        return Partition(order, order, num_experts, num_tokens)

    monkeypatch.setattr(mof, "random_partition", draw_privately)
    x = torch.randn(3, 8, 6)
    private.manual_seed(0)
    plain = gradients(layer, x, False)
    private.manual_seed(0)
    recomputed = gradients(layer, x, True)
    assert not all(torch.allclose(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_autocast_keeps_the_dtype_that_the_dense_ffn_gives(backend):
    ffn, x = Mlp(6, 12), torch.randn(2, 5, 6)
    layer = RUPMoF(ffn, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, sparse = ffn(x), layer(x)
        assert layer.eval()(x).dtype == dense.dtype
    assert sparse.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(sparse, dense, rtol=0.02, atol=0.02)
    sparse.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
