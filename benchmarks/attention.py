"""Vector attention among neighbours, the layer of Point Transformers, compared with plain and public code."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from s2d3d.models.vector_attention import VectorAttention, find_neighbours
from s2d3d.ops.points import nearest_neighbours

from .comparison import Comparison
from .interleave import Contestant, Task, interleave
from .layer import gradient_of
from .packages import require
from .pointcloud import point_transformer_conv
from .reference import load_reference, submodule
from .section import Settings
from .training import clouds

FLIPPED = 2e-3
"""Tolerance of a gradient: among millions of activations rounding moves one or two across the zero of a ReLU, and with
them their share of a gradient, here 1e-3 of 0.4; everything else agrees to 5e-5."""


def measure_attention(settings: Settings) -> Comparison:
    """Compare forward and backward of one attention layer in training, its neighbour search included.

    Raises:
        InputError: ours and the plain one disagree.
    """
    batch, points, channels, share_planes, size = settings.pick((8, 1024, 64, 8, 16), (2, 32, 8, 4, 4))
    xyz, _ = clouds(batch, points, settings.seed, settings.device)
    torch.manual_seed(settings.seed)
    ours = VectorAttention(channels, share_planes).to(settings.device).train()
    x = torch.randn(batch, points, channels).to(settings.device).requires_grad_()
    # Of a size with which gradients of weights, sums over all points, are numbers about 1.
    direction = torch.randn(batch * points, channels).to(settings.device) / (batch * points) ** 0.5

    def task(
        module: nn.Module, forward: Callable[[], Tensor], gradients: Callable[[], list[Tensor]] | None = None
    ) -> Task:
        def run() -> Tensor:
            module.zero_grad(set_to_none=True)
            x.grad = None
            rows = forward().reshape(batch * points, channels)
            rows.backward(direction)
            return rows

        def outputs() -> list[Tensor]:
            rows = run().detach()
            names = ("linear_v.weight", "linear_q.weight")
            weights = gradients() if gradients else [gradient_of(module, name) for name in names]
            assert x.grad is not None
            return [rows, x.grad.clone(), *weights]

        return Task(run, outputs)

    def plain() -> Task:
        layer = submodule(load_reference(), "point_transformer").PointTransformerLayer(channels, share_planes, size)
        layer.load_state_dict(ours.state_dict())
        layer = layer.to(settings.device).train()
        return task(layer, lambda: layer(xyz, x))

    def public() -> Task:
        package = require("torch_geometric.nn", "torch-geometric")
        encode = nn.Sequential(nn.Linear(3, channels), nn.ReLU(), nn.Linear(channels, channels))
        attend = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
        layer = package.PointTransformerConv(channels, channels, encode, attend, add_self_loops=False)
        layer = layer.to(settings.device).train()
        return task(layer, lambda: layer(x.flatten(0, 1), xyz.flatten(0, 1), edges()))

    def edges() -> Tensor:
        first = torch.arange(batch, device=xyz.device).view(-1, 1, 1) * points
        sources = (nearest_neighbours(xyz, xyz, size) + first).flatten()
        return torch.stack([sources, torch.arange(batch * points, device=xyz.device).repeat_interleave(size)])

    def pointcloud() -> Task:
        layer = point_transformer_conv(ours, channels, share_planes).to(settings.device).train()
        return task(
            layer,
            lambda: layer(x.flatten(0, 1), xyz.flatten(0, 1), edges()),
            # Its query has the other sign.
            lambda: [gradient_of(layer, "lin.weight"), -gradient_of(layer, "lin_dst.weight")],
        )

    return interleave(
        "vector attention",
        [
            Contestant(
                "ours", lambda: task(ours, lambda: ours(x.flatten(0, 1), find_neighbours(xyz, xyz, size))),
                note="queries, keys and values of points, then gathered",
            ),
            Contestant("plain reference", plain, note="neighbours gathered, then every layer"),
            Contestant("torch-pointcloud PointTransformerConv", pointcloud, note="same weights; our neighbour search"),
            Contestant(
                "torch-geometric PointTransformerConv", public, same_math=False,
                note="a weight for each channel, no BatchNorm; our neighbour search",
            ),
        ],
        title=f"attention, {batch} x {points} points, {channels} channels, {size} neighbours, forward and backward",
        start=settings.here(),
        tolerance=FLIPPED,
        **settings.interleaving(12),
    )  # fmt: skip
