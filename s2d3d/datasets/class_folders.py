"""Folders named after classes: which files they hold, of which class and in which split."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..atomic import real_path
from ..errors import InputError, printable, quoted
from ..random_state import derived_generator
from .files import SUFFIXES
from .links import check_inside

SPLITS = ("train", "test")
OTHER_SPLITS = ("training", "testing", "val", "valid", "validation")
"""Names, in any case, of folders that are meant for a split, and are no class."""
SHOWN_CLASSES = 10
"""Class names in the line that sums up a folder."""
UNLABELLED = "unlabelled"
"""The class of files outside of class folders, where no labels are needed."""
LAYOUTS = "ROOT/CLASS/FILE, ROOT/train/CLASS/FILE with ROOT/test/CLASS/FILE, or ROOT/CLASS/train/FILE with test"


@dataclass(frozen=True)
class ClassFolders:
    """The files of a data set in class folders.

    Attributes:
        root: the folder.
        class_names: in alphabetical order.
        files: by split, each file below `root` and the number of its class, in the order of class and path.
        ignored: number of files by suffix that are no clouds; "" stands for none.
        empty: names of folders at the place of a class that hold no cloud.
    """

    root: Path
    class_names: list[str]
    files: dict[str, list[tuple[Path, int]]]
    ignored: Counter[str]
    empty: list[str]

    def summary(self) -> str:
        """Return one line: how many files of which kinds, in how many classes, and how they are split."""
        suffixes = Counter(path.suffix.lower() for files in self.files.values() for path, _ in files)
        parts = ", ".join(f"{len(files)} to {split}" for split, files in self.files.items())
        ignored = f"; ignored, of other kinds: {count_suffixes(self.ignored)}" if self.ignored else ""
        total, classes = suffixes.total(), len(self.class_names)
        names = ", ".join([*map(printable, self.class_names[:SHOWN_CLASSES]), *["..."] * (classes > SHOWN_CLASSES)])
        kinds = count_suffixes(suffixes)
        return f"{self.root}: {total} files ({kinds}) in {classes} classes ({names}), {parts}{ignored}"

    def doubts(self) -> list[str]:
        """Return a line for whatever may be meant otherwise than it is read."""
        said = []
        if self.empty:
            said.append(f"no cloud in {', '.join(map(printable, self.empty))}, so it is no class")
        tested = {label for _, label in self.files["test"]}
        if untested := [name for label, name in enumerate(self.class_names) if label not in tested]:
            said.append(f"no file of {', '.join(map(printable, untested))} is tested")
        below: dict[str, set[str]] = {name: set() for name in self.class_names}
        for path, label in (pair for files in self.files.values() for pair in files):
            inside = path.relative_to(self.root).parts[:-1]
            below[self.class_names[label]].update(name for name in inside[1:2] if _split_name(name) is None)
        alike = Counter(map(_folded, self.class_names))
        for name in (name for name, count in alike.items() if count > 1):
            same = ", ".join(ascii(other) for other in self.class_names if _folded(other) == name)
            said.append(f"the classes {same} differ in case or in the form of their letters only; are they one class?")
        shared = set.intersection(*below.values())
        if len(shared) > 1 and all(names == shared for names in below.values()):
            shown = ", ".join(map(printable, sorted(shared)))
            said.append(f"all classes hold the folders {shown}; if these are the classes, move them up by one folder")
        return said


def find_class_folders(
    root: str | os.PathLike,
    *,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    allow_links: bool = False,
    labelled: bool = True,
) -> ClassFolders:
    """Find the files of a data set in class folders, see `LAYOUTS`.

    Where no folder is called train or test, in any case of letters, a share of each class's files is the test split: at
    least one file, chosen by `split_seed` and the file's path. Files are looked for in folders below the class folder
    too. Names that begin with a dot are left out.

    Args:
        root: the folder.
        test_fraction: share of the test split, in (0, 1), where the folders do not split the files.
        split_seed: of that choice, independent of the training's seed.
        allow_links: follow links that lead out of the folder.
        labelled: False accepts files outside of class folders, of the class `UNLABELLED`, and a single class.

    Raises:
        InputError: no folder, fewer than two classes, a class without a file to train on, files outside of class
            folders, a folder that is named like a split or cannot name a class, or a link out of the folder.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("box/1.ply", "box/2.off", "mug/1.npy", "mug/2.xyz", "mug/notes.doc"):
        ...     (root / name).parent.mkdir(exist_ok=True)
        ...     (root / name).touch()
        >>> found = find_class_folders(root, test_fraction=0.5)
        >>> found.class_names, {split: len(files) for split, files in found.files.items()}, dict(found.ignored)
        (['box', 'mug'], {'train': 2, 'test': 2}, {'.doc': 1})
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(
            f"{root}: {'not a folder' if root.exists() else 'no such folder'}; name one with class folders"
        )
    ignored: Counter[str] = Counter()
    by_class: dict[str, dict[str, list[Path]]] = {}  # class, then split, or "" where the files are not split
    for path in walk_files(root, root, allow_links=allow_links):
        if path.suffix.lower() not in SUFFIXES:
            ignored[path.suffix.lower()] += 1
            continue
        split, class_name = _place(path.relative_to(root), path, labelled)
        by_class.setdefault(class_name, {}).setdefault(split, []).append(path)
    if len(by_class) < (2 if labelled else 1):
        found = f"one class, '{next(iter(by_class))}'" if by_class else f"no file of {', '.join(SUFFIXES)}"
        raise InputError(f"{root}: holds {found}; the files of at least two classes are needed, as {LAYOUTS}")
    class_names = sorted(by_class)
    _refuse_deep_splits(root, by_class)
    is_split = {bool(split) for parts in by_class.values() for split in parts}
    if len(is_split) == 2:
        plain = next(parts[""][0] for parts in by_class.values() if "" in parts)
        raise InputError(f"{plain}: lies neither in a train nor in a test folder, as other files do; move it into one")
    if is_split == {False}:
        by_class = {name: _divide(name, parts[""], root, test_fraction, split_seed) for name, parts in by_class.items()}
    for name in class_names:
        if "train" not in by_class[name]:
            alike = [other for other in class_names if other != name and _folded(other) == _folded(name)]
            advice = f"is it {alike[0]!a}, as {name!a}?" if alike else "add some or remove it"
            raise InputError(f"{root}: class '{name}' has files to test but none to train on; {advice}")
    files = {
        split: [(path, label) for label, name in enumerate(class_names) for path in by_class[name].get(split, [])]
        for split in SPLITS
    }
    if not files["test"]:
        raise InputError(f"{root}: holds a folder train but no test; add one, or move its class folders into {root}")
    return ClassFolders(root, class_names, files, ignored, sorted(_folder_names(root) - by_class.keys()))


def _folder_names(root: Path) -> set[str]:
    """Return the names of the folders at the place of a class."""
    above = [path for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name)]
    splits = [path for path in above if path.name.lower() in SPLITS]
    inside = [path for split in splits for path in split.iterdir() if path.is_dir() and not _is_hidden(path.name)]
    return {path.name for path in (*above, *inside) if path not in splits and path.name.lower() not in SPLITS}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def walk_files(folder: Path, root: Path, *, allow_links: bool, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder in the order of their paths; a link to a folder above is not entered.

    Names that begin with a dot are left out.

    Args:
        folder: where to look.
        root: folder of the data set.
        allow_links: follow links that lead out of `root`.
        above: real paths of the folders above.

    Raises:
        InputError: a folder cannot be read, or a link leads out of `root` and may not.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        text = f"{folder}: cannot be read ({error.strerror}); change its permissions or leave it out"
        raise InputError(text) from None
    for name in names:
        path = folder / name
        if _is_hidden(name):
            continue
        if path.is_symlink():
            check_inside(path, root, allow_links=allow_links)
        if path.is_dir():
            yield from walk_files(path, root, allow_links=allow_links, above=above | {real})
        else:
            yield path


def _place(relative: Path, path: Path, labelled: bool) -> tuple[str, str]:
    """Return the split of a file, "" if no folder tells it, and its class."""
    folders, split = relative.parts[:-1], ""
    place = next((place for place, name in enumerate(folders[:2]) if _split_name(name) is not None), None)
    if place is not None:
        split = _split_name(folders[place]) or ""
        if not split:
            shown = printable(folders[place])
            raise InputError(f"{path}: its folder '{shown}' is named like a split; call it train or test: {LAYOUTS}")
        folders = folders[1:] if place == 0 else folders[:1]
    if not folders and not labelled:
        return split, UNLABELLED
    if not folders:
        raise InputError(f"{path}: lies in no class folder, so its class is unknown; move it: {LAYOUTS}")
    if (name := folders[0]) != name.strip() or len(name.splitlines()) != 1 or not is_text(name):
        text = f"{quoted(name)} cannot name a class: it has line breaks, spaces around it, or is not UTF-8"
        raise InputError(f"{printable(str(path.parent))}: {text}; rename it")
    return split, folders[0]


def _split_name(name: str) -> str | None:
    """Return the split that a folder's name means: one of `SPLITS`, "" for another one, None for none."""
    lowered = name.lower()
    return lowered if lowered in SPLITS else "" if lowered in OTHER_SPLITS else None


def is_text(name: str) -> bool:
    """Tell whether a name of the file system is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folded(name: str) -> str:
    """Return what names share that differ only in case, or in the form of an accented letter (one sign or two)."""
    return unicodedata.normalize("NFC", name).casefold()


def refuse_inside(root: str | os.PathLike, folder: str | os.PathLike, key: str = "output_dir") -> None:
    """Refuse a folder to write to whose files would be looked at as those of a data set.

    Args:
        root: of the data set.
        folder: where files will be written.
        key: of the config, that names this folder.

    Raises:
        InputError: it is `root` or lies inside, not hidden by a dot.
    """
    real, inside = real_path(root), real_path(folder)
    if inside.is_relative_to(real) and not any(map(_is_hidden, inside.relative_to(real).parts)):
        raise InputError(f"{key}: {folder} lies inside data.root, where it would be a class; choose one outside")


def _refuse_deep_splits(root: Path, by_class: dict[str, dict[str, list[Path]]]) -> None:
    """Refuse folders train and test below the places where they split the files."""
    found: dict[str, Path] = {}
    for path in (path for parts in by_class.values() for path in parts.get("", [])):
        inside = path.relative_to(root).parts[:-1]
        found |= {_split_name(name) or "": root.joinpath(*inside[: at + 1]) for at, name in enumerate(inside)}
    if found.keys() >= set(SPLITS):
        shown = " and ".join(str(found[split]) for split in SPLITS)
        raise InputError(f"{shown} lie too deep to split the files; move or rename them: {LAYOUTS}")


def _divide(name: str, files: list[Path], root: Path, test_fraction: float, split_seed: int) -> dict[str, list[Path]]:
    """Split the files of a class at random."""
    if len(files) < 2:
        raise InputError(f"{root}: class '{name}' has one file, {files[0]}; one to train and one to test are needed")
    order = torch.randperm(len(files), generator=derived_generator(split_seed, "test files", name)).tolist()
    count = min(max(1, round(len(files) * test_fraction)), len(files) - 1)
    chosen = set(order[:count])
    parts = {"train": [file for index, file in enumerate(files) if index not in chosen]}
    return {**parts, "test": [file for index, file in enumerate(files) if index in chosen]}


def count_suffixes(counter: Counter[str]) -> str:
    """Return one text, such as "3 .off, 1 without suffix"."""
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(counter.items()))
