"""Training and evaluation mode of a model."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode inside the block; afterwards each of its modules has the mode that it had before.

    A block may put single modules in another mode. An error inside the block restores the modes as well.

    Args:
        model: changed in place.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3).eval())
        >>> with eval_mode(model):
        ...     model.training
        False
        >>> [module.training for module in model]
        [True, False]
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        # From the outside in, by `train`: an expert layer passes its mode on to an FFN that is no child of it.
        for module, training in before:
            if module.training != training:
                module.train(training)
