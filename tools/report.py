"""Report runs: one HTML page with accuracies, plots, interactive mistakes and configs; or the plots as files."""

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2d3d.atomic import check_writable, write_text
from s2d3d.cli import described, refuse_existing, run_tool
from s2d3d.config.compare import is_named
from s2d3d.config.io import override_key
from s2d3d.errors import InputError
from s2d3d.runs.folder import require_run

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from s2d3d.runs.record import RunRecord
    from s2d3d.viz.reconstructions import Reconstructions


REPLACED = ("data", "eval.batch_size")
"""What overrides may change: the model and its scores are those of the run."""


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d report runs/demo --output report.html"
    parser = argparse.ArgumentParser(prog="report.py", **described(__doc__, example))
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders of tools/train.py; section.key=value replaces config values"
    )
    parser.add_argument("--output", metavar="FILE.html", help="the page, self-contained, below 10 MB")
    parser.add_argument(
        "--plots", metavar="DIR", help="write the plots to this folder as PNG files; no model is run for them"
    )
    parser.add_argument(
        "--num-mistakes",
        type=int,
        default=24,
        metavar="N",
        help="number of worst mistakes per run; default: %(default)s",
    )
    parser.add_argument(
        "--clouds-per-class", type=int, default=12, metavar="N",
        help="clouds per class behind the confusion matrix; default: %(default)s; both 0: run no model",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.output is None and arguments.plots is None:
        raise InputError("nothing to write; give --output FILE.html, --plots DIR or both")
    for name in ("num_mistakes", "clouds_per_class"):
        if getattr(arguments, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, must be at least 0")
    folders, overrides = split_arguments(arguments.runs)
    if arguments.output is not None:
        if Path(arguments.output).suffix.lower() not in (".html", ".htm"):
            raise InputError(f"{arguments.output}: the report is an HTML page; give it a name that ends in .html")
        refuse_existing(arguments.output, arguments.force)
    for folder in folders:
        require_run(folder)

    from s2d3d.machine import choose_device, keep_large_allocations
    from s2d3d.runs.record import read_runs, require_whole
    from s2d3d.viz.figure import save_figure
    from s2d3d.viz.report import build_report
    from s2d3d.viz.run_report import predict_run

    records = read_runs(folders)
    require_whole(records)
    plots = plot_files(records, Path(arguments.plots), arguments.force) if arguments.plots is not None else {}
    if arguments.output is not None:
        with_clouds = arguments.num_mistakes or arguments.clouds_per_class
        device = choose_device(arguments.device)
        keep_large_allocations()
        classifiers = [record for record in records if record.config["task"] == "classify"]
        others = [record for record in records if record.config["task"] == "pretrain"]
        said = (
            {record.name: predict_run(record, overrides, device=device) for record in classifiers}
            if with_clouds
            else {}
        )
        made = {record.name: reconstruct(record, overrides, device) for record in others} if with_clouds else {}
        page = build_report(
            records, said, made, num_mistakes=arguments.num_mistakes, clouds_per_class=arguments.clouds_per_class
        )
    for path, figure in plots.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path)
        print(f"written to {path}")
    if arguments.output is not None:  # last: a page that is there tells that nothing failed
        write_text(arguments.output, page)
        print(f"written to {arguments.output}")


def split_arguments(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate run folders from overrides, which have the form `section.key=value`."""
    overrides = [item for item in items if re.match(r"[a-z0-9_]+(\.[a-z0-9_]+)*=", item) and not Path(item).exists()]
    folders = [item for item in items if item not in overrides]
    if not folders:
        raise InputError("no run to report; name a run folder")
    for override in overrides:
        if not is_named(override_key(override), REPLACED):
            raise InputError(
                f"{override}: has no effect on a report; what can be replaced here is data.*, eval.batch_size"
            )
    return folders, overrides


def reconstruct(record: "RunRecord", overrides: Sequence[str], device: "torch.device") -> "Reconstructions":
    """Run the final model of a pre-training on a few test clouds, under the masks of evaluations."""
    from s2d3d.viz.kinds import read_source, rebuild
    from s2d3d.viz.reconstructions import Reconstructions
    from s2d3d.viz.run_report import finished

    source = read_source("reconstructions", checkpoint=finished(record), overrides=overrides, device=str(device))
    return Reconstructions(source.points, *rebuild(source), source.captions)


def plot_files(records: Sequence["RunRecord"], folder: Path, force: bool) -> dict[Path, "Figure"]:
    """Return the figures by their output file, after a check that these files may be written."""
    from s2d3d.viz.plots import confusion_figure
    from s2d3d.viz.report import report_figures

    figures = report_figures(records)
    for entry in records:
        if entry.final and "confusion" in entry.final:
            title = f"{entry.name}, OA {100 * entry.final['oa']:.2f} %"
            figures[f"confusion of {entry.name}"] = confusion_figure(
                entry.final["confusion"], entry.final["class_names"], title=title
            )
    paths: dict[Path, Figure] = {}
    for name, figure in figures.items():
        stem = re.sub("[^A-Za-z0-9.-]+", "_", name)
        places = (folder / f"{stem}{end}.png" for end in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
        paths[next(place for place in places if place not in paths)] = figure
    if folder.exists():
        for path in paths:
            refuse_existing(path, force)
    else:
        check_writable(folder)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
