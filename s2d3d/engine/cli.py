"""What the command lines in tools/ have in common: one way to fail, and the flags that mean the same everywhere."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError, TrainingError

Body = Callable[[argparse.Namespace], "int | None"]


def run_tool(parser: argparse.ArgumentParser, body: Body, argv: Sequence[str] | None) -> int:
    """Parse, call and translate errors; the return value is the exit code of the process.

    A user's mistake ends as `error: ...` on stderr with exit code 1, wrong arguments as 2, Ctrl-C as 130.
    `--debug` lets the traceback through.

    Args:
        parser: the tool's arguments; `--debug` is added.
        body: does the work; its return value is the exit code, None means 0.
        argv: arguments without the program's name; None takes those of the process.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        arguments = _parse(parser, argv)
    except SystemExit as error:  # argparse leaves the process; in-process callers want the code
        return int(error.code or 0)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        return body(arguments) or 0
    except (ValueError, OSError, TrainingError) as error:
        if arguments.debug:
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the positional `section.key=value` overrides."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the config")


def refuse_existing(path: str | Path, force: bool) -> Path:
    """Return `path` as a place to write to.

    Raises:
        InputError: it exists and `force` is not set, or its folder does not exist.
    """
    path = Path(path)
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; choose another output or pass --force")
    if not path.parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist; create it first")
    return path


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse with flags and overrides in any order, which plain argparse refuses and sub-commands rule out."""
    has_commands = any(action.nargs == argparse.PARSER for action in parser._actions)
    return parser.parse_args(argv) if has_commands else parser.parse_intermixed_args(argv)
