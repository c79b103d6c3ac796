"""Fit a linear classifier to the features of a frozen model, of a random encoder and of coordinate statistics."""

import argparse
import sys
from collections.abc import Sequence

from s2d3d.atomic import write_json
from s2d3d.cli import add_overrides, check_overrides, described, refuse_existing, refuse_split, run_tool
from s2d3d.runs.folder import require_checkpoint

FEATURES = ("mean+max", "max", "concat")


def build_parser() -> argparse.ArgumentParser:
    example = "s2d3d linear-probe --checkpoint runs/pretrain_mae_small/merged.pt"
    parser = argparse.ArgumentParser(prog="linear_probe.py", **described(__doc__, example))
    parser.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="a pre-training or a classifier, sparse or dense"
    )
    add_overrides(parser)
    parser.add_argument(
        "--features", choices=FEATURES, default=FEATURES[0],
        help="how the tokens of a cloud become one vector; default: the sum of their mean and maximum",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE.json", help="also write the results to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> None:
    output = None
    if arguments.output is not None:
        output = refuse_existing(arguments.output, arguments.force, sources=[arguments.checkpoint], suffix=".json")
    refuse_split(arguments.overrides)
    check_overrides(arguments.overrides, ("data", "eval.batch_size", "log", "seed"))
    require_checkpoint(arguments.checkpoint)

    from s2d3d.evaluation.probe import check_labels, probe_coordinates, probe_model, random_encoder, require_sklearn
    from s2d3d.machine import choose_device, keep_large_allocations
    from s2d3d.runs.trained import open_trained

    require_sklearn()
    device = choose_device(arguments.device)
    keep_large_allocations()
    trained = open_trained(arguments.checkpoint, arguments.overrides, device=device, task=None)
    config, (train, test) = trained.config, (trained.dataset(split) for split in ("train", "test"))
    check_labels(train, "a linear probe", "name a labelled set by data.root=")
    kwargs = {**config.model.kwargs, "in_channels": config.in_channels}
    size, seed, progress = config.eval.batch_size, config.seed, config.log.progress
    fresh = random_encoder(config.model.name, kwargs, train, seed=seed, device=device, batch_size=size)
    rows = {"model": arguments.checkpoint, "random": "random encoder", "coordinates": "coordinate statistics"}
    reports = {
        key: probe_model(model, train, test, device=device, kind=arguments.features, batch_size=size, progress=progress)
        for key, model in (("model", trained.model), ("random", fresh))
    }
    reports["coordinates"] = probe_coordinates(train, test, batch_size=size, progress=progress)
    width = max(map(len, rows.values()))
    for key, report in reports.items():
        print(f"{rows[key]:<{width}}  {report.num_features:>4} features  {report.summary()}")
    print(
        f"support vector machine on {len(train)} training clouds, C chosen on a fifth of them; scored on the test split"
    )
    if output:
        found = {key: report.to_dict() for key, report in reports.items()}
        write_json(output, {"checkpoint": arguments.checkpoint, "features": arguments.features, "seed": seed, **found})
        print(f"written to {output}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
