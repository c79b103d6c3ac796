"""Throughput of the data path compared with the consumption of training, in one process without workers."""

import time
from dataclasses import replace
from functools import partial

from s2d3d.datasets import BatchLoader, PointCloudDataset

from .interleave import Contestant, Task, interleave
from .losses import training_set
from .presets import PUBLIC_BERT, SMALL_BERT, spec_for
from .section import Section, Settings, new_section
from .training import ModelSpec, build_step

STORED = 8192
"""Points of a stored shape in the published recipe."""


def measure(settings: Settings) -> Section:
    """Measure batches of the loader beside training steps of the same batch size.

    Raises:
        InputError: the data set at `settings.root` cannot be read.
    """
    section = new_section("data", "Data path", settings)
    bert, small = (spec_for(preset, settings) for preset in (PUBLIC_BERT, SMALL_BERT))
    stored = settings.pick(STORED, 64)
    started = time.perf_counter()
    shapes = training_set(without_root(settings), num_points=bert.points, stored_points=stored)
    seconds = time.perf_counter() - started
    section.facts["first reading"] = (
        f"{len(shapes)} procedural shapes of {stored} points made, read, and their farthest-point prefixes of "
        f"{shapes.points.shape[1]} points computed and cached in {seconds:.1f} s; the batches below come from them"
    )
    sets = {"cached prefix": shapes}
    if settings.root is not None:
        sets["ModelNet40"] = training_set(settings, num_points=bert.points)
    for title, dataset in sets.items():
        _deliver(section, settings, title, dataset, {"point_bert": bert, "point_bert_small": small})
    return section


def without_root(settings: Settings) -> Settings:
    """Return the settings with procedural shapes."""
    return replace(settings, root=None)


def _deliver(
    section: Section, settings: Settings, title: str, dataset: PointCloudDataset, specs: dict[str, ModelSpec]
) -> None:
    batch = next(iter(specs.values())).batch

    def loading() -> Task:
        loader = BatchLoader(dataset, batch, shuffle=True, drop_last=True, seed=settings.seed)
        batches = iter(loader)

        def run() -> None:
            nonlocal batches
            points = next(batches, None)
            if points is None:
                batches = iter(loader)
                points = next(batches)

        return Task(run)

    stored = "sampled from the prefix" if dataset.points.shape[1] > dataset.num_points else "all points, shuffled"
    loaded = "load a batch"
    comparison = interleave(
        f"data, {title}",
        [
            Contestant(
                loaded,
                loading,
                same_math=False,
                note=f"{stored}, scaled and shifted; no workers",
            ),
            *(
                Contestant(f"train {name}", partial(build_step, spec), same_math=False, note="float32, dense")
                for name, spec in specs.items()
            ),
        ],
        title=f"{title}: a batch of {batch} clouds of {dataset.num_points} points, loaded and trained on",
        start=settings.here(),
        samples=batch,
        **settings.interleaving(10, min_seconds=0.1),
    )
    section.comparisons.append(comparison)
    key = "prefix" if title == "cached prefix" else "modelnet40"
    section.add_rate(f"{key}.samples_per_second", comparison, loaded)
    for name in specs:
        section.add_speedup(f"{key}.{name}", comparison, loaded, f"train {name}")
