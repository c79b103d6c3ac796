"""The command `s2d3d`: every tool of the repository as a sub-command, also where only the wheel is installed."""

import argparse
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .cli import shorten_errors
from .errors import did_you_mean
from .version import __version__

COMMANDS = {
    "train": "train the model that a config describes, merge and evaluate it",
    "evaluate": "score a checkpoint on the test split of its data set",
    "predict": "classify files: clouds and meshes",
    "merge": "merge the experts of a sparse checkpoint",
    "apply-ewa": "apply Experts Weights Averaging to a checkpoint once",
    "prepare-data": "make, convert or fetch a data set",
    "visualize": "draw clouds: data, predictions, patches, experts",
    "report": "put runs into one HTML page",
    "analyze": "find out what the experts of a run did",
    "few-shot": "run few-shot folds",
    "study": "run arms times seeds, paired and resumable",
    "benchmark": "measure speed and memory",
    "export": "write a dense model as ONNX, TorchScript or torch.export program",
}
"""Sub-command -> what it does; the tool is the module of that name with underscores."""
HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run `s2d3d COMMAND ...` and return the exit code, as `python tools/COMMAND.py ...` does.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Example:
        >>> main(["--version"])
        s2d3d 0.1.0
        0
    """
    parser = argparse.ArgumentParser(
        prog="s2d3d",
        description="Sparse-to-Dense training of 3D point-cloud transformers.",
        epilog="commands:\n" + "\n".join(f"  {name:<14}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"s2d3d {__version__}")
    parser.add_argument("--copy-configs", metavar="DIR", help="copy the shipped configs into a new folder, and end")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; see s2d3d COMMAND --help")
    given = list(sys.argv[1:] if argv is None else argv)
    shorten_errors(parser)
    try:
        if given and given[0] in COMMANDS:  # argparse would take the command's own flags for those of this parser
            name = given[0].replace("-", "_")
            if not tool_file(name).is_file():
                parser.exit(1, f"error: {given[0]}: needs a clone of the repository; there: python tools/{name}.py\n")
            return load_tool(name).main(given[1:])
        asked = parser.parse_args(given)
        if asked.command is not None and asked.command not in COMMANDS:
            parser.error(f"no command '{asked.command}'{did_you_mean(asked.command, COMMANDS)}")
        if asked.copy_configs is None:
            parser.error("a command is missing")
        copy_configs(asked.copy_configs, parser)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def copy_configs(folder: str, parser: argparse.ArgumentParser) -> None:
    """Copy the shipped configs to a folder that does not exist; ends the program with a message where it does."""
    source = next(path for path in (HERE / "configs", HERE.parent / "configs") if path.is_dir())
    try:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    except OSError as error:
        parser.exit(1, f"error: {folder}: {error.strerror}; name a folder that does not exist yet\n")


def tool_file(name: str) -> Path:
    """Return where a tool is: in the wheel, which ships all but the benchmarks, or in the repository around it."""
    packaged = HERE / "tools"
    return (packaged if packaged.is_dir() else HERE.parent / "tools") / f"{name}.py"


def load_tool(name: str) -> ModuleType:
    """Import a tool, which the wheel holds as a module of `s2d3d.tools`."""
    path = tool_file(name)
    if path.is_relative_to(HERE):
        return importlib.import_module(f"{__package__}.tools.{name}")
    spec = importlib.util.spec_from_file_location(f"s2d3d_tools_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
