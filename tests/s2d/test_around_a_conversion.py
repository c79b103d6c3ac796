"""What stands around a conversion changes nothing of it: hooks on all modules, modes, other conversions, generators."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from s2d3d.s2d import MoFConfig, RUPMoF, balance_loss, convert_to_mof_, merge_experts
from s2d3d.s2d.merge import linears_with_experts

C, H = 12, 20
EACH = MoFConfig(every=1, targets=("*.mlp",))


class Model(nn.Module):
    def __init__(self, mlp=None):
        super().__init__()
        self.block = nn.Module()
        self.block.mlp = mlp or nn.Sequential(nn.Linear(C, H), nn.GELU(), nn.Linear(H, C))

    def forward(self, x):
        return x + self.block.mlp(x)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(C, 2, H, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, **options)


def test_hooks_on_all_modules_are_not_taken_for_the_ffns_own():
    """BatchNorm in slots would count idle slots: the trial must see it, with a profiler's hooks as without.

    With hooks on all modules experts leave slots, which are not tried then.
    """
    channels = nn.Sequential(nn.Conv2d(C, H, 1), nn.BatchNorm2d(H), nn.GELU(), nn.Conv2d(H, C, 1))
    dense, x = Model(channels).train(), torch.randn(3, C, 5, 7)
    first, second = copy.deepcopy(dense), copy.deepcopy(dense)
    with register_module_forward_hook(lambda *_: None):
        convert_to_mof_(first, EACH)
        plain = Model()
        convert_to_mof_(plain, EACH)
        assert not plain.block.mlp.layout.in_slots
    plain = Model()
    convert_to_mof_(plain, EACH)
    assert plain.block.mlp.layout.in_slots, "what was found with hooks is not kept"
    convert_to_mof_(second, EACH)
    expected = dense(x)
    for sparse in (first, second):
        assert not sparse.block.mlp.layout.in_slots
        torch.testing.assert_close(sparse.train()(x), expected, rtol=1e-5, atol=1e-5)


def test_a_conversion_does_not_depend_on_one_that_failed():
    with pytest.raises(TypeError):
        convert_to_mof_(Model(nn.Sequential(nn.Linear(C, H), nn.Linear(7, C))), EACH)
    with torch.inference_mode(), pytest.raises(ValueError, match="convert outside of it"):
        convert_to_mof_(Model(), EACH)
    assert convert_to_mof_(Model(), EACH) == ["block.mlp"]


def test_a_conversion_where_new_tensors_have_no_memory():
    model = Model()
    with torch.device("meta"):
        convert_to_mof_(model, EACH)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_numpys_generator_is_pinned_and_stays():
    class Noisy(Model):
        def forward(self, x):
            return super().forward(x * (1 + np.random.rand()))

    before = np.random.get_state()
    convert_to_mof_(Noisy(), EACH, example=torch.randn(2, 7, C))
    after = np.random.get_state()
    assert before[2] == after[2] and np.array_equal(before[1], after[1])


def test_what_lies_beside_the_ffn_of_a_layer_may_be_shared():
    model = encoder()
    model.layers[1].self_attn, model.layers[1].norm1 = model.layers[0].self_attn, model.layers[0].norm1
    keys = model.state_dict().keys()
    assert convert_to_mof_(model, MoFConfig(every=1)) == ["layers.0", "layers.1"]
    merged = merge_experts(model)
    assert merged.state_dict().keys() == keys and merged.layers[1].self_attn is merged.layers[0].self_attn


@pytest.mark.parametrize("num_experts", [25, 32, 100])
def test_a_layer_is_tried_with_as_many_tokens_as_experts_need(num_experts):
    assert convert_to_mof_(encoder(), MoFConfig(every=1, num_experts=num_experts)) == ["layers.0", "layers.1"]


def test_one_linear_layer_of_an_ffn_is_frozen_alone():
    model = encoder()
    convert_to_mof_(model, MoFConfig(every=1))
    assert set(linears_with_experts(model)) == {f"layers.{n}.linear{part}" for n in (0, 1) for part in (1, 2)}
    model.layers[0].linear2.requires_grad_(False)
    model.layers[1].linear1.requires_grad_(False)
    merged = merge_experts(model)
    frozen = {name for name, parameter in merged.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"layers.{part}.{kind}" for part in ("0.linear2", "1.linear1") for kind in ("weight", "bias")}


def test_no_weight_decay_of_an_instance_comes_back():
    model, own = Model(), lambda: {"block.mlp.0.weight"}
    model.no_weight_decay = own
    convert_to_mof_(model, EACH)
    assert model.no_weight_decay() >= {"block.mlp.0.weight", "block.mlp.0.bias"}
    assert merge_experts(model).no_weight_decay is own


def test_a_merged_ffn_has_no_attribute_of_the_experts():
    model = Model()
    before = vars(model.block.mlp).keys()
    convert_to_mof_(model, EACH)
    assert vars(merge_experts(model).block.mlp).keys() == before


def test_nested_tensors_are_refused_in_one_line():
    layer = RUPMoF(Model().block.mlp, 2)
    nested = torch.nested.nested_tensor([torch.randn(3, C), torch.randn(5, C)], layout=torch.jagged)
    with pytest.raises(TypeError, match="takes padded tokens, got a nested tensor"):
        layer(nested)


def test_a_balancing_loss_without_a_gradient_is_refused():
    class Checkpointed(Model):
        reentrant = True

        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)

    model = Checkpointed()
    convert_to_mof_(model, MoFConfig(every=1, kind="topk", top_k=1))
    x = torch.randn(3, 7, C, requires_grad=True)
    model(x)
    with pytest.raises(ValueError, match="has no gradient, for the layer ran without one: in a checkpoint pass use_re"):
        balance_loss(model)
    with torch.no_grad():
        assert balance_loss(model) > 0
    model.reentrant = False
    model(x)
    balance_loss(model).backward()
    assert model.block.mlp.router.weight.grad.any()
    model.eval()(x)
    with torch.no_grad():
        model(x)
    assert not balance_loss(model).requires_grad, "in evaluation nothing learns"
