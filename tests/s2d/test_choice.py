"""Which modules the default targets take: the FFN of each block, and nothing that has its form alone."""

import pytest
import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

from s2d3d.s2d import MoFConfig, convert_to_mof_

C, H = 12, 20
EACH = MoFConfig(every=1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        return self.proj(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), Mlp(C, H)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


def gate(*last):
    return nn.Sequential(nn.Linear(C, H), nn.ReLU(), nn.Linear(H, C), *last)


class Squeeze(Block):
    """Squeeze and excitation: one token for each sample."""

    def __init__(self):
        super().__init__()
        self.se = nn.ModuleDict({"mlp": gate()})

    def forward(self, x):
        x = super().forward(x)
        return x * self.se["mlp"](x.mean(1)).sigmoid().unsqueeze(1)


class Gated(Block):
    """A gate of each token: it sees all of them, but ends in a sigmoid."""

    def __init__(self):
        super().__init__()
        self.gate = gate(nn.Sigmoid())

    def forward(self, x):
        return super().forward(x) * self.gate(x)


class Positions(Block):
    """Three coordinates of one sample."""

    def __init__(self):
        super().__init__()
        self.pos = nn.Sequential(nn.Linear(3, H), nn.ReLU(), nn.Linear(H, 3))

    def forward(self, x):
        return super().forward(x) + self.pos(x[0, :, :3]).mean()


class Macaron(Block):
    """Two FFNs of the block's own, not of one form."""

    def __init__(self):
        super().__init__()
        self.before = Mlp(C, 2 * H)

    def forward(self, x):
        return super().forward(x + 0.5 * self.before(x))


def model_of(kind):
    return nn.ModuleDict({"blocks": nn.ModuleList([kind() for _ in range(2)]), "head": nn.Linear(C, 3)})


@pytest.mark.parametrize("kind", [Block, Squeeze, Gated, Positions])
def test_the_ffn_of_a_block_is_the_one_that_sees_its_tokens(kind):
    assert convert_to_mof_(model_of(kind), EACH) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_two_ffns_of_a_block_are_both_taken():
    names = ["blocks.0.before", "blocks.0.mlp", "blocks.1.before", "blocks.1.mlp"]
    assert sorted(convert_to_mof_(model_of(Macaron), EACH)) == names


def test_a_block_that_does_not_run_on_tokens_alone_keeps_all_its_ffns():
    class Asks(Squeeze):
        def forward(self, x, height, width):
            return super().forward(x)

    assert len(convert_to_mof_(model_of(Asks), EACH)) == 4


class StateSpace(nn.Module):
    """Two linear layers with a mixer of tokens between them are no FFN."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.conv = nn.Linear(C, H), nn.Conv1d(H, H, 3, padding=1, groups=H)
        self.out_proj = nn.Linear(H, C)

    def forward(self, x):
        return x + self.out_proj(self.conv(self.in_proj(x).transpose(1, 2)).transpose(1, 2).cumsum(1))


def test_a_mixer_of_tokens_between_two_linear_layers_is_no_ffn():
    with pytest.raises(ValueError, match="the model has no FFN to convert"):
        convert_to_mof_(model_of(StateSpace), EACH)


def test_an_ffn_with_a_convolution_between_converts_in_a_block_with_attention_and_by_its_name():
    class Depthwise(StateSpace):
        def forward(self, x):
            return self.out_proj(self.conv(self.in_proj(x).transpose(1, 2)).transpose(1, 2))

    class WithAttention(Block):
        def __init__(self):
            super().__init__()
            self.mlp = Depthwise()

    for targets in (None, ("*.mlp",)):
        names = convert_to_mof_(model_of(WithAttention), MoFConfig(every=1, targets=targets))
        assert names == ["blocks.0.mlp", "blocks.1.mlp"]


def test_a_linear_layer_in_two_blocks_is_refused():
    class Apart(Block):
        def __init__(self):
            super().__init__()
            del self.mlp
            self.fc1, self.act, self.fc2 = nn.Linear(C, H), nn.GELU(), nn.Linear(H, C)

        def forward(self, x):
            x = x + self.attn(x)
            return x + self.fc2(self.act(self.fc1(x)))

    model = model_of(Apart)
    assert model["blocks"][0](torch.randn(2, 5, C)).shape == (2, 5, C)
    model["blocks"][1].fc1 = model["blocks"][0].fc1
    with pytest.raises(ValueError, match=r"shares fc1.weight, fc1.bias with another module"):
        convert_to_mof_(model, EACH)


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_a_wrapper_is_to_be_put_around_the_converted_model(wrap):
    with pytest.raises(ValueError, match=r"inside DataParallel: convert model.module, and wrap it afterwards"):
        convert_to_mof_(wrap(model_of(Block)), EACH)
