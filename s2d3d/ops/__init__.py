"""Point operations, which data sets and backbones use."""

from .points import farthest_point_sample, gather_points, group_points, nearest_neighbours

__all__ = ["farthest_point_sample", "gather_points", "group_points", "nearest_neighbours"]
