"""Classification of clouds that come one after another, such as those of files, several in one pass of the model."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..errors import InputError

POINTS_AT_ONCE = 2**15
"""Points of one pass, 32 clouds of 1,024, unless one cloud alone has more: they bound the memory of the pass."""
PATIENCE = 1.0
"""Seconds for which a cloud waits for others to fill a pass, where each of them takes long to come."""


def classify_clouds(
    model: nn.Module,
    clouds: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device | str,
    where: str = "",
    points_at_once: int = POINTS_AT_ONCE,
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[str, Tensor]]:
    """Classify clouds in their order. Clouds of equal size that follow each other share a pass of the model.

    The next cloud is asked for only when answers that are due have been given.

    Args:
        model: points (B, N, C) -> logits (B, num_classes), in eval mode, on `device`.
        clouds: names and clouds (N, C); N may change from one to the next.
        device: where to compute.
        where: text in front of an error.
        points_at_once: most points of a pass, at least 1; a larger cloud passes alone.
        patience: seconds after which a pass begins although it has room for more clouds.
        clock: returns seconds.

    Yields:
        The name and the probabilities (num_classes,), float64 on the CPU, of each cloud. They are those of the cloud
        alone up to rounding.

    Raises:
        InputError: an output that is not finite; the answers before it have been given.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(24, 2)).eval()
        >>> both = [("a", torch.rand(8, 3)), ("b", torch.rand(8, 3))]
        >>> [name for name, _ in classify_clouds(model, both, device="cpu")]
        ['a', 'b']
    """
    waiting: list[tuple[str, Tensor]] = []
    since = clock()
    for name, cloud in clouds:
        if waiting and waiting[0][1].shape != cloud.shape:
            yield from _classify(model, waiting, device, where)
            waiting = []
        if not waiting:
            since = clock()
        waiting.append((name, cloud))
        if (len(waiting) + 1) * len(cloud) > points_at_once or clock() - since >= patience:
            yield from _classify(model, waiting, device, where)
            waiting = []
    if waiting:
        yield from _classify(model, waiting, device, where)


def _classify(
    model: nn.Module, clouds: list[tuple[str, Tensor]], device: torch.device | str, where: str
) -> Iterator[tuple[str, Tensor]]:
    with torch.no_grad():
        logits = model(torch.stack([cloud for _, cloud in clouds]).to(device))
        shares = logits.double().softmax(1).cpu()
    for (name, _), share in zip(clouds, shares):
        if not torch.isfinite(share).all():
            raise InputError(f"{where}the model's output for {name} is not finite")
        yield name, share
