"""Callbacks: code of the user that the trainer calls during a run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """Base class of callbacks; each method does nothing unless a subclass overrides it.

    The trainer calls its callbacks in the order in which they were given, on every rank, and passes itself. They may
    read everything that `Trainer` lists as its attributes. `on_update` and `on_epoch` come before the state is saved:
    what they change in the model is in the checkpoint, and after a crash the calls since the last checkpoint are
    repeated. The checkpoint holds nothing of the callback itself.

    An exception ends the run as any other error does; the checkpoints written before stay whole. A callback that draws
    from the global random generators changes the rest of the run; `torch.random.fork_rng` prevents that.

    Example:
        >>> class Norms(Callback):
        ...     def on_epoch(self, trainer):
        ...         norm = sum(float(p.detach().square().sum()) for p in trainer.model.parameters()) ** 0.5
        ...         print(f"epoch {trainer.progress.epoch}: weights of norm {norm:.3f}")
        >>> from s2d3d import Trainer, load_config
        >>> Trainer(load_config("configs/demo.yaml"), callbacks=[Norms()]).fit()  # doctest: +SKIP
    """

    def on_update(self, trainer: "Trainer") -> None:
        """Called after each optimizer update, EWA and moving average included, before anything is saved.

        `trainer.progress.updates` counts this update, and so does `trainer.progress.step` in its epoch. The gradients
        are still there.
        """

    def on_epoch(self, trainer: "Trainer") -> None:
        """Called after each epoch and its evaluation, before anything is saved.

        `trainer.progress.epoch` counts this epoch; `trainer.history[-1]` is its row of log.csv.
        """

    def on_finish(self, trainer: "Trainer") -> None:
        """Called once the final model and metrics.json are written; `trainer.reports` holds the evaluations.

        A run that `train.max_steps` or a signal stops is not finished. A finished run that is resumed repeats its end.
        """
