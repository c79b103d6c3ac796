"""Files that appear whole or not at all, whatever happens while they are written; JSON files read back."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import InputError

MARK = ".s2d3d"
"""The file by which a workspace is known to be ours; locked by its writer, and holds the name of the target."""
NEW, OLD = "new", "old"
"""Names in a workspace: what shall take the place of the target, and what stood there before."""
MAX_DEPTH = 50
"""Levels of the JSON that is read; what this package writes has ten."""
_SYSTEM = ("/dev", "/proc", "/sys")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, previous: str | os.PathLike | None = None) -> Iterator[BinaryIO]:
    """Give a binary file to write to, which takes the place of `path` when the body ends without an error.

    The content is on disk before it gets the name, so that after a power cut `path` holds the old content or the new
    one. Several writers of one path do not meet: each has a `workspace`, and the last one to end wins.

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
    watched = None
    try:
        with workspace(path) as work:
            with open(work / NEW, "xb") as file:
                watched = _Watched(file)
                yield cast(BinaryIO, watched)  # what writers use of one
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                link_or_copy(path, Path(previous))
            os.replace(work / NEW, path)
            _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = getattr(watched, "error", None) or error
        ours = isinstance(cause, OSError) and str(cause.filename or _prefix(path)).startswith(_prefix(path))
        if not isinstance(cause, OSError) or cause.errno is None or not ours:
            raise
        advice = "free space and try again; " if cause.errno in _FULL else ""
        text = f"cannot be written ({cause.strerror}); {advice}what was there before is unchanged"
        raise OSError(cause.errno, text, str(path)) from error


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Give a new private folder beside `target`, in which what shall take its place is made; it is removed at the end.

    Its name is made up, so nothing that is there can be met or followed. What is put into it as `OLD` goes back to
    `target` unless something else has taken that place, at the end of the body or after a kill (see `sweep`).

    Args:
        target: a file or a folder; the folder around it exists.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp(), "set")
        >>> with workspace(target) as work:
        ...     (work / NEW).mkdir()
        ...     os.replace(work / NEW, target)
        >>> [path.name for path in target.parent.iterdir()]
        ['set']
    """
    _settle_abandoned(target.parent, target.name)
    work = Path(tempfile.mkdtemp(prefix=Path(_prefix(target)).name, suffix=".tmp", dir=target.parent))
    lock = os.open(work / MARK, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        _try_lock(lock)
        os.write(lock, os.fsencode(target.name))
        yield work
    finally:
        try:
            _settle(work, target)
        finally:
            os.close(lock)


@contextlib.contextmanager
def whole_folder(output: Path, check: Callable[[], object]) -> Iterator[Path]:
    """Yield a temporary folder beside `output`; it becomes `output` if the body ends without an error.

    Args:
        output: its name.
        check: raises InputError unless `output` may be made or replaced; asked before the body and after it.

    Raises:
        InputError: as `check`, or `output` cannot be made.
    """
    check()
    with contextlib.ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(workspace(output))
        except OSError as error:
            raise InputError(f"{output}: cannot be made there ({error.strerror}); choose another --output") from error
        fresh = work / NEW
        fresh.mkdir()
        yield fresh
        take_place(fresh, output, check)


def take_place(fresh: Path, output: Path, check: Callable[[], object]) -> None:
    """Give a whole folder its name; the one that it replaces is removed when it has it, and put back if it fails.

    Args:
        fresh: the new folder.
        output: its name.
        check: as for `whole_folder`.
    """
    with locked(output.parent), workspace(output) as work:  # two that end at once: the second sees the first
        check()
        if output.exists():
            os.replace(output, work / OLD)
        os.replace(fresh, output)


def needs_force(output: Path, force: bool) -> bool:
    """Tell whether something stands at the place of a new folder that `force` may replace, if it is of the right kind.

    Raises:
        InputError: a place of the system, no folder, or a folder with something in it and no `force`.
    """
    refuse_system_folder(output)
    if not output.exists() and not output.is_symlink():
        return False
    if output.is_symlink() or not output.is_dir():
        raise InputError(f"{output}: exists and is not a folder; choose another --output")
    if not any(output.iterdir()):
        return False
    if not force:
        raise InputError(f"{output}: exists; choose another --output, or --force to replace it")
    return True


def sweep(*folders: Path) -> None:
    """Remove the workspaces of killed writers in some folders, and put back what they had moved aside.

    A workspace is known by the file in it and by its lock, not by its name. Nothing else is touched.
    """
    for folder in folders:
        _settle_abandoned(folder)


def _settle_abandoned(folder: Path, name: str | None = None) -> None:
    """Settle the workspaces that killed writers left in a folder; with `name` those of this target alone."""
    with contextlib.suppress(OSError):  # a folder that cannot be listed or changed stays as it is
        for work in folder.glob(".*.tmp"):
            if work.is_symlink() or not work.is_dir():
                continue
            found = {path.name for path in work.iterdir()}
            if MARK not in found or not found <= {MARK, NEW, OLD}:
                continue
            lock = os.open(work / MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                target = os.fsdecode(os.read(lock, 1024))
                known = target not in ("", ".", "..") and "/" not in target and "\0" not in target
                ours = known and str(work).startswith(_prefix(folder / target)) and target == (name or target)
                if ours and _try_lock(lock):
                    _settle(work, folder / target)
            finally:
                os.close(lock)


def _settle(work: Path, target: Path) -> None:
    if os.path.lexists(work / OLD) and not os.path.lexists(target):
        os.replace(work / OLD, target)
    shutil.rmtree(work, ignore_errors=True)  # a disk that failed may fail again; the first error counts


def _prefix(target: Path) -> str:
    """Return how the paths of workspaces of a target begin; cut, since a name has at most 255 bytes."""
    return str(target.parent / f".{target.name[:40]}.")


def _try_lock(descriptor: int) -> bool:
    """Lock a file unless another process holds it; False also where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder, as `locked`, without waiting; give False if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without such locks: nobody can tell
            free = True
        yield free
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` be the content of `source`, atomically; not written again where the file system can link."""
    with workspace(target) as work:
        try:
            os.link(source, work / NEW)
        except OSError:
            shutil.copyfile(source, work / NEW)
        os.replace(work / NEW, target)


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
    refuse_system_folder(folder)
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


def real_path(path: str | os.PathLike) -> Path:
    """Return a path without links, as `Path.resolve`, which fails on a circle of links: there it is the path to it."""
    return Path(os.path.realpath(path))


def refuse_system_folder(folder: Path) -> None:
    """Refuse a place where the system keeps devices and processes, not files.

    Raises:
        InputError: as said.
    """
    real = real_path(folder)
    if any(real.is_relative_to(place) for place in _SYSTEM) and not real.is_relative_to("/dev/shm"):
        raise InputError(f"{folder}: cannot be written to (the system keeps its own files there); choose another place")


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


def read_json(
    path: str | Path, *, schema: Any = None, advice: str = "write it again or remove it", missing: str = ""
) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        schema: a `TypedDict` that the content must match, see `stored.check_stored`.
        advice: what to do about a damaged file; ends the error message.
        missing: what to do about a missing file; default: `advice`.

    Raises:
        InputError: the file is missing, is not JSON, or holds something other than an object of the schema.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.json")
        >>> write_json(path, {"seed": 0})
        >>> read_json(path)
        {'seed': 0}
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # opening a pipe could wait for ever
        raise InputError(f"{path}: is no regular file; {advice}")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {missing or advice}") from None
    except ValueError as error:  # not UTF-8, not JSON
        raise InputError(f"{path}: not a JSON file ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; {advice}")
    if schema is not None:
        from .stored import check_stored

        check_stored(content, schema, where=path, advice=advice)
    return content


def parse_json(text: str) -> Any:
    """Parse JSON that is nested less than `MAX_DEPTH` deep.

    Raises:
        ValueError: it is not, or is no JSON.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [content] if isinstance(content, (dict, list)) else [], 0
    while level:
        depth += 1
        inside = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        level = [item for item in inside if isinstance(item, (dict, list))]
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
    return content
