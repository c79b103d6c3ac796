"""What holds for every model of the registry, and for the layers they are made of."""

import inspect
import itertools

import pytest
import torch
from cases import quick
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2d3d.errors import InputError
from s2d3d.models import create_model, list_models, model_kwargs
from s2d3d.models.layers import GroupEncoder, max_over_group
from s2d3d.training.optim import no_decay_names

SHALLOW = {"depth": 2}
"""Full width, two blocks: every kind of layer at a fraction of the time."""
SHALLOW_STAGES = {"point_transformer": {"depths": (0, 1, 0, 0, 1)}}
"""The same for models whose depth is that of their stages."""
GROUPED = [name for name in list_models(task="classify") if "num_group" in model_kwargs(name)]
"""The models that cut a cloud into groups, one token each."""
SMALL_FIRST = quick(
    len(list_models(task="classify")) - 1, sorted(list_models(task="classify"), key="point_bert".__eq__)
)
"""The large Point-BERT, of which there are two smaller ones, is slow."""


def build(name, in_channels=3, **kwargs):
    known = model_kwargs(name)
    shallow = SHALLOW | SHALLOW_STAGES.get(name, {})
    wanted = {key: value for key, value in {**shallow, **kwargs}.items() if key in known}
    assert wanted.keys() >= kwargs.keys(), "the model has these parameters"
    return create_model(name, num_classes=7, in_channels=in_channels, **wanted)


def clouds(batch=2, count=128, channels=3):
    return torch.rand(batch, count, channels) * 2 - 1


@pytest.mark.parametrize("name", list_models(task="classify"))
def test_shapes_finite_outputs_and_determinism(name):
    model = build(name).eval()
    points = clouds()
    copy = points.clone()
    with torch.no_grad():
        logits = model(points)
        again = model(points)
        single = model(points[1:])
    assert logits.shape == (2, 7) and logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert torch.equal(logits, again) and torch.equal(points, copy)
    assert torch.allclose(single, logits[1:], atol=1e-5), "a cloud's logits do not depend on its batch"
    assert (logits[0] - logits[1]).abs().max() > 1e-6, "they do depend on the cloud"


@pytest.mark.parametrize("name", SMALL_FIRST)
def test_every_parameter_gets_a_gradient(name):
    model = build(name, drop_path_rate=0.0).train()
    # In the last of several stages a point needs another one: attention to a single neighbour has no weights to learn.
    model(clouds(batch=4, count=512 if "strides" in model_kwargs(name) else 128)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", SMALL_FIRST)
def test_training_mode_is_random_and_follows_the_global_generator(name):
    model = build(name).train()
    points = clouds(batch=4)
    torch.manual_seed(1)
    first = model(points)
    second = model(points)
    torch.manual_seed(1)
    assert not torch.equal(first, second) and torch.equal(first, model(points))


@pytest.mark.parametrize("name", list_models(task="classify"))
def test_one_seed_gives_one_model(name):
    torch.manual_seed(3)
    first = build(name).state_dict()
    torch.manual_seed(3)
    second = build(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", GROUPED)
def test_initial_weights_have_the_models_deviation_and_biases_are_zero(name):
    std = model_kwargs(name)["init_std"]
    for key, module in build(name).named_modules():
        if isinstance(module, nn.Linear):
            assert 0.75 * std < module.weight.std() < 1.25 * std, key
            assert module.bias is None or not module.bias.any(), key


@pytest.mark.parametrize("name", list_models(task="classify"))
def test_other_channels_are_refused_in_one_line(name):
    model = build(name).eval()
    for points in (clouds(channels=6), clouds()[0]):
        with pytest.raises(InputError, match=r"^points have shape \(.*\), the model takes \(B, N, 3\): 3 channels$"):
            model(points)


@pytest.mark.parametrize("name", GROUPED)
def test_additional_channels_are_used_and_do_not_move_the_groups(name):
    model = build(name, in_channels=6).eval()
    points = clouds(channels=6)
    changed = points.clone()
    changed[..., 3:] += 1
    with torch.no_grad():
        assert not torch.equal(model(points), model(changed))
        model.encoder.first_conv[0].weight[:, 3:] = 0
        assert torch.equal(model(points), model(changed))


@pytest.mark.parametrize("name", list_models(task="classify"))
def test_order_of_points_does_not_matter_behind_the_first(name):
    """Sampling starts at index 0; all that follows is a function of the set."""
    model = build(name).eval()
    points = clouds()
    shuffled = torch.cat([points[:, :1], points[:, 1:].flip(1)], dim=1)
    with torch.no_grad():
        assert torch.allclose(model(points), model(shuffled), atol=1e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_fewer_points_than_groups_or_than_a_group(name):
    model = build(name, num_group=24, group_size=16)
    with pytest.raises(ValueError, match=r"23 points per cloud are too few for num_group=24 and group_size=16"):
        model(clouds(count=23))
    with pytest.raises(ValueError, match=r"23 points per cloud are too few"):
        build(name, num_group=16, group_size=24)(clouds(count=23))
    assert model.eval()(clouds(count=24)).shape == (2, 7)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 5}, "num_heads is 5, must divide trans_dim"),
        ({"num_heads": 0}, "num_heads is 0, must divide trans_dim"),
        ({"depth": 0}, "depth is 0, must be at least 1"),
        ({"trans_dim": 0}, "trans_dim is 0, must be at least 1"),
        ({"num_group": 0}, "num_group is 0, must be at least 1"),
        ({"group_size": -1}, "group_size is -1, must be at least 1"),
        ({"encoder_dims": 0}, "encoder_dims is 0, must be at least 1"),
        ({"encoder_width": 0}, "encoder_width is 0, must be at least 1"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio is 0.0, must be at least 1 / \d+ channels"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0, must be in \[0, 1\)"),
        ({"head_dropout": -0.1}, r"head_dropout is -0.1, must be in \[0, 1\)"),
        ({"init_std": 0.0}, "init_std is 0.0, must be above 0"),
        ({"init_std": float("nan")}, "init_std is nan, must be above 0"),
        ({"in_channels": 2}, r"in_channels is 2, must be at least 3"),
    ],
)
def test_values_out_of_range(name, kwargs, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(name, **kwargs)


@pytest.mark.parametrize("name", list_models(task="classify"))
def test_no_classes(name):
    with pytest.raises(ValueError, match="num_classes is 0, must be at least 1"):
        create_model(name, num_classes=0)


@pytest.mark.parametrize("name", GROUPED)
def test_weight_decay_spares_vectors_and_the_class_token_alone(name):
    """As published: `cls_pos` is decayed."""
    model = build(name)
    spared = no_decay_names(model)
    assert spared == {key for key, p in model.named_parameters() if p.dim() == 1} | {"cls_token"}
    assert "cls_pos" not in spared


# Registry


def test_list_models_filters_by_pattern():
    assert list_models() == sorted(list_models())
    assert list_models("point_bert*") == ["point_bert", "point_bert_small", "point_bert_tiny"]
    assert list_models("resnet*") == []


@pytest.mark.parametrize("name", list_models(task="classify"))
def test_model_kwargs_are_what_create_model_takes(name):
    defaults = model_kwargs(name)
    assert not {"num_classes", "in_channels"} & defaults.keys()
    with torch.device("meta"):
        plain, spelled_out = create_model(name, num_classes=3), create_model(name, num_classes=3, **defaults)
    assert repr(plain) == repr(spelled_out)


def test_unknown_names_get_the_nearest():
    with pytest.raises(InputError, match=r"unknown model 'point_brt'; did you mean 'point_bert'\? \(known: .*_tiny"):
        create_model("point_brt", num_classes=2)
    with pytest.raises(InputError, match=r"model 'point_bert' has no parameter 'dept'; did you mean 'depth'\?"):
        create_model("point_bert", num_classes=2, dept=3)
    with pytest.raises(InputError, match="unknown model 'x'"):
        model_kwargs("x")


def test_sizes_are_ordered():
    sizes = []
    for name in ("point_bert_tiny", "point_bert_small", "point_bert"):
        with torch.device("meta"):
            sizes.append(sum(p.numel() for p in create_model(name, num_classes=40).parameters()))
    assert all(1.5 * small < large for small, large in itertools.pairwise(sizes))


def test_models_know_nothing_of_training_or_data():
    import s2d3d.models as package

    for module in (package, package.layers, package.point_bert, package.point_transformer):
        imports = [line for line in inspect.getsource(module).splitlines() if line.startswith(("import", "from"))]
        assert not [
            line for line in imports if any(room in line for room in ("training", "runs", "config", "datasets"))
        ]


# Layers


def test_maximum_over_a_group_equals_amax_in_value_and_gradient_with_ties():
    x = torch.randint(4, (5, 6, 7)).double()
    x[0] = 1.0
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    weight = torch.randn(5, 7, dtype=torch.double)
    (max_over_group(ours) * weight).sum().backward()
    (theirs.amax(1) * weight).sum().backward()
    assert torch.equal(max_over_group(ours), theirs.amax(1))
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12) and ours.grad.any()
    with torch.no_grad():
        assert torch.equal(max_over_group(x), x.amax(1))


def test_rows_of_the_group_encoder_are_shifted_without_copies():
    """In a view, autograd would copy the gradient of the largest tensor three times: 4 % of a ViT-S step."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((str(func), [value.numel() for value in args if isinstance(value, torch.Tensor)]))
            return func(*args, **(kwargs or {}))

    loss = GroupEncoder(3, 24, encoder_width=8)(torch.randn(2, 6, 4, 3)).square().sum()
    with Record():
        loss.backward()
    rows = 2 * 6 * 4
    assert ("aten.native_batch_norm_backward.default", rows * 32) in [(name, sizes[0]) for name, sizes in seen if sizes]
    copies = [
        name for name, sizes in seen if rows * 32 in sizes and name.split(".")[1] in ("clone", "copy_", "new_zeros")
    ]
    assert not copies


@pytest.mark.parametrize("training", [False, True])
def test_group_encoder_equals_its_convolutions_without_the_split(training):
    encoder = GroupEncoder(5, 24, encoder_width=8).double().train(training)
    groups = torch.randn(2, 3, 4, 5).double()
    slopes = []
    for form in ("ours", "convolutions"):
        if form == "ours":
            result = encoder(groups)
        else:
            points = encoder.first_conv(groups.flatten(0, 1).transpose(1, 2))
            points = torch.cat([points.amax(2, keepdim=True).expand_as(points), points], dim=1)
            result = encoder.second_conv(points).amax(2).view(2, 3, 24)
        slopes.append([result, *torch.autograd.grad(result.tanh().sum(), list(encoder.parameters()))])
    for found, expected in zip(*slopes):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
