"""The command `s2d3d`: the tools of the repository as sub-commands. It also works with only the wheel installed."""

import argparse
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .cli import described, shorten_errors
from .errors import InputError, did_you_mean
from .version import __version__

COMMANDS = {
    "train": "train the model that a config describes, merge and evaluate it",
    "pretrain": "pre-train a masked autoencoder without labels",
    "evaluate": "score a checkpoint on the test split of its data set",
    "linear-probe": "score the features of a frozen model by a linear classifier",
    "predict": "classify files: clouds and meshes",
    "merge": "merge the experts of a sparse checkpoint",
    "apply-ewa": "apply Experts Weights Averaging to a checkpoint once",
    "prepare-data": "make, convert or download a data set",
    "visualize": "draw clouds: data, predictions, patches, experts",
    "report": "put runs into one HTML page",
    "open": "show the report of a run in a browser",
    "analyze": "analyse the experts of a run",
    "few-shot": "run few-shot folds",
    "study": "run and compare configurations over paired seeds",
    "benchmark": "measure speed and memory",
    "zoo": "try the conversion on many model families",
    "export": "export a dense model as ONNX, TorchScript or torch.export program",
}
"""Description by sub-command. The tool is the module of the same name, with underscores."""
SHELLS = ("bash", "zsh", "tcsh")
HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run `s2d3d COMMAND ...` like `python tools/COMMAND.py ...`, and return the exit code.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Example:
        >>> main(["--version"])
        s2d3d 0.1.0
        0
    """
    parser = argparse.ArgumentParser(
        prog="s2d3d",
        epilog="commands:\n" + "\n".join(f"  {name:<14}{text}" for name, text in COMMANDS.items()),
        **described("Sparse-to-Dense training of 3D point-cloud transformers.", "s2d3d train configs/demo.yaml"),
    )
    add_flags(parser)
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; see s2d3d COMMAND --help")
    given = list(sys.argv[1:] if argv is None else argv)
    shorten_errors(parser)
    try:
        if given and given[0] in COMMANDS:  # argparse would read the command's flags as flags of this parser
            name = given[0].replace("-", "_")
            if not tool_file(name).is_file():
                parser.exit(1, f"error: {given[0]}: needs a clone of the repository; there: python tools/{name}.py\n")
            return load_tool(name).main(given[1:])
        asked = parser.parse_args(given)
        if asked.command is not None and asked.command not in COMMANDS:
            parser.error(f"no command '{asked.command}'{did_you_mean(asked.command, COMMANDS)}")
        if asked.print_completion is not None:
            print_completion(asked.print_completion)
        elif asked.copy_configs is not None:
            copy_configs(asked.copy_configs, parser)
        else:
            parser.error("a command is missing")
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `s2d3d` itself."""
    parser.add_argument("--version", action="version", version=f"s2d3d {__version__}")
    parser.add_argument("--copy-configs", metavar="DIR", help="copy the shipped configs into a new folder, and stop")
    parser.add_argument("--print-completion", choices=SHELLS, help="print the completion script of a shell, and stop")


def print_completion(shell: str) -> None:
    """Write the completion script of a shell to stdout; commands that need a clone are left out where there is none.

    Raises:
        InputError: the package that makes the script is missing.
    """
    from .completion import completion_script

    names = {command: command.replace("-", "_") for command in COMMANDS}
    parsers = {command: load_tool(name).build_parser() for command, name in names.items() if tool_file(name).is_file()}
    parser = argparse.ArgumentParser(prog="s2d3d")
    add_flags(parser)
    sys.stdout.write(completion_script(shell, parser, parsers, COMMANDS) + "\n")


def copy_configs(folder: str, parser: argparse.ArgumentParser) -> None:
    """Copy the shipped configs to a new folder. If the folder exists, end the program with a message."""
    source = next(path for path in (HERE / "configs", HERE.parent / "configs") if path.is_dir())
    try:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    except OSError as error:
        parser.exit(1, f"error: {folder}: {error.strerror}; name a folder that does not exist yet\n")


def tool_file(name: str) -> Path:
    """Return the place of a tool: in the wheel, which has all but the benchmarks, or in the repository."""
    packaged = HERE / "tools"
    return (packaged if packaged.is_dir() else HERE.parent / "tools") / f"{name}.py"


def load_tool(name: str) -> ModuleType:
    """Import a tool. In the wheel, tools are modules of `s2d3d.tools`."""
    path = tool_file(name)
    if path.is_relative_to(HERE):
        return importlib.import_module(f"{__package__}.tools.{name}")
    spec = importlib.util.spec_from_file_location(f"s2d3d_tools_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
