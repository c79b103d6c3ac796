"""How experts may be called: one FFN with several arguments, parts under torch.compile, two layers of a block."""

import pickle

import pytest
import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

from s2d3d.s2d import MoFConfig, RUPMoF, TopKMoE, convert_to_mof_, merge_experts

C, H = 8, 16
CONFIG = MoFConfig(every=1, targets=("*.mlp",))
X = torch.randn(4, 6, C, generator=torch.Generator().manual_seed(0))


class Rolled(nn.Module):
    """An FFN that mixes tokens where it is told to."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, H), nn.Linear(H, C)

    def forward(self, x, shift=0):
        hidden = self.fc1(x)
        if shift:
            hidden = torch.roll(hidden, shift, 1)
        return self.fc2(F.gelu(hidden))


class Block(nn.Module):
    def __init__(self, mlp, *shifts):
        super().__init__()
        self.mlp, self.shifts = mlp, shifts

    def forward(self, x):
        for shift in self.shifts:
            x = x + self.mlp(x, shift)
        return x


@pytest.mark.parametrize("shifts", [[(0,), (1,)], [(1,), (0,)], [(0, 1)]], ids=str)
def test_each_call_of_a_sample_input_is_tried(shifts):
    def model(form):
        return nn.Sequential(*[Block(Rolled(), *form(each)) for each in shifts])

    with pytest.raises(TypeError, match="mixes tokens"):
        convert_to_mof_(model(lambda shift: shift), CONFIG, example=X)
    assert convert_to_mof_(model(lambda shift: [0] * len(shift)), CONFIG, example=X)


class Layer(nn.Module):
    """A transformer layer with the FFN spread over it, used in a wrong way unless `wrong` is ""."""

    def __init__(self, wrong):
        super().__init__()
        self.attn, self.wrong = nn.MultiheadAttention(C, 2, batch_first=True), wrong
        self.linear1, self.linear2 = nn.Linear(C, H), nn.Linear(H, C)

    def forward(self, x):
        x = x + self.attn(x, x, x)[0]
        if self.wrong == "functional":
            hidden = F.gelu(F.linear(x, self.linear1.weight, self.linear1.bias))
            return x + F.linear(hidden, self.linear2.weight, self.linear2.bias)
        if self.wrong == "dtype":  # reading it is no use of the weight
            x = x.to(self.linear1.weight.dtype)
        hidden = F.gelu(self.linear1(x))
        if self.wrong == "twice":
            hidden = hidden * self.linear1(x.tanh())
        if self.wrong == "reads":
            hidden = hidden * self.linear1.weight.abs().mean()
        return x + self.linear2(hidden)


@pytest.mark.parametrize("example", [None, X], ids=["random tokens", "example"])
@pytest.mark.parametrize(
    "wrong, message",
    [
        ("twice", "does not call its linear layers one after the other"),
        ("functional", "does not call its linear layers one after the other"),
        ("reads", "uses a weight outside its linear layer"),
        ("", None),
        ("dtype", None),
    ],
)
def test_the_two_layers_of_a_pair_are_used_one_after_the_other(wrong, message, example):
    model, config = nn.Sequential(Layer(wrong), Layer(wrong)), MoFConfig(every=1, targets=("*",))
    if message is None:
        assert convert_to_mof_(model, config, example=example) == ["0", "1"]
        return
    with pytest.raises(TypeError, match=message):
        convert_to_mof_(model, config, example=example)


class ReadsLong(Layer):
    """Uses a weight outside its linear layer for long sequences alone."""

    def forward(self, x):
        self.wrong = "reads" if x.shape[1] > 6 else ""
        return super().forward(x)


@pytest.mark.parametrize("sizes", [(4, 9), (9, 4)])
def test_a_layer_is_checked_in_each_of_its_calls(sizes):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([ReadsLong("")])

        def forward(self, x):
            return [self.layers[0](x[:, :size]) for size in sizes]

    with pytest.raises(TypeError, match="uses a weight outside its linear layer"):
        convert_to_mof_(Twice(), MoFConfig(every=1, targets=("layers.*",)), example=torch.randn(4, 9, C))


class CallsParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Mlp(C, H)

    def forward(self, x):
        return x + self.mlp.fc2(self.mlp.act(self.mlp.fc1(x)))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_that_is_called_alone_is_refused(compiled):
    """A batch of K samples, which would pass as the slots of K experts."""
    model = nn.Sequential(CallsParts(), CallsParts())
    convert_to_mof_(model, CONFIG)
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(TypeError, match="a part of it is called"):
        run(X)


class Dropped(nn.Module):
    """Goes by its own mode."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, H), nn.Linear(H, C)
        nn.init.ones_(self.fc2.weight)

    def forward(self, x):
        self.seen = self.training
        return F.dropout(self.fc2(self.fc1(x)), 0.5, self.training)


def test_a_mode_that_is_set_on_each_module_holds_for_the_ffn():
    """Lightning restores modes so after a validation."""
    layer = RUPMoF(Dropped(), 4)
    for mode in (False, True, False):
        for module in layer.modules():
            module.training = mode
        zeros = (layer(X) == 0).float().mean()
        assert layer.seen is mode and (0.3 < zeros < 0.7 if mode else zeros == 0)


def test_hooks_on_all_modules_see_tokens():
    seen = []
    layer, dense = RUPMoF(mlp := Mlp(C, H), 4).train(), mlp.train()

    def shift(module, args):
        if isinstance(module, nn.GELU):
            seen.append(args[0].shape)
            return (args[0] + torch.arange(args[0].shape[1]).view(1, -1, 1),)

    with nn.modules.module.register_module_forward_pre_hook(shift):
        torch.testing.assert_close(layer(X), dense(X))
    assert seen == [(4, 6, H)] * 2


def test_hooks_of_a_copy_are_its_own():
    model = nn.Sequential(nn.Sequential(Mlp(C, H)))
    convert_to_mof_(model, MoFConfig(every=1, targets=("0.0",)))
    merged = merge_experts(model)
    layer = RUPMoF(dense := Mlp(C, H), 4)
    merged[0][0].fc1.register_forward_hook(lambda module, args, output: output * 0)
    layer.fc2.register_forward_hook(lambda module, args, output: output * 0)
    layer.register_forward_hook(lambda module, args, output: output * 0)
    assert not model[0][0].fc1._forward_hooks and model[0][0].layout.in_slots
    assert not (dense._forward_hooks or dense.fc2._forward_hooks)


@pytest.mark.parametrize("kind", ["rup", "topk"])
@pytest.mark.parametrize("build", [lambda: Mlp(C, H), lambda: Layer("")], ids=["ffn", "pair"])
def test_a_compiled_layer_can_be_saved(kind, build):
    model = nn.Sequential(build(), build())
    convert_to_mof_(model, MoFConfig(every=1, targets=("*",), kind=kind))
    for module in model.modules():
        module.compile(backend="eager")
    model(X)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded.eval()(X), model.eval()(X))


@pytest.mark.parametrize("tokens", [(2, 6), (3, 7)], ids=["K divides", "K does not divide"])
def test_forward_derivatives(tokens):
    layer = RUPMoF(Mlp(C, H).double(), 4).train()
    x, step = torch.randn(2, *tokens, C, dtype=torch.float64)

    def run(x):
        torch.manual_seed(0)
        return layer(x)

    _, found = torch.func.jvp(run, (x,), (step,))
    torch.testing.assert_close(found, (run(x + 1e-6 * step) - run(x - 1e-6 * step)) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [RUPMoF, TopKMoE])
@pytest.mark.parametrize("number", [2.5, True, "4", None])
def test_numbers_of_experts_are_whole(build, number):
    with pytest.raises(ValueError, match=r"num_experts is .*, must be a whole number"):
        build(Mlp(C, H), number)


@pytest.mark.parametrize("number", [1.5, True, 0, 5])
def test_top_k_is_whole(number):
    with pytest.raises(ValueError, match=r"top_k is .*, must be in"):
        TopKMoE(Mlp(C, H), 4, number)
