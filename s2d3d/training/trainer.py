"""The training recipe: setup -> train -> evaluate -> merge, resumable at every step."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..atomic import write_json, write_text
from ..config.data import check_classes
from ..config.load import Config, dump_config
from ..datasets import LabelledDataset
from ..datasets.class_folders import refuse_inside
from ..errors import TrainingError
from ..machine import environment, start_runtime, stop_runtime, watching_peers
from ..models.freeze import hold_frozen_
from ..random_state import seed_all, set_rng_state
from ..runs.checkpoint import load_weights_, model_payload, save_checkpoint
from ..runs.folder import RunFolder, find_pretrained
from ..runs.log import COLUMNS, epoch_line, epoch_row
from ..runs.metrics import run_metrics, run_summary
from ..runs.resume import Progress, check_same_data, check_same_run, read_run, restoring
from ..runs.trained_files import refuse_trained
from ..runs.training_state import checked_progress, checked_state, gather_states
from ..s2d import balance_loss
from .callbacks import Callback
from .ending import doubt, end_model
from .loaders import build_loaders
from .loggers import RunLoggers, check_loggers, open_loggers
from .optim import base_lr
from .parts import build_model, describe, ema_of, ewa_of, optimizer_of, scheduler_of, try_batch
from .signals import SignalWatch, StoppedBySignal
from .task import task_of
from .update import BALANCE, DROPPED, NORM, FiniteWatch, accumulate_gradient, clip_gradient_, nonfinite_message

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the model that a config describes. One object trains one run.

    Attributes:
        config: of the run.
        folder: the run folder, with the paths of its files.
        callbacks: the callbacks of the run, see `Callback`.
        runtime: device, rank and number of processes. `fit` creates this attribute and those below.
        data: the loaders, and the names of the classes.
        task: the loss and the evaluation of the model.
        class_names: of the model, in the order of its logits; empty for a pre-training.
        parts: details of the model's construction, such as the names of its expert layers.
        model: the trained model, with its experts.
        optimizer: its parameter groups hold the learning rate of the update.
        ewa: the averaging of the experts; None for a dense run.
        ema: the moving average of the weights; None without `train.ema_decay`.
        progress: epochs and updates made so far.
        history: the rows of log.csv so far.
        reports: the evaluations at the end of the run, by form of the model.
        logits: (n, C) of the final model at the end of the run, for the clouds of `data.scored`; None without classes.

    Example:
        >>> from s2d3d import load_config
        >>> merged = Trainer(load_config("configs/demo.yaml")).fit()  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Config,
        *,
        force: bool = False,
        datasets: tuple[LabelledDataset, LabelledDataset] | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        """Store the config. Nothing is read or written before `fit`.

        Args:
            config: from `load_config`.
            force: replace an existing run in the output folder.
            datasets: training and test set to use; default: those of `config.data`. To resume a run, pass the same
                ones.
            callbacks: called after updates, after epochs and at the end, in this order.
        """
        self.config, self.force, self.datasets, self.callbacks = config, force, datasets, tuple(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"a callback is {type(callback).__name__}, must be a subclass of s2d3d.Callback")
        self.folder, self.signals, self.loggers = RunFolder(config.output_dir), SignalWatch(), RunLoggers()

    def fit(self, resume: str | Path | None = None) -> Path:
        """Train to the last epoch, merge, evaluate; return the path of the dense model (kind topk: the routed model).

        With `train.max_steps` a run may end earlier. Then the path of its checkpoint is returned.

        Args:
            resume: a checkpoint or a run folder. For a folder, its last checkpoint is used, or the previous one if the
                last is damaged. Resuming is bit-exact on a CPU.

        Raises:
            InputError: the data is bad, the output folder holds a run, or the checkpoint belongs to another run.
            TrainingError: the loss or a gradient is not finite, or another process of the run ended.
            OSError: a checkpoint cannot be written; the previous one is unchanged.
            StoppedBySignal: SIGTERM or Ctrl-C was received; the state is saved.
        """
        cfg = self.config
        self.runtime = start_runtime(cfg.train.device, cfg.train.num_threads)
        try:
            with watching_peers(self.runtime, self.folder.root), self.folder.giving_back(StoppedBySignal):
                self._setup(resume)
                with self.signals.watching(), logging_redirect_tqdm():
                    while self.progress.epoch < cfg.train.epochs:
                        if not self._reached_max_steps():  # false for a run that is resumed at its limit
                            self._train_epoch()
                        if self._reached_max_steps():
                            return self._stop_early()
                        self._finish_epoch()
                    if self.signals.received(self.runtime, agree=True):  # during the evaluation of the last epoch
                        raise StoppedBySignal(self.signals.signum, self.folder.last)
                return self._finish_run()
        finally:
            self.loggers.close()
            self.folder.release()
            stop_runtime(self.runtime)

    # ------------------------------------------------------------------ setup

    def _setup(self, resume: str | Path | None) -> None:
        cfg, runtime = self.config, self.runtime
        checkpoint: Path | None = None
        state: dict[str, Any] | None = None
        if runtime.is_main:
            self.folder.recover()
        self._barrier()
        if resume:
            checkpoint, state = read_run(resume, warn=runtime.is_main)
            check_same_run(state, cfg, checkpoint)
        reads = [find_pretrained(cfg.model.pretrained)] if cfg.model.pretrained and not state else []
        if runtime.is_main:  # before the data, which may take minutes
            self.folder.check(resume=checkpoint, force=self.force, reads=reads)
            if cfg.data.name == "files" and self.datasets is None:
                refuse_inside(cfg.data.root, cfg.output_dir)
        check_loggers(cfg)
        self.data = build_loaders(cfg, runtime, self.datasets)
        self.steps_per_epoch = len(self.data.train)
        self.total_updates = self.steps_per_epoch * cfg.train.epochs
        self.task = task_of(cfg, runtime)
        self.task.check(self.data)
        self._build_model(pretrained=state is None)
        self._note_files(state)
        self.optimizer = optimizer_of(cfg, self.parts)
        self.scheduler = scheduler_of(cfg, self.optimizer, self.steps_per_epoch)
        self.ewa = ewa_of(cfg, self.parts, self.scheduler, self.steps_per_epoch)
        self.ema = ema_of(cfg, self.parts)
        try_batch(cfg, runtime, self.data, self.model)
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []
        # Sums over the epoch, indexed as in `update`.
        self.sums = torch.zeros(6 if self.parts.routed else 4, dtype=torch.float64, device=runtime.device)
        self.watch, self.fingerprint = FiniteWatch(runtime.device), self.data.train.dataset.fingerprint()
        seed_all(cfg.seed * 1000 + runtime.rank)  # ranks draw different partitions and drop different paths
        if state:
            with restoring(str(checkpoint)):
                self._load_state(state, str(checkpoint))
        if runtime.is_main:
            self.folder.create(resume=checkpoint, force=self.force)
        self._barrier()
        if not self.folder.owns(checkpoint):
            self._save()  # so that a run that is killed in its first epoch can resume
        if runtime.is_main:  # after the checkpoint: a folder that holds a run can be resumed
            if self.folder.is_latest(checkpoint):
                self._keep_epoch(self.progress.is_best())
            write_text(self.folder.config, dump_config(cfg))
            self.folder.write_environment(environment(), continues=self.folder.is_latest(checkpoint))
            if skipped := self.data.train.dataset.skipped:
                write_text(self.folder.skipped, "".join(f"{line}\n" for line in skipped))
            self.loggers = open_loggers(cfg, self.folder, self.history)
            if self.folder.owns(checkpoint):  # it may hold epochs that were not saved and are repeated
                self.folder.write_log(self.history, COLUMNS[cfg.task])
            if self.progress.epoch:
                self.folder.stands()
            if self.progress.epoch >= cfg.train.epochs:
                logger.info(f"{checkpoint}: all {cfg.train.epochs} epochs were trained; --extend sets a higher number")
            logger.info(describe(cfg, runtime, self.data, self.parts))

    def _build_model(self, *, pretrained: bool = True) -> None:
        self.class_names = self.task.class_names(self.data.class_names)
        self.parts = build_model(self.config, self.runtime, self.class_names, pretrained=pretrained)
        self.model, self.network = self.parts.model, self.parts.network

    def _note_files(self, state: dict[str, Any] | None) -> None:
        """Refuse test files that the pretrained model was trained on; note which files the new model was trained on."""
        origin, own = state or self.parts.origin, self.data.train.dataset.trained_files()
        advice = (
            "the file of model.pretrained; divide the files as its run did, by its data.split_seed or, if files were "
            "added, by folders train/ and test/; or remove model.pretrained"
        )
        for part, loader in {"test": self.data.test, "validation": self.data.val}.items():
            if loader and not state:
                refuse_trained(loader.dataset, origin, str(self.config.model.pretrained), advice=advice, part=part)
        # The labels of a pre-training were not seen.
        inherits = "trained_files" in origin and bool(origin.get("class_names")) == bool(self.class_names)
        self.trained_files: Tensor | None = own if self.data.train.dataset.file_hashes else None
        if inherits:
            self.trained_files = torch.cat([own, origin["trained_files"]]).unique()

    # --------------------------------------------------------------- training

    def _train_epoch(self) -> None:
        cfg, progress = self.config, self.progress
        self.network.train()
        hold_frozen_(self.model, self.parts.frozen)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        max_norm = cfg.optim.clip_grad or float("inf")
        self.data.train.set_position(progress.epoch, progress.step)
        bar = tqdm(
            total=self.steps_per_epoch, initial=progress.step, desc=f"epoch {progress.epoch + 1}/{cfg.train.epochs}",
            leave=False, disable=None if self.runtime.is_main and cfg.log.progress else True,
        )  # fmt: skip
        started = time.perf_counter()
        self.share_rate = self.ewa.last_share_rate() if self.ewa else 0.0
        with bar:
            for points, labels in self.data.train:
                self.scheduler.step_update(progress.updates)
                self.optimizer.zero_grad(set_to_none=True)
                loss = self._forward_backward(points, labels)
                grad_norm = clip_gradient_(parameters, max_norm)
                self.watch.note(loss, grad_norm, progress.updates)
                if self.runtime.device.type == "cpu":
                    self._raise_if_bad()
                self.optimizer.step()
                if self.ewa:
                    self.share_rate = self.ewa.step()
                if self.ema:
                    self.ema.update(self.model, step=progress.updates)

                self.sums[NORM] += grad_norm
                progress.step += 1
                progress.updates += 1
                now = time.perf_counter()
                progress.seconds += now - started
                started = now
                for callback in self.callbacks:
                    callback.on_update(self)
                self._after_update(bar)
                if self._reached_max_steps():
                    return

    def _forward_backward(self, points: Tensor, labels: Tensor) -> Tensor:
        """Accumulate the gradient of one global batch; return this rank's mean loss, detached."""
        device = self.runtime.device
        return accumulate_gradient(
            self.network, points.to(device, non_blocking=True), labels.to(device, non_blocking=True), sums=self.sums,
            loss=self.task.loss, num_parts=self.config.train.accum_steps, parallel=self.parts.parallel,
            extra_loss=self._balance if self.parts.routed else None, weight=self.data.train.weight(self.progress.step),
        )  # fmt: skip

    def _balance(self, share: float) -> Tensor:
        """Return the weighted balance loss of the last forward pass, times its share of the batch; add it to `sums`."""
        loss = balance_loss(self.model) * share
        self.sums[BALANCE] += loss.detach()
        routed = self.parts.routed
        dropped = [layer.dropped_fraction for layer in routed if layer.dropped_fraction is not None]
        self.sums[DROPPED] += sum(dropped) / len(routed) * share
        return self.config.s2d.balance_weight * loss

    def _raise_if_bad(self) -> None:
        update = self.watch.first_bad()
        if update is not None:
            raise TrainingError(nonfinite_message(self.data.train, update, self.folder.last_good()))

    def _after_update(self, bar: tqdm) -> None:
        """Do the work between two updates: refresh the display, save, stop on a signal."""
        cfg, progress = self.config, self.progress
        interval = progress.updates % cfg.log.interval == 0
        bar.update()
        if interval:
            self._raise_if_bad()
            if not bar.disable:
                shown = self.task.shown(self.sums.tolist())
                bar.set_postfix({key: f"{value:.{3 if 'oa' in shown else 5}f}" for key, value in shown.items()})
        every = cfg.train.checkpoint_every
        if every and progress.updates % every == 0:
            self._save()
        if self.signals.received(self.runtime, agree=interval):
            self._save()
            raise StoppedBySignal(self.signals.signum, self.folder.last)

    def _reached_max_steps(self) -> bool:
        limit = self.config.train.max_steps
        return limit is not None and limit <= self.progress.updates < self.total_updates

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
        row = epoch_row(
            progress, sums, lr=base_lr(self.optimizer), share_rate=self.share_rate,
            steps_per_epoch=self.steps_per_epoch, sparse_model=self.model if self.ewa else None, task=cfg.task,
        )  # fmt: skip
        if self.data.val:
            row |= self.task.columns("val", self.task.evaluate(self.model, self.data.val))
        due = cfg.eval.every and cfg.eval.split == "test" and (progress.epoch + 1) % cfg.eval.every == 0
        if due and progress.epoch + 1 < cfg.train.epochs:
            report = self.task.evaluate(self.model, self.data.test)
            row |= self.task.columns("test", report)
            self.loggers.report("test", report, progress.epoch + 1)
        self.history.append(row)
        self.loggers.row(row)  # before the checkpoint: rows that it lacks are replaced on resume
        progress.epoch, progress.step, progress.seconds = progress.epoch + 1, 0, 0.0
        self.sums.zero_()
        for callback in self.callbacks:
            callback.on_epoch(self)
        # best.pt is a copy of last.pt: only an epoch that is saved can be the best one.
        saves = progress.epoch % cfg.train.save_every == 0 or progress.epoch == cfg.train.epochs
        is_best = saves and progress.select(row)
        if saves:
            self._save()
        if self.runtime.is_main:
            self._keep_epoch(is_best)
            self.folder.write_log(self.history, COLUMNS[cfg.task])
            if saves:
                self.folder.stands()
            logger.info(epoch_line(row, cfg.train.epochs))

    def _keep_epoch(self, is_best: bool) -> None:
        """Keep the state of last.pt. A resumed run calls this at its start, in case it was killed before this step."""
        every, progress = self.config.train.keep_every, self.progress
        if is_best:
            self.folder.mark_best()
        if every and progress.epoch and progress.step == 0 and progress.epoch % every == 0:
            save_checkpoint(self.folder.kept(progress.epoch), self._payload(self.model))

    # ----------------------------------------------------------------- ending

    def _finish_run(self) -> Path:
        """Evaluate the sparse model, merge it, evaluate the merged model, and write the model and the results."""
        cfg, scored = self.config, self.data.scored
        model, reports, kept, self.logits = end_model(
            cfg, self.runtime, self.data, self.parts, self.task, self.ema, self.progress.updates
        )
        line = doubt(model, reports, kept, self.data, self.task, self.history[-1].get("train_oa", 0.0))
        if line and self.runtime.is_main:
            logger.warning(line)
        path = self.folder.final if self.parts.routed else self.folder.merged
        if self.runtime.is_main:
            save_checkpoint(path, self._payload(model))
            metrics = run_metrics(
                reports, progress=self.progress, seed=cfg.seed, parameters=self.parts.counts(),
                train_seconds=sum(row["seconds"] for row in self.history), split=cfg.eval.split,
                shapes=scored.dataset.names, kept=kept, task=cfg.task,
            )  # fmt: skip
            write_json(self.folder.metrics, metrics)
            self.loggers.finish(reports, scored.dataset, self.progress.epoch)
            self.folder.write_log(self.history, COLUMNS[cfg.task])
            self.folder.stands()
        self._barrier()
        self.reports = reports
        for callback in self.callbacks:
            callback.on_finish(self)
        return path

    def summary(self) -> str:
        """Return the table that ends a finished run: evaluations, parameters, run folder."""
        training, final = self.parts.counts().values()
        return run_summary(
            self.reports, folder=self.folder, split=self.config.eval.split, sparse=bool(self.parts.converted),
            training_parameters=training, final_parameters=final,
        )  # fmt: skip

    # ------------------------------------------------------------------ state

    def _payload(self, model: nn.Module) -> dict[str, Any]:
        cfg = self.config
        payload = model_payload(
            model, name=cfg.model.name, in_channels=cfg.in_channels, kwargs=cfg.model.kwargs,
            class_names=self.class_names, mof=self.parts.mof, config=cfg.to_dict(), channels=cfg.data.channels,
        )  # fmt: skip
        return payload | ({} if self.trained_files is None else {"trained_files": self.trained_files})

    def _barrier(self) -> None:
        if self.runtime.is_distributed:
            dist.barrier()

    def _save(self) -> None:
        """Write last.pt. Every rank must call this, because each rank has its own random state."""
        self._raise_if_bad()
        states, sums = gather_states(self.runtime, self.sums)
        if self.runtime.is_main:
            payload = self._payload(self.model) | {
                "optimizer": self.optimizer.state_dict(),
                "ewa": self.ewa.state_dict() if self.ewa else None,
                "ema": self.ema.state_dict() if self.ema else None,
                "progress": vars(self.progress).copy(),
                "sums": [part.cpu() for part in sums],
                "history": self.history,
                "rng": states,
                "data": self.fingerprint,
            }
            save_checkpoint(self.folder.last, payload, previous=self.folder.previous)
        self._barrier()

    def _load_state(self, state: dict[str, Any], where: str) -> None:
        """Take over a training state; all of it is checked before any of it is used."""
        progress, history = checked_progress(state, where, epochs=self.config.train.epochs, task=self.config.task)
        if self.class_names:
            check_classes(self.data.train.dataset, state["class_names"], where)
        runtime = self.runtime
        check_same_data(
            state, progress, where, root=self.config.data.root, steps_per_epoch=self.steps_per_epoch,
            fingerprint=self.fingerprint, world_size=runtime.world_size,
        )  # fmt: skip
        checked = checked_state(
            state, where, progress.updates, optimizer=self.optimizer, ewa=self.ewa is not None, ema=self.ema,
            sums=self.sums, device=runtime.device, ranks=runtime.world_size,
        )  # fmt: skip
        load_weights_(self.model, state["state_dict"], where=where)
        for key, part in (("optimizer", self.optimizer), ("ewa", self.ewa), ("ema", self.ema)):
            if part is not None:
                part.load_state_dict(checked[key])
        self.progress, self.history = progress, history
        self.sums.copy_(checked["sums"][runtime.rank])
        set_rng_state(checked["rng"][runtime.rank], runtime.device)
