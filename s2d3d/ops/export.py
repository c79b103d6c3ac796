"""Farthest point sampling for exported programs: one loop in the graph, whose length may depend on the input."""

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop


def farthest_point_sample(planes: Tensor, num_samples: int, skip_radius_sq: float) -> Tensor:
    """Select as `s2d3d.ops.farthest_point_sample` does, with the same arithmetic.

    Args:
        planes: (3, B, N) float32 coordinates.
        num_samples: how many points to select, in [1, N].
        skip_radius_sq: points whose squared norm is at most this are never selected; negative: all may be.

    Returns:
        (B, num_samples) int64 indices.
    """
    _, batch, num_points = planes.shape
    distance = planes.new_full((batch, num_points), torch.inf)
    if skip_radius_sq >= 0:
        distance = torch.where(planes.square().sum(0) <= skip_radius_sq, -1.0, distance)
    selected = torch.zeros((batch, num_samples), dtype=torch.int64, device=planes.device)
    newest = torch.zeros((batch, 1), dtype=torch.int64, device=planes.device)
    step = torch.ones((1, 1), dtype=torch.int64, device=planes.device)

    def more(step: Tensor, newest: Tensor, distance: Tensor, selected: Tensor, planes: Tensor) -> Tensor:
        return (step < selected.shape[1]).all()

    def select(
        step: Tensor, newest: Tensor, distance: Tensor, selected: Tensor, planes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        difference = planes - planes.gather(2, newest.expand(3, -1, -1))
        x, y, z = difference.square().unbind(0)
        distance = torch.minimum(distance, x + y + z)
        newest = distance.argmax(1, keepdim=True)
        return step + 1, newest, distance, selected.scatter(1, step.expand_as(newest), newest), planes.clone()

    return while_loop(more, select, (step, newest, distance, selected, planes))[3]
