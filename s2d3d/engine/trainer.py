"""The training recipe: setup -> train -> evaluate -> merge, resumable at every step."""

import contextlib
import copy
import gc
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..datasets import BatchLoader, PointCloudDataset, same_data, split_train_validation
from ..errors import InputError, TrainingError
from ..models import create_model, load_pretrained_
from ..s2d import EWA, TopKMoE, balance_loss, convert_to_mof_, merge_experts
from ..s2d.analysis import expert_divergence
from .checkpoint import load_weights_, model_payload, save_checkpoint
from .config import Config, dump_config
from .data import build_dataset, build_test_loader, check_classes
from .diagnosis import nonfinite_message
from .evaluator import ClassificationReport, evaluate, recalibrate_batchnorm_
from .loggers import RunLoggers, check_loggers, open_loggers
from .midway import merge_midway_
from .optim import build_optimizer, build_scheduler
from .results import norms_behind_experts, run_metrics, run_summary
from .resume import Progress, check_same_run, read_run, restoring, selection_score
from .run_folder import RunFolder, write_json, write_text
from .runtime import (
    environment,
    package_versions,
    rng_state,
    seed_all,
    set_rng_state,
    start_runtime,
    stop_runtime,
    watching_peers,
)  # fmt: skip
from .signals import SignalWatch, StoppedBySignal

logger = logging.getLogger(__name__)

LOG_COLUMNS = (
    "epoch", "updates", "lr", "share_rate", "divergence", "train_loss", "train_oa", "grad_norm",
    "balance_loss", "dropped", "val_oa", "test_oa", "test_macc", "seconds",
)  # fmt: skip


class Trainer:
    """Trains the model that a config describes; one object, one run.

    Example:
        >>> from s2d3d import load_config
        >>> merged = Trainer(load_config("configs/demo.yaml")).fit()  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Config,
        *,
        force: bool = False,
        datasets: tuple[PointCloudDataset, PointCloudDataset] | None = None,
    ) -> None:
        """Keep the config; nothing is read or written before `fit`.

        Args:
            config: from `load_config`.
            force: replace a run that the output folder holds.
            datasets: training and test set to use; default those that `config.data` describes. A run that resumes
                must be given the same again.
        """
        self.config, self.force, self.datasets = config, force, datasets
        self.folder, self.signals, self.loggers = RunFolder(config.output_dir), SignalWatch(), RunLoggers()

    def fit(self, resume: str | Path | None = None) -> Path:
        """Train to the last epoch, evaluate, merge; return the path of the dense model (kind topk: of the routed one).

        With `train.max_steps` a run may end earlier; the path is then that of its checkpoint.

        Args:
            resume: a checkpoint, or a run folder whose last one is meant; if that is damaged, the one before it. On a
                CPU the run continues bit for bit.

        Raises:
            InputError: bad data, an output folder that holds a run, a checkpoint of another run.
            TrainingError: loss or gradient is not finite; another process of the run is gone.
            OSError: a checkpoint cannot be written; the one before it is as it was.
            StoppedBySignal: SIGTERM or Ctrl-C; the state has been saved.
        """
        cfg = self.config
        self.runtime = start_runtime(cfg.train.device, cfg.train.num_threads)
        try:
            with watching_peers(self.runtime, self.folder.root):
                self._setup(resume)
                with self.signals.watching(), logging_redirect_tqdm():
                    while self.progress.epoch < cfg.train.epochs:
                        self._train_epoch()
                        if self._reached_max_steps():
                            return self._stop_early()
                        self._finish_epoch()
                return self._finish_run()
        finally:
            self.loggers.close()
            self.folder.release()
            stop_runtime(self.runtime)

    # ------------------------------------------------------------------ setup

    def _setup(self, resume: str | Path | None) -> None:
        cfg, runtime = self.config, self.runtime
        checkpoint, state = read_run(resume, warn=runtime.is_main) if resume else (None, None)
        if state:
            check_same_run(state, cfg, checkpoint)
        if runtime.is_main:  # before the data, which may take minutes
            self.folder.check(resume=checkpoint, force=self.force)
        check_loggers(cfg)
        if not state and cfg.model.pretrained and not Path(cfg.model.pretrained).is_file():
            raise InputError(f"model.pretrained: no such file {cfg.model.pretrained}")  # before data is prepared for it
        self._build_data()
        self._build_model(resume=state is not None)
        self._build_optimizer()
        self._try_batch()
        self.progress, self.history = Progress(), []
        # Sums over the epoch: loss, correct, samples, gradient norm; with routers also balance loss, dropped fraction.
        self.sums = torch.zeros(6 if self.routed else 4, dtype=torch.float64, device=runtime.device)
        self.versions, self.fingerprint = package_versions(), self.train_loader.dataset.fingerprint()
        self.bad_update = torch.full((), -1, dtype=torch.int64, device=runtime.device)
        seed_all(cfg.seed * 1000 + runtime.rank)  # ranks draw different partitions and drop different paths
        if state:
            with restoring(str(checkpoint)):
                self._load_state(state, str(checkpoint))
        if runtime.is_main:
            self.folder.create(resume=checkpoint, force=self.force)
        if runtime.is_distributed:
            dist.barrier()
        if not self.folder.owns(checkpoint):
            self._save()  # a run that is killed in its first epoch resumes as well
        if runtime.is_main:  # after the checkpoint: a folder that holds a run can be resumed
            if self.folder.is_latest(checkpoint):
                self._keep_epoch(self.progress.is_best(self.history))
            write_text(self.folder.config, dump_config(cfg))
            write_json(self.folder.environment, environment())
            self.loggers = open_loggers(cfg, self.folder, self.history, fresh=not self.folder.owns(checkpoint))
            logger.info(self._describe())

    def _build_data(self) -> None:
        cfg, runtime = self.config, self.runtime
        train, test = self.datasets or (build_dataset(cfg.data, split, seed=cfg.seed) for split in ("train", "test"))
        if train.class_names != test.class_names:
            raise InputError(f"{cfg.data.root}: training and test split have different classes")
        validation = None
        if cfg.data.val_fraction:
            train, validation = split_train_validation(train, cfg.data.val_fraction, cfg.seed)
        self.class_names = train.class_names
        ranks = dict(rank=runtime.rank, world_size=runtime.world_size)
        micro = cfg.train.accum_steps * runtime.world_size
        if cfg.train.batch_size % micro:
            raise InputError(
                f"train.batch_size is {cfg.train.batch_size}, must be divisible by accum_steps x processes = {micro}"
            )
        self.train_loader = BatchLoader(
            train, cfg.train.batch_size, shuffle=True, drop_last=cfg.train.drop_last, seed=cfg.seed, prefetch=2,
            pin_memory=runtime.device.type == "cuda", **ranks,
        )
        tests = dict(batch_size=cfg.eval.batch_size, seed=cfg.seed, **ranks)
        self.test_loader = build_test_loader(test, cfg.data, **tests)
        self.val_loader = build_test_loader(validation, cfg.data, **tests) if validation else None
        self.scored_loader = self.val_loader if cfg.eval.split == "validation" else self.test_loader
        self.plain_train_loader = BatchLoader(train, cfg.eval.batch_size, augment=False)
        self.steps_per_epoch = len(self.train_loader)
        self.total_updates = self.steps_per_epoch * cfg.train.epochs

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
        self.network: nn.Module = self.model
        if runtime.is_distributed:
            devices = [runtime.device] if runtime.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=devices)
        if cfg.train.compile:
            self.network = torch.compile(self.network, mode=cfg.train.compile_mode)

    def _build_optimizer(self) -> None:
        cfg = self.config
        self._schedule(self._new_optimizer(self.model))
        self.ewa, self.merge_at = None, None
        if self.converted:
            active = self.total_updates
            if cfg.s2d.active_fraction < 1:
                active = self.merge_at = max(1, round(cfg.s2d.active_fraction * self.total_updates))
            self.ewa = EWA(
                self.model, share_rate=cfg.s2d.share_rate, schedule=cfg.s2d.schedule, total_steps=active,
                stop_fraction=cfg.s2d.stop_fraction, rise_fraction=cfg.s2d.rise_fraction,
                optimizer=self.optimizer if cfg.s2d.average_moments else None,
            )  # fmt: skip
        self.ema = ModelEmaV3(self.model, decay=cfg.train.ema_decay) if cfg.train.ema_decay else None

    def _new_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optim, multiplier = self.config.optim, self.config.s2d.lr_multiplier
        return build_optimizer(
            model, name=optim.name, lr=optim.lr, weight_decay=optim.weight_decay, lr_multiplier=multiplier
        )

    def _schedule(self, optimizer: torch.optim.Optimizer) -> None:
        cfg = self.config
        self.optimizer = optimizer
        self.scheduler = build_scheduler(
            self.optimizer,
            schedule=cfg.optim.schedule,
            min_lr=cfg.optim.min_lr,
            warmup_lr=cfg.optim.warmup_lr,
            warmup_steps=round(cfg.optim.warmup_epochs * self.steps_per_epoch),
            total_steps=self.total_updates,
        )

    def _leave_experts(self) -> None:
        """Merge the experts and go on dense (`s2d.active_fraction`); everything that holds parameters follows."""
        self.share_rate = 0.0
        self.network = self.ewa = None  # DDP takes its hooks off the parameters before they are wrapped again
        gc.collect()
        self._schedule(merge_midway_(self.model, self.optimizer, self._new_optimizer))
        self.scheduler.step_update(max(0, self.progress.updates - 1))  # the log shows the rate of the last update
        if self.ema:
            merge_experts(self.ema.module, inplace=True)
        self._wrap_model()
        self.network.train()

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

    # --------------------------------------------------------------- training

    def _train_epoch(self) -> None:
        cfg, progress = self.config, self.progress
        self.network.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        max_norm = cfg.optim.clip_grad or float("inf")
        self.train_loader.set_position(progress.epoch, progress.step)
        bar = tqdm(
            total=self.steps_per_epoch, initial=progress.step, desc=f"epoch {progress.epoch + 1}/{cfg.train.epochs}",
            leave=False, disable=None if self.runtime.is_main and cfg.log.progress else True,
        )  # fmt: skip
        started = time.perf_counter()
        self.share_rate = self.ewa.last_share_rate() if self.ewa else 0.0
        with bar:
            for points, labels in self.train_loader:
                self.scheduler.step_update(progress.updates)
                self.optimizer.zero_grad(set_to_none=True)
                loss = self._forward_backward(points, labels)
                grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
                self._note_finite(loss, grad_norm)
                self.optimizer.step()
                if self.ewa:
                    self.share_rate = self.ewa.step()
                if self.ema:
                    self.ema.update(self.model, step=progress.updates)

                self.sums[3] += grad_norm
                progress.step += 1
                progress.updates += 1
                if progress.updates == self.merge_at:
                    self._leave_experts()
                    parameters = [p for p in self.model.parameters() if p.requires_grad]
                now = time.perf_counter()
                progress.seconds += now - started
                started = now
                self._after_update(bar)
                if self._reached_max_steps():
                    return

    def _forward_backward(self, points: Tensor, labels: Tensor) -> Tensor:
        """Accumulate the gradient of one global batch; return this rank's mean loss, detached."""
        cfg, device = self.config, self.runtime.device
        points, labels = points.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        micro = cfg.train.accum_steps
        total = torch.zeros((), device=device)
        parts = [part for part in zip(points.tensor_split(micro), labels.tensor_split(micro)) if len(part[1])]
        for index, (part, target) in enumerate(parts):
            last = index == len(parts) - 1
            synchronise = (
                contextlib.nullcontext() if last or not self.runtime.is_distributed else self.network.no_sync()
            )
            with synchronise:
                with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.amp == "bf16"):
                    logits = self.network(part)
                loss = F.cross_entropy(logits.float(), target, label_smoothing=cfg.train.label_smoothing)
                share = len(target) / len(labels)
                weighted = loss * share
                (weighted + self._balance(share) if self.routed else weighted).backward()
            total += weighted.detach()
            self.sums[1] += (logits.detach().argmax(1) == target).sum()
        self.sums[0] += total.double() * len(labels)
        self.sums[2] += len(labels)
        return total

    def _balance(self, share: float) -> Tensor:
        """Return the weighted balance loss of the pass just made, a share of its batch, and note it for the log."""
        loss = balance_loss(self.model) * share
        self.sums[4] += loss.detach()
        self.sums[5] += sum(layer.dropped_fraction for layer in self.routed) / len(self.routed) * share
        return self.config.s2d.balance_weight * loss

    def _note_finite(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Remember the first update with a non-finite loss or gradient, without waiting for the device."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        self.bad_update = torch.where(bad & (self.bad_update < 0), self.progress.updates, self.bad_update)
        if self.runtime.device.type == "cpu":
            self._raise_if_bad()

    def _raise_if_bad(self) -> None:
        update = int(self.bad_update)
        if update >= 0:
            good = self.folder.last if self.folder.last.exists() else "none"
            raise TrainingError(nonfinite_message(self.train_loader, update, good))

    def _after_update(self, bar: tqdm) -> None:
        """Do what must happen between two updates: refresh the display, save, obey signals."""
        cfg, progress = self.config, self.progress
        interval = progress.updates % cfg.log.interval == 0
        bar.update()
        if interval:
            self._raise_if_bad()
            if not bar.disable:
                loss, correct, samples = self.sums[:3].tolist()
                bar.set_postfix(loss=f"{loss / samples:.3f}", oa=f"{correct / samples:.3f}")
        every = cfg.train.checkpoint_every
        if every and progress.updates % every == 0:
            self._save()
        if self._signal_received(check=interval):
            self._save()
            raise StoppedBySignal(self.signals.signum, self.folder.last)

    def _reached_max_steps(self) -> bool:
        limit = self.config.train.max_steps
        if limit is None or self.progress.updates < limit:
            return False
        return self.progress.updates < self.total_updates

    def _stop_early(self) -> Path:
        self._save()
        if self.runtime.is_main:
            limit = self.config.train.max_steps
            logger.info(f"stopped after {limit} updates (train.max_steps); continue with --resume {self.folder.root}")
        return self.folder.last

    def _finish_epoch(self) -> None:
        cfg, progress = self.config, self.progress
        self._raise_if_bad()
        sums = self.sums.clone()
        if self.runtime.is_distributed:
            dist.all_reduce(sums)
            sums[3:] /= self.runtime.world_size
            for buffer in self.model.buffers():  # BatchNorm statistics differ between ranks
                dist.broadcast(buffer, 0)
        loss, correct, samples, norms, *routing = sums.tolist()
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1, "updates": progress.updates, "lr": self.optimizer.param_groups[0]["lr"],
            "share_rate": self.share_rate, "train_loss": loss / samples, "train_oa": correct / samples,
            "grad_norm": norms / self.steps_per_epoch, "seconds": progress.seconds,
        }  # fmt: skip
        if self.ewa:
            by_layer = expert_divergence(self.model)
            row["divergence"] = sum(by_layer.values()) / len(by_layer)
        if self.routed:
            row["balance_loss"], row["dropped"] = (total / self.steps_per_epoch for total in routing)
        if self.val_loader:
            row["val_oa"] = self._evaluate(self.model, self.val_loader).oa
        due = cfg.eval.every and cfg.eval.split == "test" and (progress.epoch + 1) % cfg.eval.every == 0
        if due and progress.epoch + 1 < cfg.train.epochs:
            report = self._evaluate(self.model, self.test_loader)
            row["test_oa"], row["test_macc"] = report.oa, report.macc
            self.loggers.report("test", report, progress.epoch + 1)
        self.history.append(row)
        self.loggers.row(row)  # before the checkpoint: what it does not know of is superseded on resume
        progress.epoch, progress.step, progress.seconds = progress.epoch + 1, 0, 0.0
        self.sums.zero_()
        is_best = self._select(row)
        self._save()
        if self.runtime.is_main:
            self._keep_epoch(is_best)
            self.folder.write_log(self.history, LOG_COLUMNS)
            left = str(timedelta(seconds=round(row["seconds"] * (cfg.train.epochs - row["epoch"]))))
            tested = "".join(f", {key} {100 * row[key]:.2f} %" for key in ("val_oa", "test_oa") if key in row)
            logger.info(
                f"epoch {row['epoch']}/{cfg.train.epochs}: loss {row['train_loss']:.4f}, "
                f"train_oa {100 * row['train_oa']:.2f} %{tested}, "
                f"lr {row['lr']:.2e}, share_rate {row['share_rate']:.3f}, {row['seconds']:.0f} s, {left} left"
            )

    def _keep_epoch(self, is_best: bool) -> None:
        """Keep the state that last.pt holds; at a start too, for a run that was killed before it came to this."""
        every, progress = self.config.train.keep_every, self.progress
        if is_best:
            self.folder.mark_best()
        if every and progress.epoch and progress.step == 0 and progress.epoch % every == 0:
            save_checkpoint(self.folder.kept(progress.epoch), self._payload(self.model))

    def _select(self, row: dict[str, Any]) -> bool:
        """Tell whether this epoch is the best so far."""
        score = selection_score(row)
        if self.progress.best is not None and score <= self.progress.best:
            return False
        self.progress.best = score
        return True

    # ----------------------------------------------------------------- ending

    def _finish_run(self) -> Path:
        """Evaluate the sparse model, merge it, evaluate the merged one, and write both results.

        Experts that a router chooses stay: the model is evaluated as it is, and nothing is merged.
        """
        cfg = self.config
        final, path = (copy.deepcopy, self.folder.final) if self.routed else (merge_experts, self.folder.merged)
        model = final(self.model)
        reports = {"sparse": self._evaluate(self.model, self.scored_loader)} if self.ewa and not self.routed else {}
        reports["routed" if self.routed else "merged"] = self._evaluate(model, self.scored_loader)
        if self.ema:
            reports["ema"] = self._evaluate(final(self.ema.module), self.scored_loader)
        if cfg.eval.recalibrate_batchnorm and (norms := norms_behind_experts(model, cfg, self.converted, self.mof)):
            recalibrate_batchnorm_(model, self.plain_train_loader, device=self.runtime.device, layers=norms)
            reports["recalibrated"] = self._evaluate(model, self.scored_loader)
        if cfg.eval.votes > 1:
            reports["voting"] = self._evaluate(model, self.scored_loader, votes=cfg.eval.votes)
        if self.runtime.is_main:
            save_checkpoint(path, self._payload(model))
            metrics = run_metrics(
                reports, progress=self.progress, seed=cfg.seed, parameters=self._parameter_counts(),
                train_seconds=sum(row["seconds"] for row in self.history), split=cfg.eval.split,
                shapes=self.scored_loader.dataset.names,
            )  # fmt: skip
            write_json(self.folder.metrics, metrics)
            self.loggers.finish(reports, self.scored_loader.dataset, self.progress.epoch)
            self.folder.write_log(self.history, LOG_COLUMNS)
        if self.runtime.is_distributed:
            dist.barrier()
        self.reports = reports
        return path

    def _parameter_counts(self) -> dict[str, int]:
        training = self.training_parameters
        return {"training": training, **({"routed": training} if self.routed else {"merged": self.dense_parameters})}

    def summary(self) -> str:
        """Return the table that ends a finished run: accuracies, parameters, run folder."""
        training, final = self._parameter_counts().values()
        return run_summary(
            self.reports, folder=self.folder, sparse=bool(self.converted),
            training_parameters=training, final_parameters=final,
        )  # fmt: skip

    def _evaluate(self, model: nn.Module, loader: BatchLoader, votes: int = 1) -> ClassificationReport:
        progress = self.runtime.is_main and self.config.log.progress
        return evaluate(model, loader, device=self.runtime.device, votes=votes, progress=progress)

    # ------------------------------------------------------------------ state

    def _payload(self, model: nn.Module) -> dict[str, Any]:
        cfg = self.config
        return model_payload(
            model, name=cfg.model.name, in_channels=3, kwargs=cfg.model.kwargs, class_names=self.class_names,
            mof=self.mof, config=cfg.to_dict(),
        )  # fmt: skip

    def _save(self) -> None:
        """Write last.pt; every rank takes part, because each has random state of its own."""
        self._raise_if_bad()
        states: list[Any] = [rng_state(self.runtime.device)]
        if self.runtime.is_distributed:
            states = [None] * self.runtime.world_size
            dist.all_gather_object(states, rng_state(self.runtime.device))
            sums = [torch.zeros_like(self.sums) for _ in states]
            dist.all_gather(sums, self.sums)
        else:
            sums = [self.sums]
        if self.runtime.is_main:
            payload = self._payload(self.model) | {
                "optimizer": self.optimizer.state_dict(),
                "ewa": self.ewa.state_dict() if self.ewa else None,
                "ema": self.ema.state_dict() if self.ema else None,
                "progress": vars(self.progress).copy(),
                "sums": [part.cpu() for part in sums],
                "history": self.history,
                "rng": states,
                "versions": self.versions,
                "data": self.fingerprint,
            }
            save_checkpoint(self.folder.last, payload, previous=self.folder.previous)
        if self.runtime.is_distributed:
            dist.barrier()

    def _load_state(self, state: dict[str, Any], where: str) -> None:
        progress, history = Progress.restored(state)
        check_classes(self.train_loader.dataset, state["class_names"], where)
        if progress.updates != progress.epoch * self.steps_per_epoch + progress.step:
            raise InputError(
                f"{where}: was trained on more or fewer shapes than {self.config.data.root} has; resume on its own data"
            )
        if "data" in state and not same_data(state["data"], self.fingerprint):
            raise InputError(
                f"{where}: was trained on other clouds than those in {self.config.data.root}; resume on its own data"
            )
        if len(state["rng"]) != self.runtime.world_size:
            raise InputError(
                f"{where}: was written by {len(state['rng'])} processes, this run has {self.runtime.world_size}"
            )
        if self.merge_at and progress.updates >= self.merge_at:
            self._leave_experts()
        load_weights_(self.model, state["state_dict"], where=where)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ewa:
            self.ewa.load_state_dict(state["ewa"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.progress, self.history = progress, history
        self.sums.copy_(state["sums"][self.runtime.rank])
        set_rng_state(state["rng"][self.runtime.rank], self.runtime.device)

    def _signal_received(self, check: bool) -> bool:
        """Tell whether any rank was told to stop; ranks agree every `log.interval` updates."""
        if not self.runtime.is_distributed:
            return self.signals.signum != 0
        if not check:
            return False
        received = torch.tensor(self.signals.signum, device=self.runtime.device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        self.signals.signum = int(received)
        return self.signals.signum != 0
