"""Where tokens go: against experts that write their own number into their outputs."""

import pytest
import torch
from torch import nn

from s2d3d import MoFConfig, convert_to_mof_, create_model
from s2d3d.errors import InputError
from s2d3d.ops.points import group_points
from s2d3d.s2d.mof import ExpertLayer
from s2d3d.viz.tokens import trace_experts

POINTS = torch.rand(3, 64, 3, generator=torch.Generator().manual_seed(0)) - 0.5
SMALL = dict(trans_dim=16, depth=4, num_heads=2, num_group=10, group_size=8, encoder_dims=16, encoder_width=8)


def sparse(name="point_bert_tiny", **experts):
    kwargs = SMALL if name == "point_bert_tiny" else {}
    model = create_model(name, num_classes=3, **kwargs)
    names = convert_to_mof_(model, MoFConfig(**{"num_experts": 4, **experts}))
    return model, names


def mark_experts(layer):
    """Let expert i answer i to every token, and note the answers."""
    (_, last) = list(layer.stacked_layers())[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(float(layer.num_experts))[:, None].expand_as(last.bias))
    answers = []
    layer.register_forward_hook(lambda module, inputs, output: answers.append(output[..., 0].round().long()))
    return answers


@pytest.mark.parametrize("which", [0, 1])
def test_tokens_go_where_the_experts_say_they_came_from(which):
    model, names = sparse()
    answers = mark_experts(model.get_submodule(names[which]))
    passes = trace_experts(model, POINTS, layer=names[which], passes=3, seed=5)
    assert len(passes) == len(answers) == 3
    for traced, answer in zip(passes, answers):
        assert traced.layer == names[which] and traced.num_experts == 4
        assert torch.equal(traced.experts, answer[:, 1:]), "without the class token"
        sizes = answer.flatten().bincount(minlength=4)
        assert sizes.tolist() == [9, 8, 8, 8], "3 x 11 tokens are shared out evenly over the batch"
    assert not torch.equal(passes[0].experts, passes[1].experts), "each pass has its own partition"


def test_experts_that_look_at_their_own_mode_are_left_in_it():
    model, names = sparse()
    model.eval()
    trace_experts(model, POINTS)
    templates = [model.get_submodule(name)._template for name in names]
    assert not any(module.training for template in templates for module in template.modules())


def test_the_seed_decides_and_nothing_else_changes():
    model, _ = sparse()
    model.train()
    model.blocks.eval()
    modes = [module.training for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = trace_experts(model, POINTS, seed=1)[0].experts
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items()), "BatchNorm too"
    assert torch.equal(trace_experts(model, POINTS, seed=1)[0].experts, first)
    assert not torch.equal(trace_experts(model, POINTS, seed=2)[0].experts, first)
    assert all("draw" not in vars(module) for module in model.modules() if isinstance(module, ExpertLayer))


def test_tokens_of_point_bert_lie_at_the_centres_of_their_groups():
    model, _ = sparse()
    _, centers = group_points(POINTS, 10, 8, skip_origin=True)
    assert torch.equal(trace_experts(model, POINTS)[0].positions, centers)


def test_tokens_of_point_transformer_are_the_points_of_the_stage():
    model, names = sparse("point_transformer_tiny", every=1)
    points = torch.rand(3, 256, 3)
    for name in (names[0], names[-1]):
        answers = mark_experts(model.get_submodule(name))
        kept = []
        stage = model.get_submodule(name.partition(".")[0])
        handle = stage.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output[0]))
        (traced,) = trace_experts(model, points, layer=name)
        handle.remove()
        assert torch.equal(traced.experts, answers[0]) and torch.equal(traced.positions, kept[0])
        assert traced.positions.shape == (*traced.experts.shape, 3)
        distance = (traced.positions[:, :, None] - points[:, None]).norm(dim=3)
        assert (distance.min(2).values == 0).all() and traced.experts.shape[1] < 256
    assert len({trace_experts(model, points, layer=name)[0].experts.shape for name in (names[0], names[-1])}) == 2


def test_a_router_is_shown_with_its_first_choice():
    model, names = sparse(kind="topk", top_k=2)
    layer = model.get_submodule(names[0])
    with torch.no_grad():
        layer.router.weight.mul_(50)
    tokens = []
    layer.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0]))
    (traced,) = trace_experts(model, POINTS)
    wanted = (tokens[0] @ layer.router.weight.T).argmax(-1)[:, 1:]
    assert torch.equal(traced.experts, wanted) and len(wanted.unique()) > 1


def test_tokens_without_a_slot_are_dropped():
    model, _ = sparse(kind="topk", top_k=1, capacity_factor=0.3)
    (traced,) = trace_experts(model, POINTS)
    counts = (traced.experts + 1).flatten().bincount(minlength=5)
    assert (counts[1:] <= 3).all() and counts[0] >= 30 - 4 * 3, "ceil(0.3 x 33 / 4) = 3 slots each"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: create_model("point_bert_tiny", num_classes=3, **SMALL), {}, "no expert layer to draw; .*last.pt"),
        (lambda: sparse()[0], {"layer": "blocks.blocks.1.mpl"}, "no expert layer .*did you mean 'blocks.blocks.1.mlp'"),
        (lambda: sparse()[0], {"passes": 0}, "passes is 0, must be at least 1"),
        (lambda: nn.Sequential(sparse()[0]), {}, "Sequential: where its tokens lie is not known"),
    ],
)
def test_what_cannot_be_traced_is_named(make, options, message):
    with pytest.raises(InputError, match=message):
        trace_experts(make(), POINTS, **options)
