"""Tasks of whole models: one training step, or one batch of evaluation, of ours or of a reference module."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from s2d3d.models import fold_batchnorm
from s2d3d.s2d import EWA, MoFConfig, convert_to_mof_, merge_experts
from s2d3d.s2d.ewa import expert_layers
from s2d3d.training.optim import build_optimizer
from s2d3d.training.update import clip_gradient_

from .interleave import Task
from .pointcloud import pointcloud_model
from .reference import our_model, reference_model

NUM_CLASSES = 40
CLIP = 10.0
LEARNING_RATE = 5e-4
SHARE_RATE = 0.3
BF16_TOLERANCE = 0.5
"""Tolerance of a logit in bf16, which has 8 bits of precision: sufficient only to detect a different model."""


@dataclass(frozen=True)
class ModelSpec:
    """A model to measure, in plain picklable values.

    Attributes:
        name: of `create_model`.
        kwargs: keywords that differ from its defaults.
        source: "ours", "reference", or "torch-pointcloud" for that package's form of it.
        experts: 0 for dense; otherwise the number of experts in every second FFN.
        merged: the experts are merged before the measurement.
        folded: BatchNorm is folded into the linear layers, for evaluation.
        precision: "float32", or "bf16" for autocast.
        fused: use the fused AdamW; otherwise torch's default.
        compile: compile the model.
        compile_mode: of torch.compile.
        batch: clouds of one run.
        points: of a cloud.
        device: as torch names it.
        seed: of weights and clouds.
    """

    name: str = "point_bert"
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: str = "ours"
    experts: int = 0
    merged: bool = False
    folded: bool = False
    precision: str = "float32"
    fused: bool = True
    compile: bool = False
    compile_mode: str = "default"
    batch: int = 32
    points: int = 1024
    device: str = "cpu"
    seed: int = 0

    def but(self, **changes: Any) -> "ModelSpec":
        """Return a copy with other values."""
        return replace(self, **changes)


def clouds(batch: int, points: int, seed: int = 0, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Make random clouds (B, N, 3) in the unit sphere, thick shells, and labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    xyz = F.normalize(torch.randn(batch, points, 3, generator=generator), dim=-1)
    xyz = xyz * (0.5 + 0.5 * torch.rand(batch, points, 1, generator=generator))
    return xyz.to(device), torch.randint(NUM_CLASSES, (batch,), generator=generator).to(device)


def build_model(spec: ModelSpec) -> nn.Module:
    """Build the model that a specification describes, with the weights that all of its kind share.

    Raises:
        Skip: there is no such model here.
    """
    if spec.source == "reference":
        model = reference_model(spec.name, NUM_CLASSES, spec.kwargs, spec.seed)
    else:
        model = our_model(spec.name, NUM_CLASSES, spec.kwargs, spec.seed)
    if spec.source == "torch-pointcloud":
        model = pointcloud_model(spec.name, NUM_CLASSES, spec.kwargs, model)
    if spec.experts:
        convert_to_mof_(model, MoFConfig(num_experts=spec.experts))
    if spec.merged:
        merge_experts(model, inplace=True)
    if spec.folded:
        model = fold_batchnorm(model.eval())
    return model.to(spec.device)


class TrainingStep:
    """A training step in two parts: `prepare` runs on the host; `compute` never synchronises and can be recorded.

    Attributes:
        model: in training mode, with experts where `spec` asks for them.
        network: the model, or its compiled form.
        optimizer: AdamW.
        ewa: of a model with experts, else None.
        points: (B, N, 3) clouds of every step; may be overwritten in place between steps.
        labels: (B,) int64, likewise.
        share_rate: of the update under way: a number, or a 0-d float64 tensor on the device when recordable.
    """

    def __init__(
        self, spec: ModelSpec, *, recordable: bool = False, schedule: str = "constant", total_steps: int = 1
    ) -> None:
        """Build model, clouds and optimizer.

        Args:
            spec: of the model.
            recordable: keep what changes from update to update, learning rate and share rate, in tensors on the
                device, so that a CUDA graph of `compute` follows it. Needs `spec.fused`.
            schedule: of the share rate, see `EWA`.
            total_steps: of that schedule.
        """
        self.precision = partial(autocast, spec)
        self.model = build_model(spec).train()
        self.points, self.labels = clouds(spec.batch, spec.points, spec.seed, spec.device)
        if spec.fused:
            self.optimizer = build_optimizer(self.model, name="adamw", lr=LEARNING_RATE, weight_decay=0.05)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        self.ewa = None
        if spec.experts:
            self.ewa = EWA(self.model, share_rate=SHARE_RATE, schedule=schedule, total_steps=total_steps)
        self.parameters = list(self.model.parameters())
        self.clip = clip_gradient_ if spec.source == "ours" else partial(nn.utils.clip_grad_norm_, foreach=True)
        self.network: nn.Module = self.model
        if spec.compile:
            self.network = cast(nn.Module, torch.compile(self.model, mode=spec.compile_mode))
        self.share_rate: float | Tensor = 0.0
        self.learning_rate: Tensor | None = None
        if recordable:
            assert spec.fused, "only the fused AdamW reads its learning rate on the device"
            self.learning_rate = torch.zeros((), device=spec.device)  # float32, as the fused kernel reads it
            self.share_rate = torch.zeros((), dtype=torch.float64, device=spec.device)
            for group in self.optimizer.param_groups:
                group["lr"], group["capturable"] = self.learning_rate, True

    def prepare(self, learning_rate: float = LEARNING_RATE) -> None:
        """Set the rates of the next update."""
        share_rate = self.ewa.current_share_rate() if self.ewa else 0.0
        if self.learning_rate is None:
            self.share_rate = share_rate
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        else:
            assert isinstance(self.share_rate, Tensor)
            self.share_rate.fill_(share_rate)
            self.learning_rate.fill_(learning_rate)
        if self.ewa:
            self.ewa.num_steps += 1

    def compute(self) -> Tensor:
        """Do forward, loss, backward, clipping, AdamW and, with experts, EWA; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision():
            logits = self.network(self.points)
        loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.clip(self.parameters, CLIP)
        self.optimizer.step()
        if self.ewa:
            self.ewa.average_(self.share_rate)
        return loss.detach()

    def run(self, learning_rate: float = LEARNING_RATE) -> Tensor:
        """Make one update; return its loss."""
        self.prepare(learning_rate)
        return self.compute()

    def logits(self) -> list[Tensor]:
        """Return `logits_of` the network."""
        return logits_of(self.network, self.points, self.precision)


def build_step(spec: ModelSpec) -> Task:
    """Make the task of one training step: forward, backward, clipping, AdamW and, with experts, EWA."""
    step = TrainingStep(spec)
    return Task(step.run, step.logits)


def build_inference(spec: ModelSpec) -> Task:
    """Make the task of one batch of evaluation."""
    model = build_model(spec).eval()
    points, _ = clouds(spec.batch, spec.points, spec.seed, spec.device)
    network = torch.compile(model, mode=spec.compile_mode) if spec.compile else model
    precision = partial(autocast, spec)

    @torch.inference_mode()
    def run() -> Tensor:
        with precision():
            return network(points)

    return Task(run, lambda: [run().float()])


def autocast(spec: ModelSpec) -> torch.autocast:
    """Return the context of a specification's precision."""
    return torch.autocast(torch.device(spec.device).type, torch.bfloat16, enabled=spec.precision == "bf16")


def logits_of(model: nn.Module, points: Tensor, precision: Callable[[], torch.autocast]) -> list[Tensor]:
    """Return the logits in evaluation and in training without dropout, where experts differ from their mean.

    Training logits are always in float32: BatchNorm over the few clouds of a batch would amplify bf16 rounding errors.
    """
    with torch.no_grad():
        with precision():
            evaluated = model.eval()(points).float()
        with without_dropping(model):
            trained = model.train()(points)
    return [evaluated, trained]


@contextlib.contextmanager
def without_dropping(model: nn.Module) -> Iterator[None]:
    """Disable dropout and drop path of a model (ours, a reference or a package's) inside the context."""
    places = [
        (module, name)
        for module in model.modules()
        for name in ("p", "drop_prob", "rate", "dropout")
        if isinstance(getattr(module, name, None), (float, list))  # a list: of the layers of an MLP of torch-geometric
    ]
    values = [getattr(module, name) for module, name in places]
    for (module, name), value in zip(places, values):
        setattr(module, name, [0.0] * len(value) if isinstance(value, list) else 0.0)
    try:
        yield
    finally:
        for (module, name), value in zip(places, values):
            setattr(module, name, value)


def step_flops(spec: ModelSpec) -> int:
    """Count the floating-point operations of the matrix products of one training step, forward and backward."""
    model = build_model(spec.but(compile=False)).train()
    points, labels = clouds(spec.batch, spec.points, spec.seed, spec.device)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(points), labels).backward()
    return counter.get_total_flops()


def inference_flops(spec: ModelSpec) -> int:
    """Count the floating-point operations of the matrix products of one batch of evaluation."""
    model = build_model(spec.but(compile=False)).eval()
    points, _ = clouds(spec.batch, spec.points, spec.seed, spec.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(points)
    return counter.get_total_flops()


def expert_bytes(spec: ModelSpec) -> int:
    """Return the memory of the additional experts in training: parameters, gradients and two moments of AdamW."""
    model = build_model(spec)
    layers = expert_layers(model)
    additional = sum(
        parameter.nbytes * (layer.num_experts - 1) // layer.num_experts
        for layer in layers
        for parameter in layer.expert_parameters()
    )
    return 4 * additional
