"""Signals that end a run: noted, and obeyed between two updates."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from ..machine import Runtime

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedBySignal(Exception):
    """The run saved its state and left because of a signal."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; continue with --resume {checkpoint}")
        self.exit_code = 128 + signum


class SignalWatch:
    """Notes SIGTERM and Ctrl-C instead of dying in the middle of an update.

    Attributes:
        signum: the signal received last; 0 while there was none.

    Example:
        >>> watch = SignalWatch()
        >>> with watch.watching():
        ...     signal.raise_signal(signal.SIGTERM)
        >>> watch.signum == signal.SIGTERM
        True
    """

    def __init__(self) -> None:
        self.signum = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note signals inside, restore the previous handlers afterwards. A second Ctrl-C interrupts at once."""
        self.signum = 0

        def note(signum: int, frame: object) -> None:
            if self.signum and signum == signal.SIGINT:
                raise KeyboardInterrupt
            self.signum = signum

        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def received(self, runtime: Runtime, *, agree: bool) -> bool:
        """Tell whether this process was told to stop; of several processes, whether any was.

        Args:
            runtime: this process and the others.
            agree: let the ranks ask one another, which all of them must then do; without it several ranks never stop.
        """
        if not runtime.is_distributed:
            return self.signum != 0
        if not agree:
            return False
        import torch  # here: whoever only watches for signals does not need it
        import torch.distributed as dist

        number = torch.tensor(self.signum, device=runtime.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.signum = int(number)
        return self.signum != 0
