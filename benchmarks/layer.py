"""The layer: RUP-MoF compared with the dense FFN and mixtures of experts; EWA and AdamW over stacked weights."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from s2d3d.s2d import MoFConfig, RUPMoF, TopKMoE, apply_ewa_, convert_to_mof_

from .comparison import Comparison
from .interleave import Contestant, Task, interleave
from .packages import Package, packages
from .section import Section, Settings, new_section
from .training_pass import Residual

EXPERTS = 4
LAYERS = 6
SHARE_RATE = 0.3


def measure(settings: Settings) -> Section:
    """Measure forward and backward of one layer, EWA and AdamW of the layers of a ViT-S.

    Raises:
        InputError: contestants of equal mathematics disagree.
    """
    section = new_section("layer", "One layer, averaging, optimizer", settings)
    section.comparisons += [_layers(settings), _in_order(settings), _averaging(settings), _optimizers(settings)]
    layers, in_order, averaging, optimizers = section.comparisons
    section.add_ratio("rup", layers, "RUP-MoF", "dense FFN")
    section.add_ratio("loop", layers, "loop over experts", "dense FFN")
    section.add_ratio("in_order", in_order, "RUP-MoF, tokens in order", "dense FFN with BatchNorm")
    section.add_speedup("ewa", averaging, "stacked lerp (ours)", "naive loops")
    section.add_speedup("adamw", optimizers, "fused", "default")
    return section


def _layers(settings: Settings) -> Comparison:
    dim, hidden, batch, tokens = settings.pick((384, 1536, 32, 65), (12, 24, 2, 16))
    torch.manual_seed(settings.seed)
    ffn = Mlp(dim, hidden)
    x = torch.randn(batch, tokens, dim)
    build = partial(layer_task, x=x, device=settings.device)
    same = [
        Contestant("dense FFN", lambda: build(copy.deepcopy(ffn), gradients=_dense_gradients)),
        Contestant("RUP-MoF", lambda: build(RUPMoF(ffn, EXPERTS), gradients=_stacked_gradients)),
        Contestant("loop over experts", lambda: build(LoopMoF(ffn, EXPERTS), gradients=_summed_gradients)),
    ]

    def routed_task(top_k: int) -> Task:
        return build(TopKMoE(ffn, EXPERTS, top_k))

    def public_task(package: Package) -> Task:
        return build(package.build(dim, hidden, tokens, EXPERTS))

    routed = [
        Contestant(
            f"TopKMoE top-{top_k} (ours)",
            partial(routed_task, top_k),
            same_math=False,
            note="routed, drops nothing",
        )
        for top_k in (1, 2)
    ]
    public = [
        Contestant(
            package.name,
            partial(public_task, package),
            same_math=False,
            note=package.note,
        )
        for package in packages()
    ]
    return interleave(
        "layer",
        [*same, *routed, *public],
        title=f"{EXPERTS} experts {dim} -> {hidden}, {batch * tokens} tokens, forward + backward",
        start=settings.here(),
        samples=batch * tokens,
        **settings.interleaving(30, warmup=3),
    )


def _in_order(settings: Settings) -> Comparison:
    """Compare an FFN of 1 x 1 convolutions with BatchNorm between: tokens go back to their places for the norm."""
    dim, hidden, batch, tokens = settings.pick((384, 1536, 32, 65), (12, 24, 2, 16))
    torch.manual_seed(settings.seed)
    ffn = nn.Sequential(nn.Conv1d(dim, hidden, 1), nn.BatchNorm1d(hidden), nn.GELU(), nn.Conv1d(hidden, dim, 1))
    x = torch.randn(batch, dim, tokens)

    def sparse() -> nn.Module:
        model = nn.Sequential(Residual(copy.deepcopy(ffn)))
        convert_to_mof_(model, MoFConfig(EXPERTS, targets=("*.mlp",), every=1))
        return model.get_submodule("0.mlp")

    def task(module: nn.Module) -> Task:
        return layer_task(module, x=x, device=settings.device)

    return interleave(
        "in_order",
        [
            Contestant("dense FFN with BatchNorm", lambda: task(copy.deepcopy(ffn))),
            Contestant("RUP-MoF, tokens in order", lambda: task(sparse())),
        ],
        title=f"{EXPERTS} experts {dim} -> {hidden} of 1 x 1 convolutions, BatchNorm between, {batch * tokens} tokens",
        start=settings.here(),
        samples=batch * tokens,
        **settings.interleaving(30, warmup=3),
    )


class LoopMoF(nn.Module):
    """Naive RUP-MoF: a list of FFNs, each called on its part of the tokens."""

    def __init__(self, ffn: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(ffn) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        result = torch.zeros_like(tokens)
        parts = torch.randperm(len(tokens), device=x.device).tensor_split(len(self.experts))
        for expert, part in zip(self.experts, parts):
            result[part] = expert(tokens[part])
        return result.view_as(x)


def layer_task(
    module: nn.Module,
    *,
    x: Tensor,
    device: torch.device,
    gradients: Callable[[nn.Module], list[Tensor]] | None = None,
) -> Task:
    """Make the task of one forward and backward pass.

    Args:
        module: the layer; some layers return a tuple whose first element is the output.
        x: tokens (B, T, C).
        device: where to compute.
        gradients: of its weights, summed over experts, in the layout of the dense FFN.
    """
    module = module.to(device).train()
    tokens = x.to(device).detach().clone().requires_grad_()
    # Divided by the square root of the number of tokens, so that gradients of weights are about 1, like outputs.
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device) / x[..., 0].numel() ** 0.5

    def run() -> Tensor:
        tokens.grad = None
        module.zero_grad(set_to_none=True)
        output = module(tokens)
        output = output if isinstance(output, Tensor) else output[0]
        output.backward(direction)
        return output

    def outputs() -> list[Tensor]:
        output = run().detach()
        assert tokens.grad is not None
        return [output, tokens.grad, *(gradients(module) if gradients else [])]

    return Task(run, outputs)


def gradient_of(module: nn.Module, name: str) -> Tensor:
    """Return the gradient of a parameter, such as "fc1.weight", after a backward pass."""
    gradient = module.get_parameter(name).grad
    assert gradient is not None
    return gradient


def _dense_gradients(ffn: nn.Module) -> list[Tensor]:
    return [gradient_of(ffn, f"{layer}.{name}") for layer in ("fc1", "fc2") for name in ("weight", "bias")]


def _stacked_gradients(layer: nn.Module) -> list[Tensor]:
    weight1, bias1, weight2, bias2 = (gradient.sum(0) for gradient in _dense_gradients(layer))
    return [weight1.t(), bias1, weight2.t(), bias2]


def _summed_gradients(loop: nn.Module) -> list[Tensor]:
    experts = loop.get_submodule("experts").children()
    return [torch.stack(parts).sum(0) for parts in zip(*map(_dense_gradients, experts))]


def _stack(settings: Settings) -> nn.ModuleList:
    """Make the expert layers of a ViT-S, whose experts differ."""
    dim, hidden = settings.pick((384, 1536), (8, 16))
    torch.manual_seed(settings.seed)
    layers = nn.ModuleList(RUPMoF(Mlp(dim, hidden), EXPERTS) for _ in range(settings.pick(LAYERS, 2)))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return layers.to(settings.device)


def _averaging(settings: Settings) -> Comparison:
    def task(average: Callable[[nn.Module], object]) -> Task:
        layers = _stack(settings)

        def outputs() -> list[Tensor]:
            average(layers)
            return [parameter.detach().clone() for parameter in layers.parameters()]

        return Task(lambda: average(layers), outputs)

    weights = sum(parameter.numel() for parameter in _stack(settings).parameters())
    return interleave(
        "ewa",
        [
            Contestant("stacked lerp (ours)", lambda: task(partial(apply_ewa_, share_rate=SHARE_RATE))),
            Contestant("_foreach", lambda: task(_average_foreach)),
            Contestant("naive loops", lambda: task(_average_naively)),
        ],
        title=f"EWA over {settings.pick(LAYERS, 2)} layers x {EXPERTS} experts, {weights / 1e6:.1f} M weights",
        start=settings.here(),
        tolerance=1e-6,
        **settings.interleaving(30),
    )


@torch.no_grad()
def _average_foreach(layers: nn.Module) -> None:
    for stacked in layers.parameters():
        experts = list(stacked.unbind(0))
        mean = torch.stack(experts).mean(0)
        torch._foreach_lerp_(experts, [mean] * len(experts), SHARE_RATE * EXPERTS / (EXPERTS - 1))


@torch.no_grad()
def _average_naively(layers: nn.Module) -> None:
    for stacked in layers.parameters():
        before = [expert.clone() for expert in stacked]
        for index, expert in enumerate(stacked):
            others = [weight for other, weight in enumerate(before) if other != index]
            expert.copy_((1 - SHARE_RATE) * before[index] + SHARE_RATE * sum(others) / len(others))


def _optimizers(settings: Settings) -> Comparison:
    def task(fused: bool | None = None, foreach: bool | None = None) -> Task:
        layers = _stack(settings)
        generator = torch.Generator().manual_seed(2)
        for parameter in layers.parameters():
            parameter.grad = (torch.randn(parameter.shape, generator=generator) * 1e-2).to(parameter.device)
        optimizer = torch.optim.AdamW(layers.parameters(), lr=5e-4, weight_decay=0.05, fused=fused, foreach=foreach)

        def outputs() -> list[Tensor]:
            optimizer.step()
            return [parameter.detach().clone() for parameter in layers.parameters()]

        return Task(optimizer.step, outputs)

    return interleave(
        "adamw",
        [
            Contestant("fused", lambda: task(fused=True), note="what `optim.name: adamw` uses"),
            Contestant("default", lambda: task(foreach=False), note="loop over tensors"),
            Contestant("foreach", lambda: task(foreach=True)),
        ],
        title="AdamW over the same stacked weights",
        start=settings.here(),
        tolerance=1e-5,
        **settings.interleaving(20),
    )
