"""The run that `--force` replaces: kept in its folder until the new one stands, and put back if that fails."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..atomic import read_json, sweep, write_json
from ..errors import InputError

PLACE = "replaced"
NOTE = "s2d3d-replaced.json"
"""The file by which the folder is known to be ours; it lists the files that are kept."""
MOVING, WHOLE, DROPPING = "moving", "whole", "dropping"
"""States: the files are on their way here or back, all of them are here, they are being removed."""


class ReplacedRun:
    """The folder `replaced` in a run folder, itself laid out as a run folder.

    A process that is killed at any moment leaves the run here, in its own place, or partly in each; `recover` finishes
    what it began.

    Example:
        >>> ReplacedRun(Path("runs/demo")).is_there()
        False
    """

    def __init__(self, root: Path) -> None:
        self.root, self.place, self.note = root, root / PLACE, root / PLACE / NOTE

    def is_there(self) -> bool:
        """Tell whether a run is kept here: by the note, not by the name of the folder."""
        return bool(self._read())

    def check(self) -> None:
        """Raise InputError if something of the user's has the place where a run would be kept."""
        if self.is_there() or not os.path.lexists(self.place):
            return
        inside = self.place.rglob("*") if self.place.is_dir() and not self.place.is_symlink() else [self.place]
        if any(path.is_symlink() or not path.is_dir() for path in inside):
            raise InputError(f"{self.place}: has the name of the folder that keeps a replaced run; move it elsewhere")

    def put_aside(self, files: Iterable[Path]) -> None:
        """Move files of the run folder here; when this returns, the note says that all of them are here."""
        sweep(self.place)
        self.check()
        names = [path.relative_to(self.root).as_posix() for path in files]
        self.place.mkdir(exist_ok=True)
        self._write(MOVING, names)
        try:
            for name in names:
                (self.place / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.root / name, self.place / name)
        except OSError as error:  # such as a folder that is a link to another disk
            self.put_back()
            text = f"cannot be moved to {self.place} ({error.strerror}), where a replaced run is kept"
            raise InputError(f"{self.root / name}: {text}; choose another output_dir") from error
        self._write(WHOLE, names)

    def put_back(self) -> None:
        """Move the files back to where they were. The new run's files must be gone."""
        names = self._read()["files"]
        self._write(MOVING, names)
        for name in names:
            if os.path.lexists(self.place / name):
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.place / name, self.root / name)
        self._remove_folders(names)

    def drop(self) -> None:
        """Remove the files that are kept here, and nothing that somebody else has put beside them."""
        names = self._read()["files"]
        self._write(DROPPING, names)
        for name in names:
            (self.place / name).unlink(missing_ok=True)
        self._remove_folders(names)

    def recover(self, *, new: bool) -> None:
        """Finish what a killed process began; `new` tells whether a file of the new run is in the run folder."""
        state = self._read().get("state")
        if state == DROPPING:
            self.drop()
        elif state == MOVING or (state == WHOLE and not new):
            self.put_back()

    def _read(self) -> dict[str, Any]:
        """Return the note; an empty one where there is none that we can have written."""
        if self.place.is_symlink() or not self.note.is_file():
            return {}
        try:
            note = read_json(self.note)
        except (InputError, OSError):
            return {}
        names, state = note.get("files"), note.get("state")
        if state not in (MOVING, WHOLE, DROPPING) or not isinstance(names, list) or not all(map(_is_inside, names)):
            return {}
        return note

    def _write(self, state: str, names: list[str]) -> None:
        write_json(self.note, {"written_by": "s2d3d", "state": state, "files": names})

    def _remove_folders(self, names: list[str]) -> None:
        self.note.unlink()
        folders = {self.place, *((self.place / name).parent for name in names)}
        for folder in sorted(folders, reverse=True):
            with contextlib.suppress(OSError):  # something of the user's is in it
                folder.rmdir()


def _is_inside(name: object) -> bool:
    return isinstance(name, str) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))
