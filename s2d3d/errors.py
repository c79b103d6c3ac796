"""Errors for the user. A tool prints their message unchanged."""

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Bad input: a file, a key, a value. The message says what, where and what to do, one line for each problem."""


class UnreadableError(InputError):
    """A file that is damaged, truncated, or of the wrong type."""


class TrainingError(RuntimeError):
    """A training that cannot continue. The message names the step and the last good checkpoint."""


def printable(text: str) -> str:
    """Escape control characters of external text, and characters that the terminal's encoding lacks.

    Example:
        >>> printable("red: \\x1b[31m")
        'red: \\\\x1b[31m'
    """
    return text if text.isprintable() else repr(text)[1:-1]


def quoted(text: str, limit: int = 100) -> str:
    """Return text from a file in quotes, on one line, shortened for a message.

    Example:
        >>> quoted("a\\nb")
        "'a\\\\nb'"
    """
    shown = printable(text)
    return f"'{shown}'" if len(shown) <= limit else f"'{shown[:limit]}...'"


def first_difference(theirs: Sequence[object], ours: Sequence[object]) -> str:
    """Return where two lists of class names begin to differ.

    Example:
        >>> first_difference(["box", "mug"], ["box", "cup"])
        "class 1 is 'mug' there and 'cup' here"
    """
    place = next((i for i, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
    there, here = (quoted(str(names[place]), 40) if place < len(names) else "none" for names in (theirs, ours))
    return f"class {place} is {there} there and {here} here"


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's text for use in a message, or its type if it has no text.

    Example:
        >>> first_line(RuntimeError("no such operator.\\n  at node 3"))
        'no such operator'
    """
    lines = str(error).strip().splitlines()
    return printable(lines[0][:limit].rstrip(".:")) if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str], *, likeness: float = 0.6) -> str:
    """Return "; did you mean '...'?" for the nearest known word, or an empty string."""
    known = list(known)
    same = [name for name in known if name.casefold() == word.casefold()]
    near = same or difflib.get_close_matches(word, known, n=1, cutoff=likeness)
    return f"; did you mean '{near[0]}'?" if near else ""
