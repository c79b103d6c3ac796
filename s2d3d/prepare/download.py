"""Public archives: fetched with resume, checked, unpacked."""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import lzma
import os
import shutil
import socket
import stat
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from ..errors import InputError, UnreadableError, first_line, printable

CHUNK = 2**20
MAX_UNPACKED, MAX_FILES, MAX_RATIO = 64 * 2**30, 10**6, 200
"""Bounds of what an archive unpacks to: bytes, files, and bytes for each one of the archive; ModelNet has 10 GB."""
_DAMAGED = (
    zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, zlib.error, lzma.LZMAError, struct.error,
    ValueError, IndexError,
)  # fmt: skip
"""What zipfile raises on damaged and encrypted archives, and those of unknown compression."""


@dataclass(frozen=True)
class Archive:
    """A file to fetch.

    Attributes:
        url: where it is.
        md5: of its content; None if it is not known.
        sha256: likewise. If no checksum is known, the CRC of every file in the archive is what is checked.
    """

    url: str
    md5: str | None = None
    sha256: str | None = None


ARCHIVES = {
    "modelnet40_ply_hdf5_2048": Archive(
        "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip", "c9ab8e6dfb16f67afdab25e155c79e59"
    ),
    "modelnet40_normal_resampled": Archive("https://shapenet.cs.stanford.edu/media/modelnet40_normal_resampled.zip"),
    "ModelNet40": Archive(
        "http://modelnet.cs.princeton.edu/ModelNet40.zip",
        sha256="42dc3e656932e387f554e25a4eb2cc0e1a1bd3ab54606e2a9eae444c60e536ac",
    ),
    "ModelNet10": Archive(
        "http://3dvision.princeton.edu/projects/2014/3DShapeNets/ModelNet10.zip",
        sha256="9d8679435fc07d1d26f13009878db164a7aa8ea5e7ea3c8880e42794b7307d51",
    ),
}
"""By the name of the folder that they unpack to.

The SHA-256 sums are those that several public loaders of ModelNet give, equal in all of them; of
`modelnet40_normal_resampled` none is known.
"""


def download(
    url: str,
    path: str | os.PathLike,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    timeout: float = 30.0,
    least_speed: float = 1000.0,
) -> Path:
    """Fetch a file over HTTP or HTTPS; an interrupted transfer continues where it ended, if the server supports it.

    Args:
        url: of the file. Redirections to anything but HTTP and HTTPS are refused.
        path: where to; a file that is there is checked and not fetched again. What has come so far is `path.part`.
        md5: of the whole file, in hexadecimal digits.
        sha256: likewise.
        timeout: seconds without a byte, and seconds until the reply begins.
        least_speed: bytes a second; a transfer that is slower over two times `timeout` is ended.

    Returns:
        The path.

    Raises:
        InputError: the server cannot be reached, refuses, is too slow or ends early; another process fetches the file.
        UnreadableError: the checksum is another one.
    """
    path = Path(path)
    if path.exists():
        if not path.is_file():
            raise InputError(f"{path}: is no regular file; move it elsewhere")
        _check(path, md5, sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with _part_file(part) as file:
        have = file.seek(0, os.SEEK_END)
        try:
            total = _receive(url, file, have, timeout, least_speed, path.name)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:  # complete already
                raise InputError(_cannot(url, f"{error.code} {printable(str(error.reason))}")) from error
            total = have
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(_cannot(url, printable(str(getattr(error, "reason", None) or error)))) from error
        size = file.tell()
        if total is not None and size != total:
            raise InputError(
                _cannot(url, f"the connection ended after {size:,} of {total:,} bytes; start again to go on")
            )
        file.flush()
        _check(part, md5, sha256)
        os.replace(part, path)
    return path


@contextlib.contextmanager
def _part_file(path: Path) -> Iterator[BinaryIO]:
    """Open what has come so far, for this process alone; a link or a pipe of that name is not followed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise InputError(f"{path}: is no regular file; remove it") from error
    with open(descriptor, "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path}: is no regular file; remove it")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process fetches this file; wait for it") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield file
        finally:
            if not os.fstat(descriptor).st_size:
                path.unlink(missing_ok=True)


def _receive(url: str, file: BinaryIO, have: int, timeout: float, least_speed: float, name: str) -> int | None:
    """Append the rest of a file to what is there; return the size of the whole if the server tells it."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with _opener().open(request, timeout=timeout) as reply:
        if reply.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
            file.seek(0)
            file.truncate()
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else None
        started, before = time.monotonic(), have
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, disable=None) as bar:
            while block := reply.read1(CHUNK):
                file.write(block)
                bar.update(len(block))
                have += len(block)
                seconds = time.monotonic() - started
                if seconds > 2 * timeout:
                    if have - before < least_speed * seconds:
                        speed = f"{(have - before) / seconds:.0f} bytes a second"
                        raise InputError(_cannot(url, f"the server sends {speed}; start again later to go on"))
                    started, before = time.monotonic(), have
    return total


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, new_url):
        if urllib.parse.urlsplit(new_url).scheme not in ("http", "https"):
            raise InputError(_cannot(request.full_url, f"it redirects to {printable(new_url)}, which is not followed"))
        return super().redirect_request(request, file, code, message, headers, new_url)


class _Deadline:
    """A connection that is cut if the reply has not begun in time: a byte now and then would hold it open."""

    def getresponse(self):
        def cut() -> None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]

        timer = threading.Timer(self.timeout, cut)  # type: ignore[attr-defined]
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            timer.cancel()


class _Plain(_Deadline, http.client.HTTPConnection):
    pass


class _Secure(_Deadline, http.client.HTTPSConnection):
    pass


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_Plain, request)


class _HTTPS(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_Secure, request, context=self._context)  # type: ignore[attr-defined]


def _opener() -> urllib.request.OpenerDirector:
    """Return what opens HTTP and HTTPS and nothing else: neither files nor FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.UnknownHandler(), urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(), _Redirects(), _HTTP(), _HTTPS(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


def unpack(archive: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Unpack a zip archive; every file's CRC is checked.

    The archive's own list decides before anything is written: at most `MAX_UNPACKED` bytes in at most `MAX_FILES`
    files, at most `MAX_RATIO` times the archive, and no more than the disk has room for.

    Args:
        archive: the file.
        folder: where to. What an interrupted call leaves is unpacked again by the next.

    Returns:
        The only folder at the top of the archive, or `folder`.

    Raises:
        UnreadableError: not a zip archive, damaged, encrypted, or packed in a way that is not known here.
        InputError: it unpacks to more than is allowed, or than there is room for.
    """
    archive, folder = Path(archive), Path(folder)
    done = folder / ".unpacked"
    if not done.exists():
        try:
            with zipfile.ZipFile(archive) as content:
                _check_size(archive, content, folder)
                for member in tqdm(content.infolist(), desc=f"unpack {archive.name}", unit="file", disable=None):
                    content.extract(member, folder)  # absolute names and .. are made harmless by it
        except _DAMAGED as error:
            if isinstance(error, InputError):
                raise
            encrypted = isinstance(error, RuntimeError) and "encrypted" in str(error)
            state = "is encrypted" if encrypted else f"not a zip archive, or damaged ({first_line(error)})"
            raise UnreadableError(f"{archive}: {state}; remove it and fetch it again") from error
        done.touch()
    inside = [path for path in folder.iterdir() if path.name not in (".unpacked", "__MACOSX")]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _check_size(archive: Path, content: zipfile.ZipFile, folder: Path) -> None:
    members = content.infolist()
    size = sum(member.file_size for member in members)
    bound = min(MAX_UNPACKED, MAX_RATIO * archive.stat().st_size)
    if size > bound or len(members) > MAX_FILES:
        raise InputError(
            f"{archive}: unpacks to {size:,} bytes in {len(members):,} files, more than any of these sets; is it the "
            "right archive?"
        )
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    room = shutil.disk_usage(place).free
    if size > room:
        raise InputError(f"{folder}: {archive.name} unpacks to {size:,} bytes, {room:,} are free; make room")


def fetch(name: str, folder: str | os.PathLike, *, archives: dict[str, Archive] | None = None) -> Path:
    """Fetch and unpack one of `ARCHIVES`; finished steps are not repeated.

    Args:
        name: of the archive.
        folder: where archive and content are kept.
        archives: default `ARCHIVES`.

    Returns:
        The unpacked folder.

    Raises:
        InputError, UnreadableError: see `download` and `unpack`.
    """
    entry = (archives or ARCHIVES)[name]
    folder = Path(folder)
    return unpack(download(entry.url, folder / f"{name}.zip", md5=entry.md5, sha256=entry.sha256), folder / name)


def _check(path: Path, md5: str | None, sha256: str | None) -> None:
    for name, wanted in (("MD5", md5), ("SHA256", sha256)):
        if wanted is None:
            continue
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, partial(hashlib.new, name, usedforsecurity=False)).hexdigest()
        if found != wanted.lower():
            path.unlink() if path.suffix == ".part" else None
            again = "it was removed" if path.suffix == ".part" else "remove it"
            raise UnreadableError(f"{path}: its {name} is {found}, must be {wanted.lower()}; {again}, fetch it again")


def _cannot(url: str, reason: object) -> str:
    return (
        f"cannot fetch {url} ({reason}); if this machine has no way to it, fetch the file elsewhere, unpack it, "
        "and name the folder with --from"
    )
