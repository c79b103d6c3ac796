"""Folded BatchNorm: the same function in eval mode, and nothing left to fold."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from s2d3d import create_model, fold_batchnorm

MODELS = {
    "point_bert_tiny": {},
    "point_mae": dict(trans_dim=96, encoder_dims=96, depth=1, num_heads=2, num_group=16, group_size=8),
    "point_transformer_tiny": {},
    "point_transformer_small": dict(depths=(1, 0, 1, 1), mlp_ratio=0.0),
}


def with_statistics(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and weights that matter."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 3)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_folded_model_computes_the_same(name):
    torch.manual_seed(0)
    model = with_statistics(create_model(name, num_classes=7, **MODELS[name]))
    points = torch.rand(3, 128, 3) - 0.5
    expected, before = model(points), copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model)
    assert (folded(points) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )  # the argument is left alone
    count = [sum(isinstance(m, nn.BatchNorm1d) for m in which.modules()) for which in (model, folded)]
    # Two BatchNorms of an attention block follow no linear layer: before the weights' MLP, and after the values.
    blocks = sum("transformer2" in key and key.endswith("linear_q.weight") for key in before)
    assert count[0] > count[1] == 2 * blocks


@torch.no_grad()
def test_a_layer_without_bias_or_affine_weights_is_folded_too():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(5, 4)
    torch.testing.assert_close(fold_batchnorm(model)(x), model(x))


@torch.no_grad()
def test_what_cannot_be_folded_stays():
    norms = [nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4)]
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4), norms[0], nn.Linear(4, 4), norms[1]).eval()
    folded = fold_batchnorm(model)
    assert [type(module) for module in folded] == [type(module) for module in model]
    x = torch.randn(8, 4)
    assert torch.equal(folded(x), model(x))


@torch.no_grad()
def test_a_linear_layer_that_others_use_or_that_has_hooks_is_not_folded():
    shared, tied, pruned = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    prune.l1_unstructured(pruned, "weight", 0.5)
    parts = [nn.Sequential(shared, nn.BatchNorm1d(4)), nn.Sequential(shared, nn.BatchNorm1d(4))]
    parts += [nn.Sequential(tied, nn.BatchNorm1d(4)), nn.Sequential(pruned, nn.BatchNorm1d(4)), nn.Linear(4, 4)]
    parts[-1].weight = tied.weight
    model, x = with_statistics(nn.Sequential(*parts)), torch.randn(8, 4)
    model(x)
    folded = fold_batchnorm(model)
    torch.testing.assert_close(folded(x), model(x))
    assert sum(isinstance(m, nn.BatchNorm1d) for m in folded.modules()) == 4


@torch.no_grad()
def test_a_folded_linear_layer_refuses_more_dimensions():
    """BatchNorm takes channels from dimension 1, a linear layer has them in the last."""
    folded = fold_batchnorm(with_statistics(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))))
    with pytest.raises(ValueError, match="got 3 dimensions"):
        folded(torch.randn(5, 6, 4))


def test_a_model_in_train_mode_is_refused():
    with pytest.raises(ValueError, match=r"eval mode: call model\.eval\(\) first"):
        fold_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
