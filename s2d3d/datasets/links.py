"""Links in the folder of a data set: one rule for every reader."""

from pathlib import Path

from ..atomic import real_path
from ..errors import InputError


def check_inside(path: Path, root: Path, *, allow_links: bool) -> Path:
    """Return a file of a data set, after refusing one that lies elsewhere behind a link.

    Args:
        path: below `root` as it is named; `root` itself may be a link.
        root: folder of the set.
        allow_links: follow links to wherever they lead, as in trees of git-annex, DVC or a download cache.

    Raises:
        InputError: it, or a folder on the way to it, is a link out of the folder.
    """
    if not allow_links and not real_path(path).is_relative_to(real_path(root)):
        raise InputError(
            f"{path}: is a link out of the folder; copy the file into {root}, or set data.allow_links=true "
            "(prepare_data: --allow-links)"
        )
    return path
