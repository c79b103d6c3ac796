"""The masked autoencoder against a plain reference, its layout, and what it refuses."""

import copy

import pytest
import torch
from reference import draw_weights_
from reference.point_mae_pretrain import PointMAEPretrain as Reference

from s2d3d import EWA, MoFConfig, convert_to_mof_, create_model, list_models, load_pretrained_, merge_experts
from s2d3d.errors import InputError
from s2d3d.models import model_task

SIZE = dict(trans_dim=48, depth=3, num_heads=3, decoder_depth=2, decoder_num_heads=4, num_group=10, group_size=8)


def pair(**options):
    """Make our model and the reference, with the same weights."""
    own = create_model("point_mae_pretrain", encoder_dims=48, **{**SIZE, "drop_path_rate": 0.0, **options})
    reference = Reference(**{**SIZE, "drop_path_rate": 0.0, **options})
    draw_weights_(reference)
    reference.mask_token.data.normal_()
    own.load_state_dict(reference.state_dict(), strict=True)
    return own, reference


@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_gradients_equal_the_reference(loss, training):
    own, reference = pair(loss=loss)
    points = torch.rand(4, 96, 3) * 2 - 1
    mask = own.draw_mask(4)
    losses = [model.train(training)(points, mask) for model in (own, reference)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    for value in losses:
        value.backward()
    gradients = dict(reference.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in gradients.values())
    for name, p in own.named_parameters():
        assert p.grad is not None, name
        assert float((p.grad - gradients[name].grad).abs().max()) <= 1e-4 * largest, name
    if training:  # BatchNorm of the patch encoder has seen the masked groups as well
        for (name, buffer), other in zip(own.named_buffers(), reference.buffers()):
            torch.testing.assert_close(buffer, other, msg=name)


def test_reconstruction_equals_the_reference_part_by_part():
    own, reference = pair()
    points, mask = torch.rand(3, 64, 3) * 2 - 1, torch.zeros(3, 10, dtype=torch.bool)
    mask[:, [1, 4, 7]] = True
    result = own.eval().reconstruct(points, mask)
    rebuilt, target, visible = reference.eval().reconstruct(points, mask)
    assert result._fields == ("loss", "rebuilt", "target", "visible", "mask")
    assert result.rebuilt.shape == result.target.shape == (3, 3, 8, 3) and result.visible.shape == (3, 7, 48)
    torch.testing.assert_close(result.rebuilt.flatten(0, 1), rebuilt, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.visible, visible, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(result.target.flatten(0, 1), target):  # points of a group stand in any order
        assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))
    assert torch.equal(result.mask, mask)


def test_published_layout():
    """Keys and shapes of the full size; the count is that of the reference, written after the published layout."""
    with torch.device("meta"):
        own, reference = create_model("point_mae_pretrain"), Reference()
    shapes = {key: tuple(value.shape) for key, value in own.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    assert shapes["MAE_encoder.blocks.blocks.11.attn.qkv.weight"] == (1152, 384)
    assert shapes["MAE_decoder.blocks.3.mlp.fc1.weight"] == (1536, 384)
    assert shapes["increase_dim.0.weight"] == (96, 384, 1) and shapes["mask_token"] == (1, 1, 384)


def test_files_in_the_published_layout_load_in_both_directions(tmp_path):
    own, reference = pair()
    file = {"base_model": {f"module.{key}": value for key, value in reference.state_dict().items()}, "epoch": 300}
    torch.save(file, tmp_path / "pretrain.pth")
    fresh = create_model("point_mae_pretrain", encoder_dims=48, **SIZE)
    report = load_pretrained_(fresh, tmp_path / "pretrain.pth")
    assert len(report.matched) == len(own.state_dict()) and not report.missing and not report.unexpected
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in fresh.state_dict().items())
    reference.load_state_dict(fresh.state_dict(), strict=True)
    classifier = create_model(
        "point_mae", num_classes=5, trans_dim=48, depth=3, num_heads=3, num_group=10, group_size=8, encoder_dims=48
    )
    report = load_pretrained_(classifier, tmp_path / "pretrain.pth")
    encoder = [key for key in own.state_dict() if key.startswith("MAE_encoder.")]
    assert len(report.matched) == len(encoder)
    assert all(torch.equal(classifier.state_dict()[key[12:]], own.state_dict()[key]) for key in encoder)


def test_masks_have_the_right_number_and_come_from_the_global_generator():
    model = create_model("point_mae_pretrain_tiny", mask_ratio=0.6)
    torch.manual_seed(1)
    first = model.draw_mask(200)
    torch.manual_seed(1)
    assert torch.equal(first, model.draw_mask(200))
    assert (first.sum(1) == 19).all(), "int(0.6 * 32)"
    assert (first.float().mean(0) - 19 / 32).abs().max() < 0.15, "each group is masked as often"
    points = torch.rand(2, 64, 3)
    losses = {float(model(points)) for _ in range(3)}
    assert len(losses) == 3, "a new mask at each pass"


def test_experts_in_encoder_and_decoder_merge_to_the_dense_model():
    torch.manual_seed(0)
    model = create_model("point_mae_pretrain_tiny")
    names = convert_to_mof_(model, MoFConfig(num_experts=3, every=1))
    assert {name.split(".")[0] for name in names} == {"MAE_encoder", "MAE_decoder"} and len(names) == 5
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    ewa = EWA(model, share_rate=0.1, total_steps=3)
    points = torch.rand(4, 128, 3)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(points).backward()
        optimizer.step()
        ewa.step()
    mask = model.draw_mask(4)
    merged = merge_experts(copy.deepcopy(model))
    torch.testing.assert_close(merged.eval()(points, mask), model.eval()(points, mask))
    create_model("point_mae_pretrain_tiny").load_state_dict(merged.state_dict(), strict=True)


def test_identical_experts_train_as_the_dense_model():
    dense = create_model("point_mae_pretrain_tiny")
    sparse = copy.deepcopy(dense)
    convert_to_mof_(sparse, MoFConfig(num_experts=4, every=1))
    points, mask = torch.rand(3, 96, 3), dense.draw_mask(3)
    losses = [model.train()(points, mask) for model in (dense, sparse)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    for name, p in dense.named_parameters():
        if ".mlp." not in name:
            other = dict(sparse.named_parameters())[name]
            torch.testing.assert_close(p.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_features_of_unmasked_clouds_are_those_of_an_empty_mask():
    model = create_model("point_mae_pretrain_tiny").eval()
    features = model.forward_features(torch.rand(2, 64, 3))
    assert features.shape == (2, 32, 96) and bool(torch.isfinite(features).all())


def test_pretraining_models_are_listed_with_their_task():
    assert list_models("point_mae_*") == ["point_mae_pretrain", "point_mae_pretrain_small", "point_mae_pretrain_tiny"]
    assert list_models(task="pretrain") == list_models("point_mae_*")
    assert not set(list_models(task="classify")) & set(list_models(task="pretrain"))
    assert model_task("point_bert") == "classify"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, r"mask_ratio is 0.0, must be in \(0, 1\)"),
        ({"mask_ratio": 1.0}, r"mask_ratio is 1.0, must be in \(0, 1\)"),
        ({"mask_ratio": 0.05, "num_group": 8}, "masks 0 groups, must mask at least one"),
        ({"encoder_dims": 24}, "encoder_dims is 24, must equal trans_dim 96"),
        ({"decoder_num_heads": 5}, "num_heads is 5, must divide trans_dim 96"),
        ({"loss": "emd"}, "loss is 'emd', must be one of l2, l1"),
        ({"init_std": 0.0}, "init_std is 0.0, must be above 0"),
        ({"decoder_depth": 0}, "decoder_depth is 0, must be at least 1"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("point_mae_pretrain_tiny", **options)


def test_refused_masks_points_and_classes():
    model = create_model("point_mae_pretrain_tiny")
    points, mask = torch.rand(2, 64, 3), model.draw_mask(2)
    uneven = mask.clone()
    uneven[0] = False
    uneven[0, 0] = True
    for wrong, message in (
        (mask[:1], "must be bool of shape"),
        (mask.float(), "mask is torch.float32"),
        (torch.ones_like(mask), "hides 32 to 32 of 32 groups"),
        (uneven, "the same number in each"),
    ):
        with pytest.raises(ValueError, match=message):
            model(points, wrong)
    with pytest.raises(ValueError, match="31 points per cloud are too few for num_group=32"):
        model(torch.rand(2, 31, 3))
    with pytest.raises(InputError, match="has no classes: it is for pre-training"):
        create_model("point_mae_pretrain", num_classes=40)
    with pytest.raises(InputError, match="'point_bert' needs num_classes"):
        create_model("point_bert")
