"""FFNs put together at random: each trains exactly as the dense one with identical experts, or is refused."""

import math
import random

import pytest
import torch
from cases import quick
from torch import nn
from torch.nn import functional as F

from benchmarks.training_pass import EXACT, Residual, training_error
from s2d3d.s2d import MoFConfig, is_sparse

C, H = 8, 16
CONFIG = MoFConfig(num_experts=3, targets=("*.mlp",), every=1)
BATCHES = [torch.randn(*shape, C, generator=torch.Generator().manual_seed(0)) for shape in ((3, 6), (4, 7), (5, 5))]

BY_TOKEN = {
    "gelu": F.gelu,
    "square": lambda x: x.relu().square(),
    "softmax": lambda x: x.softmax(-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "sort": lambda x: x.sort(-1).values,
    "cumsum": lambda x: x.cumsum(-1),
    "largest": lambda x: x * (x >= x.topk(4, -1).values[..., -1:]),
    "double": lambda x: x.double().tanh().to(x.dtype),
    "own_gate": lambda x: x * x.mean(-1, keepdim=True).sigmoid(),
    "branch_per_token": lambda x: torch.where(x.sum(-1, keepdim=True) > 0, x, -0.5 * x),
    "flip_channels": lambda x: x.flip(-1),
    "halves": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
}
ACROSS_TOKENS = {
    "softmax_tokens": lambda x: x.softmax(-2),
    "cumsum_tokens": lambda x: x.cumsum(-2),
    "centred": lambda x: x - x.mean(-2, keepdim=True),
    "flip_tokens": lambda x: x.flip(-2),
    "roll": lambda x: x.roll(1, -2),
    "first_sample": lambda x: x + x[:1],
    "last_token": lambda x: x - 0.1 * x[..., -1:, :],
    "largest_of_all": lambda x: x / x.abs().max(),
    "sorted_tokens": lambda x: x.sort(-2).values,
    "gate_of_mean": lambda x: x * x.mean((0, 1), keepdim=True).sigmoid(),
    "branch_on_sum": lambda x: x if x.sum() > 0 else -x,
    "rank": lambda x: x * (x[..., :1].argsort(-2) + 1),
}
BY_SHAPE = {
    "over_tokens": lambda x: x / math.sqrt(x.shape[-2]),
    "over_batch": lambda x: x / x.shape[0],
    "over_all": lambda x: x * (x.numel() % 7 + 1),
    "position": lambda x: x + torch.arange(x.shape[-2], dtype=x.dtype).view(-1, 1),
    "sample": lambda x: x + torch.arange(x.shape[0], dtype=x.dtype).view(-1, *[1] * (x.dim() - 1)),
    "odd_batch": lambda x: x if x.shape[0] % 2 else -x,
    "even_positions": lambda x: torch.cat([x[..., ::2, :], -x[..., 1::2, :]], -2),
}
OPERATIONS = BY_TOKEN | ACROSS_TOKENS | BY_SHAPE


class Counts(nn.Module):
    """Scales by the number of the call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class RunningMean(nn.Module):
    """Subtracts a mean over tokens that it keeps in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(H))

    def forward(self, x):
        with torch.no_grad():
            self.mean.lerp_(x.detach().flatten(0, -2).mean(0), 0.1)
        return x - self.mean


class Remembers(nn.Module):
    """Keeps what it saw for a loss elsewhere."""

    def forward(self, x):
        self.seen = x.square().mean()
        return x


class WarmsUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x):
        self.step += 1
        return x * torch.tanh(self.step)


class TokenNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view_as(x)


class OtherInTraining(nn.Module):
    def forward(self, x):
        return x * 2 if self.training else x


STATE = {
    "counts": Counts, "running_mean": RunningMean, "remembers": Remembers, "warms_up": WarmsUp,
    "batch_norm": lambda: TokenNorm(H), "layer_norm": lambda: nn.LayerNorm(H), "dropout_0": lambda: nn.Dropout(0.0),
    "other_in_training": OtherInTraining, "token_conv": lambda: TokenConv(), "linear": lambda: nn.Linear(H, H),
}  # fmt: skip


class TokenConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(H, H, 3, padding=1, groups=H)

    def forward(self, x):
        return self.conv(x.flatten(0, -3).mT if x.dim() > 3 else x.mT).mT.reshape(x.shape)


FORMS = ("plain", "glu", "glu_swapped", "two_gates", "gate_of_input", "bilinear", "packed_three", "gate_across")
ENDS = ("tensor", "tensor", "tensor", "tuple", "dict", "with_loss", "scaled_by_mask", "filled_by_mask", "gated_by_key")


class Random(nn.Module):
    """An FFN of a random form, with random operations on its hidden channels, that ends in a random way."""

    def __init__(self, seed: int):
        super().__init__()
        draw = random.Random(seed)
        self.form, self.end = draw.choice(FORMS), draw.choice(ENDS)
        width = {"glu": 2, "glu_swapped": 2, "bilinear": 2, "gate_across": 2, "packed_three": 3}.get(self.form, 1)
        self.norm = nn.LayerNorm(C) if draw.random() < 0.3 else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(C, width * H), nn.Linear(H, C, bias=draw.random() < 0.7)
        if self.form in ("two_gates", "gate_of_input"):
            self.gate = nn.Linear(C, H)
        names = draw.choices([*OPERATIONS, *STATE, *BY_TOKEN, *BY_TOKEN], k=draw.randint(1, 3))
        self.inner = nn.ModuleList(STATE[name]() for name in names if name in STATE)
        inner = iter(range(len(names)))
        self.steps = [next(inner) if name in STATE else OPERATIONS[name] for name in names]
        right = {*BY_TOKEN, "batch_norm", "layer_norm", "dropout_0", "other_in_training"}
        self.by_token = {*names} <= right and self.form != "gate_across" and self.end[-3:] in ("sor", "ask", "key")
        self.label = f"{seed}: {self.form}, {', '.join(names)}, {self.end}"

    def hidden(self, x):
        y = self.fc1(x)
        if self.form == "plain":
            return y
        if self.form == "two_gates":
            return y * self.gate(x).sigmoid()
        if self.form == "gate_of_input":
            return y * F.silu(self.gate(x.detach()))
        parts = y.chunk(y.shape[-1] // H, -1)
        if self.form == "packed_three":
            return parts[0] * parts[1].sigmoid() + parts[2]
        if self.form == "gate_across":
            return parts[0] * parts[1].mean(-2, keepdim=True).sigmoid()
        first, second = parts if self.form != "glu_swapped" else parts[::-1]
        return first * (second if self.form == "bilinear" else second.sigmoid())

    def forward(self, x, mask=None, *, key=None):
        y = self.hidden(self.norm(x))
        for step in self.steps:
            y = self.inner[step](y) if isinstance(step, int) else step(y)
        if self.end == "scaled_by_mask" and mask is not None:
            y = y * mask
        if self.end == "filled_by_mask" and mask is not None:
            y = y.masked_fill(mask == 0, 0.5)
        if self.end == "gated_by_key":
            y = y * key.sigmoid()
        out = self.fc2(y)
        return {"tuple": (out,), "dict": {"out": out}, "with_loss": (out, y.square().mean())}.get(self.end, out)


class Caller(Residual):
    """Calls an FFN as its end asks for."""

    def forward(self, x):
        end, mask = self.mlp.end if hasattr(self.mlp, "end") else self.end, (x[..., :1] > 0).to(x.dtype)
        self.end = end
        if end.endswith("mask"):
            return x + self.mlp(x, mask)
        if end == "gated_by_key":
            return x + self.mlp(x, key=x[..., :1])
        out = self.mlp(x)
        return (
            x
            + {"tuple": lambda: out[0], "dict": lambda: out["out"], "with_loss": lambda: out[0] + out[1]}.get(
                end, lambda: out
            )()
        )


def outcome(seed: int) -> str:
    """Return "exact" or "refused"; fail where a conversion is neither."""
    torch.manual_seed(seed)
    ffn = Random(seed)
    caller = Caller(ffn)
    caller.end = ffn.end
    model = nn.Sequential(caller)
    how = {"example": BATCHES[1]} if ffn.end.endswith(("mask", "key")) or seed % 3 == 0 else {}
    try:
        error = training_error(model, BATCHES, CONFIG, **how)
    except (TypeError, ValueError) as refusal:
        assert (str(refusal).count("\n") == 0 and "0.mlp" in str(refusal)) or "example=" in str(refusal), ffn.label
        assert not ffn.by_token, f"{ffn.label}: {refusal}"
        assert not is_sparse(model)
        return "refused"
    assert error < EXACT, (ffn.label, error)
    return "exact"


@pytest.mark.parametrize("first", quick(1, list(range(0, 1000, 20))))
def test_random_ffns_are_exact_or_refused(first):
    outcomes = [outcome(seed) for seed in range(first, first + 20)]
    assert set(outcomes) == {"exact", "refused"}
