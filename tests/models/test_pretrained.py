"""Published checkpoints, made here in their layout by the reference models, load whole or are refused in one line."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import reference
import timm
import torch
from torch import nn
from weights import assert_same_weights

from s2d3d.channels import num_channels
from s2d3d.datasets.transforms import turn_up_axis
from s2d3d.errors import InputError
from s2d3d.models import create_model, load_pretrained_
from s2d3d.models.pretrained import numpy_scalars
from s2d3d.runs.checkpoint import model_payload, save_checkpoint
from s2d3d.s2d import MoFConfig, convert_to_mof_

ATOL = 2e-5
SMALL = dict(trans_dim=48, num_heads=2, num_group=16, group_size=8)  # all 12 blocks: all keys, of small tensors
HINT = "taken as trained z up, published files were trained y up: model.pretrained_up_axis=y"
REFERENCES = {"point_bert": reference.PointBERT, "point_mae": reference.PointMAE}
CONVERTED = MoFConfig(num_experts=2)


def kwargs_of(name):
    return SMALL | ({"encoder_dims": 48} if name == "point_mae" else {})


def published_model(name="point_bert", num_classes=5):
    return reference.draw_weights_(REFERENCES[name](num_classes, **kwargs_of(name)), seed=1).eval()


def our_model(name="point_bert", num_classes=5, **kwargs):
    return create_model(name, num_classes=num_classes, **{**kwargs_of(name), **kwargs}).eval()


def wrapped(weights, module="module."):
    """The layout of the public trainers: weights, optimizer and numpy numbers."""
    return {
        "base_model": {module + key: value for key, value in weights.items()},
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": 5e-4, "params": [0]}],
        },
        "epoch": 299,
        "metrics": {"acc": np.float64(92.9)},
        "best_metrics": {"acc": np.float32(93.2), "epoch": np.int64(250), "vote": np.bool_(False)},
    }


def our_payload(model, mof=None):
    """The layout of our own trainer."""
    description = dict(name="point_bert", in_channels=3, kwargs=kwargs_of("point_bert"))
    return model_payload(model, **description, class_names=list("abcde"), mof=mof, config={})


@pytest.fixture
def write(tmp_path):
    def save(content, name="published.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


def clouds(batch=2, count=128):
    return torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(2)) * 2 - 1


@torch.no_grad()
def deviation(ours, theirs, points):
    return (ours.eval()(points) - theirs.eval()(points)).abs().max().item()


def copy_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


# What loads


@pytest.mark.parametrize("module", ["module.", ""])
@pytest.mark.parametrize("name", REFERENCES)
def test_published_layout_loads_every_tensor_and_gives_equal_logits(write, name, module):
    theirs, ours = published_model(name), our_model(name)
    path = write(wrapped(theirs.state_dict(), module))
    assert deviation(ours, theirs, clouds()) > 0.1
    report = load_pretrained_(ours, path)
    assert report.missing == report.unexpected == report.mismatched == ()
    assert list(report.matched) == list(ours.state_dict())
    total = {"point_bert": 164, "point_mae": 174}[name]
    assert report.summary() == f"{path}: {total} of the model's {total} tensors loaded; {HINT}"
    assert_same_weights(ours.state_dict(), dict(theirs.state_dict()))
    assert deviation(ours, theirs, clouds()) < ATOL


@pytest.mark.slow
def test_full_size_point_mae(write):
    theirs, ours = reference.draw_weights_(reference.PointMAE(40)), create_model("point_mae", num_classes=40)
    report = load_pretrained_(ours, write(wrapped(theirs.state_dict())))
    assert len(report.matched) == 174 and not (report.missing or report.unexpected or report.mismatched)
    assert deviation(ours, theirs, clouds(batch=1, count=512)) < ATOL


def test_plain_state_dicts_and_our_own_checkpoints_load(write, tmp_path):
    theirs, ours = published_model(), our_model()
    payload = our_payload(theirs)
    for path in (
        write(theirs.state_dict(), "plain.pth"),
        write({f"module.{key}": value for key, value in theirs.state_dict().items()}, "ddp.pth"),
        save_checkpoint(tmp_path / "ours.pt", payload),
    ):
        reference.draw_weights_(ours, seed=5)
        report = load_pretrained_(ours, path)
        assert len(report.matched) == 164, path
        assert report.summary().endswith("of the model's 164 tensors loaded"), "not the layout that is trained y up"
        assert deviation(ours, theirs, clouds()) < ATOL


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("_orig_mod.", None),
        ("module._orig_mod.", "model"),
        ("_orig_mod.module.", "net"),
        ("net.module.", "model_state_dict"),
        ("model.", "state_dict"),
    ],
)
def test_files_of_other_trainers_load_whole(write, prefix, key):
    theirs, ours = published_model(), our_model()
    weights = {prefix + name: weight.half() for name, weight in theirs.state_dict().items()}
    report = load_pretrained_(ours, write({key: weights, "epoch": 3} if key else weights))
    assert len(report.matched) == 164 and not report.unexpected
    expected = {name: weight.half().to(weight.dtype) for name, weight in theirs.state_dict().items()}
    assert_same_weights(ours.state_dict(), expected)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_head_follows_the_names_of_the_classes(tmp_path, suffix):
    """A head whose rows mean other classes is reordered or left fresh, and that is said."""
    theirs, points = published_model(), clouds()
    path = save_checkpoint(tmp_path / f"ours.{suffix}", our_payload(theirs))
    with torch.no_grad():
        expected = theirs(points)
        for names, said in (("abcde", None), ("ecdab", "; its classes have another order, the rows of the last")):
            ours = our_model()
            report = load_pretrained_(ours, path, class_names=list(names))
            assert len(report.matched) == 164 and (said is None or said in report.summary())
            rows = ["abcde".index(name) for name in names]
            assert torch.allclose(ours(points), expected[:, rows], atol=ATOL)
    ours = our_model()
    fresh = copy_of(ours)
    report = load_pretrained_(ours, path, class_names=list("abXde"))
    last = ("cls_head_finetune.3.weight", "cls_head_finetune.3.bias")
    assert report.mismatched == last and all(torch.equal(ours.state_dict()[key], fresh[key]) for key in last)
    assert "left fresh, other classes (class 2 is 'c' there and 'X' here): cls_head_finetune (2)" in report.summary()


def test_point_bert_pretraining_loads_what_the_classifier_has(write):
    weights = published_model().state_dict()
    backbone = {key: value for key, value in weights.items() if not key.startswith("cls_head_finetune")}
    extras = {
        "mask_token": torch.zeros(1, 1, 48),
        "lm_head.weight": torch.ones(8, 48),
        "cls_head.0.weight": torch.ones(9, 96),
    }
    content = {f"transformer_q.{key}": value for key, value in (backbone | extras).items()}
    content |= {f"transformer_k.{key}": value + 1 for key, value in backbone.items()}
    content |= {"dvae.encoder.first_conv.0.weight": torch.ones(128, 3, 1), "queue": torch.ones(2, 2)}
    ours = our_model()
    fresh = copy_of(ours)
    report = load_pretrained_(ours, write(wrapped(content)))
    assert set(report.matched) == backbone.keys()
    assert_same_weights({key: ours.state_dict()[key] for key in backbone}, backbone)
    assert set(report.missing) == {f"cls_head_finetune.{key}" for key in ("0.weight", "0.bias", "3.weight", "3.bias")}
    assert_same_weights(
        {key: ours.state_dict()[key] for key in report.missing}, {key: fresh[key] for key in report.missing}
    )
    assert set(report.unexpected) == set(content) - {f"transformer_q.{key}" for key in backbone}
    assert report.summary().partition(": ")[2] == (
        "160 of the model's 164 tensors loaded; left fresh, not in the file: cls_head_finetune (4); "
        f"in the file, not used: transformer_q (3), transformer_k (160), dvae, queue; {HINT}"
    )


def test_point_mae_pretraining_has_no_class_token(write):
    weights = published_model("point_mae").state_dict()
    backbone = {key: value for key, value in weights.items() if not key.startswith("cls_")}
    content = {f"MAE_encoder.{key}": value for key, value in backbone.items()}
    content |= {"mask_token": torch.zeros(1, 1, 48), "MAE_decoder.norm.weight": torch.ones(48)}
    ours = our_model("point_mae")
    report = load_pretrained_(ours, write(wrapped(content)))
    assert set(report.matched) == backbone.keys() and len(backbone) == 156
    assert {"cls_token", "cls_pos"} < set(report.missing) and len(report.missing) == 18
    assert report.unexpected == ("mask_token", "MAE_decoder.norm.weight")
    assert_same_weights({key: ours.state_dict()[key] for key in backbone}, backbone)


@pytest.mark.parametrize("name", REFERENCES)
def test_another_number_of_classes_leaves_the_last_layer_fresh(write, name):
    theirs, ours = published_model(name), our_model(name, num_classes=7)
    fresh = copy_of(ours)
    last = {"point_bert": "cls_head_finetune.3", "point_mae": "cls_head_finetune.8"}[name]
    report = load_pretrained_(ours, write(wrapped(theirs.state_dict())))
    assert report.mismatched == (f"{last}.weight", f"{last}.bias")
    assert not report.missing and not report.unexpected
    now = ours.state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(now[key], fresh[key] if key in report.mismatched else value), key
    left = "left fresh, another number of classes: cls_head_finetune (2)"
    assert report.summary().endswith(f"tensors loaded; {left}; {HINT}")


def test_blocks_that_the_file_lacks_are_reported(write):
    ours = our_model(depth=14)
    report = load_pretrained_(ours, write(wrapped(published_model().state_dict())))
    assert len(report.matched) == 164 and len(report.missing) == 22
    assert all(key.startswith(("blocks.blocks.12.", "blocks.blocks.13.")) for key in report.missing)


def test_half_precision_files_keep_the_models_type(write):
    theirs, ours = published_model(), our_model()
    load_pretrained_(
        ours, write({key: v.half() if v.is_floating_point() else v for key, v in theirs.state_dict().items()})
    )
    assert ours.norm.weight.dtype == torch.float32
    assert torch.equal(ours.norm.weight, theirs.norm.weight.half().float())


def test_loading_leaves_mode_gradients_and_random_state_alone(write):
    path, ours = write(wrapped(published_model().state_dict())), our_model().train()
    ours.cls_pos.requires_grad_(False)
    before = torch.get_rng_state()
    load_pretrained_(ours, path)
    assert ours.training and not ours.cls_pos.requires_grad and ours.cls_token.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


# Orientation


@pytest.mark.parametrize("name", REFERENCES)
def test_weights_of_clouds_y_up_do_the_same_with_clouds_z_up(write, name):
    theirs, ours = published_model(name), our_model(name)
    path = write(wrapped(theirs.state_dict()))
    assert load_pretrained_(ours, path, up_axis="y").summary().endswith("tensors loaded; turned from y up to z up")
    points = clouds()
    turned = turn_up_axis(points, "y", "z")
    with torch.no_grad():
        expected = theirs(points)
        assert (ours(turned) - expected).abs().max() < ATOL
        assert (ours(points) - expected).abs().max() > 100 * ATOL, "orientation matters"
        assert (ours(turn_up_axis(points, "z", "y")) - expected).abs().max() > 100 * ATOL


def test_only_known_axes_and_models_can_be_turned(write):
    path = write(wrapped(published_model().state_dict()))
    with pytest.raises(InputError, match="up_axis is 'x', must be 'y' or 'z'"):
        load_pretrained_(our_model(), path, up_axis="x")
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(InputError, match="weights of Sequential cannot be turned"):
        load_pretrained_(other, write(other.state_dict(), "other.pth"), up_axis="y")


# What is refused


def test_a_pickle_with_code_is_refused_and_the_code_not_run(write, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    ours = our_model()
    before = copy_of(ours)
    path = write(wrapped(published_model().state_dict()) | {"metrics": Hostile()})
    with pytest.raises(InputError, match=r"^\S+published\.pth: .*its pickle calls \w+\.mkdir, which is not done\)$"):
        load_pretrained_(ours, path)
    assert not (tmp_path / "ran").exists()
    assert_same_weights(ours.state_dict(), before)
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the file does run code where it is allowed to"


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_numbers_of_numpy_1_and_numpy_2_are_read(write, core):
    theirs, ours = published_model(), our_model()
    content = wrapped(theirs.state_dict())
    content["metrics"] = {code: np.dtype(code).type(1) for code in "?bhilqBHILQefd"}
    path = write(content, _use_new_zipfile_serialization=False)  # the older format, whose pickle is not in an archive
    written = path.read_bytes()
    changed = re.sub(rb"numpy\._?core(?=\.multiarray\n)", core, written)
    assert core + b".multiarray\nscalar\n" in changed
    path.write_bytes(changed)
    assert len(load_pretrained_(ours, path).matched) == 164
    with torch.serialization.safe_globals(numpy_scalars()):
        assert torch.load(path, weights_only=True)["best_metrics"]["acc"] == np.float32(93.2)


@pytest.mark.parametrize(
    "value", [np.arange(3), np.random.default_rng(0), Path("a")], ids=lambda value: type(value).__name__
)
def test_nothing_of_numpy_but_numbers_is_read(write, value):
    path = write(wrapped(published_model().state_dict()) | {"metrics": value})
    with pytest.raises(InputError, match="it is more than data: its pickle calls "):
        load_pretrained_(our_model(), path)


def test_allowing_numbers_ends_with_the_reading(write):
    path = write(wrapped(published_model().state_dict()))
    before = set(torch.serialization.get_safe_globals())
    load_pretrained_(our_model(), path)
    assert set(torch.serialization.get_safe_globals()) == before


def changed(key, value):
    return lambda weights: {**weights, key: value(weights[key])}


def first(number):
    return lambda weights: dict(list(weights.items())[:number])


QKV = "blocks.blocks.3.attn.qkv.weight"
REFUSED = {
    "foreign keys": (
        lambda weights: timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=2).state_dict(),
        "belongs to another model: it has 3 of the 160 tensors",
    ),
    "a part": (first(40), r"belongs to another model: it has \d+ of the 160 tensors"),
    "nan": (changed(QKV, lambda t: t * torch.nan), rf"tensors with values that are not finite \(1\), such as '{QKV}'"),
    "inf": (changed("norm.bias", lambda t: t / 0), r"values that are not finite \(1\), such as 'norm\.bias'"),
    "whole numbers": (changed(QKV, lambda t: t.long()), f"'{QKV}' is torch.int64, the model has torch.float32"),
    "a sparse tensor": (changed(QKV, lambda t: t.to_sparse()), f"'{QKV}' is not an ordinary tensor"),
    "text for a tensor": (changed(QKV, lambda t: "text"), f"'{QKV}' is not an ordinary tensor"),
    "another width": (
        changed(QKV, lambda t: t[:, :12].clone()),
        rf"of another shape \(1\), such as '{QKV}': \(144, 12\) in the file, \(144, 48\) in the model; choose the",
    ),
    "another head": (
        changed("cls_head_finetune.3.weight", lambda t: t[:, :9].clone()),
        r"tensors of another shape \(1\), such as 'cls_head_finetune.3.weight': \(5, 9\)",
    ),
    "a model of the other kind": (
        lambda weights: published_model("point_mae").state_dict(),
        r"tensors of another shape \(2\), such as 'encoder\.second_conv\.3\.\w+': ",
    ),
    "a list": (lambda weights: list(weights.values()), "holds a list, a checkpoint is a mapping from names to weights"),
    "no weights": (lambda weights: {"epoch": 3, "lr": 0.1}, "no weights found, neither under .* top: 'epoch', 'lr'$"),
    "nothing": (lambda weights: {}, "no weights found, neither under 'base_model', .*'net' nor .*: it is empty"),
    "another wrapping": (lambda weights: {"mine": weights}, "no weights found, .*: 'mine'"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_one_line_and_leaves_the_model_as_it_was(write, spoil, message):
    ours = our_model()
    before = copy_of(ours)
    path = write(spoil(dict(published_model().state_dict())))
    with pytest.raises(InputError, match=message) as caught:
        load_pretrained_(ours, path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert_same_weights(ours.state_dict(), before)


def test_experts_are_neither_loaded_nor_loaded_into(write, tmp_path):
    sparse = our_model()
    convert_to_mof_(sparse, CONVERTED)
    path = save_checkpoint(tmp_path / "sparse.pt", our_payload(sparse, CONVERTED))
    with pytest.raises(
        InputError, match=r"has experts, pretrained weights must be dense; merge it first: python tools/merge"
    ):
        load_pretrained_(our_model(), path)
    with pytest.raises(
        InputError, match=r"tensors of another shape \(24\), such as 'blocks\.blocks\.1\.mlp\.fc1\.weight'"
    ):
        load_pretrained_(sparse, write(wrapped(published_model().state_dict())))


@pytest.mark.parametrize("content", [b"", b"weights", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(40)], ids=repr)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_pretrained_(our_model(depth=1), path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files(write, legacy):
    path = write(wrapped({"weight": torch.ones(40)}), _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    model = our_model(depth=1)
    for size in generator.integers(1, len(whole), 20):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            load_pretrained_(model, path)
    for place in generator.integers(len(whole), size=60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(InputError):  # undamaged, it still belongs to another model
            load_pretrained_(model, path)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: no such checkpoint file$"):
            load_pretrained_(our_model(depth=1), path)


# A file of the public repositories, where there is one


def test_published_checkpoint(request):
    """Fine-tuned: every tensor matches, logits equal the reference's. Pretrained: only head and tokens are missing."""
    path = request.config.getoption("--published-checkpoint")
    if not path:
        pytest.skip("--published-checkpoint names no file")
    with torch.serialization.safe_globals(numpy_scalars()):
        content = torch.load(path, map_location="cpu", weights_only=True)
    weights = {key.removeprefix("module."): value for key, value in content["base_model"].items()}
    is_mae = any(key.startswith(("MAE_encoder.", "cls_head_finetune.8.")) for key in weights)
    name = "point_mae" if is_mae else "point_bert"
    head = weights.get(f"cls_head_finetune.{8 if is_mae else 3}.bias")
    ours = create_model(name, num_classes=40 if head is None else len(head))
    report = load_pretrained_(ours, path)
    if head is None:
        assert all(key.startswith("cls_") for key in report.missing) and not report.mismatched
        return
    assert not (report.missing or report.unexpected or report.mismatched)
    theirs = REFERENCES[name](len(head))
    theirs.load_state_dict(weights, strict=True)
    assert deviation(ours, theirs, clouds(count=1024)) < ATOL


# Channels beyond x, y, z

BACKBONES = {
    "point_bert": kwargs_of("point_bert") | {"depth": 2},
    "point_mae": kwargs_of("point_mae") | {"depth": 2},
    "point_transformer": dict(channels=(16, 32), depths=(1, 1), strides=(1, 4), num_neighbors=(8, 8)),
}


def backbone(name, channels, seed=0):
    torch.manual_seed(seed)
    model = create_model(name, num_classes=5, in_channels=num_channels(channels), **BACKBONES[name])
    return reference.draw_weights_(model, seed=seed).eval()


def described(model, channels):
    return model_payload(
        model, name="any", in_channels=num_channels(channels), kwargs={}, class_names=list("abcde"), mof=None,
        config={}, channels=channels,
    )  # fmt: skip


def cloud_of(channels, seed=3):
    return torch.rand(2, 128, num_channels(channels), generator=torch.Generator().manual_seed(seed)) - 0.5


@pytest.mark.parametrize("plain", [True, False], ids=["state dict", "checkpoint"])
@pytest.mark.parametrize("name", BACKBONES)
def test_more_channels_than_the_file_start_at_zero(write, name, plain):
    """The model does what the file's does, whatever the new channels hold, and learns from them."""
    theirs, ours = backbone(name, "xyz"), backbone(name, "xyz+normal+rgb", seed=1)
    path = write(theirs.state_dict() if plain else described(theirs, "xyz"))
    report = load_pretrained_(ours, path, channels="xyz+normal+rgb")
    assert "first layers: columns of xyz loaded, those of normal and rgb start at zero" in report.summary()
    assert not (report.missing or report.unexpected or report.mismatched)
    points = cloud_of("xyz+normal+rgb")
    assert deviation(ours, lambda_model(theirs), points) < ATOL
    ours.train()(points).square().sum().backward()
    first = next(key for key in ("encoder.first_conv.0.weight", "enc1.0.linear.weight") if key in ours.state_dict())
    assert ours.get_parameter(first).grad[:, 3:].abs().max() > 0


def lambda_model(model):
    """A model of coordinates, fed with clouds of more channels."""

    class OnCoordinates(nn.Module):
        def forward(self, points):
            return model(points[..., :3])

    return OnCoordinates()


@pytest.mark.parametrize("name", BACKBONES)
def test_fewer_and_other_channels_than_the_file(write, name):
    theirs = backbone(name, "xyz+normal")
    path = write(described(theirs, "xyz+normal"))
    fewer = backbone(name, "xyz", seed=1)
    report = load_pretrained_(fewer, path)
    assert "columns of xyz loaded; the file's columns of normal are not used" in report.summary()
    points = cloud_of("xyz+normal")
    points[..., 3:] = 0
    assert deviation(lambda_model(fewer), theirs, points) < ATOL
    other = backbone(name, "xyz+rgb", seed=1)
    text = "columns of xyz loaded, those of rgb start at zero; the file's columns of normal are not used"
    assert text in load_pretrained_(other, path, channels="xyz+rgb").summary()
    assert deviation(other, theirs, points) < ATOL
    same = backbone(name, "xyz+normal", seed=1)
    assert "columns of" not in load_pretrained_(same, path, channels="xyz+normal").summary()
    assert deviation(same, theirs, cloud_of("xyz+normal")) == 0


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_of_normals_are_turned_with_those_of_coordinates(write, name):
    theirs, ours = backbone(name, "xyz+normal+rgb"), backbone(name, "xyz+normal+rgb", seed=1)
    load_pretrained_(ours, write(theirs.state_dict()), up_axis="y", channels="xyz+normal+rgb")
    points = cloud_of("xyz+normal+rgb")
    turned = turn_up_axis(points, "y", "z", channels="xyz+normal+rgb")
    with torch.no_grad():
        assert (ours(turned) - theirs(points)).abs().max() < ATOL
        assert (ours(points) - theirs(points)).abs().max() > 100 * ATOL
