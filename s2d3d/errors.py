"""The one error that bad input raises: what is wrong, where, what to do."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a user: a file, a key, a value. The message is one line that a tool prints as it is."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean '...'?" for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
