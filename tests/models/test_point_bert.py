"""Our Point-BERT equals the plain reference of the published one, and the comparison notices small deviations."""

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from s2d3d.models import create_model

PUBLISHED = {"point_bert": reference.PointBERT}
COUNTS = {"point_bert": (22_065_960, 164)}
ATOL = 2e-5  # separates right from wrong: tanh-GELU deviates by 1e-4 and more

SMALL = dict(trans_dim=96, depth=3, num_heads=3, num_group=16, group_size=8)
NO_DROP = dict(drop_path_rate=0.0, head_dropout=0.0)


def make_pair(name, num_classes, **kwargs):
    """Our model and the reference with the same seeded weights."""
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


@pytest.mark.parametrize("name", PUBLISHED)
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
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if not is_cancelled_by_batchnorm(key):
            scale = expected[key].grad.abs().max()
            assert scale > 0 and (parameter.grad - expected[key].grad).abs().max() < 1e-9 * scale, key
    expected = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert torch.allclose(buffer, expected[key], rtol=1e-9, atol=1e-9), key
    assert ours.encoder.first_conv[1].num_batches_tracked == 101


def is_cancelled_by_batchnorm(key):
    """A shift that the next BatchNorm takes away has no effect in training; its gradient is rounding noise."""
    return key in ("encoder.first_conv.0.bias", "encoder.first_conv.3.bias", "encoder.second_conv.0.bias")


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
    model = create_model("point_bert", num_classes=2, depth=1, num_heads=1)
    assert not model.cls_token.any()
    assert 0.8 < model.cls_pos.std() < 1.2


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
