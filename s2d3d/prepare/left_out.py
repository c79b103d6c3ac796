"""What a conversion would leave out of its source: counted by suffix and class, and refused unless it is asked for."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..datasets.class_folders import SPLITS, count_suffixes, walk_files
from ..datasets.files import SUFFIXES
from ..errors import InputError, printable

log = logging.getLogger(__name__)

_KINDS = (*SUFFIXES, ".h5")
_SHOWN = 6
"""Classes that a message names."""
TRAIN_AS_IT_IS = "s2d3d train configs/files.yaml data.root="


def find_left_out(source: Path, used: Iterable[Path] = ()) -> tuple[list[Path], list[Path]]:
    """Return the files below a folder that a conversion does not read: clouds, by their suffix, and others.

    Texts at the top of the folder are lists and notes: they are in neither list.

    Args:
        source: the folder.
        used: files that the conversion reads.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("cup/train/1.off", "cup/train/2.ply", "cup/photo.jpg", "README.txt"):
        ...     (root / name).parent.mkdir(parents=True, exist_ok=True)
        ...     (root / name).touch()
        >>> clouds, others = find_left_out(root, [root / "cup/train/1.off"])
        >>> [path.name for path in clouds], [path.name for path in others]
        (['2.ply'], ['photo.jpg'])
    """
    known = set(used)
    found: tuple[list[Path], list[Path]] = [], []
    for path in walk_files(source, source, allow_links=True):
        suffix = path.suffix.lower()
        if path not in known and not (path.parent == source and suffix == ".txt"):
            found[suffix not in _KINDS].append(path)
    return found


def check_left_out(source: Path, used: Sequence[Path], *, skip_others: bool) -> str:
    """Refuse to convert a folder of which clouds would be left out.

    Args:
        source: the folder.
        used: files that the conversion reads.
        skip_others: leave the other files out, and log how many.

    Returns:
        One line: how many files of which kinds are read, and how many of other kinds are ignored.

    Raises:
        InputError: files that hold clouds, by their suffix, are not among `used`; the message counts them by suffix and
            by class.
    """
    clouds, others = find_left_out(source, used)
    if clouds:
        text = f"{source}: {_left_out(source, used, clouds)}"
        if not skip_others:
            remedy = f"convert without them by --skip-others, or train on the folder as it is: {TRAIN_AS_IT_IS}{source}"
            raise InputError(f"{text}; {remedy}")
        log.warning("%s", text)
    ignored = f"; ignored, of other kinds: {count_suffixes(_suffixes(others))}" if others else ""
    return f"{source}: {len(used)} files ({count_suffixes(_suffixes(used))}){ignored}"


def _left_out(source: Path, used: Sequence[Path], clouds: Sequence[Path]) -> str:
    """Count what is left out by suffix and class, and name the classes of which nothing is used."""
    classes = Counter(_class_of(source, path) for path in clouds)
    whole = [printable(name) for name in classes.keys() - {_class_of(source, path) for path in used} if name]
    counts = _first([f"{printable(name) or 'in no class'} {count}" for name, count in sorted(classes.items())])
    text = f"{len(clouds)} of {len(clouds) + len(used)} files have no place in the layout and are left out"
    lost = f"; nothing is left of {_first(sorted(whole))}" if whole and used else ""
    return f"{text} ({count_suffixes(_suffixes(clouds))}; {counts}){lost}"


def _suffixes(paths: Iterable[Path]) -> Counter[str]:
    return Counter(path.suffix.lower() for path in paths)


def _class_of(source: Path, path: Path) -> str:
    """Return the class of a file, its folder at the top or below train and test; "" for a file at the top itself."""
    folders = [name for name in path.relative_to(source).parts[:-1] if name not in SPLITS]
    return folders[0] if folders else ""


def _first(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
