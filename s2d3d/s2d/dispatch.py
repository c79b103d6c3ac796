"""Grouped dispatch: cut all tokens into K random groups of equal size, and put the results back.

Random Uniform Partition (RUP) needs no router, so the whole plan is two index vectors of a length known
on the host: nothing here waits for the device.
"""

import logging
from functools import lru_cache
from typing import Callable, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Partition(NamedTuple):
    """Which token stands in which slot of which expert.

    Slots form a (K, capacity) table, flattened. When K does not divide the number of tokens, the last slot
    of the later experts is idle: it reads token `source` like any other, and its result goes to row
    `num_tokens`, one past the last token, which `combine` cuts off.
    """

    source: Tensor
    """(K * capacity,) int64: the token that a slot reads."""
    target: Tensor
    """(K * capacity,) int64: the row that a slot's result is added to."""
    num_experts: int
    num_tokens: int


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

    Source: Sparse-to-Dense Training, IEEE TCSVT 2025, section on Random Uniform Partition.
    """
    _check_counts(num_tokens, num_experts)
    order = torch.randperm(num_tokens, device=device)
    base, larger = divmod(num_tokens, num_experts)
    if larger == 0:
        return Partition(order, order, num_experts, num_tokens)
    full, extra = order[: base * num_experts].view(num_experts, base), order[base * num_experts :]
    source_end = torch.cat([extra, order[: num_experts - larger]])
    target_end = torch.cat([extra, extra.new_full((num_experts - larger,), num_tokens)])
    source = torch.cat([full, source_end.unsqueeze(1)], dim=1).flatten()
    target = torch.cat([full, target_end.unsqueeze(1)], dim=1).flatten()
    return Partition(source, target, num_experts, num_tokens)


def dispatch(tokens: Tensor, partition: Partition) -> Tensor:
    """Gather (num_tokens, C) tokens into their experts' slots: (K, capacity, C)."""
    return tokens.index_select(0, partition.source).view(partition.num_experts, -1, tokens.shape[-1])


def combine(outputs: Tensor, partition: Partition) -> Tensor:
    """Return the experts' (K, capacity, C) outputs to their places: (num_tokens, C), in the dtype of `outputs`."""
    idle = 0 if partition.target.numel() == partition.num_tokens else 1
    rows = outputs.new_zeros(partition.num_tokens + idle, outputs.shape[-1])
    # With `out` given, scatter_sum never reads index.max() on the host.
    rows = scatter_backend()(outputs.flatten(0, 1), partition.target.unsqueeze(1).expand(-1, outputs.shape[-1]), rows)
    return rows[: partition.num_tokens]


@lru_cache(maxsize=1)
def scatter_backend() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Choose the summation once: torch-scatter where it is installed, the same operation of torch otherwise."""
    try:
        from torch_scatter import scatter_sum
    except (ImportError, OSError) as error:  # OSError: compiled for another torch
        logger.warning(
            "torch-scatter is not usable (%s); using torch's own scatter_add_, which computes the same. "
            "To install it: pip install --no-build-isolation torch-scatter",
            str(error).splitlines()[0],
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
