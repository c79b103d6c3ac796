"""Completion of commands, flags and files in a shell, as a script that the shell reads."""

import argparse
import importlib
from collections.abc import Mapping

from .cli import add_common_flags
from .optional import optional

_FILES = ("FILE", "PATH", "CONFIG", "SPARSE", "STUDY", "RUN")
_FOLDERS = ("DIR",)
"""Beginnings of the metavars of arguments that name files or folders."""


def completion_script(
    shell: str, parser: argparse.ArgumentParser, tools: Mapping[str, argparse.ArgumentParser], texts: Mapping[str, str]
) -> str:
    """Return the script that completes a program and its commands in a shell.

    Args:
        shell: "bash", "zsh" or "tcsh".
        parser: of the program, with its own flags.
        tools: by command, its parser.
        texts: by command, what it does.

    Raises:
        InputError: shtab is missing.
    """
    with optional("shtab", "--print-completion", extra="completion"):
        shtab = importlib.import_module("shtab")
    commands = parser.add_subparsers(dest="command")
    for name, tool in tools.items():
        add_common_flags(tool)
        commands.add_parser(name, help=texts[name], parents=[tool], add_help=False)
    waiting = [parser]
    while waiting:
        for action in waiting.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
            for kinds, completed in ((_FILES, shtab.FILE), (_FOLDERS, shtab.DIRECTORY)):
                if isinstance(action.metavar, str) and action.metavar.startswith(kinds):
                    action.complete = completed  # type: ignore[attr-defined]  # how shtab is told
    return shtab.complete(parser, shell=shell)
