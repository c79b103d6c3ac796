"""The divergence of experts against its definition and against what EWA must do to it."""

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from s2d3d.s2d import RUPMoF, apply_ewa_, convert_to_mof_, merge_experts
from s2d3d.s2d.analysis import expert_divergence


def flat_experts(layer: RUPMoF) -> torch.Tensor:
    """(K, number of weights and biases of one expert)"""
    return torch.cat([p.detach().double().flatten(1) for p in layer.parameters()], dim=1)


def test_divergence_is_the_relative_distance_to_the_mean(spread_):
    layer = spread_(RUPMoF(Mlp(6, 12), 5), 0.3)
    experts = flat_experts(layer)
    mean = experts.mean(0)
    squares = [float((expert - mean).norm() ** 2) for expert in experts]
    expected = (sum(squares) / 5) ** 0.5 / float(mean.norm())
    assert expert_divergence(layer) == {"": pytest.approx(expected, rel=1e-9)}


def test_divergence_of_known_experts():
    layer = RUPMoF(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)), 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter[0], parameter[1] = 1.0, 3.0  # mean 2, each 1 away from it
    assert expert_divergence(layer)[""] == pytest.approx(0.5)


def test_layers_are_reported_by_name_and_only_what_differs(tiny_vit, spread_):
    model = tiny_vit()
    names = convert_to_mof_(model)
    assert expert_divergence(model) == dict.fromkeys(names, 0.0)
    spread_(model.blocks[3])
    divergence = expert_divergence(model)
    assert list(divergence) == names
    assert divergence["blocks.1.mlp"] == 0.0 and divergence["blocks.3.mlp"] > 0.1


def test_single_expert_and_zero_weights_diverge_by_nothing():
    layer = RUPMoF(Mlp(6, 12), 3)
    assert expert_divergence(RUPMoF(Mlp(6, 12), 1)) == {"": 0.0}
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    assert expert_divergence(layer) == {"": 0.0}


@pytest.mark.parametrize("num_experts", [2, 3, 4])
@pytest.mark.parametrize("share_rate", [0.0, 0.2, 0.5, 1.0])
def test_ewa_multiplies_the_divergence_by_the_closed_form(num_experts, share_rate, spread_):
    layer = spread_(RUPMoF(Mlp(6, 12).double(), num_experts))
    before = expert_divergence(layer)[""]
    apply_ewa_(layer, share_rate)
    factor = abs(1 - share_rate * num_experts / (num_experts - 1))
    assert expert_divergence(layer)[""] == pytest.approx(before * factor, abs=1e-12)


def test_dense_model_is_refused_and_nothing_is_changed(tiny_vit, spread_):
    model = tiny_vit()
    convert_to_mof_(model)
    spread_(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expert_divergence(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match=r"the model has no .* layer"):
        expert_divergence(merge_experts(model))
