"""Our Point-BERT and Point-MAE equal the plain references, and the comparison notices small deviations."""

import pytest
import reference
import torch
from cases import quick
from torch import nn
from torch.nn import functional as F

from s2d3d.models import create_model, layers

PUBLISHED = {"point_bert": reference.PointBERT, "point_mae": reference.PointMAE}
COUNTS = {"point_bert": (22_065_960, 164), "point_mae": (22_099_752, 174)}
ATOL = 2e-5  # separates right from wrong: tanh-GELU deviates by 1e-4 and more

SMALL = dict(trans_dim=96, depth=3, num_heads=3, num_group=16, group_size=8)
NO_DROP = dict(drop_path_rate=0.0, head_dropout=0.0)

ENCODER_SHIFTS = {"encoder.first_conv.0.bias", "encoder.first_conv.3.bias", "encoder.second_conv.0.bias"}
HEAD_SHIFTS = {"norm.bias", "cls_head_finetune.0.bias", "cls_head_finetune.4.bias"}
WITHOUT_EFFECT = {"point_bert": ENCODER_SHIFTS, "point_mae": ENCODER_SHIFTS | HEAD_SHIFTS}
"""Shifts that the next BatchNorm takes away in training: their gradient is rounding noise."""


def make_pair(name, num_classes, **kwargs):
    """Our model and the reference with the same seeded weights."""
    if name == "point_mae" and "trans_dim" in kwargs:
        kwargs["encoder_dims"] = kwargs["trans_dim"]
    theirs = reference.draw_weights_(PUBLISHED[name](num_classes, **kwargs))
    ours = create_model(name, num_classes=num_classes, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def unit_clouds(batch, count, seed=0):
    """Thick shells in the unit sphere, with some points about the origin that only plain sampling selects."""
    generator = torch.Generator().manual_seed(seed)
    points = F.normalize(torch.randn(batch, count, 3, generator=generator), dim=-1)
    points *= 0.5 + 0.5 * torch.rand(batch, count, 1, generator=generator)
    points[:, 5::17] *= 0.02
    return points


def deviation(ours, theirs, points):
    with torch.no_grad():
        return (ours.eval()(points) - theirs.eval()(points)).abs().max().item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_keys_are_those_of_the_published_classifier(name):
    with torch.device("meta"):
        ours, theirs = create_model(name, num_classes=40), PUBLISHED[name](40)
    assert (sum(p.numel() for p in ours.parameters()), len(ours.state_dict())) == COUNTS[name]
    assert shapes(ours) == shapes(theirs)


def shapes(model):
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", quick(1, list(PUBLISHED)))
def test_full_size_logits_equal_the_reference(name):
    ours, theirs = make_pair(name, 40)
    points = unit_clouds(2, 1024)
    assert deviation(ours, theirs, points) < ATOL
    with torch.no_grad():
        logits = ours(points)
    assert logits.std() > 0.3 and (logits[0] - logits[1]).abs().max() > 1000 * ATOL, "no comparison of constants"


def make_gelu_tanh_(model):
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"


def add_position_once_(model):
    def forward(x, pos):
        x = x + pos
        for block in model.blocks.blocks:
            x = block(x)
        return x

    model.blocks.forward = forward


def use_plain_sampling_(model):
    model.fps_skip_origin = False


def swap_head_input_(model):
    model.forward_head = lambda t: model.cls_head_finetune(torch.cat([t[:, 1:].amax(1), t[:, 0]], dim=-1))


def swap_encoder_halves_(model):
    weight = model.encoder.second_conv[0].weight
    weight.data = weight.data.roll(weight.shape[1] // 2, dims=1)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "spoil_", [make_gelu_tanh_, add_position_once_, use_plain_sampling_, swap_head_input_, swap_encoder_halves_]
)
def test_a_wrong_variant_fails_the_same_comparison(name, spoil_):
    ours, theirs = make_pair(name, 40, **SMALL)
    points = unit_clouds(2, 256)
    assert deviation(ours, theirs, points) < ATOL
    spoil_(ours)
    assert deviation(ours, theirs, points) > 4 * ATOL


def train_one_batch(ours, theirs):
    """Gradients in float64: in float32 a rounding error can hand a maximum, and its gradient, to another point."""
    points, labels = unit_clouds(6, 256).double(), torch.arange(6)
    for model in (ours, theirs):
        F.cross_entropy(model.double().train()(points), labels).backward()


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradients_and_batch_statistics_equal_the_reference_in_training(name):
    """Tolerance: 1e-9 of each tensor's largest gradient, in float64."""
    ours, theirs = make_pair(name, 10, **SMALL, **NO_DROP)
    train_one_batch(ours, theirs)
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    assert {key for key, gradient in expected.items() if gradient.abs().max() < 1e-12} == WITHOUT_EFFECT[name]
    for key, parameter in ours.named_parameters():
        scale = 1e-3 if key in WITHOUT_EFFECT[name] else expected[key].abs().max()
        assert (parameter.grad - expected[key]).abs().max() < 1e-9 * scale, key
    expected = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert torch.allclose(buffer, expected[key], rtol=1e-9, atol=1e-9), key
    assert ours.encoder.first_conv[1].num_batches_tracked == 101


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradients_of_a_wrong_variant_differ(name):
    ours, theirs = make_pair(name, 10, **SMALL, **NO_DROP)
    make_gelu_tanh_(ours)
    train_one_batch(ours, theirs)
    key = "blocks.blocks.0.mlp.fc1.weight"
    expected = theirs.get_parameter(key).grad
    assert (ours.get_parameter(key).grad - expected).abs().max() > 1e-6 * expected.abs().max()


def test_drop_path_grows_linearly_over_the_blocks():
    model = create_model("point_bert", num_classes=2, trans_dim=12, num_heads=1, depth=5, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_tokens_start_as_published():
    model = create_model("point_bert", num_classes=2, depth=1)
    assert not model.cls_token.any()
    assert 0.8 < model.cls_pos.std() < 1.2
    model = create_model("point_mae", num_classes=2, depth=1)
    for token in (model.cls_token, model.cls_pos):
        assert 0.017 < token.std() < 0.023
    assert not torch.equal(model.cls_token, model.cls_pos)


def test_point_mae_is_a_variant_of_point_bert():
    """`reduce_dim` and two BatchNorm layers are what tells them apart, beside the start of the tokens."""
    with torch.device("meta"):
        bert, mae = (create_model(name, num_classes=15).state_dict().keys() for name in PUBLISHED)
        same = create_model("point_bert", num_classes=15, variant="mae", encoder_dims=384).state_dict().keys()
    assert same == mae
    assert {key for key in bert - mae if not key.startswith("cls_head_finetune.3")} == {
        "reduce_dim.weight",
        "reduce_dim.bias",
    }
    head = {int(key.split(".")[1]) for key in mae if key.startswith("cls_head_finetune")}
    assert head == {0, 1, 4, 5, 8}


def test_scanobjectnn_shape_of_point_mae():
    """128 groups of 32 points out of 2048, 15 classes."""
    kwargs = dict(num_group=128, depth=1)
    ours, theirs = make_pair("point_mae", 15, **kwargs)
    points = unit_clouds(1, 2048)
    assert ours.eval().forward_features(points).shape == (1, 129, 384)
    assert deviation(ours, theirs, points) < ATOL


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variant": "dino"}, "variant is 'dino', must be one of bert, mae"),
        ({"variant": "mae"}, "encoder_dims is 256, must equal trans_dim 384 in variant 'mae'"),
    ],
)
def test_variants_that_cannot_be(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_model("point_bert", num_classes=2, **kwargs)


def test_features_are_normalised_tokens_with_the_class_token_first():
    model = create_model("point_bert_tiny", num_classes=4, **NO_DROP).eval()
    points = unit_clouds(2, 128)
    tokens = model.forward_features(points)
    assert tokens.shape == (2, 33, 96)
    assert torch.allclose(tokens.mean(-1), torch.zeros(2, 33), atol=1e-5)
    assert torch.equal(model.forward_head(tokens), model(points))
    with torch.no_grad():
        model.cls_pos += 1 + torch.arange(96)
    changed = model.forward_features(points)
    assert (changed[:, 0] - tokens[:, 0]).abs().max() > 10 * (changed[:, 1:] - tokens[:, 1:]).abs().max()


# Attention in bf16 on a CPU


@pytest.mark.parametrize("tokens", [1, 5, 65])
def test_attention_by_products_is_the_fused_one(tokens):
    """Values and gradients, in float64, from slices as `qkv` gives them."""
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, tokens, 8, dtype=torch.float64)
    results = []
    for attend in (layers._attend_by_products, F.scaled_dot_product_attention):
        result = attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        results.append((result, *torch.autograd.grad((result * weight).sum(), qkv)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_attention_takes_products_in_bf16_alone(monkeypatch):
    """And only while the attention matrices are small; what it computes is the float32 result but for rounding."""
    attention, calls = layers.Attention(16, num_heads=2), []
    by_products = layers._attend_by_products
    monkeypatch.setattr(layers, "_attend_by_products", lambda *qkv: calls.append(qkv[0].dtype) or by_products(*qkv))
    for tokens, expected in ((65, [torch.bfloat16]), (513, [])):
        x, calls[:] = torch.randn(1, tokens, 16), []
        exact = attention(x)
        assert calls == []
        with torch.autocast("cpu", torch.bfloat16):
            rounded = attention(x)
        assert calls == expected
        torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.02)
