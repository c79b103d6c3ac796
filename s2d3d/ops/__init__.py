"""Point operations: what data sets and backbones stand on."""

from .points import farthest_point_sample, gather_points, group_points, nearest_neighbours

__all__ = ["farthest_point_sample", "gather_points", "group_points", "nearest_neighbours"]
