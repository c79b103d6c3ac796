"""Optional packages: a uniform error with the install command if one is missing."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

from .errors import InputError, first_line


@contextlib.contextmanager
def optional(package: str, what: str, *, extra: str) -> Iterator[None]:
    """Convert a failed import into one line that says what needs the package and how to install it.

    Args:
        package: name for the installer.
        what: the part that needs the package; first words of the message.
        extra: the extra of s2d3d that installs it.

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
        raise_if_interrupted(error)
        raise InputError(f'{what} needs {package} ({first_line(error)}): pip install "s2d3d[{extra}]"') from error


def import_open3d(what: str) -> ModuleType:
    """Import Open3D.

    Args:
        what: the part that needs it; first words of the message.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        import open3d
    except (ImportError, OSError) as error:  # OSError: a system library of it is missing
        raise_if_interrupted(error)
        raise InputError(
            f"{what} needs Open3D, which cannot be imported ({first_line(error)}): pip install open3d"
        ) from error
    return open3d


def raise_if_interrupted(error: BaseException) -> None:
    """Raise KeyboardInterrupt if a failed import is the trace of Ctrl-C: extension modules turn one into the other.

    Example:
        >>> raise_if_interrupted(ImportError("no such module"))
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt) or "KeyboardInterrupt" in str(cause):
            raise KeyboardInterrupt from error
        cause = cause.__cause__ or cause.__context__
