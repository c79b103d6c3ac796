"""Lightning: EWA after each update, and the merged model at the end of the training."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic import check_parent, replacing
from ..errors import InputError
from ..optional import optional
from ..random_state import rng_state, set_rng_state
from ..s2d import merge_experts
from .updates import Averaging

with optional("lightning", "s2d3d.integrations.lightning", extra="integrations"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy


class S2DCallback(Callback):
    """Averages the experts after each optimizer update of a Lightning Trainer, and saves the merged model at the end.

    Convert the module, or the model in it, before `trainer.fit`. Then:

    - EWA follows each update, also with gradient accumulation, mixed precision and manual optimization. A step that the
      gradient scaler skips is not an update.
    - Checkpoints hold the position in the schedule, and `trainer.fit(ckpt_path=...)` restores it.
    - Checkpoints of one process hold the states of the global random generators too, from which the partitions are
      drawn. Lightning does not save them. A training that is resumed from the end of an epoch gives the weights of an
      uninterrupted one.
    - At the end the merged state dict is written to `merged_path`. The module itself stays sparse, as
      `trainer.test(ckpt_path="best")` needs it.

    Works on one process and under DDP; DeepSpeed and FSDP are refused.

    Example:
        >>> callback = S2DCallback(share_rate=0.3, merged_path="merged.pt")
        >>> Trainer(max_epochs=10, callbacks=[callback]).fit(module, batches)  # doctest: +SKIP
        >>> Classifier().load_state_dict(torch.load("merged.pt"))  # doctest: +SKIP
        <All keys matched successfully>
    """

    def __init__(
        self,
        *,
        share_rate: float,
        schedule: str | Callable[[int], float] = "linear",
        stop_fraction: float = 1.0,
        total_steps: int | None = None,
        merged_path: str | os.PathLike | None = None,
    ) -> None:
        """Prepare the callback; EWA checks its settings when the training begins.

        Args:
            share_rate: b at the end of the schedule, in [0, (K - 1) / K] for K experts.
            schedule: see `EWA`.
            stop_fraction: see `EWA`.
            total_steps: optimizer updates of the whole training; default: what Lightning estimates. Needed with manual
                optimization and without a limit of epochs or steps.
            merged_path: file for the merged state dict of the module, in an existing folder; None writes none.
        """
        self.total_steps = total_steps
        self.merged_path = None if merged_path is None else Path(merged_path)
        self._averaging = Averaging(share_rate=share_rate, schedule=schedule, stop_fraction=stop_fraction)
        self._device = torch.device("cpu")
        self._fitting = self._alone = False
        self._restored: int | None = None

    @property
    def num_steps(self) -> int:
        """Updates that EWA followed so far, those before a resume included."""
        return self._averaging.num_steps

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints keep: the position in the schedule, and the random state of a single process."""
        state: dict[str, Any] = {"num_steps": self.num_steps}
        return {**state, "random": rng_state(self._device)} if self._alone else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for `on_train_start`; restore the random state.

        Lightning calls it before it makes the iterators of the data, which draw from the generators first.
        """
        if self._fitting:
            self._restored = int(state_dict["num_steps"])
            if self._alone and "random" in state_dict:
                set_rng_state(state_dict["random"], self._device)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the data is read.

        Raises:
            InputError: the strategy is DeepSpeed, `merged_path` cannot be written, or a callback that averages weights
                comes later: it changes the module after this one has merged it.
        """
        self._fitting, self._alone, self._restored = stage == "fit", trainer.world_size == 1, None
        self._device = trainer.strategy.root_device
        if self._fitting and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise InputError("S2DCallback: DeepSpeed keeps weights of its own, which EWA does not reach; use DDP")
        if self._fitting and self.merged_path is not None:
            check_parent(self.merged_path)
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            later = [type(callback).__name__ for callback in callbacks[callbacks.index(self) + 1 :]]
            averages = next((name for name in later if "WeightAveraging" in name), None)
            if averages:
                raise InputError(
                    f"S2DCallback: {averages} averages the weights of the module after they were merged into "
                    f"{self.merged_path}; put S2DCallback behind it in callbacks"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the hook on the optimizer that holds the experts.

        Raises:
            InputError: the module is not converted, its experts are not in one optimizer, the checkpoint to resume from
                was written without this callback, or the length of the training is unknown.
        """
        total_steps = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if not (math.isfinite(total_steps) and total_steps >= 1):
            raise InputError("S2DCallback: the number of updates of this training is unknown; give total_steps")
        position = self._position(trainer)
        self._averaging.start(pl_module, trainer.optimizers, total_steps=int(total_steps), num_steps=position)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hook; write the merged state dict.

        Raises:
            ValueError: merged weights are not finite; the message names the layer.
        """
        self._averaging.stop()
        if self.merged_path is not None and trainer.is_global_zero:
            dense: nn.Module = merge_experts(pl_module)
            with replacing(self.merged_path) as file:
                torch.save({name: tensor.cpu() for name, tensor in dense.state_dict().items()}, file)

    def _position(self, trainer: Trainer) -> int:
        """Return the number of updates before this training; `global_step` counts skipped ones too."""
        if self._restored is not None:
            return self._restored
        if not trainer.global_step:
            return 0
        if trainer.ckpt_path is not None:
            raise InputError(
                f"{trainer.ckpt_path}: was written without S2DCallback, so that the position in its schedule is "
                "unknown; start the training anew"
            )
        return self.num_steps  # the same Trainer goes on
