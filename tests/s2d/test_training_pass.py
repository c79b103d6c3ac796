"""Many small FFNs: each trains exactly as the dense one with identical experts, or is refused with the reason."""

import functools

import pytest
import torch
from timm.layers import DropPath, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.training_pass import EXACT, Residual, training_error
from s2d3d.s2d import MoFConfig, RUPMoF, TopKMoE, convert_to_mof_, is_sparse, merge_experts

K, C, H = 4, 8, 32
CONFIG = MoFConfig(num_experts=K, targets=("*.mlp",), every=1)
BATCHES = [torch.randn(*shape, C, generator=torch.Generator().manual_seed(0)) for shape in ((4, 6), (3, 7), (5, 5))]
ROWS = [torch.randn(n, C, generator=torch.Generator().manual_seed(0)) for n in (16, 21)]
SERIES = [x.transpose(1, 2).contiguous() for x in BATCHES]
IMAGES = [torch.randn(b, C, h, w, generator=torch.Generator().manual_seed(0)) for b, h, w in ((4, 3, 3), (3, 5, 2))]


class Between(nn.Module):
    """Two linear layers and a function between them."""

    def __init__(self, between, *modules):
        super().__init__()
        self.fc1, self.fc2, self.between = nn.Linear(C, H), nn.Linear(H, C), between
        self.inner = nn.ModuleList(modules)

    def forward(self, x):
        return self.fc2(self.between(self, self.fc1(x)))


class TokenBatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view_as(x)


def zeroed(ffn):
    nn.init.zeros_(ffn.fc2.weight)
    return ffn


def conv_ffn(conv, norm=None, bias=True):
    layers = [conv(C, H, 1, bias=bias), *([] if norm is None else [norm(H)]), nn.GELU(), conv(H, C, 1)]
    return nn.Sequential(*layers)


class GatedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv2d(C, 2 * H, 1), nn.Conv2d(H, C, 1)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, dim=1)
        return self.down(value * gate.sigmoid())


class ThroughConv(nn.Module):
    """Channels last outside, convolutions inside, as in the first transformer implementations."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Conv1d(C, H, 1), nn.Conv1d(H, C, 1)

    def forward(self, x):
        return self.w2(F.relu(self.w1(x.transpose(1, 2)))).transpose(1, 2)


class ThroughLinear(nn.Module):
    """Channels first outside, linear layers inside."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, H), nn.Linear(H, C)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(nn.Linear(C, H), nn.Sequential(nn.GELU(), nn.Linear(H, H)))
        self.down = nn.ModuleDict({"out": nn.Linear(H, C)})

    def forward(self, x):
        return self.down["out"](self.up(x))


class InnerCheckpoint(Between):
    def __init__(self):
        super().__init__(None)

    def forward(self, x):
        return self.fc2(checkpoint(lambda y: F.gelu(self.fc1(y)), x, use_reentrant=False))


class InPlace(Between):
    def forward(self, x):
        return self.fc2(self.fc1(x.mul_(0.5)).relu_())


class Iterates(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(C, H), nn.GELU(), nn.Linear(H, C))

    def forward(self, x):
        for layer in self.net:
            x = layer(x)
        return x


class LevitLinear(nn.Module):
    """Linear and BatchNorm1d over all tokens, as in LeViT."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.bn = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x):
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


def hooked(ffn):
    ffn.fc1.register_forward_hook(lambda module, inputs, output: output + output.mean(0, keepdim=True))
    return ffn


BETWEEN = {
    "batch_norm": (lambda: Between(lambda m, x: F.relu(m.inner[0](x)), TokenBatchNorm(H)), BATCHES),
    "batch_norm_rows": (lambda: nn.Sequential(nn.Linear(C, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, C)), ROWS),
    "batch_norm_levit": (lambda: nn.Sequential(LevitLinear(C, H), nn.Hardswish(), LevitLinear(H, C)), BATCHES),
    "batch_norm_mlp": (lambda: Mlp(C, H, norm_layer=nn.BatchNorm1d), ROWS),
    "layer_norm": (lambda: Between(lambda m, x: m.inner[0](x), nn.LayerNorm(H)), BATCHES),
    "group_norm_rows": (lambda: Between(lambda m, x: m.inner[0](x), nn.GroupNorm(4, H)), ROWS),
    "softmax_channels": (lambda: Between(lambda m, x: x.softmax(-1)), BATCHES),
    "glu": (lambda: GluMlp(C, H), BATCHES),
    "swiglu_norm": (lambda: SwiGLU(C, H, norm_layer=nn.LayerNorm), BATCHES),
    "double": (lambda: Between(lambda m, x: x.double().tanh().float()), BATCHES),
    "zero_start": (lambda: zeroed(Mlp(C, H)), BATCHES),
    "conv1d": (lambda: conv_ffn(nn.Conv1d), SERIES),
    "conv1d_batch_norm": (lambda: conv_ffn(nn.Conv1d, nn.BatchNorm1d, bias=False), SERIES),
    "conv2d": (lambda: conv_ffn(nn.Conv2d), IMAGES),
    "conv2d_batch_norm": (lambda: conv_ffn(nn.Conv2d, nn.BatchNorm2d), IMAGES),
    "conv2d_mlp": (lambda: Mlp(C, H, use_conv=True), IMAGES),
    "conv2d_gated": (GatedConv, IMAGES),
    "through_conv": (ThroughConv, BATCHES),
    "through_linear": (ThroughLinear, IMAGES),
    "nested": (Nested, BATCHES),
    "in_place": (lambda: InPlace(None), BATCHES),
    "iterates": (Iterates, BATCHES),
    "hook_that_mixes": (lambda: hooked(Mlp(C, H)), BATCHES),
    "convolution": (
        lambda: Between(lambda m, x: m.inner[0](x.mT).mT, nn.Conv1d(H, H, 3, padding=1, groups=H)),
        BATCHES,
    ),
    "pre_norm_residual": (lambda: nn.Sequential(nn.LayerNorm(C), nn.Linear(C, H), nn.GELU(), nn.Linear(H, C)), BATCHES),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_trains_exactly_as_the_dense_ffn(name):
    make, inputs = BETWEEN[name]
    torch.manual_seed(0)
    model = Residual(make())
    assert training_error(nn.Sequential(model), inputs, CONFIG, run=lambda module, x: module(x.clone())) < EXACT


class Mask(Between):
    def forward(self, x, mask=None):
        x = F.gelu(self.fc1(x))
        return self.fc2(x if mask is None else x * mask)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, H), nn.Linear(H, C)

    def forward(self, x, gate):
        return self.fc2(self.fc1(x) * gate)


class ExternalAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mk, self.mv = nn.Linear(C, H, bias=False), nn.Linear(H, C, bias=False)

    def forward(self, x):
        return self.mv(F.normalize(self.mk(x).softmax(1), p=1, dim=2))


class ReadsWeights(Between):
    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.fc1.weight, self.fc1.bias)), self.fc2.weight)


class ReadsTransposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)

    def forward(self, x):
        return self.b(x @ self.a.weight.mT)


def patched(ffn):
    ffn.forward = functools.partial(type(ffn).forward, ffn)
    return ffn


def patched_inside(ffn):
    ffn.act.forward = lambda x: x
    return ffn


class Closure(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, H), nn.Linear(H, C)
        first, second = self.fc1, self.fc2
        self.run = lambda x: second(F.gelu(first(x)))

    def forward(self, x):
        return self.run(x)


def spectral(ffn):
    nn.utils.parametrizations.spectral_norm(ffn.fc1)
    return ffn


def old_spectral(ffn):
    nn.utils.spectral_norm(ffn.fc1)
    return ffn


def quantized(ffn):
    ffn.fc1.weight = nn.Parameter(torch.zeros(H, C, dtype=torch.int8), requires_grad=False)
    return ffn


class OwnForward(nn.Linear):
    def forward(self, x):
        return x[..., :C]


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base, nn.Linear(C, 2, bias=False), nn.Linear(2, H, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def lora(ffn):
    ffn.fc1 = Adapted(ffn.fc1)
    return ffn


def tied(ffn):
    ffn.fc2 = nn.Linear(C, H, bias=False)
    ffn.fc2.weight = ffn.fc1.weight
    return ffn


REFUSED = {
    "cumsum": (lambda: Between(lambda m, x: x.cumsum(-2)), "mixes tokens"),
    "shift_last": (lambda: Between(lambda m, x: torch.cat([x[..., :-1, :], 2 * x[..., :1, :]], -2)), "mixes tokens"),
    "roll": (lambda: Between(lambda m, x: x.roll(1, 0)), "mixes tokens"),
    "softmax_dim_1": (lambda: Between(lambda m, x: x.softmax(1)), "mixes tokens.*example="),
    "mean_of_all": (lambda: Between(lambda m, x: x - x.mean()), "mixes tokens"),
    "max_of_all": (lambda: Between(lambda m, x: x / x.abs().max()), "mixes tokens"),
    "sort": (lambda: Between(lambda m, x: x.sort(-2).values), "mixes tokens"),
    "branch_on_values": (lambda: Between(lambda m, x: x if x.sum() > 0 else -x), "mixes tokens"),
    "global_response_norm": (lambda: GlobalResponseNormMlp(C, H), "mixes tokens"),
    "external_attention": (ExternalAttention, "mixes tokens"),
    "instance_norm": (lambda: conv_ffn(nn.Conv1d, nn.InstanceNorm1d), "mixes tokens"),
    "group_norm_conv": (lambda: conv_ffn(nn.Conv2d, lambda width: nn.GroupNorm(4, width)), "mixes tokens"),
    "zero_start_mixing": (lambda: zeroed(Between(lambda m, x: x.cumsum(-2))), "mixes tokens"),
    "gate": (Gate, "gate.*example="),
    "forward_replaced": (lambda: patched(Mlp(C, H)), "forward was replaced on the instance.*convert before"),
    "forward_replaced_inside": (lambda: patched_inside(Mlp(C, H)), "forward of 'act' was replaced"),
    "closure": (Closure, "holds a function or a weak reference that leads to its own parts"),
    "inner_checkpoint": (InnerCheckpoint, "under activation checkpointing, recompute the FFN or the block"),
    "reads_weights": (lambda: ReadsWeights(None), "uses the weight of a layer in its own code"),
    "reads_transposed": (ReadsTransposed, "uses the weight of a layer in its own code"),
    "spectral_norm": (lambda: spectral(Mlp(C, H)), "remove the parametrization"),
    "old_spectral_norm": (lambda: old_spectral(Mlp(C, H)), "remove the parametrization"),
    "quantized": (lambda: quantized(Mlp(C, H)), "int8 in 'fc1': convert before quantizing"),
    "lora": (lambda: lora(Mlp(C, H)), "adapters"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(H), nn.Linear(H, C)), "lazy"),
    "sub_class": (lambda: nn.Sequential(nn.Linear(C, H), OwnForward(H, C)),
                  "more than an nn.Linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_the_name_and_the_reason(name):
    make, reason = REFUSED[name]
    model = nn.Sequential(Residual(make()))
    with pytest.raises(TypeError, match=f"module '0.mlp' cannot become experts: .*{reason}"):
        convert_to_mof_(model, CONFIG)
    assert not is_sparse(model)


def test_a_linear_layer_used_for_both_is_refused():
    with pytest.raises((TypeError, ValueError), match="share"):
        convert_to_mof_(nn.Sequential(Residual(tied(Mlp(C, H)))), CONFIG)


def test_a_compiled_ffn_is_refused():
    model = nn.Sequential(Residual(torch.compile(Mlp(C, H), backend="eager")))
    with pytest.raises(TypeError, match=r"module '0.mlp._orig_mod' cannot .*convert before torch.compile"):
        convert_to_mof_(model, CONFIG)
    assert not is_sparse(model)


@pytest.mark.parametrize("make", [lambda mlp: [mlp], lambda mlp: mlp.forward, lambda mlp: functools.partial(mlp)])
def test_an_ffn_that_is_held_outside_the_module_tree_is_refused(make):
    model = nn.Sequential(Residual(Mlp(C, H)))
    model[0].other = make(model[0].mlp)
    with pytest.raises(TypeError, match=r"module '0.mlp' cannot become experts: '0.other' holds it as well"):
        convert_to_mof_(model, CONFIG)
    assert not is_sparse(model)


# Randomness inside


def test_stochastic_depth_inside_stays_one_draw_a_sample():
    layer = RUPMoF(nn.Sequential(nn.Linear(C, H), DropPath(0.5), nn.Linear(H, C, bias=False)), K)
    with torch.no_grad():
        dropped = (layer(torch.randn(64, 3, C)) - 0).abs().amax(-1) < 1e-6
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 10 < int(dropped[:, 0].sum()) < 54


def test_dropout_inside_keeps_the_fast_layout_and_one_draw_a_number():
    layer = RUPMoF(Mlp(C, H, drop=0.5), K)
    assert layer.layout.in_slots
    output = layer(torch.randn(64, 3, C))
    assert 0.4 < float((output == 0).float().mean()) < 0.6


# Called with more


class MaskedBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Residual(Mask(None)), Residual(Mask(None))])
        self.blocks[0].mlp.between = self.blocks[1].mlp.between = None

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x) if mask is None else block(x, mask=mask)
        return x


def test_optional_mask_is_tried_with_an_example_and_named_without_one():
    inputs = [{"x": x, "mask": (x[..., :1] > 0).float()} for x in BATCHES]
    model = MaskedBlocks()
    config = MoFConfig(num_experts=K, targets=("*.mlp",), every=1)
    assert training_error(model, inputs, config, example=inputs[1]) < EXACT
    assert training_error(model, [{"x": x} for x in BATCHES], config) < EXACT
    convert_to_mof_(model, config)
    with pytest.raises(TypeError, match=r"expert layer 'blocks.0.mlp' was tried with one tensor .*example=inputs"):
        model(**inputs[0])


def test_required_gate_needs_an_example():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Gate()

        def forward(self, x):
            return x + self.mlp(x, gate=torch.sigmoid(x[..., :1]))

    model = nn.Sequential(Gated())
    with pytest.raises(TypeError, match=r"module '0.mlp' cannot become experts: Gate does not run .*example="):
        convert_to_mof_(model, CONFIG)
    assert training_error(model, BATCHES, CONFIG, example=BATCHES[1]) < EXACT
    with pytest.raises(TypeError, match="more than one tensor"):
        convert_to_mof_(model, MoFConfig(num_experts=K, targets=("*.mlp",), every=1, kind="topk"), example=BATCHES[1])


def test_an_example_tells_the_shape_that_the_model_gives():
    """Softmax over dimension 1 treats rows (N, C) one by one, and mixes the tokens of (B, T, C)."""
    model = nn.Sequential(Residual(Between(lambda m, x: x.softmax(1))))
    assert training_error(model, ROWS, CONFIG, example=ROWS[1]) < EXACT
    with pytest.raises(TypeError, match="mixes tokens"):
        convert_to_mof_(model, CONFIG, example=BATCHES[1])


class Point:
    def __init__(self, feat):
        self.feat = feat


class PointSequential(nn.Sequential):
    """Takes a tensor or a point cloud with features, as that of Point Transformer V3."""

    def forward(self, x):
        if isinstance(x, Point):
            x.feat = super().forward(x.feat)
            return x
        return super().forward(x)


class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = PointSequential(Mlp(C, H))

    def forward(self, x):
        point = Point(x)
        return x + self.mlp(point).feat


def test_a_container_of_points_is_refused_and_the_ffn_inside_converts():
    model = nn.Sequential(PointNet())
    with pytest.raises(
        TypeError, match=r"module '0.mlp' cannot become experts: PointSequential does not run on tokens"
    ):
        convert_to_mof_(model, CONFIG, example=ROWS[0])
    inside = MoFConfig(num_experts=K, targets=("*.mlp.0",), every=1)
    assert training_error(model, ROWS, inside, example=ROWS[0]) < EXACT
    convert_to_mof_(model, CONFIG)
    with pytest.raises(TypeError, match=r"'0.mlp' was tried with one tensor and is called with \(Point\): .*example="):
        model(ROWS[0])


class CallsParts(nn.Module):
    """A block that calls the linear layers of its FFN, and never the FFN."""

    def __init__(self):
        super().__init__()
        self.mlp = Mlp(C, H)

    def forward(self, x):
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(x)))


def test_an_ffn_that_the_model_does_not_call_is_found_by_an_example():
    with pytest.raises(TypeError, match=r"module '0.mlp' is not called when the model runs on example="):
        convert_to_mof_(nn.Sequential(CallsParts()), CONFIG, example=BATCHES[0])


def test_a_routed_layer_needs_slots():
    model = nn.Sequential(Residual(Between(lambda m, x: F.relu(m.inner[0](x)), TokenBatchNorm(H))))
    with pytest.raises(TypeError, match="does not train as the dense FFN"):
        convert_to_mof_(model, MoFConfig(num_experts=K, targets=("*.mlp",), every=1, kind="topk"))
    conv = nn.Sequential(Residual(conv_ffn(nn.Conv2d)))
    convert_to_mof_(conv, MoFConfig(num_experts=K, targets=("*.mlp",), every=1, kind="topk", top_k=K))
    assert isinstance(conv[0].mlp, TopKMoE)
    dense = merge_experts(conv, allow_average=True)
    torch.testing.assert_close(conv(IMAGES[0]), dense(IMAGES[0]))


# What a sample input, or a first look, does not show


def norm_between():
    return nn.Sequential(nn.Linear(C, H), TokenBatchNorm(H), nn.ReLU(), nn.Linear(H, C))


@pytest.mark.parametrize(
    ("make", "example", "inputs"),
    [
        (norm_between, torch.randn(K, 16, C), BATCHES),
        (lambda: conv_ffn(nn.Conv1d), torch.randn(K, C, 16), SERIES),
        (lambda: conv_ffn(nn.Conv2d, nn.BatchNorm2d), torch.randn(K, C, 4, 4), IMAGES),
        (lambda: Between(lambda m, x: x / x.shape[-1]), torch.randn(K, 16, C), BATCHES),
    ],
)
def test_an_example_whose_tokens_divide_evenly_shows_no_less(make, example, inputs):
    """No slot idles then, whose content BatchNorm would see."""
    torch.manual_seed(0)
    model = nn.Sequential(Residual(make()))
    assert training_error(model, inputs, CONFIG, example=example, run=lambda module, x: module(x.clone())) < EXACT


class Scaled(Between):
    def forward(self, x, scale=2.0):
        return self.fc2(F.gelu(self.fc1(x)) * (1.0 if scale is None else scale))


class PassesNone(Residual):
    def forward(self, x):
        return x + self.mlp(x, scale=None)


def test_none_is_passed_on():
    assert training_error(nn.Sequential(PassesNone(Scaled(None))), BATCHES, CONFIG) < EXACT


def act_of(function):
    class Act(nn.Module):
        def forward(self, x):
            return function(x)

    return Act()


def test_classes_of_one_name_are_told_apart():
    for function in (F.gelu, F.relu):
        convert_to_mof_(
            nn.Sequential(Residual(nn.Sequential(nn.Linear(C, H), act_of(function), nn.Linear(H, C)))), CONFIG
        )
    mixing = nn.Sequential(nn.Linear(C, H), act_of(lambda x: x.cumsum(-2)), nn.Linear(H, C))
    both = nn.Sequential(Residual(nn.Sequential(nn.Linear(C, H), act_of(F.gelu), nn.Linear(H, C))), Residual(mixing))
    with pytest.raises(TypeError, match=r"'1.mlp' cannot become experts: Sequential mixes tokens"):
        convert_to_mof_(both, CONFIG)


class SharesState(nn.Module):
    """The FFN and its block hold one dict."""

    def __init__(self):
        super().__init__()
        self.state = {"scale": 1.0}
        self.mlp = Between(lambda m, x: x * m.state["scale"])
        self.mlp.state = self.state

    def forward(self, x):
        self.state["scale"] = 1.0 + x.shape[0]
        return x + self.mlp(x)


def test_state_that_is_shared_stays_shared():
    model = nn.Sequential(SharesState())
    assert training_error(model, BATCHES, CONFIG) < EXACT
    dense = nn.Sequential(SharesState())
    dense.load_state_dict(model.state_dict())
    convert_to_mof_(model, CONFIG)
    for other in (model.eval(), merge_experts(model).eval()):
        torch.testing.assert_close(other(BATCHES[1]), dense.eval()(BATCHES[1]))


def test_a_mask_that_is_set_on_a_part_later_keeps_tokens_in_order():
    class Masked(nn.Module):
        mask = None

        def forward(self, x):
            return F.gelu(x) if self.mask is None else F.gelu(x) * self.mask

    def run(model, x):
        (sparse_or_dense,) = (m for m in model.modules() if isinstance(m, Masked))
        sparse_or_dense.mask = (x[..., :1] > 0).float()
        return model(x)

    model = nn.Sequential(Residual(nn.Sequential(nn.Linear(C, H), Masked(), nn.Linear(H, C))))
    assert training_error(model, BATCHES, CONFIG, run=run) < EXACT


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: torch.cat([x[..., :8, :].flip(-2), x[..., 8:, :]], -2) if x.shape[-2] >= 8 else x,
        lambda m, x: torch.cat([x[..., :12, :], 0 * x[..., 12:, :] + x[..., :1, :]], -2),
        lambda m, x: x.roll(1, 1) if x.dim() == 5 else x,
    ],
    ids=["windows", "first twelve", "video"],
)
def test_mixing_that_begins_with_more_tokens_is_seen(between):
    with pytest.raises(TypeError, match="mixes tokens"):
        convert_to_mof_(nn.Sequential(Residual(Between(between))), CONFIG)


def test_a_block_that_calls_parts_of_its_ffn_is_refused_in_its_first_step():
    model = nn.Sequential(CallsParts())
    convert_to_mof_(model, CONFIG)
    with pytest.raises(TypeError, match=r"expert layer '0.mlp': a part of it is called, not the whole"):
        model(torch.randn(K, 6, C))
    with pytest.raises(TypeError, match=r"does not train|a part of it is called|not called when the model runs"):
        convert_to_mof_(nn.Sequential(CallsParts()), CONFIG, example=torch.randn(K, 6, C))


def test_a_frozen_norm_stays_frozen():
    model = nn.Sequential(Residual(Mlp(C, H, norm_layer=nn.LayerNorm))).train()
    model[0].mlp.norm.eval()
    convert_to_mof_(model, CONFIG)
    assert model[0].mlp.training and not model[0].mlp.norm.training


class KeepsLosses(Between):
    """Appends a loss over its hidden activations to a list, which its block reads."""

    def __init__(self):
        super().__init__(None)
        self.losses = []

    def forward(self, x):
        hidden = F.gelu(self.fc1(x))
        self.losses.append(hidden.square().mean())
        return self.fc2(hidden)


class ReadsLosses(Residual):
    def forward(self, x):
        out = x + self.mlp(x)
        return out + self.mlp.losses.pop()


def test_a_list_of_losses_is_that_of_the_tokens():
    """Idle slots would count in the mean. The trial compares what the dense FFN and the experts kept, each its own."""
    ffn = KeepsLosses()
    assert training_error(nn.Sequential(ReadsLosses(ffn)), BATCHES, CONFIG) < EXACT
    assert ffn.losses == [], "a trial leaves nothing"
