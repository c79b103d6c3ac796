"""Population averaging (examples/population): each expert is trained by its own view, and all are pulled together."""

import copy
import itertools
import types

import pytest
import torch

from s2d3d import create_model, list_models
from s2d3d.machine import Runtime
from s2d3d.models import _MODELS
from s2d3d.plugins import load_plugins
from s2d3d.s2d.ewa import expert_layers
from s2d3d.studies.plan import load_study
from s2d3d.training.parts import build_model, optimizer_of

SIZES = dict(num_classes=3, trans_dim=16, depth=2, num_heads=2, num_group=4, group_size=8, encoder_dims=16)


@pytest.fixture(scope="module")
def plugin(repository):
    """What examples/population/population.py defines."""
    load_plugins([repository / "examples/population/population.py"])
    assert "population_bert" in list_models()
    build, _ = _MODELS["population_bert"]
    return types.SimpleNamespace(**build.forward.__globals__)


@pytest.fixture
def population(plugin):
    """A dense model and its population of 4, of the same seed."""
    models = []
    for name, own in (("point_bert_small", {}), ("population_bert", {"pull": 0.2, "pull_every": 3})):
        torch.manual_seed(0)
        models.append(create_model(name, **SIZES, **own, head_dropout=0.0))
    return models


def test_a_batch_is_each_shape_in_its_views(plugin):
    points = torch.arange(10.0)[:, None, None] + torch.linspace(0, 0.9, 64)[None, :, None].expand(10, 64, 3)
    data = plugin.Views(points, torch.arange(10), [*"abcdefghij"], num_points=8, normalize=False)
    data.views = 4
    drawn, labels = data.sample(torch.arange(8), torch.Generator().manual_seed(0))
    assert drawn.shape == (8, 8, 3) and labels.tolist() == [0, 1] * 4
    assert drawn[..., 0].floor().mean(1).tolist() == [0, 1] * 4
    assert len({tuple(sorted(view[:, 0].tolist())) for view in drawn[::2]}) == 4
    assert data.sample(torch.arange(8))[1].tolist() == list(range(8))  # evaluation
    with pytest.raises(ValueError, match="6 clouds are no whole number of shapes in 4 views"):
        data.sample(torch.arange(6), torch.Generator())


def test_the_first_pass_and_its_gradient_are_those_of_the_dense_model(population):
    dense, sparse = population
    clouds = torch.rand(8, 64, 3)
    for model in population:
        model(clouds).sin().sum().backward()
    assert torch.allclose(dense(clouds), sparse(clouds), atol=1e-6)
    wanted = dense.blocks.blocks[1].mlp.fc1.weight.grad
    stacked = sparse.blocks.blocks[1].mlp.fc1.weight.grad
    stacked = stacked if stacked.shape[1:] == wanted.shape else stacked.transpose(1, 2)
    assert torch.allclose(stacked.sum(0), wanted, atol=1e-5)
    assert torch.allclose(dense.cls_pos.grad, sparse.cls_pos.grad, atol=1e-5)


def test_an_expert_is_trained_by_its_own_view_alone(population):
    _, sparse = population
    logits = sparse(torch.rand(8, 64, 3))
    logits[2:4].sum().backward()  # the second of four views
    for layer in expert_layers(sparse):
        for parameter in layer.expert_parameters():
            reached = [bool(gradient.any()) for gradient in parameter.grad]
            assert reached == [False, True, False, False]
    with pytest.raises(ValueError, match="6 clouds cannot be cut into 4 equal parts"):
        sparse(torch.rand(6, 64, 3))


def test_experts_are_pulled_every_third_update_and_evaluated_as_their_mean(population):
    dense, sparse = population
    clouds = torch.rand(8, 64, 3)
    weights = [parameter for layer in expert_layers(sparse) for parameter in layer.expert_parameters()]
    with torch.no_grad():
        for weight in weights:
            weight += 0.1 * torch.randn_like(weight)
    before = copy.deepcopy(weights)

    def apart():
        return sum(float((w - w.mean(0)).square().sum()) for w in weights) ** 0.5

    spread = [apart()]
    for _ in range(6):
        sparse(clouds)
        spread.append(apart())
    shrunk = [after / earlier for earlier, after in itertools.pairwise(spread)]
    assert shrunk == pytest.approx([0.8, 1, 1, 0.8, 1, 1], rel=1e-5)
    assert all(torch.allclose(w.mean(0), b.mean(0), atol=1e-6) for w, b in zip(weights, before))
    sparse.eval(), dense.eval()
    assert torch.allclose(sparse(clouds[:3]), sparse(clouds)[:3], atol=1e-5)  # of any number of clouds
    assert int(sparse.updates) == 6


def test_a_rate_of_the_experts_reaches_those_of_the_model(plugin, repository):
    study = load_study(repository / "configs/studies/population.yaml")
    config = next(cell.config for cell in study.cells if cell.arm == "population_x2")
    parts = build_model(config, Runtime(torch.device("cpu")), [*"abc"])
    groups = optimizer_of(config, parts).param_groups
    scaled = {id(p) for group in groups if group.get("lr_scale") == 2 for p in group["params"]}
    assert scaled == {id(p) for layer in expert_layers(parts.model) for p in layer.expert_parameters()}
