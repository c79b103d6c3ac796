"""Few-shot classification: a few training shapes of a few classes, repeated over seeded folds.

A fold is an ordinary run of the `Trainer` with a few classes (`data.classes`). Its data sets are subsets of the
training and test split.

Source: Point-BERT (Yu et al. 2022, arXiv 2111.14819), whose protocol is that of Sharma and Kaul 2020; docs/few_shot.md.
"""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import check_parent, read_json, write_json
from ..config.compare import SAME_RESULT, differences
from ..config.data import build_dataset
from ..config.load import Config, parse_config
from ..datasets import LabelledDataset
from ..errors import InputError
from ..evaluation.accuracy import ClassificationReport
from ..random_state import derived_generator
from ..runs.folder import RunFolder
from ..runs.record import final_form
from ..runs.schemas import Folds
from ..training.trainer import Trainer


@dataclass(frozen=True)
class FewShotTask:
    """The task of each fold.

    Attributes:
        ways: classes of a fold, at least 2.
        shots: training shapes of each class, at least 1.
        queries: test shapes of each class, at least 1.
    """

    ways: int = 5
    shots: int = 10
    queries: int = 20

    def __post_init__(self) -> None:
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, must be at least {least}")


def draw_classes(class_names: list[str], ways: int, *, seed: int, fold: int) -> list[str]:
    """Draw the classes of a fold. With the same seed and fold, fewer ways give a prefix of the classes of more ways.

    Raises:
        InputError: the data set has fewer classes.

    Example:
        >>> draw_classes(["a", "b", "c"], 2, seed=0, fold=0) == draw_classes(["a", "b", "c"], 3, seed=0, fold=0)[:2]
        True
    """
    if ways > len(class_names):
        raise InputError(f"ways is {ways}, more than the {len(class_names)} classes of the data set")
    order = torch.randperm(len(class_names), generator=derived_generator(seed, "few-shot classes", fold))
    return [class_names[index] for index in order[:ways].tolist()]


def draw_shapes(dataset: LabelledDataset, count: int, *, seed: int, fold: int) -> Tensor:
    """Draw `count` shapes of each class, as a function of seed, fold, split and class name.

    A smaller count draws a subset of the shapes of a larger count.

    Returns:
        (count * num_classes,) int64 indices, class by class.

    Raises:
        InputError: a class has fewer.
    """
    chosen = []
    for label, name in enumerate(dataset.class_names):
        members = (dataset.labels == label).nonzero().flatten()
        if len(members) < count:
            where = f"{dataset.source}: class '{name}' has {len(members)} {dataset.noun} in split '{dataset.split}'"
            raise InputError(f"{where}, {count} are needed")
        generator = derived_generator(seed, "few-shot shapes", fold, dataset.split, name)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen)


def fold_config(config: Config, task: FewShotTask, fold: int, class_names: list[str]) -> Config:
    """Return the config of a fold's run, with its own classes, seed and run folder."""
    mapping = config.to_dict()
    mapping["seed"] = (config.seed + fold) % 2**32
    mapping["output_dir"] = str(Path(config.output_dir) / f"{task.ways}way_{task.shots}shot" / f"fold_{fold}")
    mapping["data"]["classes"] = draw_classes(class_names, task.ways, seed=config.seed, fold=fold)
    return parse_config(mapping, where=f"fold {fold}")


def fold_datasets(
    config: Config, task: FewShotTask, *, seed: int, fold: int
) -> tuple[LabelledDataset, LabelledDataset]:
    """Build the support set (training split) and the query set (test split) of a fold.

    Args:
        config: of the fold, see `fold_config`.
        task: number of shapes.
        seed: of the whole experiment.
        fold: number of the fold.
    """
    parts = []
    for split, count in (("train", task.shots), ("test", task.queries)):
        dataset = build_dataset(config.data, split, seed=seed)
        parts.append(dataset.subset(draw_shapes(dataset, count, seed=seed, fold=fold)))
    return parts[0], parts[1]


def run_folds(
    config: Config, task: FewShotTask, *, folds: int, output: str | Path, force: bool = False
) -> Iterator[dict[str, Any]]:
    """Run the folds that are missing in `output`, and yield each fold when it is finished.

    `output` is written after each fold. An interrupted fold continues from its last checkpoint.

    Args:
        config: of all folds.
        task: ways, shots, queries.
        folds: number of folds, at least 1; folds 0 .. folds - 1.
        output: JSON file of the experiment.
        force: ignore the folds in `output` and replace their run folders.

    Yields:
        Fold number, class names, `oa`, `macc`, `loss` of the last epoch, training seconds, names of the shapes.

    Raises:
        InputError: `output` belongs to another experiment or cannot be written; the data has too few classes or shapes;
            the config is bad, or it would not score the queries.
        StoppedBySignal: SIGTERM or Ctrl-C; the state has been saved.
    """
    if folds < 1:
        raise InputError(f"folds is {folds}, must be at least 1")
    if config.task != "classify":
        raise InputError(
            f"task: is {config.task}, folds train classifiers; fine-tune a pre-training by model.pretrained"
        )
    if config.train.max_steps:
        raise InputError("train.max_steps: folds run to their last epoch, remove it")
    if config.eval.split != "test":
        raise InputError(f"eval.split: is {config.eval.split}, folds score their queries; set it to test")
    if config.data.val_fraction:
        raise InputError("data.val_fraction: would hold out support shapes, of which a fold trains on all; set it to 0")
    output = Path(output)
    check_parent(output)
    header = {**asdict(task), "config": config.to_dict()}
    done = {} if force or not output.exists() else _finished(output, header)
    class_names = build_dataset(config.data, "test", seed=config.seed).class_names
    for fold in range(folds):
        if fold not in done:
            done[fold] = _run_fold(config, task, fold, class_names, force)
            write_json(output, summarize(header, done))
        yield done[fold]


def summary_line(task: FewShotTask, folds: list[dict[str, Any]]) -> str:
    """Return one line: mean and deviation of OA over folds."""
    mean, deviation = _mean_and_deviation(folds)
    spread = "" if deviation is None else f" +- {100 * deviation:.2f}"
    return (
        f"{task.ways}-way {task.shots}-shot: OA {100 * mean:.2f}{spread} % "
        f"({len(folds)} folds, {task.queries} queries a class, last epoch)"
    )


def summarize(header: dict[str, Any], folds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the content of an output file: header, mean and deviation of OA over the folds, and the folds.

    The deviation is that of a sample (n - 1), None for a single fold.
    """
    results = [folds[fold] for fold in sorted(folds)]
    mean, deviation = _mean_and_deviation(results)
    return {**header, "mean_oa": mean, "std_oa": deviation, "folds": results}


def _mean_and_deviation(folds: list[dict[str, Any]]) -> tuple[float, float | None]:
    accuracies = [result["oa"] for result in folds]
    return statistics.fmean(accuracies), statistics.stdev(accuracies) if len(accuracies) > 1 else None


def _run_fold(config: Config, task: FewShotTask, fold: int, class_names: list[str], force: bool) -> dict[str, Any]:
    own = fold_config(config, task, fold, class_names)
    support, queries = fold_datasets(own, task, seed=config.seed, fold=fold)
    trainer = Trainer(own, force=force, datasets=(support, queries))
    last = RunFolder(own.output_dir).last
    trainer.fit(resume=last if last.exists() and not force else None)
    report = trainer.reports[final_form(trainer.reports)]
    assert isinstance(report, ClassificationReport), "run_folds refuses a pre-training"
    return {
        "fold": fold,
        "classes": list(own.data.classes or ()),
        "oa": report.oa,
        "macc": report.macc,
        "loss": report.loss,
        "seconds": sum(row["seconds"] for row in trainer.history),
        "run": own.output_dir,
        "support": support.names,
        "queries": queries.names,
    }


def _finished(output: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Read the folds of an earlier call, after a check that it was the same experiment."""
    advice = "choose another --output or pass --force"
    content = read_json(output, schema=Folds, advice=advice)
    try:
        theirs = {key: content[key] for key in header}
        folds = {int(result["fold"]): result for result in content["folds"]}
    except KeyError:
        raise InputError(f"{output}: is not a file of few-shot folds; {advice}") from None
    # Parsed, so that keys that were added or removed since are not a difference.
    theirs["config"] = parse_config(theirs["config"], where=str(output)).to_dict()
    found = differences(header, theirs, [f"config.{key}" for key in SAME_RESULT])
    roots = header["config"]["data"]["root"], theirs["config"]["data"]["root"]
    if Path(roots[0]).name != Path(roots[1]).name:  # the same data may lie elsewhere on another machine
        found["config.data.root"] = roots
    for name, (own, other) in found.items():
        difference = f"{name.removeprefix('config.')}={other!r}, this call has {own!r}"
        raise InputError(f"{output}: holds folds with {difference}; {advice}")
    return folds
