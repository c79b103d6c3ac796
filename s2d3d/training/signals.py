"""Signals that end a run. They are recorded, and the run stops between two updates."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from ..machine import Runtime

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedBySignal(Exception):
    """The run saved its state and stopped because of a signal."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        self.reason = f"stopped by {signal.Signals(signum).name}"
        super().__init__(f"{self.reason}; continue with --resume {checkpoint}")
        self.exit_code = 128 + signum


class SignalWatch:
    """Records SIGTERM and Ctrl-C, so that the process does not end in the middle of an update.

    Attributes:
        signum: the last signal received, 0 before any.

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
        """Record signals inside the context, then restore the previous handlers. A second Ctrl-C interrupts at once."""
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
        """Return whether the run must stop: this process, or with several ranks any of them, received a signal.

        Args:
            runtime: this process and the others.
            agree: exchange the signals between ranks. All ranks must then call this. With several ranks and
                `agree=False` the result is always False.
        """
        if not runtime.is_distributed:
            return self.signum != 0
        if not agree:
            return False
        import torch  # here, so that a process that only watches for signals does not import torch
        import torch.distributed as dist

        number = torch.tensor(self.signum, device=runtime.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.signum = int(number)
        return self.signum != 0
