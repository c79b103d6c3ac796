"""Stock transformers of timm, Hugging Face and torch: FFNs found by structure, identities, stock models afterwards."""

import copy
import os

import pytest
import torch
from cases import quick
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from s2d3d.s2d import (
    EWA,
    MoFConfig,
    TopKMoE,
    apply_ewa_,
    balance_loss,
    convert_to_mof_,
    is_sparse,
    merge_experts,
)
from s2d3d.s2d.adapters import find_ffn, find_ffns
from s2d3d.s2d.analysis import expert_divergence
from s2d3d.s2d.ewa import expert_layers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

K = 3
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
IDS = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def hugging_face(model: str, config: str, **options):
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


bert = hugging_face("BertForMaskedLM", "BertConfig", vocab_size=30, **SIZES, **NO_DROPOUT)
gpt2 = hugging_face(
    "GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=30, bos_token_id=1, eos_token_id=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
t5 = hugging_face(
    "T5ForConditionalGeneration", "T5Config", d_model=16, d_ff=32, d_kv=12, num_layers=2, num_heads=2, vocab_size=30,
    dropout_rate=0.0, feed_forward_proj="gated-gelu",
)  # fmt: skip
opt = hugging_face(
    "OPTForCausalLM", "OPTConfig", hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
    vocab_size=30, word_embed_proj_dim=16, dropout=0.0,
)  # fmt: skip


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


# Name: model, targets, what goes in, names of what is replaced.
MODELS = {
    "bert": (bert, "*.layer.*", {"input_ids": IDS}, ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
    "gpt2": (gpt2, "*.mlp", {"input_ids": IDS}, ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
    "llama": (
        hugging_face("LlamaForCausalLM", "LlamaConfig", vocab_size=30, **SIZES),
        "*.mlp", {"input_ids": IDS}, ["model.layers.0.mlp", "model.layers.1.mlp"],
    ),
    "opt": (opt, "*.layers.*", {"input_ids": IDS}, ["model.decoder.layers.0", "model.decoder.layers.1"]),
    "torch": (torch_encoder, "layers.*", {"src": torch.randn(2, 7, 16)}, ["layers.0", "layers.1"]),
    "eva": (  # gated, with a LayerNorm between its linear layers
        lambda: Eva(
            img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, swiglu_mlp=True,
            scale_mlp=True,
        ),
        "*.mlp", {"x": IMAGES}, ["blocks.0.mlp", "blocks.1.mlp"],
    ),
    "convnext": (  # channels last
        lambda: ConvNeXt(depths=(2, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3, ls_init_value=1.0),
        "stages.0.*.mlp", {"x": torch.randn(2, 3, 32, 32)}, ["stages.0.blocks.0.mlp", "stages.0.blocks.1.mlp"],
    ),
    "swin": (
        lambda: SwinTransformer(
            img_size=16, patch_size=2, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,), num_classes=3,
            drop_path_rate=0.0,
        ),
        "*.mlp", {"x": IMAGES}, ["layers.0.blocks.0.mlp", "layers.0.blocks.1.mlp"],
    ),
    "vit": (
        hugging_face("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=8, **SIZES),
        "*.mlp", {"pixel_values": IMAGES}, ["vit.layers.0.mlp", "vit.layers.1.mlp"],
    ),
    "t5": (
        t5, "encoder.*.DenseReluDense", {"input_ids": IDS, "decoder_input_ids": IDS},
        ["encoder.block.0.layer.1.DenseReluDense", "encoder.block.1.layer.1.DenseReluDense"],
    ),
}  # fmt: skip


@pytest.fixture(params=quick(7, list(MODELS)))
def case(request):
    return MODELS[request.param]


@pytest.fixture
def pair_case():
    return MODELS["bert"]


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def converted(model: nn.Module, targets: str, num_experts: int = K, **options) -> nn.Module:
    sparse = copy.deepcopy(model)
    convert_to_mof_(sparse, MoFConfig(num_experts=num_experts, targets=(targets,), every=1, **options))
    return sparse


def spread_(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for layer in expert_layers(model):
            for parameter in layer.expert_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def dense_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients under the names of the dense model; those of the experts added up."""
    holder = copy.deepcopy(model)
    stacked = (
        {id(p) for layer in expert_layers(holder) for p in layer.expert_parameters()} if is_sparse(holder) else set()
    )
    with torch.no_grad():
        for parameter, source in zip(holder.parameters(), model.parameters(), strict=True):
            factor = parameter.shape[0] if id(parameter) in stacked else 1  # merging takes the mean
            parameter.copy_(torch.zeros_like(source) if source.grad is None else source.grad * factor)
    return dict(merge_experts(holder).named_parameters())


def backward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = run(model, inputs)
    (output * torch.arange(output.numel()).sin().view_as(output)).sum().backward()
    return output.detach()


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    first, second = dense_gradients(model), dense_gradients(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=1e-4, atol=1e-5 * float(second[name].abs().max()) + 1e-7
        )


# Identities


@pytest.mark.parametrize("num_experts", quick(1, [K, 1]))
def test_identical_experts_train_as_the_dense_model_forward_and_gradients(num_experts, case):
    build, targets, inputs, names = case
    dense = build().train()
    sparse = copy.deepcopy(dense)
    assert convert_to_mof_(sparse, MoFConfig(num_experts=num_experts, targets=(targets,), every=1)) == names
    assert is_sparse(sparse) and sparse.training
    torch.testing.assert_close(backward(sparse, inputs), backward(dense, inputs))
    assert_same_gradients(sparse, dense)


def test_evaluation_equals_the_merged_model_which_is_a_stock_one(case):
    build, targets, inputs, _ = case
    dense = build()
    sparse = spread_(converted(dense, targets)).train()
    with torch.no_grad():
        training = run(sparse, inputs)
        before = run(sparse.eval(), inputs)
        merged = merge_experts(sparse)
        assert torch.equal(run(merged, inputs), before)
        assert not torch.allclose(training, before, atol=1e-4), "the experts differ"

        stock = build().eval()
        assert not torch.allclose(run(stock, inputs), before, atol=1e-4), "it started from other weights"
        stock.load_state_dict(merged.state_dict(), strict=True)
        assert torch.equal(run(stock, inputs), before)
        merge_experts(sparse, inplace=True)
        assert torch.equal(run(sparse, inputs), before)
    for model in (merged, sparse):
        assert not is_sparse(model) and not model.training
        kinds, stock_kinds = ([(name, type(m)) for name, m in x.named_modules()] for x in (model, stock))
        assert kinds == stock_kinds
        shapes, stock_shapes = (
            [(name, p.shape, p.requires_grad) for name, p in x.named_parameters()] for x in (model, stock)
        )
        assert shapes == stock_shapes


def test_averaging_shrinks_the_experts_and_leaves_the_merged_model(case):
    build, targets, inputs, names = case
    sparse = spread_(converted(build(), targets)).eval()
    before, merged = expert_divergence(sparse), run(merge_experts(sparse), inputs)
    assert apply_ewa_(sparse, 0.2) == len(before) == len(names)
    for name, divergence in expert_divergence(sparse).items():
        assert divergence == pytest.approx(before[name] * (1 - 0.2 * K / (K - 1)), rel=1e-4)
    torch.testing.assert_close(run(merge_experts(sparse), inputs), merged)


def test_a_few_updates_with_averaging_lower_the_loss_of_the_merged_model(case):
    build, targets, inputs, _ = case
    sparse = converted(build(), targets, init_noise=0.1).train()
    ewa = EWA(sparse, share_rate=0.3, total_steps=6)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=3e-3)
    goal = torch.randn_like(run(sparse, inputs))

    def loss_of(model: nn.Module) -> Tensor:
        return (run(model, inputs) - goal).square().mean()

    with torch.no_grad():
        first = loss_of(merge_experts(sparse).eval())
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(sparse).backward()
        optimizer.step()
        ewa.step()
    with torch.no_grad():
        assert loss_of(merge_experts(sparse).eval()) < 0.98 * first


@pytest.mark.parametrize("name", quick(2, ["bert", "gpt2", "opt"]))
def test_merged_model_survives_save_pretrained_and_from_pretrained(name, tmp_path):
    build, targets, inputs, _ = MODELS[name]
    merged = merge_experts(spread_(converted(build(), targets))).eval()
    merged.save_pretrained(tmp_path)
    loaded, report = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(run(loaded.eval(), inputs), run(merged, inputs))


# The gated baseline in the same places


@pytest.mark.parametrize("name", quick(2, ["opt", "eva", "gpt2", "bert"]))
def test_gated_experts_in_the_same_places(name):
    build, targets, inputs, names = MODELS[name]
    dense = build().train()
    sparse = converted(dense, targets, kind="topk")
    torch.testing.assert_close(run(sparse, inputs), run(dense, inputs))  # identical experts, gates that add up to 1
    spread_(sparse)
    routers = [m.router.weight for m in sparse.modules() if isinstance(m, TopKMoE)]
    with torch.no_grad():
        for router in routers:
            router.normal_()
    output = run(sparse, inputs)
    torch.testing.assert_close(run(sparse.eval(), inputs), output)  # routed in evaluation too
    (run(sparse.train(), inputs).square().sum() + balance_loss(sparse)).backward()
    assert len(routers) == len(names) and all(router.grad.abs().max() > 0 for router in routers)
    with pytest.raises(ValueError, match="is a TopKMoE"):
        merge_experts(sparse)
    build().load_state_dict(merge_experts(sparse, allow_average=True).state_dict(), strict=True)


# Pairs of layers


def test_both_layers_of_a_pair_use_one_partition(pair_case):
    """Token by token through the experts that the slots say: a second draw in the output layer would mix experts."""
    build, targets, _, _ = pair_case
    sparse = spread_(converted(build(), targets)).train()
    layer = sparse.bert.encoder.layer[0]
    experts = layer.intermediate.dense.experts
    x = torch.randn(2, 7, 16)
    torch.manual_seed(5)
    hidden = layer.intermediate(x)
    partition = layer.intermediate.dense.plan.partition
    output = layer.output.dense(hidden)
    assert hidden.shape == (K, 5, 32) and output.shape == x.shape and layer.intermediate.dense.plan is None

    first, second = experts.first, experts.second
    tokens, expected = x.view(-1, 16), torch.zeros(14, 16)
    for slot, token in enumerate(partition.target.tolist()):
        if token < 14:
            expert = slot // 5
            inner = nn.functional.gelu(tokens[token] @ first.weight[expert] + first.bias[expert])
            expected[token] = inner @ second.weight[expert] + second.bias[expert]
    torch.testing.assert_close(output, expected.view_as(x))


def test_a_copy_of_a_pair_is_whole(pair_case):
    build, targets, inputs, _ = pair_case
    sparse = spread_(converted(build(), targets)).train()
    clone = copy.deepcopy(sparse)
    layer = clone.bert.encoder.layer[0]
    assert layer.output.dense._entry is layer.intermediate.dense
    torch.manual_seed(1)
    before = run(sparse, inputs)
    torch.manual_seed(1)
    assert torch.equal(run(clone, inputs), before)
    spread_(clone)
    torch.manual_seed(1)
    assert torch.equal(run(sparse, inputs), before)


def test_pairs_under_gradient_checkpointing_and_chunking(pair_case):
    build, targets, inputs, _ = pair_case
    sparse = spread_(converted(build(), targets)).train()
    plain = copy.deepcopy(sparse)
    torch.manual_seed(3)
    output = backward(plain, inputs)
    sparse.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    assert torch.equal(backward(sparse, inputs), output)
    assert_same_gradients(sparse, plain)

    chunked, dense = converted(build(), targets).train(), build().train()
    dense.load_state_dict(merge_experts(chunked).state_dict())
    for layer in chunked.bert.encoder.layer:
        layer.chunk_size_feed_forward = 7
    layer.chunk_size_feed_forward = 1  # 2 tokens: fewer than experts
    with pytest.raises(ValueError, match="2 tokens cannot be shared among 3 experts"):
        run(chunked, inputs)
    layer.chunk_size_feed_forward = 7
    torch.testing.assert_close(run(chunked, inputs), run(dense, inputs))


def test_no_weight_decay_by_name_holds_for_pairs(pair_case):
    build, targets, _, _ = pair_case
    for name, parameter in converted(build(), targets).named_parameters():
        is_vector_of_each_expert = ".experts." in name and parameter.dim() == 2
        assert is_vector_of_each_expert == (".experts." in name and name.endswith(".bias")), name


def test_norm_behind_the_pair_and_other_parts_stay_single(pair_case):
    build, targets, _, _ = pair_case
    dense = build()
    sparse = converted(dense, targets)
    names = {name for name, _ in sparse.named_parameters()}
    assert {name for name, _ in dense.named_parameters()} - names == {
        f"bert.encoder.layer.{i}.{part}.dense.{key}"
        for i in (0, 1) for part in ("intermediate", "output") for key in ("weight", "bias")
    }  # fmt: skip
    assert sparse.bert.encoder.layer[0].output.LayerNorm.weight.shape == (16,)


# Initialisation


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_independent_experts_follow_the_models_own_initialiser(name):
    wide = dict(initializer_range=0.3)
    build = {
        "bert": hugging_face("BertModel", "BertConfig", **(SIZES | {"intermediate_size": 2048}), **wide),
        "gpt2": hugging_face("GPT2Model", "GPT2Config", n_embd=16, n_inner=2048, n_layer=2, n_head=2, **wide),
    }[name]
    dense = build()
    sparse = converted(dense, {"bert": "encoder.layer.*", "gpt2": "h.*"}[name], init="independent")
    for layer in expert_layers(sparse):
        (_, first), (_, second) = layer.stacked_layers()
        # GPT-2 scales the layer in front of the residual sum by 1 / sqrt(2 * number of layers).
        for stacked, deviation in ((first, 0.3), (second, {"bert": 0.3, "gpt2": 0.15}[name])):
            for expert in range(1, K):
                assert float(stacked.weight[expert].std()) == pytest.approx(deviation, rel=0.03)
                assert not torch.allclose(stacked.weight[expert], stacked.weight[0], atol=0.01)
                assert not stacked.bias[expert].any()
    kept = {"bert": "encoder.layer.1.output.dense.weight", "gpt2": "h.1.mlp.c_proj.weight"}[name]
    expected = dense.state_dict()[kept]
    torch.testing.assert_close(second.weight[0], expected.t() if name == "bert" else expected)


# What a target means


@pytest.mark.parametrize(
    ("model", "targets"),
    [(bert, "bert.encoder.layer.*"), (gpt2, "*.h.*"), (opt, "model.decoder.layers.*"), (t5, "encoder.block.*")],
)
def test_what_lies_inside_a_match_of_the_same_pattern_does_not_count(model, targets):
    names = convert_to_mof_(model(), MoFConfig(targets=(targets,), every=2))
    assert len(names) == 1 and names[0].endswith(".1")


@pytest.mark.parametrize("name", quick(7, list(MODELS)))
def test_candidates_are_the_ffns_and_nothing_else(name):
    build, _, _, names = MODELS[name]
    found = [ffn.name for ffn in find_ffns(build())]
    if name == "t5":
        names = names + [f"decoder.block.{i}.layer.2.DenseReluDense" for i in (0, 1)]
    if name == "convnext":
        names = names + [f"stages.{i}.blocks.0.mlp" for i in (1, 2, 3)]
    assert found == names


@pytest.mark.parametrize(
    ("model", "targets", "error", "message"),
    [
        (bert, "*.mlp", ValueError,
         r"^no module matches .*; modules that could become experts: bert.encoder.layer.0, bert.encoder.layer.1$"),
        (bert, "bert.encoder", TypeError,
         r"'bert\.encoder' cannot become experts: BertEncoder holds 2 FFNs \(layer\.0, layer\.1\): name each$"),
        (bert, "*.attention", TypeError,
         "'bert.encoder.layer.0.attention' cannot become experts: BertAttention holds state"),
        (bert, "*.attention.self", TypeError, "'bert.encoder.layer.0.attention.self' cannot become experts"),
        (bert, "*.output.LayerNorm", TypeError, "LayerNorm is not an FFN"),
        (gpt2, "*.attn", TypeError, "'transformer.h.0.attn' cannot become experts"),
        (t5, "*.SelfAttention", TypeError, "cannot become experts"),
        (opt, "*.fc1", TypeError, "Linear is not an FFN"),
    ],
)  # fmt: skip
def test_targets_that_are_no_ffn_are_refused_and_leave_the_model_unchanged(model, targets, error, message):
    network = model()
    before = [(name, id(module)) for name, module in network.named_modules()]
    with pytest.raises(error, match=message):
        convert_to_mof_(network, MoFConfig(targets=(targets,), every=1))
    assert [(name, id(module)) for name, module in network.named_modules()] == before


def test_layers_with_a_gate_beside_the_pair_are_no_pair():
    """Converting two of three layers would be silently wrong."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8))
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    assert find_ffns(nn.Sequential(Gated())) == []
    with pytest.raises(TypeError, match="Gated holds state outside its linear layers"):
        find_ffn(Gated())
