"""Normals of clouds that have none, estimated from neighbouring points."""

import numpy as np

from ..optional import import_open3d

NEIGHBOURS = 16
"""Points, the own included, through which the plane of a point is laid; all of them where a cloud has fewer."""


def estimate_normals(points: np.ndarray) -> np.ndarray:
    """Estimate the normal of each point with Open3D: of the plane of least squares through its nearest points.

    A plane does not tell which of its sides is outside. The normal is turned away from the centre of the cloud. That is
    right for convex shapes, and alike in similar clouds of other shapes.

    Args:
        points: (N, 3), finite.

    Returns:
        (N, 3) float64 unit vectors; zeros where fewer than three points are there.

    Raises:
        InputError: Open3D is missing.

    Example:
        >>> plane = np.stack([*np.mgrid[0:4, 0:4].reshape(2, -1), np.zeros(16)], axis=1)
        >>> np.abs(estimate_normals(plane)).round(6)[0].tolist()
        [0.0, 0.0, 1.0]
    """
    open3d = import_open3d("estimating normals")
    around = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    if len(points) < 3:
        return np.zeros_like(around)
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(around))
    cloud.estimate_normals(open3d.geometry.KDTreeSearchParamKNN(knn=min(NEIGHBOURS, len(points))))
    normals = np.asarray(cloud.normals)
    return np.where((normals * around).sum(axis=1, keepdims=True) < 0, -normals, normals)
