"""Common parts of the command lines in tools/: error handling, and flags with the same meaning everywhere.

At its top, a tool imports only what it needs to check its arguments. The rest is imported in `run`, after the check:
torch and the models take seconds to import, and `--help` or a wrong path must be fast.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .atomic import check_parent, real_path
from .errors import InputError, TrainingError, printable, quoted
from .plugins import load_plugins
from .terminal import messages_on_stderr, open_streams, plain_stdout

CLOSED_PIPE = 141
"""Exit code of a process whose reader has gone, as a shell shows it."""
_NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|cannot allocate memory|failed to map segment"
    "|can't start new thread",
    re.IGNORECASE,
)
"""How libraries say it; under a limit of the address space imports and threads fail so."""
Body = Callable[[argparse.Namespace], "int | None"]
CLOUD_FILES = ".ply .pcd .off .obj .stl .glb .las .npy .npz .txt .xyz .csv .pts"
"""File types that the tools read, for their help; equal to `datasets.files.SUFFIXES`."""


def run_tool(parser: argparse.ArgumentParser, body: Body, argv: Sequence[str] | None) -> int:
    """Parse the arguments, call the tool and handle errors; return the exit code of the process.

    A user error prints `error: ...` on stderr and gives exit code 1. Wrong arguments give 2, Ctrl-C gives 130, and a
    closed pipe (`| head`) gives 141; a tool that was given an --output finishes its work before that. `--debug` shows
    the traceback.

    Args:
        parser: the tool's arguments; `--debug` and `--plugin` are added.
        body: the tool; its return value is the exit code, None means 0.
        argv: arguments without the program's name; None: those of the process.
    """
    add_common_flags(parser)
    shorten_errors(parser)
    open_streams()
    try:
        arguments = _parse(parser, argv)
    except SystemExit as error:  # argparse ends the process; in-process callers need the code
        return int(error.code or 0)
    try:
        with messages_on_stderr(), plain_stdout(go_on=getattr(arguments, "output", None) is not None) as output:
            load_plugins(arguments.plugin)
            code = body(arguments) or 0
            output.flush()
        return CLOSED_PIPE if output.closed_early else code
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return CLOSED_PIPE
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        if arguments.debug or not print_error(error):
            raise
        return 1


def described(text: str | None, example: str) -> dict[str, Any]:
    """Return keywords of `ArgumentParser` for a help that begins with an example: usage, example, text, options.

    Args:
        text: what the command does.
        example: a command line that works.
    """
    return {"description": f"example: {example}\n\n{text}", "formatter_class": _Help}


class _Help(argparse.RawDescriptionHelpFormatter):
    """The usage line names what must be given; the options are listed below."""

    def add_usage(self, usage: Any, actions: Iterable[Any], groups: Iterable[Any], prefix: str | None = None) -> None:
        choices = [group for group in groups if group.required]
        either = [action for group in choices for action in group._group_actions]
        needed = [action for action in actions if action.required or not action.option_strings or action in either]
        super().add_usage(usage, needed, choices, prefix)


def print_error(error: Exception) -> bool:
    """Print an error as `error: ...` on stderr, one line for each problem; return False for a bug of the program."""
    lines = _error_lines(error)
    for line in lines or ():
        print(f"error: {printable(line)}", file=sys.stderr)
    return lines is not None


def own_command(tool: str) -> str:
    """Return the beginning of a command line that starts a tool in the way in which this process was started.

    Args:
        tool: its name as a subcommand, such as "train".
    """
    program = Path(sys.argv[0])
    if program.name == "s2d3d":
        return f"s2d3d {tool}"
    here = Path(sys.executable).is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if here else sys.executable
    file = program.with_name(f"{tool.replace('-', '_')}.py")
    return shlex.join([python, str(file)] if file.is_file() else [python, "-m", "s2d3d", tool])


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every tool."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py",
        help="a Python file that registers models or data sets of your own; may be repeated",
    )  # fmt: skip


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the positional `section.key=value` overrides."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="replace values of the config"
    )


def add_files(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--files`, which replaces the data set, and the flags of `add_file_flags`."""
    parser.add_argument("--files", nargs="+", metavar="PATH", help=f"{what}; `predict --help` lists the file types")
    add_file_flags(parser)


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how files are read: `--up-axis`, `--refuse-missing` and `--estimate-normals`."""
    parser.add_argument(
        "--up-axis", choices=("y", "z"),
        help="vertical axis of the files; default: data.up_axis of a model that learned class folders, else z",
    )  # fmt: skip

    parser.add_argument(
        "--refuse-missing", action="store_true",
        help="refuse files with points that are NaN or infinite; default: drop these points and report their number",
    )  # fmt: skip
    parser.add_argument(
        "--estimate-normals", action="store_true",
        help="estimate the normals of clouds that have none, if the model takes normals; "
        "default: as data.estimate_normals",
    )  # fmt: skip


def check_overrides(overrides: Sequence[str], keys: Sequence[str]) -> None:
    """Refuse overrides that a tool for checkpoints would ignore.

    Args:
        overrides: as on the command line.
        keys: the sections, or single keys of a section, that the tool uses.

    Raises:
        InputError: an override changes another key; one line for each.
    """
    if not overrides:
        return
    from .config.compare import is_named
    from .config.io import override_key, override_name
    from .config.schema import Config

    known = ", ".join(key if key == "seed" or "." in key else f"{key}.*" for key in keys)
    names = {override: override_key(override) for override in overrides}
    lines = [
        f"{override_name(override)}: has no effect on a checkpoint; what can be replaced here is {known}"
        for override, name in names.items()
        if name.partition(".")[0] in Config.model_fields and not is_named(name, keys)
    ]
    if lines:
        raise InputError("\n".join(lines))


def check_file_flags(arguments: argparse.Namespace) -> None:
    """Refuse the flags of `add_file_flags` without `--files`, and `data.up_axis` with it.

    Raises:
        InputError: as said.
    """
    from .config.io import override_key

    if arguments.files and "data.up_axis" in map(override_key, arguments.overrides):
        raise InputError("data.up_axis: has no effect with --files; use --up-axis")
    advice = {
        "up_axis": "that of a data set is data.up_axis",
        "estimate_normals": "data sets get them by prepare_data.py",
        "refuse_missing": "data sets leave out points that are not finite",
    }
    for name, text in advice.items():
        if getattr(arguments, name) and not arguments.files:
            raise InputError(f"--{name.replace('_', '-')}: is for --files only; {text}")


def refuse_split(overrides: Sequence[str]) -> None:
    """Refuse `eval.split`, for tools that score the test split whatever it says.

    Raises:
        InputError: an override changes it.
    """
    from .config.io import override_key

    if "eval.split" in map(override_key, overrides):
        raise InputError("eval.split: has no effect here, the test split is scored; training scores a validation part")


def refuse_existing(
    path: str | Path, force: bool, *, sources: Sequence[str | Path] = (), suffix: str | None = None
) -> Path:
    """Check that an output file may be written, and return its path.

    Args:
        path: the output file.
        force: replace an existing file.
        sources: input files, which are never replaced, and folders of them, to which none is added.
        suffix: that the file must have, such as ".json".

    Raises:
        InputError: the file exists and `force` is not set; it is a source or lies in one, as a cloud would; it is a
            folder, a device or not a file, or of another suffix; its folder does not exist or cannot be written to.
    """
    if not str(path):
        raise InputError("--output: is empty; name a file")
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file, such as {path / 'FILE'}")
    if path.exists() and any(path.samefile(source) for source in sources if Path(source).exists()):
        raise InputError(f"{path}: is what is read; choose another output")
    real, is_cloud = real_path(path), path.suffix.lower() in CLOUD_FILES.split()
    for folder in (real_path(source) for source in sources if is_cloud and Path(source).is_dir()):
        if real.is_relative_to(folder) and not any(part.startswith(".") for part in real.relative_to(folder).parts):
            raise InputError(f"{path}: lies in {folder}, which is read, and would be one of its clouds; choose another")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is a device, a pipe or a socket; name a file")
    if suffix and path.suffix.lower() != suffix:
        raise InputError(f"--output: must end in {suffix}, got {quoted(str(path))}")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path}: exists already; choose another output or pass --force")
    check_parent(path)
    return path


def shorten_errors(parser: argparse.ArgumentParser) -> None:
    """Report wrong arguments in one line, like all other errors, without the usage text."""

    def error(message: str) -> NoReturn:
        parser.exit(2, f"error: {printable(message)}; see {parser.prog} --help\n")

    parser.error = error  # type: ignore[method-assign]  # the tools and their sub-commands make plain parsers
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                shorten_errors(command)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse flags and overrides in any order. Plain argparse refuses that, and sub-commands do not support it."""
    has_commands = any(action.nargs == argparse.PARSER for action in parser._actions)
    parsed = parser.parse_args(argv) if has_commands else parser.parse_intermixed_args(argv)
    for name, value in vars(parsed).items():
        setattr(parsed, name, _at_home(value))
    return parsed


def _at_home(value: object) -> object:
    """Expand `~` at the beginning of paths, as a shell does not in `--output=~/a` or behind quotes."""
    if isinstance(value, str):
        return os.path.expanduser(value)
    return [_at_home(item) for item in value] if isinstance(value, list) else value


def _error_lines(error: Exception) -> list[str] | None:
    """Return the message of an error for the user; None for a bug of the program."""
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        detail = f" ({wanted[1]} more were needed)" if wanted else ""
        return [f"out of memory{detail}; use a smaller batch, a smaller model or fewer points"]
    if isinstance(error, (RuntimeError, ImportError)) and not isinstance(error, TrainingError):
        return None
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return [f"{error.filename}: {error.strerror}"]
    return [line for line in text.split("\n") if line] or [type(error).__name__]
