"""The parts of a run: model, optimizer, schedule, EWA and EMA. One function makes each of them from the config."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config.load import Config
from ..datasets import PointCloudDataset
from ..errors import InputError
from ..evaluation.batchnorm import names_of_experts
from ..machine import Runtime
from ..models import create_for_classes, load_pretrained_
from ..models.freeze import freeze_
from ..random_state import seed_all
from ..runs.checkpoint import description_beside
from ..runs.folder import find_pretrained
from ..s2d import EWA, MoFConfig, TopKMoE, convert_to_mof_, is_sparse
from ..s2d.mof import ExpertLayer
from .loaders import Loaders
from .optim import build_optimizer, build_scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelParts:
    """The model of a run, and details of its construction.

    Attributes:
        model: the trained model with its experts, on the device of the run.
        network: the module that training calls: the model, or its wrapper for several processes or compilation.
        parallel: the wrapper that averages gradients over ranks, None with one process.
        mof: settings of the conversion to experts.
        converted: names of the expert layers; empty for a dense run.
        routed: the expert layers that have a router.
        frozen: names of the modules that are not trained.
        dense_parameters: number of parameters without additional experts.
        training_parameters: number of parameters of `model`.
        origin: what the file of `model.pretrained` says of its training, see `PretrainedReport`; empty without one.
    """

    model: nn.Module
    network: nn.Module
    parallel: DistributedDataParallel | None
    mof: MoFConfig
    converted: list[str]
    routed: list[TopKMoE]
    frozen: list[str]
    dense_parameters: int
    training_parameters: int
    origin: Mapping[str, Any]

    def counts(self) -> dict[str, int]:
        """Return the numbers of parameters for metrics.json: in training, and of the final model."""
        final = {"routed": self.training_parameters} if self.routed else {"merged": self.dense_parameters}
        return {"training": self.training_parameters, **final}


def build_model(config: Config, runtime: Runtime, class_names: list[str], *, pretrained: bool = True) -> ModelParts:
    """Create the model, load pretrained weights, convert FFNs to experts, move it to its device and wrap it.

    Args:
        config: of the run.
        runtime: this process and the others.
        class_names: in the order of the labels.
        pretrained: load the file that `model.pretrained` names; a resumed run does not need it.

    Raises:
        InputError: the file does not match the model, no FFN matches the targets, or no module is to be frozen.
    """
    # Seeded here: a dense and a sparse run of one seed start from the same dense weights.
    seed_all(config.seed)
    model = create_for_classes(
        config.model.name, len(class_names), in_channels=config.in_channels, **config.model.kwargs
    )
    dense_parameters = count_parameters(model)
    origin: Mapping[str, Any] = {}
    if config.model.pretrained and pretrained:  # before the conversion, so that experts start as copies
        path = find_pretrained(config.model.pretrained)
        report = load_pretrained_(
            model,
            path,
            up_axis=config.model.pretrained_up_axis,
            class_names=class_names,
            channels=config.data.channels,
            description=description_beside(path),
        )
        origin = report.origin
        if runtime.is_main:
            logger.info(report.summary())
    if config.s2d.kind == "none" and is_sparse(model):
        raise InputError(f"model.name: {config.model.name} brings experts of its own; build it dense, and set s2d.kind")
    mof = config.s2d.mof()
    converted = convert_to_mof_(model, mof) if config.s2d.kind != "none" else []
    frozen = freeze_(model, config.train.freeze) if config.train.freeze else []
    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    idle = [layer.name for layer in layers if not all(p.requires_grad for p in layer.expert_parameters())]
    if idle and converted:
        raise InputError(
            f"train.freeze: freezes {idle[0]}, whose experts would stay equal; set s2d.kind: none, or freeze others"
        )
    if frozen and runtime.is_main:
        left = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        logger.info(f"frozen: {', '.join(frozen)}; {left:,} of {count_parameters(model):,} parameters are trained")
    routed = [module for module in model.modules() if isinstance(module, TopKMoE)]
    model = model.to(runtime.device)
    parallel = None
    if runtime.is_distributed:
        devices = [runtime.device] if runtime.device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=devices)
    network: nn.Module = parallel or model
    if config.train.compile:
        network = cast(nn.Module, torch.compile(network, mode=config.train.compile_mode))
    return ModelParts(
        model, network, parallel, mof, converted, routed, frozen, dense_parameters, count_parameters(model), origin
    )


def optimizer_of(config: Config, parts: ModelParts) -> torch.optim.Optimizer:
    """Return the optimizer of a run. In a dense run `s2d.lr_multiplier` applies to the FFNs that S2D would convert.

    Raises:
        InputError: there is no FFN to apply it to; see also `build_optimizer`.
    """
    optim, multiplier, scaled = config.optim, config.s2d.lr_multiplier, None
    if config.s2d.kind == "none" and multiplier != 1:
        names = names_of_experts(config, parts.mof)[1]
        if not names:
            raise InputError("s2d.lr_multiplier: no FFN to apply it to; set it to 1, or see s2d.targets and s2d.every")
        scaled = [parameter for name in names for parameter in parts.model.get_submodule(name).parameters()]
        if not any(parameter.requires_grad for parameter in scaled):
            raise InputError("s2d.lr_multiplier: train.freeze freezes the FFNs that it is for; set it to 1")
    return build_optimizer(
        parts.model, name=optim.name, lr=optim.lr, weight_decay=optim.weight_decay, lr_multiplier=multiplier,
        scaled=scaled, layer_decay=optim.layer_decay,
    )  # fmt: skip


def scheduler_of(config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """Return the learning-rate schedule of a run."""
    optim = config.optim
    return build_scheduler(
        optimizer, schedule=optim.schedule, min_lr=optim.min_lr, warmup_lr=optim.warmup_lr,
        warmup_steps=round(optim.warmup_epochs * steps_per_epoch), total_steps=steps_per_epoch * config.train.epochs,
    )  # fmt: skip


def ewa_of(config: Config, parts: ModelParts, scheduler: CosineLRScheduler, steps_per_epoch: int) -> EWA | None:
    """Return the averaging of the experts' weights; None for a dense run."""
    if not parts.converted:
        return None

    def squared_lr(update: int) -> float:
        """Return the squared ratio of an update's learning rate to the peak rate."""
        return (scheduler._get_lr(update)[0] / config.optim.lr) ** 2

    return EWA(
        parts.model, share_rate=config.s2d.share_rate, total_steps=steps_per_epoch * config.train.epochs,
        schedule=squared_lr if config.s2d.schedule == "squared_lr" else config.s2d.schedule,
        stop_fraction=config.s2d.stop_fraction,
    )  # fmt: skip


def ema_of(config: Config, parts: ModelParts) -> ModelEmaV3 | None:
    """Return the moving average of the weights; None without `train.ema_decay`."""
    return ModelEmaV3(parts.model, decay=config.train.ema_decay) if config.train.ema_decay else None


@torch.no_grad()
def try_batch(config: Config, runtime: Runtime, data: Loaders, model: nn.Module) -> None:
    """Pass the smallest batch of an epoch through the model, so that an impossible setting fails before files are made.

    The random state is set after this. Buffers are restored after the pass.

    Raises:
        InputError: the model cannot process the batch.
    """
    dataset, batch_size = data.train.dataset, config.train.batch_size
    rest = 0 if config.train.drop_last else len(dataset) % batch_size
    count = max(1, (rest or batch_size) // runtime.world_size // config.train.accum_steps)
    points, _ = dataset.batch(torch.arange(count), augment=False)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        model.train()(points.to(runtime.device))
    except (ValueError, AssertionError) as error:  # timm asserts the size of its images
        batch = f"a batch of {count} {dataset.noun} of shape {[*points.shape[1:]]}"
        if isinstance(dataset, PointCloudDataset):
            batch = f"a batch of {count} clouds of {points.shape[1]} points"
        raise InputError(f"{batch} does not pass through {config.model.name}: {error}") from error
    for buffer, before in buffers:
        buffer.copy_(before)


def describe(config: Config, runtime: Runtime, data: Loaders, parts: ModelParts) -> str:
    """Return one line that describes the model, the data and the machine of a run."""
    experts = ""
    if parts.converted:
        number, trained = parts.mof.num_experts, parts.training_parameters
        experts = f", {len(parts.converted)} FFNs as {number} experts ({trained:,} while training)"
    return (
        f"{config.model.name}: {parts.dense_parameters:,} parameters{experts}; "
        f"{len(data.train.dataset)} training and {len(data.test.dataset)} test {data.test.dataset.noun}; "
        f"{len(data.train)} updates an epoch on {runtime.device}, "
        f"{runtime.world_size} process(es), {torch.get_num_threads()} threads"
    )


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
