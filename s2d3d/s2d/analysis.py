"""What the experts of a model look like: how far they are from each other."""

import torch
from torch import nn

from .ewa import expert_layers


@torch.no_grad()
def expert_divergence(model: nn.Module) -> dict[str, float]:
    """Measure how far the experts of each expert layer are from their mean.

    Returns:
        For each layer by name: the root mean square over experts of `|W_i - mean|`, relative to `|mean|`, over all
        weights and biases of its experts. 0 means identical experts. EWA multiplies it by `|1 - b * K / (K - 1)|`.

    Raises:
        ValueError: the model has no expert layer.
    """
    names = {id(module): name for name, module in model.named_modules()}
    result = {}
    for layer in expert_layers(model):
        apart = size = 0.0
        for parameter in layer.expert_parameters():
            stacked = parameter.double()
            mean = stacked.mean(0)
            apart += float((stacked - mean).square().sum()) / layer.num_experts
            size += float(mean.square().sum())
        result[names[id(layer)]] = (apart / size) ** 0.5 if size else 0.0
    return result
