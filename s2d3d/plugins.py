"""A user's own Python files, imported for what they register: models and data sets that a config can name."""

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError, first_line

_LOADED: dict[Path, str] = {}
"""By resolved path: the plugin as it was named."""


def load_plugins(paths: Iterable[str | Path], *, beside: Path | None = None) -> None:
    """Import Python files, each once in a process. A plugin calls `register_model` or `register_dataset`.

    Args:
        paths: Python files, relative to the working directory. One that is not there is taken to be a file of that name
            that is imported already.
        beside: folder in which a relative path is looked up as well.

    Raises:
        InputError: no such file, or its import fails.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "my_data.py")
        >>> _ = path.write_text("print('imported')\\n")
        >>> load_plugins([path, path])
        imported
    """
    for named in paths:
        path = Path(named).expanduser()
        if beside and not path.is_file() and (beside / path).is_file():
            path = beside / path
        if not path.is_file():
            if path.name in {place.name for place in _LOADED}:  # named with its folder, by the command line
                continue
            raise InputError(f"{path}: no such plugin; name a Python file that registers models or data sets")
        place = Path(os.path.realpath(path))
        if place in _LOADED:
            continue
        spec = importlib.util.spec_from_file_location(f"s2d3d_plugin_{place.stem}_{len(_LOADED)}", place)
        if spec is None or spec.loader is None:
            raise InputError(f"{path}: is no Python file; a plugin's name ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # so that classes of the plugin can be pickled
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a plugin may raise anything
            del sys.modules[spec.name]
            raise InputError(f"{path}: cannot be imported ({type(error).__name__}: {first_line(error)})") from error
        _LOADED[place] = str(named)


def loaded_plugins() -> list[str]:
    """Return the plugins of this process, as they were named."""
    return list(_LOADED.values())


def plugin_files() -> list[str]:
    """Return the files of the plugins of this process, as absolute paths: another process can import them."""
    return list(map(str, _LOADED))
