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


def measure_attention(settings: Settings) -> Comparison:
    """Compare forward and backward of one attention layer in training, its neighbour search included.

    Raises:
        InputError: ours and the plain one disagree.
    """
    batch, points, channels, share_planes, size = settings.pick((8, 1024, 64, 8, 16), (2, 32, 8, 4, 4))
    xyz, _ = clouds(batch, points, settings.seed, settings.device)
    torch.manual_seed(settings.seed)
    ours = VectorAttention(channels, share_planes).to(settings.device).train()
    features = torch.randn(batch, points, channels).to(settings.device)
    # Of a size with which gradients of weights, sums over all points, are numbers about 1.
    direction = torch.randn(batch * points, channels).to(settings.device) / (batch * points) ** 0.5

    def task(
        module: nn.Module,
        forward: Callable[[Tensor, Tensor], Tensor],
        gradients: Callable[[], list[Tensor]] | None = None,
    ) -> Task:
        """Make the task of `forward(x (B, N, C), xyz (B, N, 3))` and its backward pass."""

        def pass_through(x: Tensor) -> Tensor:
            module.zero_grad(set_to_none=True)
            x.grad = None
            rows = forward(x, xyz.to(x.dtype)).reshape(batch * points, channels)
            rows.backward(direction.to(x.dtype))
            return rows

        def outputs() -> list[Tensor]:
            # In float64: in float32 rounding moves one or two of millions of activations across the zero of a ReLU.
            exact = features.double().requires_grad_()
            module.double()
            rows = pass_through(exact).detach()
            names = ("linear_v.weight", "linear_q.weight")
            weights = gradients() if gradients else [gradient_of(module, name) for name in names]
            assert exact.grad is not None
            module.float()
            return [part.float() for part in (rows, exact.grad, *weights)]

        x = features.clone().requires_grad_()
        return Task(lambda: pass_through(x), outputs)

    def plain() -> Task:
        layer = submodule(load_reference(), "point_transformer").PointTransformerLayer(channels, share_planes, size)
        layer.load_state_dict(ours.state_dict())
        layer = layer.to(settings.device).train()
        return task(layer, lambda x, places: layer(places, x))

    def public() -> Task:
        package = require("torch_geometric.nn", "torch-geometric")
        encode = nn.Sequential(nn.Linear(3, channels), nn.ReLU(), nn.Linear(channels, channels))
        attend = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
        layer = package.PointTransformerConv(channels, channels, encode, attend, add_self_loops=False)
        layer = layer.to(settings.device).train()
        return task(layer, lambda x, places: layer(x.flatten(0, 1), places.flatten(0, 1), edges()))

    def edges() -> Tensor:
        first = torch.arange(batch, device=xyz.device).view(-1, 1, 1) * points
        sources = (nearest_neighbours(xyz, xyz, size) + first).flatten()
        return torch.stack([sources, torch.arange(batch * points, device=xyz.device).repeat_interleave(size)])

    def pointcloud() -> Task:
        layer = point_transformer_conv(ours, channels, share_planes).to(settings.device).train()
        return task(
            layer,
            lambda x, places: layer(x.flatten(0, 1), places.flatten(0, 1), edges()),
            # Its query has the other sign.
            lambda: [gradient_of(layer, "lin.weight"), -gradient_of(layer, "lin_dst.weight")],
        )

    return interleave(
        "vector attention",
        [
            Contestant(
                "ours",
                lambda: task(ours, lambda x, places: ours(x.flatten(0, 1), find_neighbours(places, places, size))),
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
        **settings.interleaving(12),
    )  # fmt: skip
