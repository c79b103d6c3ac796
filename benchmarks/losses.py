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
from .training import CLIP, LEARNING_RATE, ModelSpec, autocast

STEPS = 200


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


def loss_gap(spec: ModelSpec, settings: Settings) -> float:
    """Return the relative difference of the mean loss over 200 steps between bf16 and float32.

    Both start from the package's own initial weights and see the same batches, partitions and dropout.
    """
    dataset = training_set(settings, num_points=spec.points)
    steps = settings.pick(STEPS, 2)
    means = [_mean_loss(spec.but(precision=precision), dataset, steps) for precision in ("float32", "bf16")]
    return abs(means[1] / means[0] - 1)


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
