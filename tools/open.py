"""Show the report of a run in a browser; make it first if there is none, or if the run has gone on since."""

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence

from s2d3d.cli import described, run_tool
from s2d3d.runs.folder import RunFolder, require_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="open.py", **described(__doc__, "s2d3d open runs/demo"))
    parser.add_argument("run", metavar="RUN", help="a run folder of tools/train.py")
    parser.add_argument("--device", default="auto", help="where a new report runs the model: auto, cpu, cuda or cuda:N")
    return parser


def run(arguments: argparse.Namespace) -> None:
    require_run(arguments.run)
    folder = RunFolder(arguments.run)
    if not is_current(folder):
        make_report(folder, arguments.device)
    address = folder.report.resolve().as_uri()
    shown = has_screen() and webbrowser.open(address)
    print(f"{folder.report}: shown in the browser" if shown else f"no browser here; open {address}")


def is_current(folder: RunFolder) -> bool:
    """Return whether the folder has a page that was written after the last change of the run, and its plots."""
    if not folder.report.is_file() or not folder.plots.is_dir():
        return False
    sources = (folder.log, folder.metrics, folder.robustness, folder.analysis)
    changes = [path.stat().st_mtime for path in sources if path.is_file()]
    return folder.report.stat().st_mtime >= max(changes, default=0.0)


def make_report(folder: RunFolder, device: str) -> None:
    """Write the report of a run, finished or not; without clouds, and a line that says why, if its data is not here."""
    from s2d3d.errors import InputError
    from s2d3d.machine import choose_device, keep_large_allocations
    from s2d3d.runs.record import read_runs
    from s2d3d.viz.run_report import predict_run, write_run_report

    (record,) = read_runs([folder.root])
    predictions = None
    if record.checkpoint is not None:
        chosen = choose_device(device)
        keep_large_allocations()
        try:
            predictions = predict_run(record, device=chosen)
        except InputError as error:
            print(f"the report has no clouds: {error}", file=sys.stderr)
    write_run_report(folder, predictions)


def has_screen() -> bool:
    """Return whether a browser could have a window here: on Linux a display, or a browser that BROWSER names."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    return sys.platform != "linux" or any(os.environ.get(name) for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
