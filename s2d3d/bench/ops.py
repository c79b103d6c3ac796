"""Point operations: farthest point sampling and nearest neighbours against plain and public ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import farthest_point_sample, gather_points, nearest_neighbours
from .attention import measure_attention
from .interleave import Contestant, Skip, Task, interleave
from .packages import require
from .reference import load_reference, submodule
from .section import Section, Settings, new_section
from .training import clouds

CHECKED = 16
"""Selections that are compared: rounding may order later ones, which are nearly as far as each other, differently."""
OURS, PLAIN, CLUSTER = "ours", "plain reference", "torch_cluster"


def measure(settings: Settings) -> Section:
    """Measure operations at the sizes of the models and of data preparation, and the attention that uses them.

    Raises:
        InputError: contestants select other points.
    """
    section = new_section("ops", "Point operations", settings)
    for batch, points, samples in settings.pick([(32, 1024, 64), (32, 8192, 1200)], [(2, 64, 20)]):
        _sampling(section, settings, batch, points, samples)
    for batch, queries, points, neighbours in settings.pick([(32, 64, 1024, 32), (8, 1024, 1024, 16)], [(2, 8, 64, 4)]):
        _neighbours(section, settings, batch, queries, points, neighbours)
    attention = measure_attention(settings)
    section.comparisons.append(attention)
    section.add_speedup("vector_attention", attention, OURS, PLAIN)
    return section


def _sampling(section: Section, settings: Settings, batch: int, points: int, samples: int) -> None:
    xyz, _ = clouds(batch, points, settings.seed, settings.device)

    def task(select: Callable[[], Tensor]) -> Task:
        return Task(select, lambda: [gather_points(xyz, select()[:, :CHECKED])])

    def plain() -> Task:
        module = submodule(load_reference(), "point_transformer")
        return task(lambda: module.farthest_points(xyz, samples))

    def cluster() -> Task:
        package = require("torch_cluster", "torch-cluster")
        flat, of_cloud = xyz.flatten(0, 1), torch.arange(batch, device=xyz.device).repeat_interleave(points)
        first = torch.arange(batch, device=xyz.device).unsqueeze(1) * points
        ratio = samples / points

        def select() -> Tensor:
            chosen = package.fps(flat, of_cloud, ratio=ratio, random_start=False)
            return chosen.view(batch, -1) - first

        return task(select)

    def buckets() -> Task:
        package = require("fpsample", "fpsample")
        arrays = xyz.cpu().numpy()
        height = 5 if points > 2000 else 3

        def select() -> Tensor:
            chosen = [package.bucket_fps_kdline_sampling(cloud, samples, h=height, start_idx=0) for cloud in arrays]
            return torch.stack([torch.from_numpy(indices.astype("int64")) for indices in chosen]).to(xyz.device)

        if bool(select()[:, 0].any()):  # with small buckets its start is not the one it was given
            raise Skip("fpsample starts at another point than it was told")
        return task(select)

    name = f"fps {points} -> {samples}"
    comparison = interleave(
        name,
        [
            Contestant(OURS, lambda: task(lambda: farthest_point_sample(xyz, samples))),
            Contestant(PLAIN, plain, note="loop over (B, N, 3)"),
            Contestant(CLUSTER, cluster),
            Contestant("fpsample (bucket)", buckets, note="on the CPU, one cloud after another, one thread"),
        ],
        title=f"farthest point sampling, {batch} clouds, {points} points -> {samples}",
        start=settings.here(),
        samples=batch,
        **settings.interleaving(settings.pick(8 if points > 2000 else 30, 2)),
    )
    section.comparisons.append(comparison)
    section.add_speedup(f"fps_{points}", comparison, OURS, PLAIN)


def _neighbours(section: Section, settings: Settings, batch: int, queries: int, points: int, neighbours: int) -> None:
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

    def cluster() -> Task:
        package = require("torch_cluster", "torch-cluster")
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
            Contestant(CLUSTER, cluster),
        ],
        title=f"{neighbours} nearest neighbours, {batch} x {queries} queries in {points} points",
        start=settings.here(),
        tolerance=1e-5,
        **settings.interleaving(30),
    )
    section.comparisons.append(comparison)
    section.add_speedup(f"knn_{queries}", comparison, OURS, PLAIN)
