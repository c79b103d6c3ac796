"""Evaluate a checkpoint, sparse or dense, on the test split of its data set."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from s2d3d.atomic import write_json
from s2d3d.cli import (
    add_files,
    add_overrides,
    check_file_flags,
    check_overrides,
    described,
    refuse_existing,
    refuse_split,
    run_tool,
)
from s2d3d.errors import InputError, did_you_mean
from s2d3d.runs.folder import require_checkpoint

if TYPE_CHECKING:
    from s2d3d.runs.trained import TrainedModel


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d evaluate --checkpoint runs/demo/merged.pt --votes 10"
    parser = argparse.ArgumentParser(prog="evaluate.py", **described(__doc__, example))
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint, or an exported .onnx file")
    add_overrides(parser)
    add_files(parser, "files or folders of files instead of the data set, each in a folder named after its class")
    parser.add_argument(
        "--votes", type=int, metavar="N", help="number of passes whose logits are averaged; default: eval.votes"
    )
    parser.add_argument("--corruption", metavar="NAME:SEVERITY|all", help="corrupt the clouds; all: table and mCE")
    parser.add_argument(
        "--reference", metavar="FILE.json", help="for mCE; default: robustness.json of the dense baseline"
    )
    parser.add_argument("--output", metavar="FILE.json", help="also write the report to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> None:
    output = None
    if arguments.output is not None:
        sources = [arguments.checkpoint, *(arguments.files or ())]
        output = refuse_existing(arguments.output, arguments.force, sources=sources, suffix=".json")
    if arguments.votes is not None and arguments.votes < 1:
        raise InputError(f"--votes is {arguments.votes}, must be at least 1")
    refuse_split(arguments.overrides)
    check_overrides(arguments.overrides, ("data", "eval.batch_size", "eval.votes", "log", "seed"))
    check_file_flags(arguments)
    everything = arguments.corruption == "all"
    if arguments.reference and not everything:
        raise InputError("--reference: is for --corruption all only")
    require_checkpoint(arguments.checkpoint)

    from s2d3d import evaluate
    from s2d3d.config.data import build_test_loader
    from s2d3d.datasets import require_clouds
    from s2d3d.datasets.corruptions import CorruptedDataset, parse_corruption
    from s2d3d.datasets.file_set import ChainedLoader, in_order
    from s2d3d.evaluation.robustness import (
        SEED,
        add_corruption_errors,
        check_comparable,
        evaluate_corruptions,
        robustness_table,
    )
    from s2d3d.machine import keep_large_allocations
    from s2d3d.runs.record import find_reference, read_robustness
    from s2d3d.runs.trained import open_classifier

    corruption = parse_corruption(arguments.corruption) if arguments.corruption and not everything else None
    reference = arguments.reference
    if everything and not arguments.files and not reference:  # the baseline's file is for the test set
        reference = find_reference(arguments.checkpoint)
    compared = read_robustness(reference) if reference else None
    keep_large_allocations()
    overrides = [*arguments.overrides, *([f"eval.votes={arguments.votes}"] if arguments.votes is not None else [])]
    trained, device = open_classifier(arguments.checkpoint, overrides, device=arguments.device)
    model, config = trained.model, trained.config
    if arguments.corruption:
        trained.require_clouds("--corruption")
    groups = read_datasets(arguments, trained)
    dataset = groups[0]
    if len(groups) > 1 and arguments.corruption:
        counts = ", ".join(str(require_clouds(group, "--corruption").num_points) for group in groups)
        raise InputError(f"--corruption: the files hold {counts} points; score files of one number of points at once")
    votes = config.eval.votes
    make_loader = partial(build_test_loader, data=config.data, batch_size=config.eval.batch_size, seed=config.seed)
    progress = config.log.progress
    if everything:
        clean = require_clouds(dataset, "--corruption")
        setting = {"num_points": clean.num_points, "num_samples": len(dataset), "votes": votes, "seed": SEED}
        if compared:
            check_comparable(setting, compared)
        table = evaluate_corruptions(model, clean, make_loader, device=device, votes=votes, progress=progress)
        result = table.to_dict()
        if compared and reference:
            result = add_corruption_errors(result, compared, reference)
        print(robustness_table(result))
    else:
        if corruption:
            dataset = CorruptedDataset(require_clouds(dataset, "--corruption"), *corruption, seed=SEED)
        loader = make_loader(dataset) if len(groups) == 1 else ChainedLoader([make_loader(group) for group in groups])
        report = evaluate(model, loader, device=device, votes=votes, progress=progress)
        if len(groups) > 1:
            report = replace(report, correct=in_order(groups, report.correct))
        result = {"corruption": arguments.corruption, **report.to_dict()} if corruption else report.to_dict()
        print(f"{report.table()}\n\n{report.confusions()}\n\n{report.summary()}")
    if output:
        write_json(output, {"checkpoint": str(arguments.checkpoint), **result})
        print(f"written to {output}")


def read_datasets(arguments: argparse.Namespace, trained: "TrainedModel") -> "Sequence[Any]":
    """Read the test split of the checkpoint's data set, or the named files: a set for each number of points."""
    from s2d3d.datasets.file_set import find_files, folder_labels, folder_names, group_files
    from s2d3d.runs.trained_files import warn_of_trained

    if not arguments.files:
        return [trained.dataset()]
    trained.require_clouds("--files")
    class_names, config = trained.class_names, trained.config
    files = find_files(arguments.files)
    labels = folder_labels(files, class_names, arguments.files)
    if labels is None:
        other = next(file for file in files if folder_labels([file], class_names, arguments.files) is None)
        hints = (did_you_mean(name, class_names) for name in folder_names(other, arguments.files))
        advice = "; name folders after classes, or classify without labels: tools/predict.py"
        raise InputError(
            f"{other}: its folder '{folder_names(other)[0]}' is none of the {len(class_names)} classes of "
            f"{arguments.checkpoint}{next(filter(None, hints), advice)}"
        )
    data = config.data
    groups = group_files(
        files, class_names, labels, data.num_points, least=getattr(trained.model, "min_points", None),
        up_axis=arguments.up_axis or trained.up_axis_of_files, normalize=bool(data.normalize), seed=config.seed,
        allow_missing=not arguments.refuse_missing, channels=trained.channels,
        estimate_normals=arguments.estimate_normals or trained.estimates_normals,
    )  # fmt: skip
    warn_of_trained(files, trained.payload, arguments.checkpoint)
    return groups


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
