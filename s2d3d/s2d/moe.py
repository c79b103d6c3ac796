"""The classic mixture of experts: a learned top-k gate with a load-balancing loss, the baseline of RUP-MoF."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import chosen_partition
from .mof import ExpertLayer, Plan
from .probe import Layout


class TopKMoE(ExpertLayer):
    """K experts of one FFN's form and size, of which a router chooses `top_k` for each token.

    The gate is a softmax over all experts of a linear router without bias, in float32. A token's output is the sum of
    its experts' outputs, weighted by their gates. Routing is the same in training and in evaluation, so the experts
    stay: no dense FFN equals this layer. It costs the FLOPs of `top_k` FFNs.

    After each forward pass `balance_loss` holds the load-balancing loss `K * sum_i f_i P_i`, where f_i is the share of
    all choices that fell on expert i and P_i its mean gate over the tokens: 1 when balanced, K when all choose one
    expert and are sure of it. `dropped_fraction` holds the share of choices that found no free slot.

    Source: Shazeer et al. 2017, arXiv 1701.06538; GShard, arXiv 2006.16668; Switch Transformer, arXiv 2101.03961
    (the loss, there with top_k = 1).

    Example:
        >>> import timm
        >>> layer = TopKMoE(timm.layers.Mlp(8, 32), num_experts=4, top_k=2)
        >>> layer(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])
        >>> bool(0 < layer.balance_loss < 4), float(layer.dropped_fraction)
        (True, 0.0)
    """

    averaged_in_eval = False
    balance_loss: Tensor | None = None
    dropped_fraction: Tensor | None = None
    top_k, capacity_factor, renormalize = 2, None, True

    def __init__(
        self,
        ffn: nn.Module,
        num_experts: int,
        top_k: int = 2,
        *,
        capacity_factor: float | None = None,
        renormalize: bool | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Build K copies of `ffn`, which is left untouched, and a router.

        Args:
            ffn: maps (..., C) to (..., D) token by token; its first linear layer reads the tokens.
            num_experts: K, at least 1.
            top_k: experts of a token, in [1, K].
            capacity_factor: in training an expert serves at most `ceil(capacity_factor * top_k * num_tokens / K)`
                tokens of the batch and drops further ones, which get nothing from it; greater than 0. None drops
                nothing. Evaluation never drops: a sample's result does not depend on the rest of its batch.
            renormalize: divide the gates of a token by their sum over its `top_k` experts. Default: for `top_k > 1`,
                as in GShard; with one expert the gate would always be 1 and teach the router nothing.
            layout: see `ExpertLayer`.

        Raises:
            ValueError: an argument out of range.
            TypeError: `ffn` cannot become experts.
        """
        super().__init__(ffn, num_experts, layout=layout)
        check_top_k(num_experts, top_k, capacity_factor)
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        first = next(layer for _, layer in self.stacked_layers())
        dtype = torch.promote_types(first.weight.dtype, torch.float32)
        self.__dict__["_modules"] = self._modules.copy()
        self.router = nn.Linear(first.in_features, num_experts, bias=False, device=first.weight.device, dtype=dtype)
        nn.init.normal_(self.router.weight, std=0.02)

    def look_for_changes(self, x: Tensor | None = None) -> None:
        """As of `ExpertLayer`."""
        self._template._modules.update((name, m) for name, m in self._modules.items() if name != "router")
        super().look_for_changes(x)

    def draw(self, x: Tensor) -> Plan:
        """Let every token choose its experts; raises ValueError when there is none."""
        tokens = self.rows(x)
        probabilities = self._gate(tokens)
        gates, chosen = probabilities.topk(self.top_k, dim=1)
        if self.renormalize:
            gates = gates / gates.sum(1, keepdim=True)
        capacity = None
        if self.capacity_factor is not None and self.training:
            capacity = min(math.ceil(self.capacity_factor * chosen.numel() / self.num_experts), tokens.shape[0])
        partition, served = chosen_partition(chosen, self.num_experts, capacity)
        weights = F.pad(gates.t().flatten(), (0, 1)).index_select(0, served)

        load = F.one_hot(chosen, self.num_experts).to(gates.dtype).mean((0, 1))
        self.balance_loss = self.num_experts * (load * probabilities.mean(0)).sum()
        self.dropped_fraction = 1 - (served < chosen.numel()).sum() / chosen.numel()
        return Plan(partition, weights, self.places(x))

    def _gate(self, tokens: Tensor) -> Tensor:
        """Return the gates (num_tokens, K) of all experts, in float32 (float64 for tokens in float64)."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.to(dtype), self.router.weight.to(dtype)).softmax(1)

    def __getstate__(self) -> dict[str, Any]:
        # What the last batch left is part of its autograd graph, which can be neither copied nor pickled.
        left = ("balance_loss", "dropped_fraction")
        return {key: value for key, value in super().__getstate__().items() if key not in left}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, top_k={self.top_k}, capacity_factor={self.capacity_factor}"


def balance_loss(model: nn.Module) -> Tensor:
    """Add up the load-balancing losses that the TopKMoE layers of a model have of their last forward pass.

    Add it to the task's loss, times a weight such as 0.01.

    Raises:
        ValueError: the model has no such layer, or one that has not run yet, or ran without gradients.

    Example:
        >>> import timm
        >>> from s2d3d import MoFConfig, convert_to_mof_
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> _ = convert_to_mof_(model, MoFConfig(kind="topk"))
        >>> loss = model(torch.randn(1, 3, 224, 224)).square().mean() + 0.01 * balance_loss(model)
        >>> loss.backward()
    """
    layers = [module for module in model.modules() if isinstance(module, TopKMoE)]
    if not layers:
        raise ValueError("the model has no TopKMoE layer: convert it with MoFConfig(kind='topk')")
    losses = [layer.balance_loss for layer in layers if layer.balance_loss is not None]
    if len(losses) < len(layers):
        raise ValueError("a TopKMoE layer has not run yet: call the model first")
    for layer, loss in zip(layers, losses):
        learns = layer.training and any(parameter.requires_grad for parameter in layer.router.parameters())
        if learns and torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"the loss of {layer.title()} has no gradient, for the layer ran without one: in a checkpoint pass "
                "use_reentrant=False; for the value alone call this under torch.no_grad()"
            )
    return torch.stack(losses).sum()


def check_top_k(num_experts: int, top_k: int, capacity_factor: float | None) -> None:
    """Raise ValueError when a setting of the router is out of range."""
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k!r}, must be in [1, num_experts] = [1, {num_experts}]")
    if capacity_factor is not None and not (math.isfinite(capacity_factor) and capacity_factor > 0):
        raise ValueError(f"capacity_factor is {capacity_factor}, must be greater than 0, or None to drop nothing")
