"""Point operations: farthest point sampling and nearest neighbours, compared with plain and public implementations."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from s2d3d.ops.points import farthest_point_sample, gather_points, nearest_neighbours

from .attention import measure_attention
from .interleave import Contestant, Skip, Task, interleave
from .packages import require
from .reference import load_reference, submodule
from .section import Section, Settings, new_section
from .training import clouds

CHECKED = 16
"""Number of compared selections. Later points have almost equal distances, and rounding may change their order."""
OURS, PLAIN, CLUSTER, POINTCLOUD = "ours", "plain reference", "torch_cluster", "torch-pointcloud"
FPSAMPLE = "fpsample (bucket)"


SAMPLING = (("fps_1024", 32, 1024, 64), ("fps_8192", 32, 8192, 1200))
"""By key: clouds, points and samples."""
NEIGHBOURS = (("knn_64", 32, 64, 1024, 32), ("knn_1024", 8, 1024, 1024, 16))
"""By key: clouds, queries, points and neighbours."""


def measure(settings: Settings) -> Section:
    """Measure operations at the sizes of the models and of data preparation, and the attention that uses them.

    Raises:
        InputError: contestants select other points.
    """
    section = new_section("ops", "Point operations", settings)
    for key, *sizes in SAMPLING:
        _sampling(section, settings, key, *settings.pick(sizes, (2, 64, 20)))
    for key, *sizes in NEIGHBOURS:
        _neighbours(section, settings, key, *settings.pick(sizes, (2, 8, 64, 4)))
    attention = measure_attention(settings)
    section.comparisons.append(attention)
    section.add_speedup("vector_attention", attention, OURS, PLAIN)
    return section


def _sampling(section: Section, settings: Settings, key: str, batch: int, points: int, samples: int) -> None:
    xyz, _ = clouds(batch, points, settings.seed, settings.device)

    def task(select: Callable[[], Tensor]) -> Task:
        return Task(select, lambda: [gather_points(xyz, select()[:, :CHECKED])])

    def plain() -> Task:
        module = submodule(load_reference(), "point_transformer")
        return task(lambda: module.farthest_points(xyz, samples))

    def flat(package: ModuleType, **count: float) -> Task:
        """Make the task of a package that takes all clouds as one list, with the number of each point's cloud."""
        of_cloud = torch.arange(batch, device=xyz.device).repeat_interleave(points)
        first = torch.arange(batch, device=xyz.device).unsqueeze(1) * points

        def select() -> Tensor:
            return package.fps(xyz.flatten(0, 1), of_cloud, random_start=False, **count).view(batch, -1) - first

        return task(select)

    def buckets() -> Task:
        package = require("fpsample", "fpsample")
        arrays = xyz.cpu().numpy()
        height = 5 if points > 2000 else 3

        def select() -> Tensor:
            chosen = [package.bucket_fps_kdline_sampling(cloud, samples, h=height, start_idx=0) for cloud in arrays]
            return torch.stack([torch.from_numpy(indices.astype("int64")) for indices in chosen]).to(xyz.device)

        chosen = select()[:, :CHECKED]
        if not torch.equal(chosen, farthest_from(xyz, chosen[:, 0], chosen.shape[1])):
            raise Skip("fpsample selects other points than the farthest")
        return Task(select)

    name = f"fps {points} -> {samples}"
    comparison = interleave(
        name,
        [
            Contestant(OURS, lambda: task(lambda: farthest_point_sample(xyz, samples))),
            Contestant(PLAIN, plain, note="loop over (B, N, 3)"),
            Contestant(CLUSTER, lambda: flat(require("torch_cluster", "torch-cluster"), ratio=samples / points)),
            Contestant(
                POINTCLOUD, lambda: flat(_pointcloud_operators(), num_nodes=samples), note="operators of pyg-lib"
            ),
            Contestant(
                FPSAMPLE,
                buckets,
                same_math=False,
                note="one cloud after another, one thread; checked to take the farthest from a start of its own",
            ),
        ],
        title=f"farthest point sampling, {batch} clouds, {points} points -> {samples}",
        start=settings.here(),
        samples=batch,
        **settings.interleaving(settings.pick(5 if points > 2000 else 30, 2)),
    )
    section.comparisons.append(comparison)
    section.add_speedup(key, comparison, OURS, PLAIN)
    section.add_speedup(f"{key}.fpsample", comparison, OURS, FPSAMPLE)


def _pointcloud_operators() -> ModuleType:
    """Return the operators of torch-pointcloud; raises `Skip` where it or pyg-lib, whose they are, is missing."""
    package = require("torch_pointcloud.ops.cluster", "torch-pointcloud")
    require("pyg_lib", "pyg-lib")
    return package


def farthest_from(xyz: Tensor, start: Tensor, samples: int) -> Tensor:
    """Select farthest points of each cloud (B, N, 3) from its start point (B,): indices (B, samples)."""
    clouds_of = torch.arange(len(xyz), device=xyz.device)
    order = torch.arange(xyz.shape[1], device=xyz.device).repeat(len(xyz), 1)
    order[clouds_of, start], order[clouds_of, 0] = 0, start
    return order.gather(1, farthest_point_sample(gather_points(xyz, order), samples))


def _neighbours(
    section: Section, settings: Settings, key: str, batch: int, queries: int, points: int, neighbours: int
) -> None:
    xyz, _ = clouds(batch, points, settings.seed, settings.device)
    centers = xyz[:, :queries].contiguous()

    def task(find: Callable[[], Tensor]) -> Task:
        def outputs() -> list[Tensor]:
            offsets = gather_points(xyz, find()) - centers.unsqueeze(2)
            return [offsets.square().sum(-1).sort(-1).values]

        return Task(find, outputs)

    def plain() -> Task:
        module = submodule(load_reference(), "point_transformer")
        return task(lambda: module.nearest(centers, xyz, neighbours))

    def flat(package: ModuleType) -> Task:
        """Make the task of a package that takes all clouds as one list, with the number of each point's cloud."""
        clouds_of = [torch.arange(batch, device=xyz.device).repeat_interleave(count) for count in (points, queries)]
        first = torch.arange(batch, device=xyz.device).view(-1, 1, 1) * points

        def find() -> Tensor:
            _, found = package.knn(xyz.flatten(0, 1), centers.flatten(0, 1), neighbours, *clouds_of)
            return found.view(batch, queries, neighbours) - first

        return task(find)

    comparison = interleave(
        f"knn {queries} in {points}",
        [
            Contestant(OURS, lambda: task(lambda: nearest_neighbours(centers, xyz, neighbours))),
            Contestant(PLAIN, plain, note="cdist by exact differences, topk"),
            Contestant(CLUSTER, lambda: flat(require("torch_cluster", "torch-cluster"))),
            Contestant(POINTCLOUD, lambda: flat(_pointcloud_operators()), note="operators of pyg-lib"),
        ],
        title=f"{neighbours} nearest neighbours, {batch} x {queries} queries in {points} points",
        start=settings.here(),
        tolerance=1e-5,
        **settings.interleaving(30),
    )
    section.comparisons.append(comparison)
    section.add_speedup(key, comparison, OURS, PLAIN)
    section.add_speedup(f"{key}.torch_cluster", comparison, OURS, CLUSTER)
