"""Single experts as models, lines between models, and how far random updates drive experts apart."""

import copy
import math

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from s2d3d.s2d import MoFConfig, RUPMoF, apply_ewa_, convert_to_mof_, is_sparse, merge_experts
from s2d3d.s2d.analysis import (
    barrier,
    contraction,
    expert_divergence,
    expert_model,
    interpolate,
    predict_divergence,
    stationary_divergence,
)


class Net(nn.Module):
    """Two FFNs with a residual, and a BatchNorm for its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = Mlp(6, 12), Mlp(6, 12), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm((x + self.b(x + self.a(x))).flatten(0, -2))


def spread_experts(num_experts: int) -> Net:
    model = Net()
    convert_to_mof_(model, MoFConfig(num_experts, targets=("a", "b"), every=1, init_noise=0.5))
    return model


# One expert as a model


@pytest.mark.parametrize("num_experts", [1, 3, 4])
def test_expert_model_is_the_hand_built_one(num_experts):
    sparse = spread_experts(num_experts)
    before = copy.deepcopy(sparse.state_dict())
    x = torch.randn(5, 7, 6)
    outputs = []
    for index in range(num_experts):
        alone = expert_model(sparse, index).eval()
        by_hand = Net().eval()
        for name in ("a", "b"):
            for linear in ("fc1", "fc2"):
                stacked, target = sparse.get_submodule(f"{name}.{linear}"), by_hand.get_submodule(f"{name}.{linear}")
                target.weight.data, target.bias.data = stacked.weight[index].t(), stacked.bias[index]
        assert not is_sparse(alone) and list(alone.state_dict()) == list(by_hand.state_dict())
        for key, tensor in by_hand.state_dict().items():
            assert torch.equal(alone.state_dict()[key], tensor), key  # exact: no averaging of one expert
        outputs.append(alone(x))
        assert torch.allclose(outputs[-1], by_hand(x), atol=1e-6)
    assert all(torch.equal(tensor, before[key]) for key, tensor in sparse.state_dict().items())
    if num_experts > 1:
        assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_mean_of_the_expert_models_is_the_merged_model():
    sparse = spread_experts(3)
    states = [expert_model(sparse, index).state_dict() for index in range(3)]
    for key, tensor in merge_experts(sparse).state_dict().items():
        assert torch.allclose(tensor.double(), sum(state[key].double() for state in states) / 3, atol=1e-7), key


def test_expert_model_of_a_bare_layer_and_of_frozen_experts():
    layer = RUPMoF(Mlp(4, 8), 2)
    layer.fc1.weight.requires_grad_(False)
    with torch.no_grad():
        layer.fc1.weight[1] += 1
    alone = expert_model(layer, 1)
    assert torch.equal(alone.fc1.weight, layer.fc1.weight[1].t()) and not alone.fc1.weight.requires_grad
    assert alone.fc2.weight.requires_grad


def test_expert_model_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="expert 3 of a layer with 3 experts"):
        expert_model(spread_experts(3), 3)
    with pytest.raises(ValueError, match="expert -1"):
        expert_model(spread_experts(3), -1)
    with pytest.raises(ValueError, match=r"no .* layer"):
        expert_model(Net(), 0)


# Lines


def test_interpolate_weights_and_statistics():
    first, second = Net(), Net()
    second.norm.running_mean += 2
    second.norm.num_batches_tracked += 9
    half = interpolate(first, second, 0.25)
    for key, tensor in half.state_dict().items():
        a, b = first.state_dict()[key], second.state_dict()[key]
        assert torch.allclose(tensor.double(), 0.75 * a.double() + 0.25 * b.double(), atol=1e-7) or "num_batches" in key
    assert half.norm.num_batches_tracked == 0 and interpolate(first, second, 0.75).norm.num_batches_tracked == 9
    for position, end in ((0, first), (1, second)):
        state = interpolate(first, second, position).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in end.state_dict().items())
    assert torch.equal(first.norm.running_mean, torch.zeros(6))  # the ends stay as they are


def test_no_line_between_models_of_different_form():
    with pytest.raises(ValueError, match="no line between them"):
        interpolate(Net(), spread_experts(2), 0.5)
    with pytest.raises(ValueError, match="no line between them"):
        interpolate(Mlp(4, 8), Mlp(4, 9), 0.5)


def point(*coordinates: float) -> nn.Module:
    linear = nn.Linear(len(coordinates), 1, bias=False)
    linear.weight.data = torch.tensor([coordinates])
    return linear.double()


def test_barrier_of_quadratics_in_closed_form():
    ends = point(-1.0, 0.5), point(3.0, 0.5)

    def quadratic(sign):
        return lambda model: sign * float((model.weight.detach() ** 2).sum())

    # Convex: below the straight line everywhere. Concave: L(t) = -(4t - 1)^2 - 1/4 exceeds it by 16 t (1 - t): 4.
    assert barrier(*ends, quadratic(1), num_positions=5).height == 0
    concave = barrier(*ends, quadratic(-1), num_positions=5)
    assert concave.positions == (0, 0.25, 0.5, 0.75, 1)
    assert concave.losses == pytest.approx([-1.25, -0.25, -1.25, -4.25, -9.25])
    assert concave.height == pytest.approx(4)
    assert barrier(*ends[::-1], quadratic(-1), num_positions=5).height == pytest.approx(4)
    assert barrier(*ends, quadratic(-1), num_positions=4).height == pytest.approx(16 * 2 / 9)  # at 1/3


def test_barrier_between_two_wells():
    # (w^2 - 1)^2: no loss in the wells at -1 and 1, height 1 between them; none from a well to itself or inside it.
    def loss(model):
        return float((model.weight.detach()[0, 0] ** 2 - 1) ** 2)

    assert barrier(point(-1.0), point(1.0), loss).height == pytest.approx(1)
    assert barrier(point(1.0), point(1.0), loss).height == 0
    assert barrier(point(0.8), point(1.1), loss).height == 0


def test_barrier_needs_a_position_between_the_ends():
    with pytest.raises(ValueError, match="num_positions is 2"):
        barrier(point(0.0), point(1.0), lambda model: 0.0, num_positions=2)


# Divergence over time


@pytest.mark.parametrize(("share_rate", "num_experts"), [(0.3, 4), (0.1, 2), (0.6, 3), (0.5, 1)])
def test_ewa_contracts_by_the_predicted_factor(share_rate, num_experts):
    model = spread_experts(num_experts).double()
    before = expert_divergence(model)
    apply_ewa_(model, share_rate)
    after = expert_divergence(model)
    factor = contraction(share_rate, num_experts)
    assert factor == pytest.approx(1 if num_experts == 1 else 1 - share_rate * num_experts / (num_experts - 1))
    for name, value in before.items():
        assert after[name] == pytest.approx(factor * value, rel=1e-9)


def test_prediction_in_closed_form():
    # Without updates: pure contraction. Without EWA: a random walk. Both constant: the stationary value.
    assert predict_divergence([0] * 3, [0.375] * 3, 4, initial=8) == pytest.approx([4, 2, 1])
    walk = predict_divergence([2] * 9, [0] * 9, 4)
    assert walk == pytest.approx([2 * math.sqrt(n) for n in range(1, 10)])
    for correlation in (0.0, 0.9, 0.99):
        late = predict_divergence([0.7] * 3000, [0.05] * 3000, 4, correlation=correlation)[-1]
        assert late == pytest.approx(stationary_divergence(0.7, 0.05, 4, correlation=correlation), rel=1e-9)
    # Fully correlated updates add up: with c -> 1 the experts follow r s / (1 - r).
    assert stationary_divergence(1, 0.3, 4, correlation=1 - 1e-9) == pytest.approx(0.6 / 0.4, rel=1e-6)
    assert stationary_divergence(1, 0.75, 4) == pytest.approx(0, abs=1e-15)  # b = (K-1)/K: equal after each EWA
    assert stationary_divergence(1, 0, 4) == math.inf and stationary_divergence(1, 0.5, 1) == math.inf
    with pytest.raises(ValueError):
        predict_divergence([1, 2], [0.1], 4)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_experts_with_random_updates_are_as_far_apart_as_predicted(correlation):
    """Random updates of a real layer, with `apply_ewa_` behind each, against the recursion."""
    num_experts, steps, scale = 4, 120, 0.01
    layer = RUPMoF(Mlp(40, 80), num_experts).double()
    parameters = list(layer.parameters())
    momenta = [torch.randn_like(p) for p in parameters]
    weights = sum(p[0].numel() for p in parameters)
    rates = [0.2 * step / steps for step in range(steps)]
    measured = []
    for rate in rates:
        with torch.no_grad():
            for parameter, momentum in zip(parameters, momenta):
                parameter += scale * momentum
                momentum.mul_(correlation).add_(torch.randn_like(momentum), alpha=math.sqrt(1 - correlation**2))
        apply_ewa_(layer, rate)
        apart = sum(float((p - p.mean(0)).detach().square().sum()) for p in parameters) / num_experts
        measured.append(math.sqrt(apart / weights))
    spread = scale * math.sqrt((num_experts - 1) / num_experts)  # of independent updates around their mean
    predicted = predict_divergence([spread] * steps, rates, num_experts, correlation=correlation)
    assert measured == pytest.approx(predicted, rel=0.05)
    # One number a step: without the correlation the prediction would be off by more than half at the end.
    if correlation:
        assert measured[-1] > 1.5 * predict_divergence([spread] * steps, rates, num_experts)[-1]
