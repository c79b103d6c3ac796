"""Optimizer helpers, wrappers, hooks and adapters of other libraries do for experts what they do for a dense model."""

import copy

import pytest
import torch
from timm.layers import Mlp
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn

from s2d3d import create_model
from s2d3d.s2d import MoFConfig, RUPMoF, convert_to_mof_, is_sparse, merge_experts

ALL = MoFConfig(num_experts=4, every=1)


@pytest.fixture
def both(tiny_vit):
    dense, sparse = tiny_vit(), tiny_vit()
    convert_to_mof_(sparse, ALL)
    return dense, sparse


# Parameter groups


def test_timm_gives_experts_the_decay_and_the_scale_of_their_layer(both):
    def groups(model):
        made = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in made for p in g["params"]}

    dense, sparse = map(groups, both)
    assert sparse == dense
    assert len(set(dense.values())) > 5


def test_hugging_face_decays_the_same_names(both):
    transformers = pytest.importorskip("transformers")
    trainer = transformers.Trainer.__new__(transformers.Trainer)
    dense, sparse = (set(trainer.get_decay_parameter_names(model)) for model in both)
    assert sparse == dense
    assert "blocks.0.mlp.fc1.weight" in dense and "blocks.0.mlp.fc1.bias" not in dense


def test_hugging_face_decays_the_weights_of_experts_in_two_parts_and_not_their_biases():
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    model = transformers.BertModel(transformers.BertConfig(**size))
    trainer = transformers.Trainer.__new__(transformers.Trainer)
    dense = len(trainer.get_decay_parameter_names(model))
    convert_to_mof_(model, ALL)
    names = trainer.get_decay_parameter_names(model)
    assert len(names) == dense
    experts = [name for name, parameter in model.named_parameters() if ".experts." in name]
    assert {name for name in experts if name in names} == {name for name in experts if name.endswith(".weight")}


def test_muon_takes_the_matrices_and_adamw_the_experts(both):
    """The groups that docs/method.md describes; Muon refuses parameters of three dimensions."""
    _, sparse = both
    hidden = [p for name, p in sparse.named_parameters() if p.dim() == 2 and name.endswith(".weight")]
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([*hidden, sparse.blocks[0].mlp.fc1.weight])
    chosen = {id(p) for p in hidden}
    others = [p for p in sparse.parameters() if id(p) not in chosen]
    optimizers = torch.optim.Muon(hidden, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)
    before = copy.deepcopy(sparse.state_dict())
    sparse(torch.randn(2, 3, 16, 16)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(not torch.equal(value, before[key]) for key, value in sparse.named_parameters())


# Wrappers


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "compile of ddp", "ema"])
def test_merging_a_wrapper_returns_the_dense_model_inside(wrap, both, one_process, spread_):
    dense, sparse = both
    merged = merge_experts(spread_(sparse))
    wrapped = ModelEmaV3(sparse) if wrap == "ema" else nn.parallel.DistributedDataParallel(sparse)
    if wrap == "compile of ddp":
        wrapped = torch.compile(wrapped, backend="eager")
    found = merge_experts(wrapped)
    assert type(found) is type(dense) and not is_sparse(found)
    for key, value in merged.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_a_sharded_model_says_how_to_gather_it(both, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _, sparse = both
    fully_shard(sparse, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"sharded \(FSDP\): gather a full state dict"):
        merge_experts(sparse)


# Hooks and attributes


def test_hooks_on_the_ffn_see_tokens_and_come_back_with_the_merge():
    seen, ffn = [], Mlp(8, 16)
    ffn.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output.shape)))
    model = nn.ModuleDict({"mlp": ffn})
    convert_to_mof_(model, MoFConfig(targets=("mlp",), every=1))
    assert seen == []  # the trial fires none
    x = torch.randn(3, 7, 8)
    model["mlp"](x)
    merge_experts(model)["mlp"](x)
    assert seen == [(x.shape, x.shape)] * 2


def test_attributes_of_layer_and_parameters_come_back_with_the_merge():
    model = nn.ModuleDict({"mlp": Mlp(8, 16)})
    model["mlp"].fc1.weight.mark, model["mlp"].before = "a", 1
    convert_to_mof_(model, MoFConfig(targets=("mlp",), every=1))
    assert model["mlp"].fc1.weight.mark == "a" and model["mlp"].before == 1
    model["mlp"].after = 2
    merged = merge_experts(model)["mlp"]
    assert (merged.fc1.weight.mark, merged.before, merged.after) == ("a", 1, 2)


class Masked(nn.Module):
    """An FFN whose mask is set on it before the call."""

    mask = None

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.loss = nn.Linear(8, 16), nn.Linear(16, 8), None

    def forward(self, x):
        hidden = self.fc1(x).relu()
        self.loss = hidden.square().mean()
        return self.fc2(hidden if self.mask is None else hidden * self.mask)


@pytest.mark.parametrize("tokens", [6, 7])
def test_an_attribute_that_the_forward_reads_or_writes_is_that_of_the_tokens(tokens):
    dense = Masked()
    layer = RUPMoF(dense, 4)
    x, mask = torch.randn(4, tokens, 8), (torch.rand(4, tokens, 1) > 0.5).float()
    dense.mask = layer.mask = mask
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.loss, dense.loss)
    dense.loss.backward()
    layer.loss.backward()
    torch.testing.assert_close(layer.fc1.weight.grad.sum(0).t(), dense.fc1.weight.grad)


def test_a_mask_on_a_layer_is_that_of_the_tokens():
    class Plain(Masked):
        def forward(self, x):
            hidden = self.fc1(x).relu()
            return self.fc2(hidden if self.mask is None else hidden * self.mask)

    dense = Plain()
    layer = RUPMoF(dense, 4)
    x, dense.mask = torch.randn(4, 6, 8), torch.rand(4, 6, 1)
    layer.mask = dense.mask  # (4 experts, 6 slots, 1) would have this shape as well
    torch.testing.assert_close(layer(x), dense(x))


# Adapters


def test_lora_of_peft_is_refused_with_the_way_out():
    peft = pytest.importorskip("peft")
    model = create_model("point_bert_tiny", num_classes=3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1", "fc2"]))
    with pytest.raises(TypeError, match=r"merge or remove the adapters \(LoRA\), convert, and add adapters"):
        convert_to_mof_(adapted, MoFConfig(targets=("*.mlp",), every=1))
    merged = adapted.merge_and_unload()
    assert len(convert_to_mof_(merged, MoFConfig(targets=("*.mlp",), every=1))) > 1
