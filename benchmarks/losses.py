"""Training loss in bf16 compared with float32, for the same training."""

import tempfile
from pathlib import Path

import torch

from s2d3d.datasets import BatchLoader, PointCloudDataset, build_augmentation, create_dataset, require_clouds
from s2d3d.models import create_model
from s2d3d.prepare.shapes import write_shapes
from s2d3d.random_state import seed_all
from s2d3d.training.optim import build_optimizer

from .section import Settings
from .stats import Interval, estimate
from .training import CLIP, LEARNING_RATE, ModelSpec, autocast

STEPS = 200
SEEDS = 8
"""Pairs of trainings: rounding alone sends two trainings apart by several per cent, so one pair decides nothing."""


def training_set(settings: Settings, *, num_points: int, stored_points: int | None = None) -> PointCloudDataset:
    """Read the training set at `settings.root`, or make procedural shapes, with the recipe's augmentation.

    Args:
        settings: path of the set, and whether a tiny one is used.
        num_points: points per sample.
        stored_points: points per procedural shape; default `num_points`.
    """
    transform = build_augmentation(scale=(2 / 3, 3 / 2), shift=0.2)
    if settings.root is not None:
        clouds = create_dataset("modelnet40", settings.root, "train", num_points=num_points, transform=transform)
        return require_clouds(clouds, "the benchmark")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shapes"
        count = settings.pick(384, 12)
        write_shapes(root, num_train=count, num_test=12, num_points=stored_points or num_points, seed=settings.seed)
        clouds = create_dataset("shapes", root, "train", num_points=num_points, transform=transform)
        return require_clouds(clouds, "the benchmark")


def loss_ratio(spec: ModelSpec, settings: Settings) -> Interval:
    """Return the mean loss over 200 steps in bf16 divided by that in float32, over several seeds.

    Both trainings of a seed start from the same weights and see the same batches, partitions and dropout.
    """
    dataset = training_set(settings, num_points=spec.points)
    steps = settings.pick(STEPS, 2)
    ratios = []
    for seed in range(settings.seed, settings.seed + settings.pick(SEEDS, 2)):
        half, full = (
            _mean_loss(spec.but(precision=precision, seed=seed), dataset, steps) for precision in ("bf16", "float32")
        )
        ratios.append(half / full)
    return estimate(ratios)


def _mean_loss(spec: ModelSpec, dataset: PointCloudDataset, steps: int) -> float:
    seed_all(spec.seed)
    model = create_model(spec.name, num_classes=dataset.num_classes, **spec.kwargs).to(spec.device).train()
    optimizer = build_optimizer(model, name="adamw", lr=LEARNING_RATE, weight_decay=0.05)
    loader = BatchLoader(dataset, min(spec.batch, len(dataset)), shuffle=True, drop_last=True, seed=spec.seed)
    seed_all(spec.seed)
    losses: list[torch.Tensor] = []
    while len(losses) < steps:
        for points, labels in loader:
            optimizer.zero_grad(set_to_none=True)
            with autocast(spec):
                logits = model(points.to(spec.device))
            loss = torch.nn.functional.cross_entropy(logits.float(), labels.to(spec.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
            optimizer.step()
            losses.append(loss.detach())
            if len(losses) == steps:
                break
    return float(torch.stack(losses).mean())
