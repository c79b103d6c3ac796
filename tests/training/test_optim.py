"""Weight decay by name, and the learning rate against its closed formula."""

import math
import shutil

import pytest
import torch
from timm.layers import RmsNorm
from torch import nn

from s2d3d import MoFConfig, Trainer, convert_to_mof_, create_model
from s2d3d.errors import InputError
from s2d3d.models import create_for_classes
from s2d3d.training.optim import base_lr, build_optimizer, build_scheduler, no_decay_names

TINY = dict(trans_dim=24, depth=2, num_heads=2, num_group=12, group_size=8, encoder_dims=24, encoder_width=8)


def tiny(variant: str = "bert", kind: str | None = None) -> nn.Module:
    model = create_model("point_bert_tiny", num_classes=5, variant=variant, **TINY)
    if kind:
        convert_to_mof_(model, MoFConfig(num_experts=3, every=1, kind=kind))
    return model


@pytest.mark.parametrize("variant", ["bert", "mae"])
def test_the_published_rule_on_a_dense_model(variant):
    """No decay of 1-d tensors, biases and the class token; the class position is decayed."""
    model = tiny(variant)
    expected = {name for name, p in model.named_parameters() if p.ndim == 1 or name == "cls_token"}
    assert no_decay_names(model) == expected
    assert "cls_pos" not in expected and {"norm.weight", "encoder.first_conv.1.weight"} <= expected


def test_norms_of_all_kinds_are_not_decayed():
    class Own(nn.RMSNorm):
        pass

    norms = [nn.LayerNorm(4), nn.RMSNorm(4), RmsNorm(4), Own(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)]
    model = nn.Sequential(*norms, nn.Linear(4, 4))
    assert no_decay_names(model) == {name for name, _ in model.named_parameters()} - {"6.weight"}


@pytest.mark.parametrize("kind", ["rup", "topk"])
def test_stacked_biases_are_not_decayed_and_stacked_weights_are(kind):
    """Their dimensions would say the opposite: a bias is (K, d)."""
    dense, sparse = tiny(), tiny(kind=kind)
    stacked = dict(sparse.named_parameters())["blocks.blocks.0.mlp.fc1.bias"]
    assert stacked.ndim == 2
    assert no_decay_names(sparse) == no_decay_names(dense), "a sparse run decays what the dense model decays"
    if kind == "topk":
        assert any("router" in name and name not in no_decay_names(sparse) for name, _ in sparse.named_parameters())


def test_groups_hold_every_trainable_parameter_once():
    model = tiny(kind="rup")
    model.cls_pos.requires_grad_(False)
    optimizer = build_optimizer(model, name="adamw", lr=2e-3, weight_decay=0.05)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0)
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}
    skip = no_decay_names(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == skip
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - skip - {"cls_pos"}


def test_decay_reaches_the_decayed_alone():
    """One step of AdamW without gradient signal multiplies by 1 - lr * decay, or leaves alone."""
    model = tiny(kind="rup")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, name="adamw", lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    skip = no_decay_names(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 if name in skip else 1 - 0.1 * 0.5))


def test_adamw_is_the_fused_one_and_others_are_built():
    model = tiny()
    assert build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.0).defaults["fused"]
    assert isinstance(build_optimizer(model, name="sgd", lr=1e-3, weight_decay=0.0), torch.optim.SGD)


def test_a_model_of_spared_parameters_alone():
    optimizer = build_optimizer(nn.LayerNorm(3), name="adamw", lr=1e-3, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0]


# Learning rate


def rates(schedule, total, warmup, lr=1e-2, min_lr=1e-4, warmup_lr=1e-5):
    """The rate of every update, as training asks for them."""
    optimizer = build_optimizer(tiny(), name="adamw", lr=lr, weight_decay=0.05)
    scheduler = build_scheduler(
        optimizer, schedule=schedule, min_lr=min_lr, warmup_lr=warmup_lr, warmup_steps=warmup, total_steps=total
    )
    result = []
    for update in range(total):
        scheduler.step_update(update)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second
        result.append(first)
    return result


@pytest.mark.parametrize(("total", "warmup"), [(50, 10), (50, 0), (7, 3), (300, 1)])
def test_cosine_after_a_linear_warm_up(total, warmup):
    for update, rate in enumerate(rates("cosine", total, warmup)):
        if update < warmup:
            expected = 1e-5 + (1e-2 - 1e-5) * update / warmup
        else:
            expected = 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * update / total)) / 2
        assert rate == pytest.approx(expected, rel=1e-9), update


def test_constant_after_a_linear_warm_up():
    expected = [1e-5 + (1e-2 - 1e-5) * update / 4 for update in range(4)] + [1e-2] * 16
    assert rates("constant", 20, 4) == pytest.approx(expected, rel=1e-9)


def test_the_rate_depends_on_the_update_alone():
    """A run that resumes builds a new schedule and asks for update n at once."""
    whole = rates("cosine", 30, 5)
    optimizer = build_optimizer(tiny(), name="adamw", lr=1e-2, weight_decay=0.05)
    options = dict(schedule="cosine", min_lr=1e-4, warmup_lr=1e-5, warmup_steps=5, total_steps=30)
    scheduler = build_scheduler(optimizer, **options)
    for update in (17, 3, 29):
        scheduler.step_update(update)
        assert optimizer.param_groups[0]["lr"] == whole[update]


# Experts at another rate


@pytest.mark.parametrize("kind", ["rup", "topk"])
def test_multiplier_splits_the_groups_and_keeps_the_rule_of_decay(kind):
    model = tiny(kind=kind)
    optimizer = build_optimizer(model, name="adamw", lr=1e-2, weight_decay=0.05, lr_multiplier=4.0)
    names, skip = {id(p): name for name, p in model.named_parameters()}, no_decay_names(model)
    seen = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values()), "every parameter once"
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            assert group["weight_decay"] == (0 if name in skip else 0.05), name
            is_expert = ".mlp.fc" in name  # stacked; a router is none
            assert group.get("lr_scale", 1.0) == (4.0 if is_expert else 1.0), name
            assert group["lr"] == pytest.approx(1e-2 * group.get("lr_scale", 1.0))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_multiplier_holds_at_every_update_of_the_schedule(schedule):
    expected = rates(schedule, 20, 4)
    optimizer = build_optimizer(tiny(kind="rup"), name="adamw", lr=1e-2, weight_decay=0.05, lr_multiplier=0.5)
    options = dict(schedule=schedule, min_lr=1e-4, warmup_lr=1e-5, warmup_steps=4, total_steps=20)
    scheduler = build_scheduler(optimizer, **options)
    for update, rate in enumerate(expected):
        scheduler.step_update(update)
        got = [group["lr"] for group in optimizer.param_groups]
        assert got == pytest.approx([rate, rate, rate / 2, rate / 2], rel=1e-9), update


def test_multiplier_scales_the_step_of_the_experts_alone():
    """Of plain SGD, whose step is the rate times the gradient."""
    steps = []
    for multiplier in (1.0, 3.0):
        torch.manual_seed(0)
        model = tiny(kind="rup")
        optimizer = build_optimizer(model, name="momentum", lr=0.1, weight_decay=0.0, lr_multiplier=multiplier)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        steps.append({name: before[name] - p.detach() for name, p in model.named_parameters()})
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], step * (3 if ".mlp.fc" in name else 1))


def test_multiplier_of_a_dense_model_changes_nothing():
    optimizer = build_optimizer(tiny(), name="adamw", lr=1e-3, weight_decay=0.1, lr_multiplier=4.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]


def test_multiplier_of_given_parameters_scales_these_alone():
    model = tiny()
    ffns = [p for name, p in model.named_parameters() if ".mlp.fc" in name]
    optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.1, lr_multiplier=0.5, scaled=ffns)
    scaled = {id(p) for group in optimizer.param_groups if "lr_scale" in group for p in group["params"]}
    assert scaled == {id(p) for p in ffns}
    assert {group["lr"] for group in optimizer.param_groups if "lr_scale" in group} == {5e-4}


@pytest.mark.parametrize("targets", ["['*.mlp']", "['blocks.blocks.?']"], ids=["FFNs", "blocks"])
def test_dense_run_scales_the_ffns_that_its_s2d_run_would_convert(tiny_config, targets):
    """The linear layers of these alone, also where a target names the block around an FFN."""
    rates, options = {}, ("s2d.lr_multiplier=0.5", f"s2d.targets={targets}", "train.max_steps=1")
    for kind in ("none", "rup"):
        trainer = Trainer(tiny_config(f"s2d.kind={kind}", *options))
        trainer.fit()
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        groups = trainer.optimizer.param_groups
        rates[kind] = {names[id(p)] for group in groups if "lr_scale" in group for p in group["params"]}
        shutil.rmtree(trainer.folder.root)
    assert rates["none"] and rates["none"] == rates["rup"], "stacked parameters have the names of the dense ones"
    assert all(".mlp.fc" in name for name in rates["none"])


def test_a_frozen_norm_beside_an_ffn_does_not_freeze_its_experts(tiny_config):
    options = ("s2d.targets=['blocks.blocks.?']", "train.freeze=['blocks.blocks.1.norm1']", "train.max_steps=1")
    trainer = Trainer(tiny_config(*options))
    trainer.fit()
    held = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    assert held == ["blocks.blocks.1.norm1.weight", "blocks.blocks.1.norm1.bias"]


def test_lamb_clips_no_gradient_of_its_own():
    optimizer = build_optimizer(tiny(), name="lamb", lr=1e-3, weight_decay=0.1)
    assert {group["max_grad_norm"] for group in optimizer.param_groups} == {None}


def test_dense_run_with_frozen_ffns_to_scale_is_refused(tiny_config):
    trainer = Trainer(tiny_config("s2d.kind=none", "s2d.lr_multiplier=0.5", "train.freeze=backbone"))
    with pytest.raises(InputError, match=r"s2d\.lr_multiplier: train\.freeze freezes the FFNs that it is for"):
        trainer.fit()
    assert not trainer.folder.root.exists()


def test_dense_run_without_an_ffn_to_scale_is_refused(tiny_config):
    trainer = Trainer(tiny_config("s2d.kind=none", "s2d.lr_multiplier=0.5", "s2d.targets=[head]"))
    with pytest.raises(InputError, match=r"s2d\.lr_multiplier: no FFN to apply it to; set it to 1, or see"):
        trainer.fit()
    assert not trainer.folder.root.exists()


def test_squared_lr_schedule_keeps_the_ratio_to_the_squared_rate(tiny_config):
    trainer = Trainer(tiny_config("s2d.schedule=squared_lr", "s2d.share_rate=0.2", "train.epochs=3"))
    trainer.fit()
    peak = trainer.config.optim.lr
    assert len(trainer.history) == 3
    for row in trainer.history:
        assert row["share_rate"] == pytest.approx(0.2 * (row["lr"] / peak) ** 2, rel=1e-6)


def test_an_optimizer_that_cannot_be_made_is_one_line():
    with pytest.raises(InputError, match=r"optimizer 'fusedadam' cannot be made here .*; choose another"):
        build_optimizer(nn.Linear(3, 2), name="fusedadam", lr=1e-3, weight_decay=0.0)


def test_layer_decay_multiplies_the_rate_of_experts_through_the_whole_schedule():
    """Blocks 0 and 1, experts in both: 0.5 * 0.5 and 0.5, times 3 for experts, from warm-up to the last update."""
    model = tiny(kind="rup")
    optimizer = build_optimizer(model, name="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.5, lr_multiplier=3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(
        name for group in optimizer.param_groups for name in (names[id(p)] for p in group["params"])
    ) == sorted(names.values())
    scheduler = build_scheduler(
        optimizer, schedule="cosine", min_lr=1e-6, warmup_lr=1e-5, warmup_steps=3, total_steps=10
    )
    plain = build_optimizer(tiny(), name="adamw", lr=2e-3, weight_decay=0.05)
    reference = build_scheduler(plain, schedule="cosine", min_lr=1e-6, warmup_lr=1e-5, warmup_steps=3, total_steps=10)
    for update in (0, 2, 3, 7, 9):
        scheduler.step_update(update)
        reference.step_update(update)
        base = plain.param_groups[0]["lr"]
        assert base_lr(optimizer) == pytest.approx(base)
        rates = {names[id(p)]: group["lr"] / base for group in optimizer.param_groups for p in group["params"]}
        assert rates["cls_head_finetune.0.weight"] == pytest.approx(1)
        assert rates["blocks.blocks.1.attn.qkv.weight"] == pytest.approx(0.5)
        assert rates["blocks.blocks.1.mlp.fc1.weight"] == rates["blocks.blocks.1.mlp.fc1.bias"] == pytest.approx(1.5)
        assert rates["blocks.blocks.0.mlp.fc2.weight"] == pytest.approx(0.75)
        assert rates["cls_token"] == rates["encoder.first_conv.0.bias"] == pytest.approx(0.125)


def test_a_model_with_experts_of_its_own_is_refused(tiny_config, monkeypatch):
    """Its run would end in a file that no model fits."""

    def create(*args, **kwargs):
        model = create_for_classes(*args, **kwargs)
        convert_to_mof_(model)
        return model

    monkeypatch.setattr("s2d3d.training.parts.create_for_classes", create)
    trainer = Trainer(tiny_config("s2d.kind=none"))
    with pytest.raises(InputError, match=r"model\.name: point_bert_tiny brings experts of its own; build it dense"):
        trainer.fit()
    assert not trainer.folder.root.exists()
