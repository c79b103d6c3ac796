"""What a trial does not see, code that goes by sizes and later changes: each trains as the dense model."""

import copy
import types

import pytest
import torch
from timm.layers import DropPath, Mlp, SwiGLU
from torch import nn
from torch.nn import functional as F

from benchmarks.training_pass import EXACT, Residual, pass_error, run_model, training_error
from s2d3d.s2d import MoFConfig, RUPMoF, TopKMoE, convert_to_mof_, merge_experts
from s2d3d.s2d.tokenwise import is_tokenwise, tokenwise_between

K, C, H = 4, 8, 16
CONFIG = MoFConfig(num_experts=K, targets=("*.mlp",), every=1)
SHAPES = ((4, 6), (3, 7), (8, 3), (1, 130))
BATCHES = [torch.randn(*shape, C, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]


class Plain(nn.Module):
    """An FFN with a function between its linear layers."""

    def __init__(self, between=lambda hidden: F.gelu(hidden)):
        super().__init__()
        self.fc1, self.fc2, self.between = nn.Linear(C, H), nn.Linear(H, C), between

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x)))


def unlike(hidden, alpha=0.5):
    return hidden - alpha * hidden.mean(-2, keepdim=True)


SWITCH = {"mixes": False}


class Helper(nn.Module):
    def forward(self, hidden):
        return hidden

    def run(self, hidden):
        return unlike(hidden) if SWITCH["mixes"] else hidden


class AsksHelper(Plain):
    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def forward(self, x):
        return self.fc2(self.helper.run(self.fc1(x)))


def test_a_method_of_a_part_is_no_call_of_torch():
    assert not is_tokenwise(AsksHelper())


class DividesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        ctx.count = hidden.shape[0]
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.count


class MixesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(-2, keepdim=True)


def hooked(hidden):
    if hidden.requires_grad:
        count = hidden.shape[0]
        hidden.register_hook(lambda gradient: gradient / count)
    return hidden.relu()


class Gate(Plain):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden * hidden.sigmoid())


class OwnGelu(Plain):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(0.5 * hidden * (1.0 + torch.tanh(0.8 * (hidden + 0.04 * torch.pow(hidden, 3.0)))))


class Halves(Plain):
    def forward(self, x):
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(torch.cat([value * gate.sigmoid(), value], dim=-1))


class Slices(Plain):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(torch.cat([hidden[..., :8].tanh(), hidden[..., 8:]], -1))


class Normalised(Plain):
    def forward(self, x):
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))


class Casts(Plain):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden.float().relu().to(hidden.dtype))


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(H))

    def forward(self, hidden):
        return F.layer_norm(hidden, (H,)) * self.weight


class Swish(nn.Module):
    def forward(self, hidden):
        return hidden * torch.sigmoid(hidden)


class Copied(Plain):
    """As in many point-cloud repositories, with parts of its own."""

    def __init__(self):
        super().__init__()
        self.act, self.drop = Swish(), nn.Dropout(0.0)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop(x)
        x = self.fc2(x)
        x = self.drop(x)
        return x


def has_straight_code(mixes):
    """Make FFN classes whose code has no branch, and which mix tokens nevertheless."""

    class Mixes(Plain):
        forward = mixes

    return Mixes


SHOWN = [Gate, OwnGelu, Halves, Slices, Normalised, Casts, Copied]
STRAIGHT_BUT_MIXES = {
    "mean": lambda self, x: self.fc2(self.fc1(x) - self.fc1(x).mean(-2, keepdim=True)),
    "mean of all": lambda self, x: self.fc2(self.fc1(x) - self.fc1(x).mean()),
    "softmax": lambda self, x: self.fc2(self.fc1(x).softmax(1)),
    "roll": lambda self, x: self.fc2(torch.roll(self.fc1(x), 1, 0)),
    "first": lambda self, x: self.fc2(self.fc1(x) + self.fc1(x)[:1]),
    "cat": lambda self, x: self.fc2(torch.cat([self.fc1(x)[1:], self.fc1(x)[:1]], 0)),
    "std that is no keepdim": lambda self, x: self.fc2(self.fc1(x) / self.fc1(x).std(-1, True).clamp(min=0.5)),
    "shape": lambda self, x: self.fc2(self.fc1(x) / x.shape[0]),
    "size": lambda self, x: self.fc2(self.fc1(x) / x.size(1)),
}
NOT_SHOWN = {
    "mean of tokens": unlike,
    "mean of all": lambda h: h - h.mean(),
    "long alone": lambda h: unlike(h) if h.shape[-2] > 100 else h,
    "eight alone": lambda h: unlike(h) if h.shape[0] == 8 else h,
    "float32 alone": lambda h: unlike(h) if h.dtype == torch.float32 else h,
    "softmax": lambda h: h.softmax(1),
    "view": lambda h: h.view(-1, H).relu().view_as(h),
    "is a tensor": lambda h: unlike(h) if torch.is_tensor(h) and h.shape[-2] > 100 else h,
    "with gradients": lambda h: unlike(h) if torch.is_grad_enabled() and h.shape[-2] > 100 else h,
    "backward divides": lambda h: DividesBackward.apply(h),
    "backward mixes": lambda h: MixesBackward.apply(h),
    "tensor hook": hooked,
}


@pytest.mark.parametrize("kind", SHOWN)
def test_straight_code_whose_calls_are_of_each_token_runs_in_slots(kind):
    assert is_tokenwise(kind())
    model = nn.Sequential(Residual(kind()))
    assert training_error(model, BATCHES, CONFIG) < EXACT
    assert RUPMoF(kind(), K).layout.in_slots


@pytest.mark.parametrize("name", STRAIGHT_BUT_MIXES)
def test_straight_code_that_mixes_tokens_is_not_taken_for_one_of_each(name):
    kind = has_straight_code(STRAIGHT_BUT_MIXES[name])
    assert not is_tokenwise(kind())
    try:
        assert training_error(nn.Sequential(Residual(kind())), BATCHES, CONFIG) < EXACT
    except TypeError as error:
        assert "mixes tokens" in str(error) or "one vector for each token" in str(error) or "does not run" in str(error)


@pytest.mark.parametrize("make", [Mlp, SwiGLU])
def test_a_trace_shows_common_ffns(make):
    assert is_tokenwise(make(C, H))


@pytest.mark.parametrize("name", NOT_SHOWN)
def test_what_a_trace_does_not_show_is_exact_or_refused(name):
    assert not is_tokenwise(Plain(NOT_SHOWN[name]))
    try:
        assert training_error(nn.Sequential(Residual(Plain(NOT_SHOWN[name]))), BATCHES, CONFIG) < EXACT
    except TypeError as error:
        assert "mixes tokens" in str(error)


LOSSES: list[torch.Tensor] = []
STRENGTH = 0.0


class OfGlobals(Plain):
    def forward(self, x):
        hidden = F.gelu(self.fc1(x))
        LOSSES.append(hidden.mean())
        return self.fc2(hidden)


def test_a_list_of_the_source_file_gets_the_losses_of_tokens():
    def run(model, x):
        LOSSES.clear()
        return run_model(model, x) + sum(LOSSES)

    assert training_error(nn.Sequential(Residual(OfGlobals())), BATCHES, CONFIG, run=run) < EXACT


class Changes(Plain):
    """Subtracts a share of the mean over tokens: 0 at first. Its code has branches."""

    alpha = 0.0
    extra = None

    def __init__(self, context=None):
        super().__init__()
        self.beta, self.context, self.drop = 0.0, context, DropPath(0.0)
        self.register_buffer("mask", None)
        self.flag = torch.tensor(0.0)

    def forward(self, x):
        hidden = self.between(self.fc1(x))
        for strength in (self.alpha, self.beta, STRENGTH, float(self.flag)):
            if strength:
                hidden = unlike(hidden, strength)
        if self.context is not None and self.context["mask"] is not None:
            hidden = hidden * self.context["mask"]
        if self.extra is not None:
            hidden = unlike(hidden, self.extra[0])
        if self.mask is not None:
            hidden = hidden * self.mask
        return self.fc2(self.drop(hidden))


class Straight(Plain):
    """Its code has none, but its parts may change."""

    def __init__(self):
        super().__init__()
        self.act, self.drop, self.scale = nn.GELU(), DropPath(0.0), 1.0

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x)) * self.scale))


class MixingGelu(nn.GELU):
    def forward(self, hidden):
        return unlike(super().forward(hidden))


CHANGES = {
    "attribute": (Changes, lambda ffn, monkeypatch: setattr(ffn, "beta", 0.3)),
    "of the class": (Changes, lambda ffn, monkeypatch: monkeypatch.setattr(Changes, "alpha", 0.3)),
    "of the source file": (Changes, lambda ffn, monkeypatch: monkeypatch.setitem(globals(), "STRENGTH", 0.3)),
    "a tuple": (Changes, lambda ffn, monkeypatch: setattr(ffn, "extra", (0.3,))),
    "a buffer": (Changes, lambda ffn, monkeypatch: setattr(ffn, "mask", torch.full((1,), 0.5))),
    "a registered buffer": (Changes, lambda ffn, monkeypatch: ffn.register_buffer("mask", torch.full((1,), 0.5))),
    "in place": (Changes, lambda ffn, monkeypatch: ffn.flag.fill_(0.3)),
    "number": (Straight, lambda ffn, monkeypatch: setattr(ffn, "scale", 0.5)),
    "child": (Straight, lambda ffn, monkeypatch: ffn.add_module("drop", Batch())),
    "hook": (Straight, lambda ffn, monkeypatch: ffn.fc1.register_forward_hook(lambda _, args, out: unlike(out))),
    "hook on a part": (Straight, lambda ffn, monkeypatch: ffn.act.register_forward_hook(lambda _, a, out: unlike(out))),
    "forward of a part": (Straight, lambda ffn, monkeypatch: setattr(ffn.act, "forward", unlike)),
    "class of a part": (Straight, lambda ffn, monkeypatch: setattr(ffn.act, "__class__", MixingGelu)),
    "method": (Straight, lambda ffn, monkeypatch: monkeypatch.setattr(Straight, "forward", Plain.forward)),
}


class Batch(nn.Module):
    def forward(self, hidden):
        return unlike(hidden)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_conversion_is_that_of_the_tokens(name, monkeypatch):
    kind, change = CHANGES[name]
    dense = nn.Sequential(Residual(kind()))
    sparse = copy.deepcopy(dense)
    convert_to_mof_(sparse, CONFIG)
    assert sparse[0].mlp.layout.in_slots == (kind is Straight)
    for model in (dense, sparse):
        change(model[0].mlp, monkeypatch)
    assert pass_error(dense, sparse, BATCHES) < EXACT
    assert not sparse[0].mlp.layout.in_slots


def test_a_router_which_needs_slots_refuses_a_change():
    layer = TopKMoE(Straight(), K)
    layer.scale = 1.0
    with pytest.raises(TypeError, match="TopKMoE has other attributes or hooks than at its conversion"):
        layer.scale = 0.3


def test_a_mask_in_a_dict_that_the_model_holds_too():
    class Block(Residual):
        def __init__(self):
            self.context = {"mask": None}
            context = self.context
            super().__init__(Changes(context))
            self.context = context

        def forward(self, x):
            self.context["mask"] = (x[..., :1] > 0).float()
            return super().forward(x)

    assert training_error(nn.Sequential(Block()), BATCHES, CONFIG) < EXACT


@pytest.mark.parametrize("part", [nn.BatchNorm1d(H), nn.GELU()])
def test_a_child_that_a_tool_puts_in_is_the_one_that_runs_and_that_is_merged(part):
    model = nn.Sequential(Residual(nn.Sequential(nn.Linear(C, H), nn.ReLU(), nn.Linear(H, C))))
    convert_to_mof_(model, CONFIG)
    model[0].mlp.add_module("1", nn.Sigmoid())
    assert isinstance(merge_experts(model)[0].mlp[1], nn.Sigmoid)
    found = merge_experts(model.eval())[0].mlp(BATCHES[0])
    torch.testing.assert_close(model[0].mlp(BATCHES[0]), found)


# An FFN spread over its block


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc1, self.fc2, self.act = Attention(), nn.Linear(C, H), nn.Linear(H, C), nn.GELU()
        self.mask = None

    def forward(self, x, mask=None):
        x = x + self.attn(x)
        hidden = self.act(self.fc1(x))
        for one in (mask, self.mask):
            hidden = hidden if one is None else hidden * one
        return x + self.fc2(hidden)


class Simple(Block):
    def forward(self, x):
        x = x + self.attn(x)
        return x + self.fc2(self.act(self.fc1(x)))


PAIRS = MoFConfig(num_experts=K, targets=("0",), every=1)


def masked(model, x):
    return model[0](x, (x[..., :1] > 0).float())


def masked_by_attribute(model, x):
    model[0].mask = (x[..., :1] > 0).float()
    return model(x)


@pytest.mark.parametrize(
    ("kind", "run"), [(Block, masked), (Block, masked_by_attribute), (Simple, masked_by_attribute)]
)
def test_a_block_that_gets_a_mask_later(kind, run):
    assert training_error(nn.Sequential(kind()), BATCHES, PAIRS, run=run) < EXACT


def test_slots_between_two_layers_are_for_what_a_trace_shows():
    assert tokenwise_between(Simple(), "fc1", "fc2") == ("", "act")
    assert tokenwise_between(Block(), "fc1", "fc2") == ()  # it has a branch
    model = nn.Sequential(Simple())
    convert_to_mof_(model, PAIRS)
    assert model[0].fc1.experts.layout.in_slots
    model[0].act.register_forward_hook(lambda _, args, out: out)
    model(BATCHES[0])
    assert not model[0].fc1.experts.layout.in_slots


# What an FFN holds of the model around it


class Held(nn.Module):
    """An FFN that reads a parameter of its block, in several ways."""

    def __init__(self, how):
        super().__init__()
        self.fc1, self.fc2, self.how = nn.Linear(C, H), nn.Linear(H, C), how

    def forward(self, x):
        hidden = F.gelu(self.fc1(x))
        if self.how == "method":
            return self.fc2(self.held(hidden))
        held = {"list": lambda: self.held[0].alpha, "dict": lambda: self.held["alpha"]}
        held |= {"module": lambda: self.__dict__["held"].alpha, "namespace": lambda: self.held.block.alpha}
        return self.fc2(hidden * held[self.how]())


class Holder(Residual):
    def __init__(self, how):
        super().__init__(Held(how))
        self.alpha = nn.Parameter(torch.tensor(1.3))
        made = {"list": [self], "dict": {"alpha": self.alpha}, "module": self, "method": self.scale}
        self.mlp.__dict__["held"] = (made | {"namespace": types.SimpleNamespace(block=self)})[how]

    def scale(self, hidden):
        return hidden * self.alpha


@pytest.mark.parametrize("example", [None, BATCHES[1]])
@pytest.mark.parametrize("how", ["list", "dict", "module", "method", "namespace"])
def test_a_parameter_of_the_block_stays_that_of_the_block(how, example):
    model = nn.Sequential(Holder(how))
    assert training_error(model, BATCHES, CONFIG, example=example) < EXACT
    convert_to_mof_(model, CONFIG)
    for inplace in (False, True):
        merged = merge_experts(model, inplace=inplace).eval()
        with torch.no_grad():
            merged[0].alpha.fill_(0.0)
        torch.testing.assert_close(merged[0].mlp(BATCHES[0]), merged[0].mlp.fc2.bias.expand(*BATCHES[0].shape))
        assert inplace or float(model[0].alpha) > 1, "a copy is a copy"


def test_a_bound_hook_on_a_part_is_that_of_its_recorder():
    class Recorder(nn.Module):
        def __init__(self, ffn):
            super().__init__()
            self.mlp, self.seen = ffn, []
            ffn.between.register_forward_hook(self.note)

        def note(self, module, args, output):
            self.seen.append(output.square().mean())

        def forward(self, x):
            self.seen.clear()
            return self.mlp(x) + sum(self.seen)

    def run(model, x):
        out = model[0].mlp(x)
        loss = sum(model[0].seen)
        model[0].seen.clear()
        return out + loss

    assert training_error(nn.Sequential(Recorder(Plain(nn.GELU()))), BATCHES, CONFIG, run=run) < EXACT


def test_the_handle_of_a_hook_goes_on_removing_it():
    model, seen = nn.Sequential(Residual(Mlp(C, H))), []
    handles = [part.register_forward_hook(lambda *_: seen.append(1)) for part in (model[0].mlp, model[0].mlp.fc1)]
    convert_to_mof_(model, CONFIG)
    model(BATCHES[0])
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    model(BATCHES[0])
    assert len(seen) == 2


# What experts cannot have


class ScaledGradient(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.1 + (self.weight * 0.9).detach(), self.bias)


class Keeps(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        self.loss = out.abs().mean()
        return out


@pytest.mark.parametrize("kind", [ScaledGradient, Keeps])
def test_a_linear_layer_that_trains_otherwise_or_keeps_results_is_refused(kind):
    ffn = Plain()
    ffn.fc1 = kind(C, H)
    with pytest.raises(TypeError, match=f"holds a {kind.__name__}, which is more than an nn.Linear"):
        convert_to_mof_(nn.Sequential(Residual(ffn)), CONFIG)


def test_a_hook_that_uses_the_weight_of_a_linear_layer_is_refused():
    model = nn.Sequential(Residual(Plain()))
    model[0].mlp.fc1.register_forward_pre_hook(lambda module, _: module.weight.data.renorm_(2, 0, 0.7))
    with pytest.raises(TypeError, match=r"has a hook on 'fc1' that uses weights, of which experts have K"):
        convert_to_mof_(model, CONFIG)
    model = nn.Sequential(Residual(Plain()))
    model[0].mlp.register_forward_hook(lambda module, args, out: out * module.fc1.weight.norm())
    with pytest.raises(TypeError, match=r"Plain has a hook that uses weights, of which experts have K"):
        convert_to_mof_(model, CONFIG)


def test_an_own_exception_of_an_ffn_is_no_crash():
    class OwnError(Exception):
        pass

    class Picky(Plain):
        def forward(self, x):
            if x.dim() != 3:
                raise OwnError("three dimensions")
            return super().forward(x)

    assert training_error(nn.Sequential(Residual(Picky())), BATCHES, CONFIG) < EXACT


def test_what_cannot_be_copied_is_named():
    import threading

    ffn = Plain()
    ffn.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"module '0.mlp' cannot become experts: Plain holds something that cannot be"):
        convert_to_mof_(nn.Sequential(Residual(ffn)), CONFIG)


def test_a_decorated_forward_may_be_called_by_any_name():
    def plain(function):
        return lambda *args, **kwargs: function(*args, **kwargs)

    class Decorated(Plain):
        forward = plain(Plain.forward)

    class ByName(Residual):
        def forward(self, x):
            return x + self.mlp(x=x)

    assert training_error(nn.Sequential(ByName(Decorated())), BATCHES, CONFIG) < EXACT


def test_a_block_may_call_a_method_of_its_ffn():
    class Scaled(Plain):
        def set_scale(self, scale):
            self.scale = scale

        def forward(self, x):
            return super().forward(x) * getattr(self, "scale", 1.0)

    class Sets(Residual):
        def forward(self, x):
            self.mlp.set_scale(x.shape[0])
            return super().forward(x)

    assert training_error(nn.Sequential(Sets(Scaled())), BATCHES, CONFIG) < EXACT


def test_a_convolution_returns_memory_in_the_order_of_its_input():
    model = nn.Sequential(Residual(nn.Sequential(nn.Conv2d(C, H, 1), nn.GELU(), nn.Conv2d(H, C, 1))))
    convert_to_mof_(model, CONFIG)
    images = torch.randn(2, C, 3, 4)
    assert model[0].mlp(images).view(2, -1).shape == (2, C * 12)
    last = images.contiguous(memory_format=torch.channels_last)
    assert model[0].mlp(last).is_contiguous(memory_format=torch.channels_last)


def test_a_loss_that_the_ffn_keeps_is_read_from_the_layer():
    class Keeps(Plain):
        def __init__(self):
            super().__init__()
            self.loss = 0.0

        def forward(self, x):
            hidden = F.gelu(self.fc1(x))
            self.loss = self.loss + hidden.square().mean()
            return self.fc2(hidden)

    def run(model, x):
        model[0].mlp.loss = 0.0
        out = model(x)
        return out + model[0].mlp.loss

    model = nn.Sequential(Residual(Keeps()))
    assert training_error(model, BATCHES, CONFIG, run=run) < EXACT
    convert_to_mof_(model, CONFIG)
    model(BATCHES[0])
    assert merge_experts(model)[0].mlp.loss > 0, "a loss with its graph is no obstacle"
    del model[0].mlp.loss
    assert not hasattr(model[0].mlp, "loss")


def test_names_that_expert_layers_have_are_refused():
    class Named(Plain):
        def __init__(self):
            super().__init__()
            self.layout = "a"

        def draw(self):
            pass

    with pytest.raises(TypeError, match="Named has draw, layout, names that expert layers have: rename them"):
        convert_to_mof_(nn.Sequential(Residual(Named())), CONFIG)


def test_a_function_over_a_part_of_the_ffn_is_refused():
    ffn = Plain()
    ffn.scale = lambda hidden: hidden * ffn.fc1.bias.mean()
    with pytest.raises(TypeError, match=r"holds a function or a weak reference that leads to its own parts"):
        convert_to_mof_(nn.Sequential(Residual(ffn)), CONFIG)


def test_a_function_of_the_model_over_an_ffn_is_refused():
    model = nn.Sequential(Residual(Plain()))
    ffn = model[0].mlp
    model.decode = lambda hidden: F.linear(hidden, ffn.fc1.weight)
    with pytest.raises(TypeError, match=r"module '0.mlp' cannot become experts: '.decode' holds it as well"):
        convert_to_mof_(model, CONFIG)


def test_an_example_leaves_the_parameters_of_the_model():
    class Moves(nn.Sequential):
        def forward(self, x):
            with torch.no_grad():
                self.count.add_(1)
            return super().forward(x)

    model = Moves(Residual(Plain()))
    model.count = nn.Parameter(torch.zeros(1), requires_grad=False)
    convert_to_mof_(model, CONFIG, example=BATCHES[0])
    assert float(model.count) == 0


def test_a_sequential_ffn_keeps_its_length():
    model = nn.Sequential(Residual(nn.Sequential(nn.Linear(C, H), nn.GELU(), nn.Linear(H, C))))
    convert_to_mof_(model, CONFIG)
    model[0].mlp[1] = nn.Sigmoid()
    assert isinstance(merge_experts(model)[0].mlp[1], nn.Sigmoid)
    del model[0].mlp[1]
    assert list(merge_experts(model)[0].mlp.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    convert_to_mof_(
        model := nn.Sequential(Residual(nn.Sequential(nn.Linear(C, H), nn.GELU(), nn.Linear(H, C)))), CONFIG
    )
    assert len(model[0].mlp) == 3 and isinstance(model[0].mlp[1], nn.GELU) and bool(RUPMoF(Plain(), K))


class Reordered(Plain):
    """Its second linear layer gets the tokens in another order."""

    def __init__(self, there, back):
        super().__init__()
        self.there, self.back = there, back

    def forward(self, x):
        return self.back(self.fc2(self.there(F.gelu(self.fc1(x)))))


@pytest.mark.parametrize(
    "there_and_back",
    [
        (lambda h: h.transpose(0, 1), lambda h: h.transpose(0, 1)),
        (lambda h: h.flip(1), lambda h: h.flip(1)),
        (lambda h: h.roll(1, -2), lambda h: h.roll(-1, -2)),
    ],
)
def test_an_ffn_in_which_a_token_would_meet_several_experts_is_refused(there_and_back):
    with pytest.raises(TypeError, match=r"a token would meet several experts|does not run on tokens|one vector for"):
        convert_to_mof_(nn.Sequential(Residual(Reordered(*there_and_back))), CONFIG, example=BATCHES[1])


class SpreadOut(nn.Module):
    """A transformer layer whose FFN is two of its own parts, with a function between them and one behind."""

    def __init__(self, there, back):
        super().__init__()
        self.mixer, self.linear1, self.linear2 = nn.MultiheadAttention(C, 2), nn.Linear(C, H), nn.Linear(H, C)
        self.there, self.back = there, back

    def forward(self, x):
        x = x + self.mixer(x, x, x)[0]
        return x + self.back(self.linear2(self.there(F.relu(self.linear1(x)))))


@pytest.mark.parametrize("refused", [True, False])
def test_a_layer_in_which_a_token_would_meet_several_experts_is_refused(refused):
    model = nn.Sequential(
        SpreadOut((lambda h: h.flip(1)) if refused else (lambda h: h + h.roll(1, 1)), lambda h: h.flip(1))
    )
    config = MoFConfig(num_experts=K, targets=("0",), every=1)
    if refused:
        with pytest.raises(TypeError, match="a token would meet several experts"):
            convert_to_mof_(model, config)
    else:
        assert convert_to_mof_(model, config) == ["0"], "a token keeps its place, whatever it sees of others"


class CountsCalls(Plain):
    """Its output depends on how often it was called."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (1 + self.calls)


@pytest.mark.parametrize("ffn", [Plain(nn.RReLU()), CountsCalls()])
def test_what_differs_from_call_to_call_is_no_second_expert(ffn):
    assert convert_to_mof_(nn.Sequential(Residual(ffn)), CONFIG) == ["0.mlp"]


def test_an_ffn_out_of_slots_gives_each_token_one_expert(spread_):
    ffn = Plain(lambda hidden: F.gelu(hidden) if len(hidden) else hidden)
    layer = spread_(RUPMoF(ffn, K), 1.0)
    assert not layer.layout.in_slots
    x = BATCHES[1]
    mixed = layer(x).flatten(0, 1)
    alone = []
    for expert in range(K):
        one = copy.deepcopy(layer)
        for parameter in one.expert_parameters():
            parameter.data.copy_(parameter.data[expert].expand_as(parameter).clone())
        alone.append(one(x).flatten(0, 1))
    gaps = (torch.stack(alone) - mixed).abs().amax(-1)
    assert gaps.amin(0).max() < 1e-5 and len(gaps.argmin(0).unique()) == K


def test_a_convolution_without_a_batch_keeps_its_channels():
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Conv1d(C, H, 1), nn.Conv1d(H, C, 1)

        def forward(self, x):
            return self.w2(F.relu(self.w1(x.transpose(-1, -2)))).transpose(-1, -2)

    inputs = [*BATCHES[:2], torch.randn(C, C), torch.randn(9, C)]
    assert training_error(nn.Sequential(Residual(Through())), inputs, CONFIG, example=BATCHES[1]) < EXACT


def test_another_number_of_dimensions_than_was_tried_takes_tokens_out_of_slots():
    model = nn.Sequential(Residual(nn.Sequential(nn.Linear(C, H), nn.Softmax(2), nn.Linear(H, C))))
    inputs = [BATCHES[1], torch.randn(4, 6, 5, C)]
    assert training_error(model, inputs, CONFIG, example=BATCHES[1]) < EXACT


def test_a_private_attribute_reaches_the_ffn_and_its_merge():
    class Asks(Plain):
        def forward(self, x):
            return super().forward(x) * getattr(self, "_scale", 1.0)

    dense = nn.Sequential(Residual(Asks()))
    sparse = copy.deepcopy(dense)
    convert_to_mof_(sparse, CONFIG)
    dense[0].mlp._scale = sparse[0].mlp._scale = 3.0
    sparse[0].mlp.fc1.tag = "kept"
    assert pass_error(dense, sparse, BATCHES) < EXACT
    merged = merge_experts(sparse)[0].mlp
    assert (merged._scale, merged.fc1.tag) == (3.0, "kept")


def test_writing_in_place_later_is_seen():
    class Block(Residual):
        def forward(self, x):
            hidden = x * 1.0
            return self.mlp(hidden) + hidden

    dense = nn.Sequential(Block(nn.Sequential(nn.ReLU(), nn.Linear(C, H), nn.GELU(), nn.Linear(H, C))))
    sparse = copy.deepcopy(dense)
    convert_to_mof_(sparse, CONFIG)
    dense[0].mlp[0].inplace = sparse[0].mlp[0].inplace = True
    assert pass_error(dense, sparse, BATCHES) < EXACT


def test_a_weight_behind_a_flag_is_refused():
    class Behind(Plain):
        def forward(self, x):
            hidden = F.gelu(self.fc1(x))
            return self.fc2(hidden / self.fc1.weight.norm() if x.shape[1] > 100 else hidden)

    with pytest.raises(
        TypeError, match=r"Behind uses the weight of a layer in its own code, and experts have K of each"
    ):
        convert_to_mof_(nn.Sequential(Residual(Behind())), CONFIG)
