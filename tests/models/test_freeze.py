"""Frozen modules, and learning rates by layer, the latter against timm's own groups."""

import pytest
import torch
from timm.optim import param_groups_layer_decay

from s2d3d import MoFConfig, convert_to_mof_, create_model
from s2d3d.errors import InputError
from s2d3d.models.freeze import freeze_, head_name, hold_frozen_, layer_scales

MODELS = ("point_bert_tiny", "point_transformer_tiny")
HEADS = {"point_bert_tiny": "cls_head_finetune", "point_transformer_tiny": "cls"}


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_backbone_leaves_the_head_and_tokens_of_the_model_itself(name):
    model = create_model(name, num_classes=3)
    frozen = freeze_(model, ["backbone"])
    assert head_name(model) == HEADS[name] not in frozen
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key in trained if "." in key} == {
        key for key, _ in model.named_parameters() if key.startswith(f"{HEADS[name]}.")
    }
    assert {key for key in trained if "." not in key} == (
        {"cls_token", "cls_pos"} if name == "point_bert_tiny" else set()
    )
    model.train()
    hold_frozen_(model, frozen)
    modes = {key: module.training for key, module in model.named_modules() if key}
    assert {key.partition(".")[0] for key, training in modes.items() if training} == {HEADS[name]}
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    model(torch.rand(4, 128, 3)).sum().backward()
    frozen_buffers = [key for key in before if not key.startswith(HEADS[name])]
    assert frozen_buffers and all(torch.equal(before[key], dict(model.named_buffers())[key]) for key in frozen_buffers)
    assert all((p.grad is None) == (key not in trained) for key, p in model.named_parameters())


def test_patterns_name_the_outermost_modules():
    model = create_model("point_bert_tiny", num_classes=3)
    assert freeze_(model, ["encoder", "encoder.*", "blocks.blocks.[01]"]) == [
        "encoder", "blocks.blocks.0", "blocks.blocks.1"
    ]  # fmt: skip
    assert (
        model.blocks.blocks[2].mlp.fc1.weight.requires_grad and not model.blocks.blocks[1].mlp.fc1.weight.requires_grad
    )


def test_refused():
    model = create_model("point_bert_tiny", num_classes=3)
    with pytest.raises(InputError, match=r"train\.freeze: no module matches 'blocs' \(modules at the top: encoder, "):
        freeze_(model, ["blocs"])
    with pytest.raises(InputError, match=r"train\.freeze: \* leaves nothing to train"):
        freeze_(model, ["*"])  # the class token alone is not a module
    pretraining = create_model("point_mae_pretrain_tiny")
    with pytest.raises(InputError, match=r"train\.freeze: backbone is all but the head, which a pre-training lacks"):
        freeze_(pretraining, ["backbone"])
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"train\.freeze: \* leaves nothing to train"):
        freeze_(plain, ["*"])
    with pytest.raises(InputError, match=r"optim\.layer_decay: Sequential does not describe its layers"):
        layer_scales(plain, 0.5)


@pytest.mark.parametrize("name", MODELS)
def test_scales_are_those_of_timm(name):
    model = create_model(name, num_classes=3)
    keys = {id(p): key for key, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    theirs = {keys[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert layer_scales(model, 0.7) == pytest.approx(theirs)


def test_scales_by_hand():
    """Four blocks: the head has 1, the blocks 0.5 to 0.5^4, the input 0.5^5; experts have that of their block."""
    model = create_model("point_bert_tiny", num_classes=3)
    convert_to_mof_(model, MoFConfig(num_experts=3, every=2))
    scales = layer_scales(model, 0.5)
    expected = {
        "norm.weight": 1,
        "cls_head_finetune.3.bias": 1,
        "cls_pos": 0.5**5,
        "encoder.first_conv.0.weight": 0.5**5,
    }
    expected |= {f"blocks.blocks.{i}.attn.qkv.weight": 0.5 ** (4 - i) for i in range(4)}
    expected |= {f"blocks.blocks.{i}.mlp.fc1.weight": 0.5 ** (4 - i) for i in range(4)}
    assert {key: scales[key] for key in expected} == expected
    assert dict(model.named_parameters())["blocks.blocks.1.mlp.fc1.weight"].dim() == 3
    stages = layer_scales(create_model("point_transformer_tiny", num_classes=3), 0.5)
    assert stages["cls.0.weight"] == 1 and stages["enc4.2.mlp.fc1.weight"] == 0.5
    assert stages["enc4.0.linear.weight"] == 0.5**3 and stages["enc1.0.linear.weight"] == min(stages.values())
