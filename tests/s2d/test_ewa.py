"""Experts Weights Averaging against its formula written out, its closed form over time, and its schedules."""

import copy
import math

import pytest
import torch
from cases import quick
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from s2d3d.s2d import EWA, RUPMoF, apply_ewa_, convert_to_mof_, is_sparse, merge_experts
from s2d3d.s2d.analysis import expert_divergence
from s2d3d.s2d.ewa import max_share_rate
from s2d3d.s2d.linear import StackedLinear


def formula(stacked: torch.Tensor, share_rate: float) -> torch.Tensor:
    """The update as it is defined, expert by expert: `(1 - b) W_i + b * mean_{j != i} W_j`."""
    experts = []
    for i in range(len(stacked)):
        others = [stacked[j] for j in range(len(stacked)) if j != i]
        experts.append((1 - share_rate) * stacked[i] + share_rate * sum(others) / len(others))
    return torch.stack(experts)


@pytest.fixture
def make_layer(spread_):
    def make(num_experts: int = 4, dtype: torch.dtype = torch.float64, **kwargs) -> RUPMoF:
        return spread_(RUPMoF(Mlp(6, 12, **kwargs).to(dtype), num_experts), 1.0)

    return make


def values(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


# One update


@pytest.mark.parametrize("share_rate", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_experts", quick(2, [2, 7, 3, 4]))
def test_update_equals_the_formula_on_every_weight_and_bias(num_experts, share_rate, make_layer):
    layer = make_layer(num_experts)
    before = values(layer)
    apply_ewa_(layer, share_rate)
    for name, after in values(layer).items():
        torch.testing.assert_close(after, formula(before[name], share_rate), msg=name)
        assert torch.equal(after, before[name]) == (share_rate == 0)


@given(num_experts=st.integers(2, 12), share_rate=st.floats(0, 1), seed=st.integers(0, 1000))
def test_mean_stays_and_deviations_shrink_by_the_closed_form(num_experts, share_rate, seed):
    torch.manual_seed(seed)
    layer = RUPMoF(Mlp(3, 4).double(), num_experts)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    before = values(layer)
    apply_ewa_(layer, share_rate)
    factor = 1 - share_rate * num_experts / (num_experts - 1)
    for name, after in values(layer).items():
        mean = before[name].mean(0)
        torch.testing.assert_close(after.mean(0), mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(after - mean, factor * (before[name] - mean), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_experts", quick(2, [2, 10, 3, 4, 8]))
def test_the_bound_makes_the_experts_identical(num_experts, dtype, make_layer):
    layer = make_layer(num_experts, dtype)
    before = values(layer)
    apply_ewa_(layer, (num_experts - 1) / num_experts)
    for name, after in values(layer).items():
        assert (after == after[0]).all()
        torch.testing.assert_close(after[0].double(), before[name].double().mean(0), rtol=1e-2, atol=1e-2)


def test_share_rate_one_swaps_two_experts(make_layer):
    layer = make_layer(2)
    before = values(layer)
    apply_ewa_(layer, 1.0)
    for name, after in values(layer).items():
        torch.testing.assert_close(after, before[name].flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share_rate", quick(3, [0.0, 0.37, 0.75, 0.1, 0.5]))
def test_a_rate_in_a_tensor_is_the_rate_as_a_number(share_rate, dtype, make_layer):
    """And the tensor's value counts when the update runs, which is what a recorded update relies on."""
    layer, rate = make_layer(4, dtype), torch.tensor(0.99, dtype=torch.float64)
    other = copy.deepcopy(layer)
    before = values(layer)
    apply_ewa_(layer, share_rate)
    assert apply_ewa_(other, rate.fill_(share_rate)) == 1
    for name, after in values(other).items():
        torch.testing.assert_close(after, values(layer)[name], rtol=0, atol=torch.finfo(dtype).eps)
        assert torch.equal(after, before[name]) == (share_rate == 0)


def test_averaging_by_hand_equals_steps_of_the_schedule(make_layer):
    """What a replayed step does: the host writes the rate, the device averages."""
    stepped = make_layer(3)
    replayed = copy.deepcopy(stepped)
    by_steps, by_hand = (EWA(layer, share_rate=0.4, total_steps=4) for layer in (stepped, replayed))
    rate = torch.zeros((), dtype=torch.float64)
    for _ in range(4):
        by_steps.step()
        rate.fill_(by_hand.current_share_rate())
        by_hand.average_(rate)
        by_hand.num_steps += 1
    assert by_steps.state_dict() == by_hand.state_dict() == {"num_steps": 4}
    for mine, theirs in zip(stepped.parameters(), replayed.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-15)


def test_a_rate_in_a_larger_tensor_is_refused(make_layer):
    with pytest.raises(ValueError, match=r"share_rate is a tensor of shape \(1,\), must be a number or 0-d"):
        apply_ewa_(make_layer(), torch.tensor([0.3]))


@pytest.mark.parametrize("share_rate", [0.0, 0.5, 1.0])
def test_single_expert_is_left_alone(share_rate, make_layer):
    layer = make_layer(1)
    before = values(layer)
    assert apply_ewa_(layer, share_rate) == 1
    assert all(torch.equal(after, before[name]) for name, after in values(layer).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype, make_layer):
    layer = make_layer(5, dtype)
    before = values(layer)
    apply_ewa_(layer, 0.3)
    for name, after in values(layer).items():
        assert after.dtype == dtype
        exact = formula(before[name].double(), 0.3)
        # Half a unit in the last place of each value, plus what float32 adds.
        unit = torch.finfo(dtype).eps * exact.abs()
        assert ((after.double() - exact).abs() <= 0.5 * unit + 1e-6).all(), name


def test_only_experts_are_touched(tiny_vit, spread_):
    model = tiny_vit()
    names = convert_to_mof_(model)
    spread_(model)
    before = values(model)
    assert apply_ewa_(model, 0.2) == 2
    changed = {name for name, after in values(model).items() if not torch.equal(after, before[name])}
    assert changed == {f"{name}.{key}" for name in names for key in RUPMoF(Mlp(6, 12), 2).state_dict()}


def test_norms_inside_an_ffn_are_not_experts(make_layer):
    layer = make_layer(4, norm_layer=nn.LayerNorm)
    nn.init.normal_(layer.norm.weight)
    before = values(layer)
    apply_ewa_(layer, 0.5)
    after = values(layer)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"
    }  # fmt: skip


def test_gradients_and_optimizer_state_stay_and_frozen_experts_are_averaged_too(make_layer):
    layer = make_layer(4)
    layer.fc1.weight.requires_grad_(False)
    layer(torch.randn(8, 6, dtype=torch.float64)).sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    identities, before = [id(p) for p in layer.parameters()], values(layer)
    apply_ewa_(layer, 0.3)
    assert [id(p) for p in layer.parameters()] == identities
    assert all(torch.equal(p.grad, grads[name]) for name, p in layer.named_parameters() if name in grads)
    assert layer.fc1.weight.grad is None and not layer.fc1.weight.requires_grad
    assert layer.fc2.weight.requires_grad and layer.fc2.weight.is_leaf
    torch.testing.assert_close(layer.fc1.weight, nn.Parameter(formula(before["fc1.weight"], 0.3), requires_grad=False))


@pytest.mark.parametrize("share_rate", [0.1, 0.75, 1.0])
def test_finished_sparse_model_keeps_its_merged_model(share_rate, tiny_vit, spread_):
    model = tiny_vit().double()
    convert_to_mof_(model)
    spread_(model)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    merged, training = merge_experts(model).eval()(images), model.train()
    torch.manual_seed(1)
    sparse = training(images)
    apply_ewa_(model, share_rate)
    torch.testing.assert_close(merge_experts(model).eval()(images), merged, rtol=1e-9, atol=1e-12)
    torch.manual_seed(1)
    assert not torch.allclose(model(images), sparse, atol=1e-6)  # while the sparse model does change


@pytest.mark.parametrize("share_rate", [-0.1, 1.1, math.nan, math.inf])
def test_share_rate_out_of_range_is_refused(share_rate, make_layer):
    layer = make_layer()
    before = values(layer)
    with pytest.raises(ValueError, match=rf"share_rate is {share_rate}, must be in \[0, 1\]"):
        apply_ewa_(layer, share_rate)
    with pytest.raises(ValueError, match=rf"share_rate is {share_rate}, must be in \[0, 1\]"):
        EWA(layer, share_rate=share_rate, total_steps=3)
    assert all(torch.equal(after, before[name]) for name, after in values(layer).items())


def test_model_without_experts_is_refused(tiny_vit):
    for call in (lambda m: apply_ewa_(m, 0.1), lambda m: EWA(m, share_rate=0.1, total_steps=3)):
        with pytest.raises(ValueError, match=r"no .* layer to average: call convert_to_mof_ first"):
            call(tiny_vit())


# Schedules


def test_linear_schedule_rises_from_zero_to_the_share_rate_and_stays(make_layer):
    layer = make_layer(4)
    ewa = EWA(layer, share_rate=0.3, total_steps=4)
    expected = values(layer)
    for share_rate in (0.0, 0.1, 0.2, 0.3, 0.3, 0.3):
        assert ewa.step() == pytest.approx(share_rate)
        for name, after in values(layer).items():
            expected[name] = formula(expected[name], share_rate)
            torch.testing.assert_close(after, expected[name])


def test_schedule_of_the_caller_is_a_factor_on_the_share_rate(make_layer):
    ewa = EWA(make_layer(num_experts=4), share_rate=0.4, schedule=lambda t: (1 - t / 4) ** 2, total_steps=5)
    assert [ewa.step() for _ in range(5)] == pytest.approx([0.4, 0.225, 0.1, 0.025, 0.0])
    with pytest.raises(ValueError, match=r"schedule\(0\) is 2, must be in \[0, 1\]"):
        EWA(make_layer(num_experts=4), share_rate=0.4, schedule=lambda t: 2, total_steps=5).step()


def test_constant_schedule(make_layer):
    layer = make_layer(3)
    ewa = EWA(layer, share_rate=0.25, schedule="constant", total_steps=2)
    expected = values(layer)
    for _ in range(3):
        assert ewa.step() == 0.25
        for name, after in values(layer).items():
            expected[name] = formula(expected[name], 0.25)
            torch.testing.assert_close(after, expected[name])


def test_divergence_follows_the_product_of_the_factors(make_layer):
    layer = make_layer(4)
    start = expert_divergence(layer)[""]
    ewa = EWA(layer, share_rate=0.5, total_steps=10)
    for _ in range(10):
        ewa.step()
    product = math.prod(1 - 0.5 * t / 9 * 4 / 3 for t in range(10))
    assert expert_divergence(layer)[""] == pytest.approx(start * product)


@pytest.mark.parametrize(("schedule", "share_rate"), [("linear", 0.0), ("constant", 0.3)])
def test_training_of_one_step(schedule, share_rate, make_layer):
    assert EWA(make_layer(), share_rate=0.3, schedule=schedule, total_steps=1).step() == share_rate


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_early_stop_follows_the_schedule_and_then_leaves_the_experts_alone(schedule, make_layer):
    layer, full = make_layer(), EWA(make_layer(), share_rate=0.3, schedule=schedule, total_steps=8)
    ewa = EWA(layer, share_rate=0.3, schedule=schedule, total_steps=8, stop_fraction=0.5)
    assert [ewa.step() for _ in range(4)] == [full.step() for _ in range(4)]
    before = values(layer)
    assert [ewa.step() for _ in range(6)] == [0.0] * 6
    assert all(torch.equal(after, before[name]) for name, after in values(layer).items())


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_resumed_schedule_equals_the_uninterrupted_one(schedule, make_layer):
    whole = make_layer()
    part = copy.deepcopy(whole)
    options = dict(share_rate=0.6, schedule=schedule, total_steps=6)
    ewa = EWA(whole, **options)
    rates = [ewa.step() for _ in range(6)]

    first = EWA(part, **options)
    resumed_rates = [first.step() for _ in range(2)]
    state = copy.deepcopy(first.state_dict())
    assert all(isinstance(value, (int, float, str)) for value in state.values())  # loads with weights_only=True
    second = EWA(part, **options)
    second.load_state_dict(state)
    resumed_rates += [second.step() for _ in range(4)]
    assert resumed_rates == rates
    assert all(torch.equal(a, b) for a, b in zip(values(whole).values(), values(part).values(), strict=True))


def test_layers_moved_to_another_dtype_later_are_still_averaged(make_layer):
    layer = make_layer(4, torch.float32)
    ewa = EWA(layer, share_rate=0.3, schedule="constant", total_steps=2)
    layer.double()
    before = values(layer)
    ewa.step()
    for name, after in values(layer).items():
        torch.testing.assert_close(after, formula(before[name], 0.3))


@pytest.mark.parametrize(("num_experts", "bound"), [(2, "0.5"), (3, "0.6667"), (4, "0.75")])
def test_share_rate_above_the_bound_is_refused_and_named(num_experts, bound, make_layer):
    layer = make_layer(num_experts)
    limit = max_share_rate(num_experts)
    assert limit == pytest.approx((num_experts - 1) / num_experts)
    with pytest.raises(ValueError, match=rf"share_rate is 0.76: above \(K-1\)/K = {bound} the {num_experts} experts"):
        EWA(layer, share_rate=0.76, total_steps=3)
    EWA(layer, share_rate=limit, total_steps=3)
    apply_ewa_(layer, 0.76)  # allowed where the caller names the rate of a single update


def test_bound_of_a_model_is_that_of_its_smallest_layer_and_one_expert_has_none(make_layer):
    with pytest.raises(ValueError, match="the 2 experts overshoot"):
        EWA(nn.ModuleList([make_layer(4), make_layer(2)]), share_rate=0.6, total_steps=3)
    assert EWA(make_layer(1), share_rate=1.0, schedule="constant", total_steps=3).step() == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, "schedule is 'cosine', must be a function or one of linear, constant"),
        ({"total_steps": 0}, "total_steps is 0, must be a whole number and at least 1"),
        ({"total_steps": float("inf")}, "total_steps is inf, must be a whole number"),
        ({"total_steps": float("nan")}, "total_steps is nan, must be a whole number"),
        ({"total_steps": 2.5}, "total_steps is 2.5, must be a whole number"),
        ({"total_steps": True}, "total_steps is True, must be a whole number"),
        ({"stop_fraction": 0.0}, r"stop_fraction is 0.0, must be in \(0, 1\]"),
        ({"stop_fraction": 1.5}, r"stop_fraction is 1.5, must be in \(0, 1\]"),
    ],
)
def test_bad_schedules_are_refused(options, message, make_layer):
    with pytest.raises(ValueError, match=message):
        EWA(make_layer(), **{"share_rate": 0.3, "total_steps": 3} | options)


@pytest.mark.parametrize(
    "change_, undo_",
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight")),
        (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), lambda layer: prune.remove(layer, "bias")),
        (parametrizations.weight_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    ],
)
def test_weights_that_are_computed_from_others_are_neither_averaged_nor_merged(change_, undo_, tiny_vit):
    model = tiny_vit()
    convert_to_mof_(model)
    layer = next(m for m in model.modules() if isinstance(m, StackedLinear))
    change_(layer)
    for use in (lambda: apply_ewa_(model, 0.3), lambda: merge_experts(model)):
        with pytest.raises(
            ValueError, match=r"^expert layer '.*mlp' computes weights from others since its conversion"
        ):
            use()
    undo_(layer)
    assert apply_ewa_(model, 0.3) and not is_sparse(merge_experts(model))


@pytest.mark.parametrize("share_rate", [0.3, torch.tensor(0.6, dtype=torch.float64)])
def test_averaging_part_by_part_gives_the_same_bits(share_rate, make_layer, monkeypatch):
    """A CPU averages pieces that stay in its cache; the last one is shorter."""
    results = []
    for size in (2**16, 64, 16):
        monkeypatch.setattr("s2d3d.s2d.ewa.CACHED_WEIGHTS", size)
        torch.manual_seed(0)
        layer = make_layer(3)
        apply_ewa_(layer, share_rate)
        results.append(values(layer))
    for other in results[1:]:
        assert all(other[name].equal(value) for name, value in results[0].items())


def test_a_position_before_the_first_update_is_refused(make_layer):
    with pytest.raises(ValueError, match="num_steps is -3, must be at least 0"):
        EWA(make_layer(2), share_rate=0.3, total_steps=3).load_state_dict({"num_steps": -3})
