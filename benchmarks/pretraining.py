"""The training step of masked pre-training, compared with the plain reference module."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2d3d import EWA, MoFConfig, convert_to_mof_, create_model
from s2d3d.training.optim import build_optimizer

from .interleave import DEFAULT, Contestant, Task, interleave
from .reference import load_reference, submodule
from .section import Section, Settings, new_section
from .versus import DENSE, EXPERTS, REFERENCE_A, REFERENCE_B, SPARSE

SMALL: dict[str, Any] = dict(
    trans_dim=128, depth=4, num_heads=4, decoder_depth=2, decoder_num_heads=4, num_group=32, group_size=16,
    encoder_width=32, drop_path_rate=0.0,
)  # fmt: skip
"""The model of configs/pretrain_mae_small.yaml, which trains on batches of 32 clouds of 512 points."""
QUICK: dict[str, Any] = dict(
    trans_dim=12, depth=2, num_heads=2, decoder_depth=1, decoder_num_heads=2, num_group=6, group_size=4,
    encoder_width=4, drop_path_rate=0.0,
)  # fmt: skip
LEARNING_RATE, CLIP = 1e-3, 1.0


def measure(settings: Settings) -> Section:
    """Measure the step of the small pre-training: reference, dense, with experts.

    Raises:
        InputError: contestants of equal mathematics disagree, or a process dies.
    """
    section = new_section("pretraining", "Pre-training step", settings)
    batch, points = settings.pick((32, 512), (2, 32))
    build = partial(
        build_step, settings.pick(SMALL, QUICK), batch, points, device=str(settings.device), seed=settings.seed
    )
    plain = partial(build, source="reference")
    comparison = interleave(
        "point_mae_pretrain_small step",
        [
            Contestant(REFERENCE_A, partial(plain, fused=False), allocator=DEFAULT, note="system allocator"),
            Contestant(REFERENCE_B, plain, note="allocator and optimizer as ours"),
            Contestant(DENSE, build, note="as shipped"),
            Contestant(SPARSE, partial(build, experts=EXPERTS), note=f"{EXPERTS} experts in every second FFN, EWA"),
        ],
        title=f"point_mae_pretrain_small: training step, batch {batch}, {points} points",
        start=settings.apart(),
        base=REFERENCE_A,
        samples=batch,
        **settings.interleaving(8, min_seconds=0.2),
    )
    section.comparisons.append(comparison)
    section.add_speedup("A", comparison, DENSE, REFERENCE_A)
    section.add_speedup("B", comparison, DENSE, REFERENCE_B)
    section.add_ratio("s2d", comparison, SPARSE, DENSE)
    section.add_rate("samples_per_second", comparison, DENSE)
    section.add_rate("reference_samples_per_second", comparison, REFERENCE_A)
    return section


def build_step(
    size: dict[str, Any],
    batch: int,
    points: int,
    *,
    source: str = "ours",
    fused: bool = True,
    experts: int = 0,
    device: str = "cpu",
    seed: int = 0,
) -> Task:
    """Make the task of one training step: forward, backward, clipping, AdamW and, with experts, EWA.

    Weights depend only on their names and shapes, clouds and masks on the seed, so that all contestants start alike.

    Args:
        size: keywords of the model, of those that the reference has as well.
        batch: clouds of a step.
        points: of a cloud.
        source: "ours" or "reference".
        fused: AdamW of the trainer; False: torch's default.
        experts: in every second FFN; 0: dense.
        device: where to compute.
        seed: of clouds and masks.

    Raises:
        Skip: this is not a clone of the repository.
    """
    package = load_reference()
    ours = create_model("point_mae_pretrain", encoder_dims=size["trans_dim"], **size)
    torch.manual_seed(seed)
    clouds = (torch.rand(batch, points, 3) * 2 - 1).to(device)
    mask = ours.draw_mask(batch).to(device)  # type: ignore[operator]
    model: nn.Module = ours
    if source == "reference":
        model = submodule(package, "point_mae_pretrain").PointMAEPretrain(**size)
    model = package.draw_weights_(model, seed)
    if experts:
        convert_to_mof_(model, MoFConfig(num_experts=experts))
    model = model.to(device).train()
    optimizer: torch.optim.Optimizer
    if fused:
        optimizer = build_optimizer(model, name="adamw", lr=LEARNING_RATE, weight_decay=0.05)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    ewa = EWA(model, share_rate=0.3, total_steps=1000) if experts else None
    parameters = list(model.parameters())

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(clouds, mask)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        if ewa:
            ewa.step()
        return loss.detach()

    return Task(run, partial(_outputs, model, clouds, mask))


@torch.no_grad()
def _outputs(model: Callable[..., Tensor], clouds: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the loss of the first step."""
    return [model(clouds, mask).view(1)]
