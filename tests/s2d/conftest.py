"""Oracles and small models for the tests of the method."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from s2d3d.s2d import RUPMoF
from s2d3d.s2d.dispatch import Partition, random_partition


@pytest.fixture
def groups_of():
    """List the tokens of each expert, leaving idle slots out."""

    def read(partition: Partition) -> list[list[int]]:
        rows = partition.target.view(partition.num_experts, -1).tolist()
        return [[token for token in row if token < partition.num_tokens] for row in rows]

    return read


@pytest.fixture
def spread_():
    """Move the experts of every layer of a model apart, each in a direction of its own."""

    def move(model: nn.Module, scale: float = 0.1) -> nn.Module:
        with torch.no_grad():
            for layer in (m for m in model.modules() if isinstance(m, RUPMoF)):
                for parameter in layer.expert_parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=scale)
        return model

    return move


@pytest.fixture
def separate_experts():
    """Take a layer apart into K dense FFNs of the form of `ffn` with the weights of its experts."""

    def build(layer: RUPMoF, ffn: nn.Module) -> list[nn.Module]:
        experts = []
        for expert in range(layer.num_experts):
            dense = copy.deepcopy(ffn).to(next(layer.parameters()).dtype).train(layer.training)
            state = dict(layer.state_dict())
            for name, linear in dense.named_modules(remove_duplicate=False):
                if isinstance(linear, nn.Linear):
                    state[f"{name}.weight"] = state[f"{name}.weight"][expert].t()
                    if linear.bias is not None:
                        state[f"{name}.bias"] = state[f"{name}.bias"][expert]
            dense.load_state_dict(state)
            experts.append(dense)
        return experts

    return build


@pytest.fixture
def loop_forward(groups_of):
    """Run the tokens of (..., C) through their experts one after the other; draws the partition as the layer does."""

    def run(experts: list[nn.Module], x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        groups = groups_of(random_partition(len(tokens), len(experts)))
        rows: dict[int, Tensor] = {}
        for expert, group in zip(experts, groups, strict=True):
            for token in group:
                rows[token] = expert(tokens[token])
        return torch.stack([rows[token] for token in range(len(tokens))]).view(*x.shape[:-1], -1)

    return run


@pytest.fixture
def tiny_vit():
    """Make a stock timm vision transformer of 16-pixel images: 5 tokens an image, 3 classes."""

    def make(depth: int = 4, **kwargs) -> VisionTransformer:
        options = dict(img_size=16, patch_size=8, embed_dim=16, num_heads=2, num_classes=3) | kwargs
        return VisionTransformer(depth=depth, **options)

    return make
