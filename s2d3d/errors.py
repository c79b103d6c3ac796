"""What goes wrong in a user's hands, each with a message that a tool prints as it is."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a user: a file, a key, a value. Says what, where, what to do; one line for each problem."""


class UnreadableError(InputError):
    """A file that is damaged, cut short, or was never of the kind that is asked for."""


class TrainingError(RuntimeError):
    """A training that cannot go on. Says at which step, and where its last good checkpoint lies."""


def printable(text: str) -> str:
    """Escape what text from outside could do to a terminal, or what its encoding lacks.

    Example:
        >>> printable("red: \\x1b[31m")
        'red: \\\\x1b[31m'
    """
    return text if text.isprintable() else repr(text)[1:-1]


def quoted(text: str, limit: int = 100) -> str:
    """Return text from a file in quotes, on one line and no longer than a message can bear.

    Example:
        >>> quoted("a\\nb")
        "'a\\\\nb'"
    """
    shown = printable(text)
    return f"'{shown}'" if len(shown) <= limit else f"'{shown[:limit]}...'"


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's text, to stand inside of a message; of an error without text its type.

    Example:
        >>> first_line(RuntimeError("no such operator.\\n  at node 3"))
        'no such operator'
    """
    lines = str(error).strip().splitlines()
    return printable(lines[0][:limit].rstrip(".:")) if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean '...'?" for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
