"""Grouped dispatch: spread tokens over the slots of K experts, at random or by choice, and put the results back.

Random Uniform Partition (RUP) needs no router, so its whole plan is two index vectors of a length known
on the host: nothing there makes the host wait for the GPU.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Partition(NamedTuple):
    """Which token stands in which slot of which expert.

    Slots form a (K, capacity) table, flattened. Some are idle, such as the last slot of the later experts when K
    does not divide the number of tokens: an idle slot reads token `source` like any other, and its result goes to
    row `num_tokens`, one past the last token, which `combine` cuts off.
    """

    source: Tensor
    """(K * capacity,) int64: the token that a slot reads."""
    target: Tensor
    """(K * capacity,) int64: the row that a slot's result is added to."""
    num_experts: int
    num_tokens: int
    inverse: Tensor | None = None
    """(num_tokens,) int64: the slot of each token, where K divides their number and each has one slot."""


def partition_sizes(num_tokens: int, num_experts: int) -> list[int]:
    """Return the group sizes of a uniform partition; they differ by at most one, the larger come first.

    Example:
        >>> partition_sizes(6, 4)
        [2, 2, 1, 1]
    """
    _check_counts(num_tokens, num_experts)
    base, larger = divmod(num_tokens, num_experts)
    return [base + (expert < larger) for expert in range(num_experts)]


def random_partition(num_tokens: int, num_experts: int, device: torch.device | str = "cpu") -> Partition:
    """Draw a random uniform partition of the tokens among the experts.

    The permutation comes from the *global* generator of `device`: activation checkpointing restores that one
    when it recomputes a block, a private generator it would not.

    Raises:
        ValueError: fewer tokens than experts.

    Source: abstract of Sparse-to-Dense Training, IEEE TCSVT 2025.
    """
    _check_counts(num_tokens, num_experts)
    if torch.compiler.is_compiling():
        # The same draw. Of int64 indices, torch 2.11 and others replace `x[randperm(n)]` by a pattern that is broken.
        order = torch.randperm(num_tokens, device=device, dtype=torch.int32).long()
    else:
        order = torch.randperm(num_tokens, device=device)
    base, larger = divmod(num_tokens, num_experts)
    if larger == 0:
        if torch.compiler.is_compiling():  # it fuses what `_Permute` is for
            return Partition(order, order, num_experts, num_tokens)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(num_tokens, device=device))
        return Partition(order, order, num_experts, num_tokens, inverse)
    full, extra = order[: base * num_experts].view(num_experts, base), order[base * num_experts :]
    source_end = torch.cat([extra, order[: num_experts - larger]])
    target_end = torch.cat([extra, extra.new_full((num_experts - larger,), num_tokens)])
    source = torch.cat([full, source_end.unsqueeze(1)], dim=1).flatten()
    target = torch.cat([full, target_end.unsqueeze(1)], dim=1).flatten()
    return Partition(source, target, num_experts, num_tokens)


def chosen_partition(chosen: Tensor, num_experts: int, capacity: int | None = None) -> tuple[Partition, Tensor]:
    """Give every token a slot of each expert that it chose, as long as there are slots.

    First choices come before second ones, earlier tokens before later ones.

    Args:
        chosen: (num_tokens, k) int64 experts by token, the first choice in column 0.
        num_experts: K.
        capacity: slots of an expert; None: as many as the most wanted expert needs; the host waits for the GPU.

    Returns:
        The partition, and for each slot (K * capacity,) the index of the choice it serves in `chosen.T.flatten()`;
        idle slots have the index one past the last.

    Raises:
        ValueError: there is no token.

    Source: GShard, arXiv 2006.16668, algorithm 1.
    """
    num_tokens, num_choices = chosen.shape[0], chosen.numel()
    _check_counts(num_tokens, 1)
    choices = chosen.t().flatten()
    counts = choices.new_zeros(num_experts).scatter_add_(0, choices, torch.ones_like(choices))
    if capacity is None:
        capacity = int(counts.max())
    order = choices.argsort(stable=True)
    place = torch.arange(num_choices, device=chosen.device) - (counts.cumsum(0) - counts)[choices[order]]
    # Choices beyond the capacity share one more slot, which is cut off.
    slot = torch.where(place < capacity, choices[order] * capacity + place, num_experts * capacity)
    served = choices.new_full((num_experts * capacity + 1,), num_choices).scatter_(0, slot, order)[:-1]
    token = served % num_tokens
    return Partition(token, torch.where(served < num_choices, token, num_tokens), num_experts, num_tokens), served


def dispatch(tokens: Tensor, partition: Partition) -> Tensor:
    """Gather (num_tokens, C) tokens into their experts' slots: (K, capacity, C)."""
    if partition.inverse is not None:
        slots = _Permute.apply(tokens, partition.source, partition.inverse)
    else:
        slots = tokens.index_select(0, partition.source)
    return slots.view(partition.num_experts, -1, tokens.shape[-1])


def combine(outputs: Tensor, partition: Partition, weights: Tensor | None = None) -> Tensor:
    """Return the experts' (K, capacity, C) outputs to their places: (num_tokens, C), in the dtype of `outputs`.

    A token in several slots gets the sum of their outputs, each times its entry in `weights` (K * capacity,).
    """
    slots = outputs.flatten(0, 1)
    if weights is None and partition.inverse is not None:
        return _Permute.apply(slots, partition.inverse, partition.source)
    if weights is not None:
        slots = (slots * weights.unsqueeze(1)).to(outputs.dtype)
    rows = outputs.new_zeros(partition.num_tokens + 1, outputs.shape[-1])
    # With `out` given, scatter_sum never reads index.max() on the host. A compiled graph takes torch's own, which is
    # the same operation: what `scatter_backend` does cannot be traced.
    scatter = native_scatter_sum if torch.compiler.is_compiling() else scatter_backend()
    rows = scatter(slots, partition.target.unsqueeze(1).expand(-1, outputs.shape[-1]), rows)
    return rows[: partition.num_tokens]


class _Permute(torch.autograd.Function):
    """Permute rows. Forward and backward are one gather each: no rows of zeros are filled first and then added to."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Return `rows[order]`; `inverse` undoes `order`."""
        return rows.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Permute.apply(tangent, *ctx.saved_tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(gradient, inverse, order), None, None


@lru_cache(maxsize=1)
def scatter_backend() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Choose the summation once: torch-scatter where it is installed, the same operation of torch otherwise."""
    try:
        from torch_scatter import scatter_sum
    except (ImportError, OSError, RuntimeError) as error:  # OSError, RuntimeError: compiled for another torch or CUDA
        logger.warning(
            "torch-scatter is not usable (%s); using torch's own scatter_add_, which computes the same. "
            "To install it: pip install --no-build-isolation torch-scatter",
            str(error).partition("\n")[0] or type(error).__name__,
        )
        return native_scatter_sum
    return lambda source, index, out: scatter_sum(source, index, dim=0, out=out)


def native_scatter_sum(source: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Add the rows of `source` to the rows `index` of `out`, as torch-scatter's `scatter_sum(..., dim=0, out=out)`."""
    return out.scatter_add_(0, index, source)


def _check_counts(num_tokens: int, num_experts: int) -> None:
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}, must be at least 1")
    if num_tokens < num_experts:
        raise ValueError(
            f"{num_tokens} tokens cannot be shared among {num_experts} experts: "
            "use a larger batch, more tokens per sample or fewer experts"
        )
