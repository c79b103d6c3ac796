"""What to tell about a training that cannot go on."""

from pathlib import Path

from ..datasets import BatchLoader

SHOWN_NAMES, SHOWN_INDICES = 8, 64


def nonfinite_message(loader: BatchLoader, update: int, last_good: Path | str) -> str:
    """Say at which update the loss or a gradient was not finite, and which shapes were in this process's batch.

    Args:
        loader: of the training set.
        update: number of the update, from 0.
        last_good: the checkpoint to go back to.
    """
    epoch, step = divmod(update, len(loader))
    indices = loader.indices(epoch, step).tolist()
    names = [loader.dataset.names[index] for index in indices[:SHOWN_NAMES]]
    more = f" and {len(indices) - len(names)} more" if len(indices) > len(names) else ""
    listed = ", ".join(map(str, indices[:SHOWN_INDICES])) + (", ..." if len(indices) > SHOWN_INDICES else "")
    return (
        f"loss or gradient is not finite at update {update + 1} (epoch {epoch + 1}); "
        f"last good checkpoint: {last_good}; lower optim.lr or optim.clip_grad, or look at "
        f"its batch: {', '.join(names)}{more} (shapes {listed} of split '{loader.dataset.split}')"
    )
