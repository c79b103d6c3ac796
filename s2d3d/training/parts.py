"""What a training consists of, made from a config: loaders, model, optimizer, EWA. The trainer sets it in motion."""

import logging
from typing import cast

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config.load import Config
from ..datasets import PointCloudDataset
from ..errors import InputError
from ..evaluation.batchnorm import names_of_experts
from ..machine import Runtime
from ..models import create_model, load_pretrained_
from ..random_state import seed_all
from ..s2d import EWA, TopKMoE, convert_to_mof_
from .loaders import build_loaders
from .optim import build_optimizer, build_scheduler

logger = logging.getLogger(__name__)


class TrainingParts:
    """Loaders, model, optimizer and EWA of one run, built in this order."""

    runtime: Runtime

    def __init__(self, config: Config, datasets: tuple[PointCloudDataset, PointCloudDataset] | None) -> None:
        """Keep what the parts are made from."""
        self.config, self.datasets = config, datasets

    def _build_data(self) -> None:
        loaders = build_loaders(self.config, self.runtime, self.datasets)
        self.class_names, self.train_loader, self.plain_train_loader = (
            loaders.class_names, loaders.train, loaders.plain_train,
        )  # fmt: skip
        self.test_loader, self.val_loader, self.scored_loader = loaders.test, loaders.val, loaders.scored
        self.steps_per_epoch = len(self.train_loader)
        self.total_updates = self.steps_per_epoch * self.config.train.epochs

    def _build_model(self, resume: bool = False) -> None:
        cfg, runtime = self.config, self.runtime
        # Seeded here: a dense and a sparse run of one seed start from the same dense weights.
        seed_all(cfg.seed)
        dense = create_model(cfg.model.name, num_classes=len(self.class_names), **cfg.model.kwargs)
        self.dense_parameters = sum(p.numel() for p in dense.parameters())
        if cfg.model.pretrained and not resume:  # before the conversion, so that experts start as copies
            report = load_pretrained_(dense, cfg.model.pretrained, up_axis=cfg.model.pretrained_up_axis)
            if runtime.is_main:
                logger.info(report.summary())
        self.mof = cfg.s2d.mof()
        self.converted = convert_to_mof_(dense, self.mof) if cfg.s2d.kind != "none" else []
        self.routed = [module for module in dense.modules() if isinstance(module, TopKMoE)]
        self.model = dense.to(runtime.device)
        self.training_parameters = sum(p.numel() for p in self.model.parameters())
        self._wrap_model()

    def _wrap_model(self) -> None:
        cfg, runtime = self.config, self.runtime
        self.parallel: DistributedDataParallel | None = None
        if runtime.is_distributed:
            devices = [runtime.device] if runtime.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=devices)
        self.network: nn.Module = self.parallel or self.model
        if cfg.train.compile:
            self.network = cast(nn.Module, torch.compile(self.network, mode=cfg.train.compile_mode))

    def _build_optimizer(self) -> None:
        cfg, optim = self.config, self.config.optim
        self.optimizer = build_optimizer(
            self.model,
            name=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            lr_multiplier=cfg.s2d.lr_multiplier,
            scaled=self._dense_ffns() if cfg.s2d.kind == "none" and cfg.s2d.lr_multiplier != 1 else None,
        )
        self.scheduler = build_scheduler(
            self.optimizer,
            schedule=optim.schedule,
            min_lr=optim.min_lr,
            warmup_lr=optim.warmup_lr,
            warmup_steps=round(optim.warmup_epochs * self.steps_per_epoch),
            total_steps=self.total_updates,
        )
        self.ewa: EWA | None = None
        if self.converted:
            self.ewa = EWA(
                self.model, share_rate=cfg.s2d.share_rate, total_steps=self.total_updates,
                schedule=self._squared_lr if cfg.s2d.schedule == "squared_lr" else cfg.s2d.schedule,
                stop_fraction=cfg.s2d.stop_fraction,
            )  # fmt: skip
        self.ema = ModelEmaV3(self.model, decay=cfg.train.ema_decay) if cfg.train.ema_decay else None

    def _dense_ffns(self) -> list[nn.Parameter]:
        """Return the parameters of the FFNs that the S2D run of this config would convert."""
        names = names_of_experts(self.config, self.mof)
        return [parameter for name in names for parameter in self.model.get_submodule(name).parameters()]

    def _squared_lr(self, update: int) -> float:
        """Return the square of the rate of an update relative to the peak rate."""
        return (self.scheduler._get_lr(update)[0] / self.config.optim.lr) ** 2

    @torch.no_grad()
    def _try_batch(self) -> None:
        """Pass the smallest batch of an epoch through the model: what cannot work fails before it leaves a trace.

        Random state is set after this; what the pass does to buffers is taken back.
        """
        cfg, train = self.config, self.train_loader.dataset
        rest = 0 if cfg.train.drop_last else len(train) % cfg.train.batch_size
        count = max(1, (rest or cfg.train.batch_size) // self.runtime.world_size // cfg.train.accum_steps)
        points, _ = train.batch(torch.arange(count), augment=False)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            self.model.train()(points.to(self.runtime.device))
        except ValueError as error:
            batch = f"a batch of {count} clouds of {points.shape[1]} points"
            raise InputError(f"{batch} does not pass through {cfg.model.name}: {error}") from error
        for buffer, before in buffers:
            buffer.copy_(before)

    def _describe(self) -> str:
        sparse = sum(p.numel() for p in self.model.parameters())
        experts = (
            f", {len(self.converted)} FFNs as {self.mof.num_experts} experts ({sparse:,} while training)"
            if self.converted
            else ""
        )
        return (
            f"{self.config.model.name}: {self.dense_parameters:,} parameters{experts}; "
            f"{len(self.train_loader.dataset)} training and {len(self.test_loader.dataset)} test shapes; "
            f"{self.steps_per_epoch} updates an epoch on {self.runtime.device}, "
            f"{self.runtime.world_size} process(es), {torch.get_num_threads()} threads"
        )
