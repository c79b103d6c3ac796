"""Public archives: fetched with resume, checked, unpacked."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..errors import InputError, UnreadableError

CHUNK = 2**20


@dataclass(frozen=True)
class Archive:
    """A file to fetch.

    Attributes:
        url: where it is.
        md5: of its content; None if no checksum is published. Then the CRC of every file in the archive is
            checked.
    """

    url: str
    md5: str | None = None


ARCHIVES = {
    "modelnet40_ply_hdf5_2048": Archive(
        "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip", "c9ab8e6dfb16f67afdab25e155c79e59"
    ),
    "modelnet40_normal_resampled": Archive("https://shapenet.cs.stanford.edu/media/modelnet40_normal_resampled.zip"),
    "ModelNet40": Archive("http://modelnet.cs.princeton.edu/ModelNet40.zip"),
    "ModelNet10": Archive("http://3dvision.princeton.edu/projects/2014/3DShapeNets/ModelNet10.zip"),
}
"""By the name of the folder that they unpack to."""


def download(url: str, path: str | os.PathLike, *, md5: str | None = None, timeout: float = 30.0) -> Path:
    """Fetch a file; an interrupted transfer continues where it ended, if the server supports it.

    Args:
        url: of the file.
        path: where to; a file that is there is checked and not fetched again. What has come so far is `path.part`.
        md5: of the whole file, in hexadecimal digits.
        timeout: seconds without a byte.

    Returns:
        The path.

    Raises:
        InputError: the server cannot be reached, refuses, or ends early.
        UnreadableError: the checksum is another one.
    """
    path = Path(path)
    if path.exists():
        _check(path, md5)
        return path
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            resumed = reply.status == http.HTTPStatus.PARTIAL_CONTENT
            have = have if resumed else 0
            length = reply.headers.get("Content-Length")
            total = have + int(length) if length else None
            with open(part, "ab" if resumed else "wb") as file, tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=path.name, disable=None
            ) as bar:  # fmt: skip
                while block := reply.read(CHUNK):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:  # complete already
            raise InputError(_cannot(url, f"{error.code} {error.reason}")) from error
        total = have
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(_cannot(url, reason)) from error
    if total is not None and part.stat().st_size != total:
        size = part.stat().st_size
        raise InputError(_cannot(url, f"the connection ended after {size:,} of {total:,} bytes; start again to go on"))
    _check(part, md5)
    os.replace(part, path)
    return path


def unpack(archive: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Unpack a zip archive; every file's CRC is checked.

    Args:
        archive: the file.
        folder: where to. Only a complete one is left behind.

    Returns:
        The only folder at the top of the archive, or `folder`.

    Raises:
        UnreadableError: not a zip archive, or damaged.
    """
    archive, folder = Path(archive), Path(folder)
    done = folder / ".unpacked"
    if not done.exists():
        try:
            with zipfile.ZipFile(archive) as content:
                for member in tqdm(content.infolist(), desc=f"unpack {archive.name}", unit="file", disable=None):
                    content.extract(member, folder)  # absolute names and .. are made harmless by it
        except (zipfile.BadZipFile, EOFError) as error:
            raise UnreadableError(
                f"{archive}: not a zip archive, or damaged ({error}); remove it and fetch it again"
            ) from error
        done.touch()
    inside = [path for path in folder.iterdir() if path.name not in (".unpacked", "__MACOSX")]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


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
    return unpack(download(entry.url, folder / f"{name}.zip", md5=entry.md5), folder / name)


def _check(path: Path, md5: str | None) -> None:
    if md5 is None:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    if digest.hexdigest() != md5.lower():
        path.unlink() if path.suffix == ".part" else None
        again = "it was removed" if path.suffix == ".part" else "remove it"
        raise UnreadableError(
            f"{path}: its MD5 is {digest.hexdigest()}, must be {md5.lower()}; {again}, fetch it again"
        )


def _cannot(url: str, reason: object) -> str:
    return (
        f"cannot fetch {url} ({reason}); if this machine has no way to it, fetch the file elsewhere, unpack it, "
        "and name the folder with --from"
    )
