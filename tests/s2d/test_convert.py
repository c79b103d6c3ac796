"""Conversion and merge on stock timm transformers: what is chosen, what is refused, and that nothing else changes."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from s2d3d import create_model
from s2d3d.s2d import EWA, MoFConfig, RUPMoF, convert_to_mof_, is_sparse, merge_experts
from s2d3d.s2d.analysis import expert_divergence
from s2d3d.training.optim import no_decay_names


class Shared(nn.Module):
    """One FFN under two names, as in a transformer that shares weights over its depth."""

    def __init__(self):
        super().__init__()
        self.a = Mlp(6, 12)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Tied(nn.Module):
    """Two FFNs that share one parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Mlp(6, 12), Mlp(6, 12)
        self.b.fc1.weight = self.a.fc1.weight


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def sparse_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, RUPMoF)]


def assert_same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(now[key], value), key


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16)


# What is chosen


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        (MoFConfig(), [1, 3, 5, 7, 9, 11]),
        (MoFConfig(every=1), list(range(12))),
        (MoFConfig(every=5), [4, 9]),
        (MoFConfig(every=12), [11]),
        (MoFConfig(every=1, targets=("blocks.1.mlp",)), [1]),
        (MoFConfig(every=1, targets=("blocks.1*.mlp",)), [1, 10, 11]),
        (MoFConfig(every=1, targets=("blocks.[25].mlp", "blocks.7.*lp")), [2, 5, 7]),
        (MoFConfig(every=1, targets=["blocks.3.mlp", "*.3.mlp"]), [3]),
    ],
)
def test_targets_and_every(config, blocks, tiny_vit):
    model = tiny_vit(depth=12)
    names = [f"blocks.{block}.mlp" for block in blocks]
    assert convert_to_mof_(model, config) == names
    assert sparse_names(model) == names
    assert all(model.get_submodule(name).num_experts == 4 for name in names)


def test_filter_narrows_the_matches_before_they_are_counted(tiny_vit):
    model, seen = tiny_vit(depth=6), []

    def keep(module: nn.Module, name: str) -> bool:
        seen.append((type(module), name))
        return name not in ("blocks.0.mlp", "blocks.3.mlp")

    assert convert_to_mof_(model, MoFConfig(every=2), keep) == ["blocks.2.mlp", "blocks.5.mlp"]
    assert seen == [(Mlp, f"blocks.{block}.mlp") for block in range(6)]


def test_matches_are_counted_over_all_stages():
    model = nn.ModuleDict(
        {s: nn.ModuleList([nn.ModuleDict({"mlp": Mlp(w, w)}) for _ in range(3)]) for s, w in [("a", 4), ("b", 8)]}
    )
    assert convert_to_mof_(model) == ["a.1.mlp", "b.0.mlp", "b.2.mlp"]


def test_other_weights_keep_their_values_and_identity(tiny_vit):
    model = tiny_vit()
    parameters, state = dict(model.named_parameters()), snapshot(model)
    names = convert_to_mof_(model)
    for key, parameter in model.named_parameters():
        if key.rpartition(".mlp.")[0] + ".mlp" in names:
            dense = state[key].t() if key.endswith("weight") else state[key]
            assert torch.equal(parameter, dense.expand(4, *dense.shape)) and parameter.is_contiguous()
        else:
            assert parameter is parameters[key]
    assert model.state_dict().keys() == state.keys()


def test_copied_experts_leave_the_model_as_it_was(tiny_vit, images):
    model = tiny_vit()
    expected = model(images)
    convert_to_mof_(model)
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model.eval()(images), expected)


# What is refused


@pytest.mark.parametrize(
    ("config", "filter_fn", "error", "message"),
    [
        (MoFConfig(targets=("*.ffn",)), None, ValueError,
         r"no module matches '\*.ffn'; modules that could become experts: blocks.0.mlp, blocks.1.mlp, .*blocks.3.mlp$"),
        (MoFConfig(), lambda module, name: False, ValueError, "filter_fn rejects all 4 matches, such as"),
        (MoFConfig(every=5), None, ValueError, r"every=5 takes none of the 4 modules that match .*: use every <= 4"),
        (MoFConfig(targets=("*.mlp", "*.ffn")), None, ValueError, r"no module matches the target '\*\.ffn'"),
        (MoFConfig(targets=("*.attn",)), None, TypeError, "module 'blocks.1.attn' cannot become .*: Attention mixes"),
        (MoFConfig(targets=("*.norm1",)), None, TypeError, "module 'blocks.1.norm1' cannot become .*: LayerNorm is"),
        (MoFConfig(targets=("*.fc2",)), None, TypeError, "module 'blocks.1.mlp.fc2' cannot become .*: Linear is not"),
        # The last of three fails: the first two must not have been replaced by then.
        (MoFConfig(targets=("*.mlp", "head"), every=1), None, TypeError, "module 'head' cannot become experts"),
        (MoFConfig(targets=("*.mlp", "blocks.1"), every=1), None, ValueError,
         "module 'blocks.1.mlp' lies inside 'blocks.1', which matches too: narrow targets"),
    ],
)  # fmt: skip
def test_refused_conversions_leave_the_model_unchanged(config, filter_fn, error, message, tiny_vit):
    model = tiny_vit()
    modules, state = dict(model.named_modules()), snapshot(model)
    with pytest.raises(error, match=message):
        convert_to_mof_(model, config, filter_fn)
    assert dict(model.named_modules()) == modules
    assert_same_state(model, state)


def test_model_without_any_ffn_says_so():
    with pytest.raises(ValueError, match=r"no module matches '\*.mlp', and the model has no FFN to convert"):
        convert_to_mof_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 2)))


def test_long_list_of_candidates_is_cut(tiny_vit):
    with pytest.raises(ValueError, match=r"blocks.7.mlp, \.\.\.$"):
        convert_to_mof_(tiny_vit(depth=12), MoFConfig(targets=("nothing",)))


def test_converting_twice_is_refused(tiny_vit):
    model = tiny_vit()
    convert_to_mof_(model)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="the model has experts already: convert the dense model, or merge it first"):
        convert_to_mof_(model)
    assert dict(model.named_modules()) == modules
    assert convert_to_mof_(merge_experts(model)) == ["blocks.1.mlp", "blocks.3.mlp"]


def test_the_model_itself_is_never_replaced():
    ffn = nn.Sequential(Mlp(6, 12), nn.GELU(), Mlp(6, 12))
    assert convert_to_mof_(ffn, MoFConfig(targets=("*",), every=1), lambda m, name: isinstance(m, Mlp)) == ["0", "2"]
    with pytest.raises(TypeError, match="module 'fc1' cannot become experts"):
        convert_to_mof_(Mlp(6, 12), MoFConfig(targets=("*",), every=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0, must be at least 1"),
        ({"every": 0}, "every is 0, must be at least 1"),
        ({"targets": "*.mlp"}, r"targets is '\*.mlp', must be a sequence of patterns"),
        ({"targets": ()}, "targets is empty"),
        ({"init": "random"}, "init is 'random', must be one of copy, independent"),
        ({"init_noise": -0.1}, "init_noise is -0.1, must be finite and at least 0"),
        ({"init_noise": float("nan")}, "init_noise is nan, must be finite and at least 0"),
        ({"kind": "soft"}, "kind is 'soft', must be one of rup, topk"),
        ({"num_experts": 4.0}, "num_experts is 4.0, must be a whole number"),
        ({"num_experts": True}, "num_experts is True, must be a whole number"),
        ({"every": "2"}, "every is '2', must be a whole number"),
        ({"top_k": 1.5}, "top_k is 1.5, must be a whole number"),
        ({"targets": (None,)}, r"targets is \(None,\), must be patterns"),
        ({"init_noise": "0.1"}, "init_noise is '0.1', must be a number"),
        ({"init_noise": True}, "init_noise is True, must be a number"),
        ({"targets": 3}, "targets is 3, must be patterns"),
    ],
)
def test_config_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MoFConfig(**options)


def test_targets_may_come_one_by_one():
    assert MoFConfig(targets=(name for name in ("*.mlp", "*.ffn"))).targets == ("*.mlp", "*.ffn")


def test_config_values_may_be_numpys():
    config = MoFConfig(num_experts=np.int64(3), every=np.int32(2), init_noise=np.float32(0.5))
    assert (config.num_experts, config.every) == (3, 2) and type(config.num_experts) is int


# Shared modules


@pytest.mark.parametrize("inplace", [True, False])
def test_ffn_under_two_names_is_one_layer_under_both(inplace, spread_):
    model, x = Shared(), torch.randn(2, 5, 6)
    state, expected = snapshot(model), model(x)
    assert convert_to_mof_(model, MoFConfig(targets=("*",), every=1), lambda m, _: isinstance(m, Mlp)) == ["a"]
    assert isinstance(model.a, RUPMoF) and model.b is model.a
    torch.testing.assert_close(model(x), expected)
    assert len(list(model.parameters())) == 4
    spread_(model)
    before = model.eval()(x)
    merged = merge_experts(model, inplace=inplace)
    assert type(merged.a) is Mlp and merged.b is merged.a
    assert {key: value.shape for key, value in merged.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert torch.equal(merged(x), before)


def test_shared_ffn_is_found_under_either_name():
    model = Shared()
    assert convert_to_mof_(model, MoFConfig(targets=("b",), every=1)) == ["b"]
    assert isinstance(model.a, RUPMoF) and model.b is model.a


def test_shared_block_is_replaced_in_both_places(tiny_vit, images):
    model = tiny_vit(depth=2)
    model.blocks.append(model.blocks[1])
    expected = model(images)
    assert convert_to_mof_(model) == ["blocks.1.mlp"]
    assert model.blocks[2].mlp is model.blocks[1].mlp
    torch.testing.assert_close(model(images), expected)
    merged = merge_experts(model)
    assert merged.blocks[2] is merged.blocks[1] and not is_sparse(merged)


def test_tied_parameters_are_refused():
    model = Tied()
    with pytest.raises(ValueError, match=r"module 'a' shares fc1.weight with another module"):
        convert_to_mof_(model, MoFConfig(targets=("a",), every=1))
    assert not is_sparse(model)


# How experts start


def test_independent_experts_keep_the_dense_one_and_redraw_the_others_by_the_models_initialiser():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=96, depth=2, num_heads=2, num_classes=3)
    nn.init.normal_(model.blocks[1].mlp.fc1.bias)  # as if trained: only expert 0 may keep it
    nn.init.normal_(model.blocks[1].mlp.fc1.weight)
    dense = snapshot(model.blocks[1].mlp)
    convert_to_mof_(model, MoFConfig(init="independent"))
    for name, stacked in model.blocks[1].mlp.state_dict().items():
        wanted = dense[name].t() if name.endswith("weight") else dense[name]
        assert torch.equal(stacked[0], wanted)
        if name.endswith("bias"):
            assert (stacked[1:] == 0).all()
            continue
        for expert in range(1, 4):
            # timm draws from a normal of deviation 0.02; nn.Linear's own uniform has 0.059 (fc1) or 0.029 (fc2).
            assert float(stacked[expert].std()) == pytest.approx(0.02, rel=0.03)
            assert float(stacked[expert].mean()) == pytest.approx(0, abs=5e-4)
            assert not any(torch.allclose(stacked[expert], stacked[other]) for other in range(expert))
    assert all(layer > 0.5 for layer in expert_divergence(model).values())


def test_independent_experts_of_a_model_without_initialiser_follow_nn_linear():
    model = nn.ModuleDict({"mlp": Mlp(64, 256)})
    convert_to_mof_(model, MoFConfig(every=1, targets=("mlp",), init="independent"))
    bound = 1 / 64**0.5
    for expert in range(1, 4):
        weight, bias = (model["mlp"].state_dict()[f"fc1.{key}"][expert] for key in ("weight", "bias"))
        assert float(weight.abs().max()) <= bound and float(bias.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.03)
        assert float(bias.std()) > 0.02


def test_independent_experts_use_the_initialiser_of_a_wrapped_model(tiny_vit):
    model = nn.Sequential(nn.Identity(), tiny_vit(depth=2))
    assert convert_to_mof_(model, MoFConfig(init="independent")) == ["1.blocks.1.mlp"]
    assert (model[1].blocks[1].mlp.fc1.bias == 0).all()


@pytest.mark.parametrize(("layer", "gate"), [(SwiGLU, "fc1_g"), (GluMlp, "fc1")])
def test_gated_ffns_have_the_last_word_on_their_own_initialisation(layer, gate, tiny_vit):
    """timm starts gates at weight 0 and bias 1, after the linear layers inside have been drawn."""
    model = tiny_vit(depth=2, mlp_layer=layer)
    convert_to_mof_(model, MoFConfig(init="independent"))
    stacked = getattr(model.blocks[1].mlp, gate).requires_grad_(False)
    half = slice(None) if layer is SwiGLU else slice(stacked.out_features // 2, None)
    assert (stacked.bias[:, half] == 1).all()
    assert float(stacked.weight[:, :, half].abs().max()) < 1e-4
    assert float(model.blocks[1].mlp.fc2.weight.detach()[1:].std()) > 0.01


def test_noise_is_relative_to_the_deviation_of_each_tensor():
    torch.manual_seed(0)
    mlp = Mlp(64, 256)
    with torch.no_grad():
        mlp.fc1.weight.normal_(std=2.0)
        mlp.fc2.weight.normal_(mean=5.0, std=0.01)
        mlp.fc1.bias.zero_()
    dense = {key: value.t() if key.endswith("weight") else value for key, value in snapshot(mlp).items()}
    model = nn.ModuleDict({"mlp": mlp})
    convert_to_mof_(model, MoFConfig(every=1, targets=("mlp",), init_noise=0.1))
    for name, stacked in model["mlp"].named_parameters():
        noise = stacked.detach() - dense[name]
        if name == "fc1.bias":
            assert (noise == 0).all()
            continue
        assert float(noise.std()) == pytest.approx(0.1 * float(dense[name].std()), rel=0.08)
        if name.endswith("weight"):
            for expert in range(4):  # every expert gets noise of its own, the first included
                assert float(noise[expert].std()) == pytest.approx(0.1 * float(dense[name].std()), rel=0.05)
            together = torch.corrcoef(noise.flatten(1))
            assert float((together - torch.eye(4)).abs().max()) < 0.05


@pytest.mark.parametrize("options", [{}, {"init": "independent"}, {"init_noise": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_model_is_kept(dtype, options, tiny_vit):
    model = tiny_vit().to(dtype)
    convert_to_mof_(model, MoFConfig(**options))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.dtype for p in merge_experts(model).parameters()} == {dtype}


def test_a_model_without_memory_is_converted_by_shape(tiny_vit):
    with torch.device("meta"):
        model = tiny_vit()
        convert_to_mof_(model, MoFConfig(init="independent", init_noise=0.1))
    merged = merge_experts(model, check_finite=False)
    assert model.blocks[1].mlp.fc1.weight.shape == (4, 16, 64) and merged.blocks[1].mlp.fc1.weight.shape == (64, 16)
    assert all(p.is_meta for p in [*model.parameters(), *merged.parameters()])


def test_fused_attention_is_told_from_the_ffn_by_shape_alone(tiny_vit):
    """Without values the attention cannot be tried out, and its two linear layers read and return the same channels."""
    with torch.device("meta"):
        model = tiny_vit()
        assert convert_to_mof_(model, MoFConfig(targets=("blocks.*",))) == ["blocks.1", "blocks.3"]
    assert sparse_names(model) == ["blocks.1.mlp", "blocks.3.mlp"]


# Merging


def test_merged_model_is_a_stock_timm_model(tiny_vit, spread_, images):
    dense = tiny_vit()
    model = copy.deepcopy(dense)
    convert_to_mof_(model)
    spread_(model)
    before = model.eval()(images)
    merged = merge_experts(model)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in dense.named_modules()]
    state = merged.state_dict()
    assert list(state) == list(dense.state_dict())
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in dense.state_dict().items()}
    fresh = tiny_vit()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.eval()(images), before)  # evaluation before the merge == after it, bit for bit
    assert not torch.allclose(before, dense.eval()(images), atol=1e-3)
    model.train()
    assert not torch.allclose(model(images), before, atol=1e-3)  # while the sparse model computes something else


def test_merge_gives_the_mean_of_the_experts(tiny_vit, spread_):
    model = tiny_vit()
    convert_to_mof_(model)
    spread_(model)
    merged = merge_experts(model).state_dict()
    for key, tensor in model.state_dict().items():
        if tensor.shape != merged[key].shape:
            mean = torch.stack([tensor[expert] for expert in range(4)]).mean(0)
            tensor = mean.t() if key.endswith("weight") else mean
        torch.testing.assert_close(merged[key], tensor, msg=key)


def test_merge_of_copied_experts_gives_the_dense_model_back(tiny_vit):
    model = tiny_vit()
    dense = snapshot(model)
    convert_to_mof_(model)  # 4 experts: the mean of 4 equal numbers is exact
    assert_same_state(merge_experts(model), dense)


def test_merge_out_of_place_leaves_the_sparse_model_and_shares_nothing_with_it(tiny_vit, spread_):
    model = tiny_vit()
    convert_to_mof_(model)
    spread_(model)
    modules, state = dict(model.named_modules()), snapshot(model)
    merged = merge_experts(model)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert dict(model.named_modules()) == modules
    assert_same_state(model, state)
    assert not is_sparse(merged) and is_sparse(model)


def test_merge_in_place_changes_the_model_and_equals_the_other(tiny_vit, spread_):
    model = tiny_vit()
    convert_to_mof_(model)
    spread_(model)
    head = model.head
    other = snapshot(merge_experts(model))
    assert merge_experts(model, inplace=True) is model
    assert not is_sparse(model) and model.head is head
    assert_same_state(model, other)


@pytest.mark.parametrize("inplace", [True, False])
def test_merging_twice_is_a_no_op(inplace, tiny_vit, spread_):
    model = tiny_vit()
    convert_to_mof_(model)
    spread_(model)
    once = merge_experts(model)
    state, modules = snapshot(once), dict(once.named_modules())
    twice = merge_experts(once, inplace=inplace)
    assert_same_state(twice, state)
    assert (twice is once) == inplace
    assert dict(once.named_modules()) == modules


@pytest.mark.parametrize("inplace", [True, False])
def test_merge_keeps_requires_grad_mode_and_dtype(inplace, tiny_vit):
    model = tiny_vit().double()
    model.blocks[1].mlp.fc1.requires_grad_(False)
    model.blocks[3].mlp.fc2.bias.requires_grad_(False)
    model.norm.requires_grad_(False)
    dense = {name: (p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()}
    convert_to_mof_(model)
    model.train()
    model.blocks[3].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    merged = merge_experts(model, inplace=inplace)
    assert {name: (p.requires_grad, p.dtype, p.device) for name, p in merged.named_parameters()} == dense
    assert {name: module.training for name, module in merged.named_modules()} == modes
    assert all(p.is_leaf and p.grad is None for p in merged.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("inplace", [True, False])
def test_weights_that_are_not_finite_are_refused(value, inplace, tiny_vit):
    model = tiny_vit()
    convert_to_mof_(model)
    with torch.no_grad():
        model.blocks[3].mlp.fc2.bias[2, 5] = value
    with pytest.raises(
        ValueError, match=r"merging 'blocks.3.mlp' gives non-finite weights in fc2.bias: the training has"
    ):
        merge_experts(model, inplace=inplace)
    assert sparse_names(model) == ["blocks.1.mlp", "blocks.3.mlp"]
    merged = merge_experts(model, inplace=inplace, check_finite=False)
    assert not is_sparse(merged) and not merged.blocks[3].mlp.fc2.bias.isfinite().all()


def test_layer_that_is_itself_the_model(spread_):
    layer, x = spread_(RUPMoF(Mlp(6, 12), 4)).eval(), torch.randn(3, 6)
    assert is_sparse(layer)
    merged = merge_experts(layer)
    assert type(merged) is Mlp and torch.equal(merged(x), layer(x))
    assert isinstance(layer, RUPMoF)
    with pytest.raises(ValueError, match="cannot turn into its FFN in place"):
        merge_experts(layer, inplace=True)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_torch_encoder_evaluates_as_its_merged_model_with_and_without_gradients(every, norm_first, spread_):
    """In evaluation torch's encoder layer may hand the weights of its FFN to one fused kernel and call no layer."""
    options = dict(dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, **options), 2, enable_nested_tensor=not norm_first
    )
    dense_keys, x = model.state_dict().keys(), torch.randn(3, 5, 8)
    expected = model(x)
    convert_to_mof_(model, MoFConfig(targets=("layers.*",), every=every))
    torch.testing.assert_close(model(x), expected)
    spread_(model).eval()
    merged = merge_experts(model)
    assert merged.state_dict().keys() == dense_keys
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(model(x), merged(x))
            masked, merged_masked = (m(x, src_key_padding_mask=padding)[~padding] for m in (model, merged))
            assert masked.isfinite().all() and torch.equal(masked, merged_masked)
    assert not torch.allclose(merged(x), expected, atol=1e-3)


# Weight decay: stacked biases have two dimensions and must be told by name


def decayed(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}


def test_timm_decays_the_same_names_before_and_after_the_conversion(tiny_vit):
    dense, model = tiny_vit(), tiny_vit()
    names = convert_to_mof_(model)
    assert model.blocks[1].mlp.fc1.bias.dim() == 2  # a rule by dimension would decay it
    build = dict(opt="adamw", lr=1e-3, weight_decay=0.05)
    expected = decayed(create_optimizer_v2(dense, **build), dense)
    found = decayed(create_optimizer_v2(model, **build), model)
    assert found == expected
    for name in names:
        assert {f"{name}.fc1.weight", f"{name}.fc2.weight"} <= found
        assert not found & {f"{name}.fc1.bias", f"{name}.fc2.bias"}


@pytest.mark.parametrize("rule", ["suffix", "ours"])
def test_rules_by_name_decay_the_same_names_before_and_after_the_conversion(rule, tiny_vit):
    def kept(model: nn.Module) -> set[str]:
        if rule == "ours":
            return no_decay_names(model)
        return {name for name, _ in model.named_parameters() if name.endswith(".bias")}

    dense, model = tiny_vit(), tiny_vit()
    names = convert_to_mof_(model)
    assert kept(model) == kept(dense)
    assert {f"{name}.{layer}.bias" for name in names for layer in ("fc1", "fc2")} <= kept(model)
    assert not {f"{name}.{layer}.weight" for name in names for layer in ("fc1", "fc2")} & kept(model)


# The three calls, end to end


@pytest.mark.parametrize("layer", [Mlp, SwiGLU])
def test_three_calls_train_a_stock_model(layer, tiny_vit, images):
    model = tiny_vit(mlp_layer=layer)
    convert_to_mof_(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    ewa = EWA(model, share_rate=0.3, total_steps=3)
    labels = torch.tensor([0, 1, 2])
    start, losses = snapshot(model), []
    for step in range(3):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        before = expert_divergence(model)
        assert all(value > 1e-4 for value in before.values())  # experts saw other tokens: they differ
        share_rate = ewa.step()
        assert share_rate == pytest.approx(0.15 * step)
        for name, value in expert_divergence(model).items():
            assert value == pytest.approx(before[name] * (1 - share_rate * 4 / 3), rel=1e-4)
        losses.append(loss.item())
    assert all(not torch.equal(value, start[key]) for key, value in model.state_dict().items())
    assert losses[-1] < losses[0]

    merged = merge_experts(model)
    stock = tiny_vit(mlp_layer=layer)
    stock.load_state_dict(merged.state_dict(), strict=True)
    output = stock.eval()(images)
    assert output.isfinite().all() and torch.equal(output, model.eval()(images))


def test_registered_timm_models_convert_and_merge(spread_):
    """Families with other FFNs and names: plain, gated (EVA), hierarchical (Swin)."""
    for name, options, count in [
        ("deit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 1),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}, 1),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (2, 2), "num_heads": (2, 2), "embed_dim": 16}, 2),
    ]:
        model = timm.create_model(name, num_classes=3, **options)
        state = model.state_dict()
        x = torch.randn(2, 3, options["img_size"], options["img_size"])
        expected = model.eval()(x)
        assert len(convert_to_mof_(model)) == count, name
        torch.testing.assert_close(model(x), expected, msg=name)
        assert model.train()(x).shape == (2, 3)
        merged = merge_experts(spread_(model)).state_dict()
        assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in state.items()}, name


# Default targets, wrappers, layer decay


@pytest.mark.parametrize("name", ["point_bert_tiny", "point_transformer_tiny"])
def test_blocks_found_by_structure_are_those_of_the_name_in_our_backbones(name):
    found, named = (
        convert_to_mof_(create_model(name, num_classes=3), MoFConfig(every=1, targets=targets))
        for targets in (None, ("*.mlp",))
    )
    assert found == named


def test_an_mlp_inside_the_attention_is_not_the_ffn_of_its_block():
    model = timm.create_model("vit_relpos_small_patch16_224", depth=2, embed_dim=16, num_heads=2, img_size=32)
    assert convert_to_mof_(model, MoFConfig(every=1)) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_layer_decay_treats_stacked_biases_as_biases_until_the_merge(tiny_vit):
    dense, model = tiny_vit(), tiny_vit()
    convert_to_mof_(model)
    build = dict(opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    assert decayed(create_optimizer_v2(model, **build), model) == decayed(create_optimizer_v2(dense, **build), dense)
    merged = merge_experts(model)
    assert "no_weight_decay" not in vars(merged) and merged.no_weight_decay() == dense.no_weight_decay()


@pytest.mark.parametrize(
    "wrap",
    [torch.optim.swa_utils.AveragedModel, nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
)
def test_merging_a_wrapper_returns_the_dense_model_inside(wrap, tiny_vit, spread_):
    model = tiny_vit()
    convert_to_mof_(model)
    merged = merge_experts(wrap(spread_(model)))
    assert type(merged) is VisionTransformer
    assert_same_state(merged, snapshot(merge_experts(model)))


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, torch.jit.script])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_tracing_a_sparse_model_says_to_merge_first(trace, tiny_vit):
    model = tiny_vit()
    convert_to_mof_(model)
    with pytest.raises(TypeError, match=r"expert layer 'blocks.1.mlp' cannot be .*: merge_experts\(model\) first"):
        trace(model)


@pytest.mark.parametrize("part", ["fc1", "norm"])
def test_a_module_that_two_ffns_share_is_refused_as_a_parameter_is(part):
    """Its experts would be untied, which training and the merged model show and no evaluation does."""
    model = nn.Sequential(*(nn.Sequential(OrderedDict(mlp=Mlp(8, 16, norm_layer=nn.LayerNorm))) for _ in range(2)))
    setattr(model[1].mlp, part, getattr(model[0].mlp, part))
    before = [module for _, module in model.named_modules()]
    with pytest.raises(ValueError, match=rf"module '0.mlp' shares {part}.weight, {part}.bias with another module"):
        convert_to_mof_(model, MoFConfig(targets=("*.mlp",), every=1))
    assert [module for _, module in model.named_modules()] == before


def test_an_ffn_under_two_names_is_one_layer():
    model = nn.Sequential(OrderedDict(a=nn.Sequential(OrderedDict(mlp=Mlp(8, 16))), b=nn.Sequential()))
    model.b.add_module("mlp", model.a.mlp)
    assert convert_to_mof_(model, MoFConfig(targets=("*.mlp",), every=1)) and model.a.mlp is model.b.mlp
