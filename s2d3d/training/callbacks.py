"""Callbacks: user code that the trainer calls during a run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """Base class of callbacks; each method does nothing unless a subclass overrides it.

    The trainer calls its callbacks on every rank, in the given order, and passes itself. Callbacks may read all
    attributes that `Trainer` lists. `on_update` and `on_epoch` are called before the state is saved. Their changes to
    the model are therefore in the checkpoint. After a crash, the calls since the last checkpoint are repeated. The
    state of a callback is not saved.

    An exception in a callback ends the run like any other error; earlier checkpoints stay intact. A callback that draws
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

        `trainer.progress.updates` and `trainer.progress.step` include this update. The gradients are still available.
        """

    def on_epoch(self, trainer: "Trainer") -> None:
        """Called after each epoch and its evaluation, before anything is saved.

        `trainer.progress.epoch` includes this epoch; `trainer.history[-1]` is its row of log.csv.
        """

    def on_finish(self, trainer: "Trainer") -> None:
        """Called after the final model and metrics.json are written; `trainer.reports` holds the evaluations.

        It is not called if `train.max_steps` or a signal stops the run. Resuming a finished run calls it again.
        """
