"""Eval mode for a while: what runs inside, and what is restored."""

import pytest
from torch import nn

from s2d3d import MoFConfig, convert_to_mof_
from s2d3d.models.mode import eval_mode


def modes(model):
    return [module.training for module in model.modules()]


def test_all_modules_evaluate_inside_and_have_their_own_mode_afterwards():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).eval(), nn.BatchNorm1d(3))
    model[1][1].train()
    before = modes(model)
    with eval_mode(model):
        assert not any(modes(model))
        model[2].train()  # as the re-estimation of statistics does
    assert modes(model) == before == [True, True, False, False, True, True]


def test_a_model_in_eval_mode_stays_in_it_whatever_the_block_does():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).eval()
    with eval_mode(model):
        model[1].train()
    assert not any(modes(model))


def test_an_error_inside_restores_the_modes_as_well():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3).eval())
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert modes(model) == [True, True, False]


@pytest.mark.parametrize("frozen", [True, False])
def test_an_expert_layer_passes_its_mode_on_to_the_ffn_that_is_no_child_of_it(frozen):
    model = nn.Sequential(nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(3, 6), nn.Dropout(), nn.Linear(6, 3))}))
    convert_to_mof_(model, MoFConfig(num_experts=2, every=1))
    layer = model[0]["mlp"].train(not frozen)
    with eval_mode(model):
        assert not layer._template.training
    assert model.training and layer.training == layer._template.training == (not frozen)
