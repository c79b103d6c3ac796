"""Files that appear whole or not at all, whatever happens while they are written; JSON files read back."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import InputError

SUFFIX = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, previous: str | os.PathLike | None = None) -> Iterator[BinaryIO]:
    """Give a binary file to write to, which takes the place of `path` when the body ends without an error.

    The content is on disk before it gets the name, so that after a power cut `path` holds the old content or the new
    one. A process that is killed leaves `path` as it was, and `path.tmp`, which the next one overwrites.

    Args:
        path: replaced when it exists; its folder exists.
        previous: where the old content of `path` is kept. At no moment is neither of the two there.

    Raises:
        OSError: the file cannot be written; it names `path`, also where a library hides the reason, as torch does.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "greeting")
        >>> with replacing(path) as file:
        ...     _ = file.write(b"hello")
        >>> path.read_bytes()
        b'hello'
    """
    path = Path(path)
    temporary = path.with_name(path.name + SUFFIX)
    watched = None
    try:
        with open(temporary, "wb") as file:
            watched = _Watched(file)
            yield cast(BinaryIO, watched)  # what writers use of one
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            link_or_copy(path, Path(previous))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = getattr(watched, "error", None) or error
        if not isinstance(cause, OSError) or cause.errno is None or cause.filename not in (None, str(temporary)):
            raise
        advice = "free space and try again; " if cause.errno in _FULL else ""
        text = f"cannot be written ({cause.strerror}); {advice}what was there before is unchanged"
        raise OSError(cause.errno, text, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # a disk that failed may fail again; the first error counts
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; wait for another process that holds it.

    The lock leaves no file behind and ends with the process, however that ends. A file system without such locks (some
    network ones) gives none. Do not ask twice for the lock of one folder: a process would wait for itself.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` be the content of `source`, atomically; not written again where the file system can link."""
    temporary = target.with_name(target.name + SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(*folders: Path) -> list[Path]:
    """Remove what killed processes left half written in folders that nobody else writes to; return what was removed."""
    stale = [path for folder in folders if folder.is_dir() for path in folder.glob(f"*{SUFFIX}") if path.is_file()]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


class _Watched:
    """A file that remembers why writing to it failed: torch turns the error into one about positions."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = self.error or error
            raise


def _sync_folder(folder: Path) -> None:
    """Put a new name on disk too; file systems that cannot say so keep their own promises."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made; one that does not exist, if it cannot be made. Leaves no trace.

    Raises:
        InputError: as said.
    """
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{place}: is a file, a folder is needed here; choose another place")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"{place}: cannot be written to ({error.strerror}); choose another place") from error


def check_parent(path: Path) -> None:
    """Check that a file can be written to its place.

    Raises:
        InputError: its folder does not exist, is a file, or cannot be written to.
    """
    if not path.parent.exists():
        raise InputError(f"{path}: folder {path.parent} does not exist; create it first")
    check_writable(path.parent)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: str | Path, *, advice: str = "write it again or remove it", missing: str = "") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        advice: what to do about a damaged file; ends the error message.
        missing: what to do about a missing file; default: `advice`.

    Raises:
        InputError: the file is missing, is not JSON, or holds something other than an object.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.json")
        >>> write_json(path, {"seed": 0})
        >>> read_json(path)
        {'seed': 0}
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {missing or advice}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply
        raise InputError(f"{path}: not a JSON file ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; {advice}")
    return content
