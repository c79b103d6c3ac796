"""Packages that only some uses need: one way to say that one is missing, and how to install it."""

import contextlib
from collections.abc import Iterator

from .errors import InputError, first_line


@contextlib.contextmanager
def optional(package: str, what: str, *, extra: str) -> Iterator[None]:
    """Turn a failing import of a package into one line that says what needs it and how to install it.

    Args:
        package: the name that its installer knows.
        what: needs the package; begins the message.
        extra: of s2d3d, which installs it.

    Raises:
        InputError: an import in the body fails.

    Example:
        >>> with optional("nonesuch", "this example", extra="all"):
        ...     import nonesuch
        Traceback (most recent call last):
        s2d3d.errors.InputError: this example needs nonesuch (No module named 'nonesuch'): pip install "s2d3d[all]"
    """
    try:
        yield
    except ImportError as error:
        raise InputError(f'{what} needs {package} ({first_line(error)}): pip install "s2d3d[{extra}]"') from error
