"""What a model says of each cloud of a set; `evaluator` counts, this names."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..datasets import PointCloudDataset
from ..errors import InputError


@torch.no_grad()
def class_probabilities(
    model: nn.Module,
    dataset: PointCloudDataset,
    *,
    device: torch.device | str,
    indices: Tensor | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Classify clouds of a set without augmentation, in eval mode; the model's mode is restored afterwards.

    Args:
        model: points (B, N, 3) -> logits (B, num_classes), already on `device`.
        dataset: any split.
        device: where to compute.
        indices: (n,) int64, which clouds; default: all.
        batch_size: clouds of one forward pass, at least 1.
        progress: show a progress bar on a terminal.

    Returns:
        (n, num_classes) float32 on the CPU, rows sum to 1.

    Raises:
        InputError: an output that is not finite.

    Example:
        >>> data = PointCloudDataset(torch.rand(3, 8, 3), torch.zeros(3), ["any"], split="test", num_points=8)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
        >>> class_probabilities(model, data, device="cpu", progress=False).sum(1).round().tolist()
        [1.0, 1.0, 1.0]
    """
    indices = torch.arange(len(dataset)) if indices is None else indices
    was_training = model.training
    model.eval()
    try:
        batches = tqdm(indices.split(batch_size), desc="classify", leave=False, disable=None if progress else True)
        outputs = [model(dataset.batch(part, augment=False)[0].to(device)).float().cpu() for part in batches]
    finally:
        model.train(was_training)
    logits = torch.cat(outputs)
    bad = int((~torch.isfinite(logits).all(1)).sum())
    if bad:
        text = f"the model's output is not finite for {bad} of {len(logits)} clouds"
        raise InputError(f"{text}; its training has diverged, or the checkpoint is damaged")
    return logits.softmax(1)
