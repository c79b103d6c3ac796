"""Farthest-point prefixes of stored clouds: computed once, cached by content."""

import hashlib
import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..atomic import sweep, write_bytes
from ..errors import InputError
from ..ops.points import farthest_point_sample

CHUNK = 64  # clouds at a time: the distances of a chunk stay in the processor's cache


def farthest_prefix(points: Tensor, length: int, cache_dirs: Sequence[Path] = ()) -> Tensor:
    """Select `length` points of each cloud by farthest point sampling, or read that from a cache.

    A cache file is named by a hash of the points, so a changed set never gets an old selection. A file that
    cannot be read or does not match is computed again.

    Args:
        points: (n, P, 3).
        length: in [1, P].
        cache_dirs: folders to look in; the result is stored in the first that can be written.

    Returns:
        (n, length) int64 indices in selection order: a prefix is the selection of fewer points.
    """
    name = f"fps_{_content_hash(points)}_{length}.npz"
    for folder in cache_dirs:
        cached = _read(folder / name, (len(points), length), points.shape[1])
        if cached is not None:
            return cached
    selected = torch.cat(
        [
            farthest_point_sample(part, length)
            for part in tqdm(points.split(CHUNK), desc="farthest points (once)", disable=None, leave=False)
        ]
    )
    for folder in cache_dirs:
        if _write(folder / name, selected):
            break
    return selected


def cache_folders(root: Path, cache_dir: str | os.PathLike | None = None) -> list[Path]:
    """Return where prefixes of the set in `root` are kept: `cache_dir` if given, else beside it, else the user's cache.

    Raises:
        InputError: `cache_dir` is given and cannot be used.
    """
    if cache_dir is not None:
        try:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{cache_dir}: cannot be a cache folder ({error.strerror}); choose another") from error
        return [Path(cache_dir)]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [root / ".fps_cache", user_cache / "s2d3d"]


def can_hold(folder: Path) -> bool:
    """Return whether a folder of the cache can be written, after making it; none is made in a read-only set."""
    if folder.name.startswith(".") and not folder.exists() and not _is_writable(folder.parent):
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _content_hash(points: Tensor) -> str:
    digest = hashlib.blake2b(f"{points.dtype} {tuple(points.shape)}".encode(), digest_size=12)
    digest.update(points.contiguous().numpy().data)
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, int], stored_points: int) -> Tensor | None:
    try:
        with np.load(path, allow_pickle=False) as archive:  # a zip: its checksum is verified on reading
            selected = archive["selected"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if selected.shape != shape or selected.dtype.kind not in "iu":
        return None
    if selected.min() < 0 or selected.max() >= stored_points:
        return None
    return torch.from_numpy(selected.astype(np.int64))


def _write(path: Path, selected: Tensor) -> bool:
    """Store a selection; return False if the folder cannot be written, which is not an error for a cache."""
    if not can_hold(path.parent):
        return False
    content = io.BytesIO()
    np.savez(content, selected=selected.numpy().astype(np.int32))
    try:
        sweep(path.parent)
        write_bytes(path, content.getvalue())
    except OSError:
        return False
    return True


def _is_writable(folder: Path) -> bool:
    """Whether a folder may be written, by its mode too: root would pass `os.access` on a read-only set."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)
