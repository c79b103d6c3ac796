"""What a tool prints: nothing in a file or a name can steer the terminal, and a reader that leaves loses no work."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from .errors import printable

_PARTS = re.compile("([\n\t])")


def printable_lines(text: str, encoding: str | None = None) -> str:
    """Escape text of several lines for a terminal, as `printable` does; line feeds and tabs stay.

    Args:
        text: to be shown.
        encoding: of the terminal; characters that it lacks are escaped too.

    Example:
        >>> printable_lines("a\\x1b[2J\\n\\tb")
        'a\\\\x1b[2J\\n\\tb'
    """
    plain = "".join(part if part in ("\n", "\t") else printable(part) for part in _PARTS.split(text))
    encoding = encoding or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


class Output:
    """A stream for `print` that escapes control characters, and that may lose its reader.

    Attributes:
        closed_early: the reader has gone, as `head` does; what is printed after that is dropped.
    """

    def __init__(self, stream: TextIO, *, go_on: bool) -> None:
        """
        Args:
            stream: where the text goes.
            go_on: drop what cannot be printed because the reader has gone; otherwise that raises BrokenPipeError.
        """
        self.stream, self.go_on, self.closed_early = stream, go_on, False

    def write(self, text: str) -> int:
        with self._watched():
            self.stream.write(printable_lines(text, self.stream.encoding))
        return len(text)

    def flush(self) -> None:
        with self._watched():
            self.stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.closed_early = True
            self.silence()  # so that a later flush, also Python's own at the end, does not fail again
            if not self.go_on:
                raise
        except OSError as error:
            self.silence()
            raise OSError(error.errno, error.strerror, "standard output") from error

    def silence(self) -> None:
        """Let everything that is printed from now on go nowhere."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self.stream.fileno())
            os.close(sink)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def plain_stdout(*, go_on: bool) -> Iterator[Output]:
    """Let `print` write through an `Output` inside the context; see there."""
    open_streams()
    output = Output(sys.stdout, go_on=go_on)
    with contextlib.redirect_stdout(output):
        yield output


def open_streams() -> None:
    """Give a process whose output or error stream is closed (`>&-`) one that goes nowhere.

    Otherwise the next file that is opened would take the number of that stream.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, open as long as the process


@contextlib.contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Show the package's log messages as plain text inside the context."""
    root = logging.getLogger()
    handler, level = logging.StreamHandler(sys.stderr), root.level
    handler.setFormatter(_Plain("%(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record), getattr(sys.stderr, "encoding", None))
