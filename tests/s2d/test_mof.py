"""RUP-MoF against the dense FFN, a loop over experts, and its own merged form; and what cannot become experts."""

import copy
import io
import pickle
import sys

import pytest
import torch
from cases import quick
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional as F

from s2d3d.s2d import RUPMoF

K = 4


class OwnFFN(nn.Module):
    """Layers in a container, registered out of order and under two names, with functions between them."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(12, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12, bias=False)])
        self.again = self.layers[1]

    def forward(self, x):
        for layer in self.layers:
            x = F.silu(layer(x))
        return F.dropout(self.out(torch.tanh(self.again(x))), 0.0, self.training)


FFNS = {
    "mlp": lambda: Mlp(6, 12),
    "no_bias": lambda: Mlp(6, 12, bias=False),
    "one_bias": lambda: Mlp(6, 12, bias=(False, True)),
    "other_width": lambda: Mlp(6, 12, out_features=5, act_layer=nn.ReLU),
    "glu": lambda: GluMlp(6, 12),
    "glu_packed": lambda: SwiGLUPacked(6, 12, bias=False),
    "swiglu": lambda: SwiGLU(6, 12),
    "sequential": lambda: nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.0), nn.Linear(12, 6)),
    "norm_inside": lambda: SwiGLU(6, 12, norm_layer=nn.LayerNorm),
    "own": OwnFFN,
}


@pytest.fixture(params=FFNS)
def ffn(request):
    return FFNS[request.param]().double()


def run(
    module: nn.Module, x: torch.Tensor, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return output, input gradient and parameter gradients of a loss that weights every output differently."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    output = module(x)
    (output * torch.arange(output.numel(), dtype=x.dtype).sin().view_as(output)).sum().backward()
    return output.detach(), x.grad, {name: p.grad.clone() for name, p in module.named_parameters()}


def linear_keys(ffn: nn.Module) -> set[str]:
    """Name the parameters that are stacked: those of the linear layers."""
    return {
        f"{n}.{key}"
        for n, m in ffn.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Linear)
        for key, _ in m.named_parameters()
    }


# Training mode


@pytest.mark.parametrize("shape", quick(2, [pytest.param(shape) for shape in ((13, 6), (2, 3, 2, 6), (2, 5, 6))]))
def test_identical_experts_equal_the_dense_ffn_forward_and_gradients(ffn, shape):
    x = torch.randn(shape, dtype=torch.float64)
    layer = RUPMoF(ffn, K)
    assert layer.training
    output, x_grad, grads = run(layer, x)
    dense_output, dense_x_grad, dense_grads = run(ffn, x)
    torch.testing.assert_close(output, dense_output)
    torch.testing.assert_close(x_grad, dense_x_grad)
    assert grads.keys() == dense_grads.keys()
    for name, gradient in grads.items():
        if name in linear_keys(ffn):  # each expert saw its own tokens: their gradients add up to that of all tokens
            gradient = gradient.sum(0).t() if name.endswith("weight") else gradient.sum(0)
        torch.testing.assert_close(gradient, dense_grads[name])


def test_different_experts_equal_a_loop_over_tokens_forward_and_gradients(ffn, spread_, separate_experts, loop_forward):
    layer = spread_(RUPMoF(ffn, K))
    experts = nn.ModuleList(separate_experts(layer, ffn))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    loop = nn.Module()
    loop.experts, loop.forward = experts, lambda x: loop_forward(list(experts), x)
    output, x_grad, grads = run(layer, x)
    loop_output, loop_x_grad, loop_grads = run(loop, x)
    torch.testing.assert_close(output, loop_output)
    torch.testing.assert_close(x_grad, loop_x_grad)
    for name, gradient in grads.items():
        separate = torch.stack([loop_grads[f"experts.{expert}.{name}"] for expert in range(K)])
        if name not in linear_keys(ffn):
            separate = separate.sum(0)  # shared by the experts
        elif name.endswith("weight"):
            separate = separate.transpose(1, 2)
        torch.testing.assert_close(gradient, separate)

    # Not a vacuous pass: the experts matter, and so does the draw.
    assert not torch.allclose(output, layer.averaged_expert()(x), atol=1e-3)
    assert not torch.allclose(output, run(layer, x, seed=2)[0], atol=1e-3)


def test_one_expert_is_the_dense_ffn_forward_and_gradients(ffn):
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    for mode in (True, False):
        output, x_grad, grads = run(RUPMoF(ffn, 1).train(mode), x)
        dense_output, dense_x_grad, dense_grads = run(ffn.train(mode), x)
        torch.testing.assert_close(output, dense_output)
        torch.testing.assert_close(x_grad, dense_x_grad)
        for name, gradient in grads.items():
            if name in linear_keys(ffn):
                gradient = gradient[0].t() if name.endswith("weight") else gradient[0]
            torch.testing.assert_close(gradient, dense_grads[name])


def test_dropout_inside_works_in_training_and_not_in_evaluation():
    ffn = Mlp(6, 12, drop=(0.0, 0.5))
    layer, x = RUPMoF(ffn, K), torch.randn(40, 50, 6)
    dense = ffn.eval()(x)
    output = layer(x)
    kept = output != 0
    assert 0.45 < float(kept.float().mean()) < 0.55
    torch.testing.assert_close(output, torch.where(kept, 2 * dense, torch.zeros(())))
    torch.testing.assert_close(layer.eval()(x), dense)


def test_fewer_tokens_than_experts_fails_in_training_only():
    layer = RUPMoF(Mlp(6, 12), K)
    with pytest.raises(ValueError, match="3 tokens cannot be shared among 4 experts"):
        layer(torch.randn(1, 3, 6))
    assert layer(torch.randn(1, 4, 6)).shape == (1, 4, 6)
    assert layer.eval()(torch.randn(6)).shape == (6,)


def test_input_that_is_not_contiguous(spread_):
    layer, x = spread_(RUPMoF(Mlp(6, 12), K)), torch.randn(5, 2, 6)
    view = x.transpose(0, 1)
    torch.manual_seed(1)
    output = layer(view)
    torch.manual_seed(1)
    torch.testing.assert_close(output, layer(view.contiguous()))


# Evaluation mode and the merged FFN


@pytest.mark.parametrize("dtype", quick(2, [torch.float32, torch.bfloat16, torch.float64]))
def test_evaluation_equals_the_merged_ffn_bit_for_bit(ffn, dtype, spread_):
    layer = spread_(RUPMoF(ffn.to(dtype), K)).eval()
    merged = layer.averaged_expert()
    x = torch.randn(3, 5, 6, dtype=dtype)
    assert torch.equal(layer(x), merged(x))
    assert not torch.allclose(layer(x), ffn.eval()(x), atol=1e-3)


def test_merged_ffn_holds_the_mean_of_the_experts_and_looks_like_the_original(ffn, spread_, separate_experts):
    layer = spread_(RUPMoF(ffn, K))
    merged, experts = layer.averaged_expert(), [e.state_dict() for e in separate_experts(layer, ffn)]
    assert type(merged) is type(ffn)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in ffn.named_modules()]
    state = merged.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ffn.state_dict().items()}
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, sum(e[key] for e in experts) / K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mean_of_low_precision_experts_is_rounded_once(dtype, spread_):
    layer = spread_(RUPMoF(Mlp(16, 32).to(dtype), 5))
    for name, tensor in layer.averaged_expert().state_dict().items():
        exact = layer.state_dict()[name].double().mean(0)
        rounded = exact.to(dtype)
        assert torch.equal(tensor, rounded.t() if name.endswith("weight") else rounded)


# State


def test_state_dict_keys_are_those_of_the_ffn_and_shapes_are_stacked():
    state = RUPMoF(Mlp(6, 12), K).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "fc1.weight": (4, 6, 12),
        "fc1.bias": (4, 12),
        "fc2.weight": (4, 12, 6),
        "fc2.bias": (4, 6),
    }
    assert RUPMoF(Mlp(6, 12, bias=False), K).state_dict().keys() == {"fc1.weight", "fc2.weight"}


def test_the_ffn_is_left_untouched_and_shares_nothing_with_the_layer():
    ffn = Mlp(6, 12)
    before = copy.deepcopy(ffn.state_dict())
    layer = RUPMoF(ffn, K)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in ffn.state_dict().items())
    assert type(ffn.fc1) is nn.Linear and ffn.training


def test_requires_grad_and_mode_are_taken_over_and_given_back():
    ffn = Mlp(6, 12).eval()
    ffn.fc1.weight.requires_grad_(False)
    ffn.fc2.bias.requires_grad_(False)
    wanted = {"fc1.weight": False, "fc1.bias": True, "fc2.weight": True, "fc2.bias": False}
    layer = RUPMoF(ffn, K)
    assert not any(m.training for m in layer.modules())
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == wanted
    for mode in (True, False):
        merged = layer.train(mode).averaged_expert()
        assert all(m.training is mode for m in merged.modules())
        assert {n: p.requires_grad for n, p in merged.named_parameters()} == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_of_the_ffn_is_kept(dtype):
    layer = RUPMoF(Mlp(6, 12).to(dtype), K)
    x = torch.randn(3, 5, 6, dtype=dtype)
    output, x_grad, grads = run(layer, x)
    dense = layer.averaged_expert()(x)
    assert output.dtype == x_grad.dtype == dense.dtype == dtype
    assert all(g.dtype == dtype for g in grads.values())
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(output, dense, rtol=tolerance, atol=tolerance)


def save_and_load(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def load_state(layer: nn.Module, assign: bool) -> nn.Module:
    with torch.device("meta" if assign else "cpu"):
        other = RUPMoF(FFNS["own"]().double(), K)
    other.load_state_dict(layer.state_dict(), assign=assign)
    return other


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        save_and_load,
        lambda layer: load_state(layer, assign=False),
        lambda layer: load_state(layer, assign=True),
        lambda layer: layer.half().to(torch.float64),
        lambda layer: layer._apply(lambda tensor: tensor * 1),
        lambda layer: layer.requires_grad_(False).eval().train(),
    ],
    ids=["deepcopy", "pickle", "save", "load", "assign", "half", "apply", "modes"],
)
def test_layer_stays_whole_under(change, spread_, separate_experts, loop_forward):
    """Whatever moves, copies or loads a layer reaches the weights that its forward method reads."""
    ffn = FFNS["own"]().double()
    layer = spread_(change(spread_(RUPMoF(ffn, K))))
    experts = separate_experts(layer, ffn)
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    torch.manual_seed(4)
    output = layer(x)
    torch.manual_seed(4)
    torch.testing.assert_close(output, loop_forward(experts, x))


def test_functional_call_reads_the_weights_that_it_is_given(spread_):
    layer = spread_(RUPMoF(Mlp(6, 12), K)).eval()
    other, x = spread_(copy.deepcopy(layer)), torch.randn(3, 6)
    output = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert torch.equal(output, other(x)) and not torch.allclose(output, layer(x), atol=1e-3)


def test_a_copy_is_independent_of_its_original(spread_):
    layer = spread_(RUPMoF(Mlp(6, 12), K)).eval()
    x = torch.randn(3, 6)
    before = layer(x)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(x), before)
    spread_(clone)
    assert torch.equal(layer(x), before) and not torch.allclose(clone(x), before, atol=1e-3)


def test_children_that_are_replaced_later_are_used():
    ffn, x = Mlp(6, 12), torch.randn(3, 5, 6)
    layer = RUPMoF(ffn, K)
    layer.act = nn.ReLU()
    ffn.act = nn.ReLU()
    torch.testing.assert_close(layer(x), ffn(x))
    torch.testing.assert_close(layer.averaged_expert()(x), ffn(x))


@pytest.mark.parametrize("installed", quick(1, [True, False]))
def test_compiles_to_one_graph_that_gives_the_same_output_and_gradients(installed, spread_, monkeypatch):
    if not installed:
        monkeypatch.setitem(sys.modules, "torch_scatter", None)
    torch.compiler.reset()
    layer, x = spread_(RUPMoF(SwiGLU(6, 12), K)), torch.randn(2, 7, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for mode in (True, False):
        layer.train(mode)
        output, x_grad, grads = run(layer, x)
        compiled_output, compiled_x_grad, compiled_grads = run(compiled, x)
        torch.testing.assert_close(compiled_output, output)
        torch.testing.assert_close(compiled_x_grad, x_grad)
        for name, gradient in grads.items():
            torch.testing.assert_close(compiled_grads[f"_orig_mod.{name}"], gradient)


# What cannot become experts


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class LowRank(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.low_rank = nn.Parameter(torch.zeros(2, 2))


class TwoInputs(nn.Sequential):
    def forward(self, hidden, residual):
        return super().forward(hidden) + residual


class TwoOutputs(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x


class NextToken(nn.Sequential):
    def forward(self, x):
        return super().forward(x.roll(1, dims=-2))


def old_weight_norm(ffn: Mlp) -> Mlp:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(ffn.fc1)
    return ffn


def new_weight_norm(ffn: Mlp) -> Mlp:
    nn.utils.parametrizations.weight_norm(ffn.fc1)
    return ffn


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(6, 6), "Linear is not an FFN with nn.Linear layers inside"),
        (nn.GELU, "GELU is not an FFN with nn.Linear layers inside"),
        (lambda: Mlp(6, 12, use_conv=True, norm_layer=nn.InstanceNorm2d), "Mlp mixes tokens"),
        (lambda: RUPMoF(Mlp(6, 12), 2), "RUPMoF is not an FFN"),
        (lambda: Attention(6, num_heads=2), "Attention mixes tokens"),
        (lambda: NextToken(nn.Linear(6, 12), nn.Linear(12, 6)), "NextToken mixes tokens"),
        (lambda: nn.MultiheadAttention(6, 2), r"MultiheadAttention holds"),
        (lambda: Mlp(6, 12, act_layer=nn.PReLU), r"state outside its linear layers \(act.weight\)"),
        (
            lambda: nn.Sequential(nn.Linear(6, 12), OwnForward(12, 6)),
            "holds a OwnForward, which is more than an nn.Linear",
        ),
        (lambda: nn.Sequential(nn.Linear(6, 12), LowRank(12, 6)), r"state outside its linear layers \(1.low_rank\)"),
        (lambda: old_weight_norm(Mlp(6, 12)), r"state outside its linear layers \(fc1.weight_g, fc1.weight_v\)"),
        (lambda: new_weight_norm(Mlp(6, 12)), r"state outside its linear layers \(fc1.parametrizations"),
        (lambda: TwoInputs(nn.Linear(6, 12), nn.Linear(12, 6)), "does not run on tokens.*residual"),
        (lambda: TwoOutputs(nn.Linear(6, 12), nn.Linear(12, 6)), "does not return one vector for each token"),
    ],
)
def test_what_is_not_an_ffn_is_refused_with_the_reason(make, message):
    module = make()
    with pytest.raises(TypeError, match=message):
        RUPMoF(module, K)


def test_the_check_draws_no_random_number_and_changes_no_mode():
    ffn = Mlp(6, 12, drop=0.5)
    state = torch.get_rng_state()
    RUPMoF(ffn, K)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in ffn.modules())


def test_number_of_experts_below_one_is_refused():
    with pytest.raises(ValueError, match="num_experts is 0, must be at least 1"):
        RUPMoF(Mlp(6, 12), 0)
