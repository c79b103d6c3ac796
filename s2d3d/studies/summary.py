"""The numbers of a study, computed from its records: rows, comparisons, and missing runs."""

import statistics
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.compare import FOLDERS, flatten
from ..datasets import PointCloudDataset, dataset_reader
from ..errors import InputError
from .plan import Study
from .record import kept_form
from .stats import (
    BOOTSTRAP_SEED,
    LEVEL,
    RESAMPLES,
    bonferroni_level,
    correctness,
    detectable_difference,
    equivalence_p,
    hierarchical_bootstrap,
    holm,
    paired_t,
)

Records = Mapping[tuple[str, int], Mapping[str, Any]]


def summarize(study: Study, records: Records, failed: Mapping[str, str] = types.MappingProxyType({})) -> dict[str, Any]:
    """Compute the content of docs/results/NAME.json. Accuracies are fractions, times are in seconds.

    Args:
        study: from `load_study`.
        records: by (arm, seed), from `read_records`, without runs that are not finished.
        failed: reasons of runs that failed, from `read_failures`.

    Raises:
        InputError: a run lacks a requested form; a pair was not scored on the same shapes.
    """
    config = study.config
    rows = {name: _row(study, records, name) for name in (*config.arms, *config.forms)}
    pairs = config.pairs()
    crossed = config.evaluate == "test"
    comparisons = [_compare(study, records, name, reference, len(pairs), crossed) for name, reference in pairs]
    tested = [comparison for comparison in comparisons if comparison["p"] is not None]
    for comparison, p in zip(tested, holm([comparison["p"] for comparison in tested], len(pairs))):
        comparison["p_holm"] = p
    environments = [record["environment"] for record in records.values()]
    starts = [start for environment in environments for start in _starts(environment)]
    first = study.cells[0].config
    noun = dataset_reader(first.data.name).kind.noun
    return {
        "study": config.name,
        "question": config.question,
        "split": config.evaluate,
        "seeds": list(config.seeds),
        "base": config.base,
        "common": {key: value for key, value in config.common.items() if key not in FOLDERS},
        "overrides": list(study.overrides),
        "along": config.along,
        "selection": "last epoch",
        **({"curve": config.curve} if config.curve else {}),
        **({} if noun == PointCloudDataset.noun else {"samples": noun}),
        **({} if first.task == "classify" else {"task": first.task}),
        "level": LEVEL,
        "num_comparisons": len(pairs),
        "bootstrap": {"resamples": RESAMPLES, "seed": BOOTSTRAP_SEED, "shapes": "crossed" if crossed else "nested"},
        "rows": list(rows.values()),
        "comparisons": comparisons,
        "empty": [[cell.arm, cell.seed] for cell in study.cells if (cell.arm, cell.seed) not in records],
        **({"failed": dict(sorted(failed.items()))} if failed else {}),
        "hardware": sorted({_hardware(environment) for environment in environments}),
        "versions": sorted({_versions(environment) for environment in environments}),
        "commits": sorted({str(environment.get("git_commit")) for environment in starts}),
    }


def _row(study: Study, records: Records, name: str) -> dict[str, Any]:
    config = study.config
    arm, _ = config.row(name)
    scored = {seed: _result(study, records, name, seed) for seed in config.seeds if (arm, seed) in records}
    runs = [records[arm, seed] for seed in scored]
    of_arm = next(cell for cell in study.cells if cell.arm == arm)
    oa, macc = ([result[key] for result in scored.values()] for key in ("oa", "macc"))
    return {
        "name": name,
        "arm": arm,
        "form": _form(runs[0], config.row(name)[1]) if runs else config.row(name)[1],
        "changes": dict(config.arms[arm]),
        "along": flatten(of_arm.config.to_dict())[config.along] if config.along else None,
        "n": len(runs),
        "oa": {str(seed): result["oa"] for seed, result in scored.items()},
        "oa_mean": _mean(oa),
        "oa_std": _std(oa),
        "macc_mean": _mean(macc),
        "macc_std": _std(macc),
        "num_samples": sorted({len(result["correct"]) for result in scored.values()}),
        "updates": sorted({run["updates"] for run in runs}),
        "train_seconds_mean": _mean([run["train_seconds"] for run in runs]),
        "parameters": dict(runs[0]["parameters"]) if runs else None,
    }


def _compare(study: Study, records: Records, name: str, reference: str, number: int, crossed: bool) -> dict[str, Any]:
    config = study.config
    arms = [config.row(row)[0] for row in (name, reference)]
    seeds = [seed for seed in config.seeds if all((arm, seed) in records for arm in arms)]
    parts, scored, updates = {}, set(), set()
    for seed in seeds:
        ours, theirs = (records[arm, seed] for arm in arms)
        if ours["shapes"] != theirs["shapes"]:
            raise InputError(
                f"{study.path}: reference: '{name}' and '{reference}' were not scored on the same shapes with seed "
                f"{seed}; compare arms of one data section"
            )
        first, second = (correctness(_result(study, records, row, seed)["correct"]) for row in (name, reference))
        parts[seed] = first - second
        scored.add(ours["shapes"])
        updates.add(ours["updates"] == theirs["updates"])
    result: dict[str, Any] = {
        "name": name,
        "reference": reference,
        "n": len(seeds),
        "differences": {str(seed): float(part.mean()) for seed, part in parts.items()},
        "equal_updates": updates == {True} if updates else None,
    }
    last = [[records[arm, seed]["curve"]["train_loss"][-1] for seed in seeds] for arm in arms]
    scores = [[_result(study, records, row, seed)["loss"] for seed in seeds] for row in (name, reference)]
    result["losses"] = {"scored": _paired(*scores), "training": None if arms[0] == arms[1] else _paired(*last)}
    mixed = [seed for seed in seeds if _is_mixed([records[arm, seed]["environment"] for arm in arms])]
    if mixed:
        rest = [float(part.mean()) for seed, part in parts.items() if seed not in mixed]
        result["mixed_code"] = {"seeds": mixed, "n_without": len(rest), "without": _paired(rest, [0.0] * len(rest))}
    if config.equivalence:
        margin, differences = config.equivalence / 100, list(result["differences"].values())
        p = equivalence_p(differences, margin) if differences else None
        result["equivalence"] = {"margin": margin, "p": p}
    if config.curve and seeds and name in config.arms and reference in config.arms:
        result["selection"] = _selection([[records[arm, seed]["curve"]["test_oa"] for seed in seeds] for arm in arms])
    empty = ("mean", "std", "t_low", "t_high", "p", "p_holm", "bonferroni_low", "bonferroni_high")
    result |= dict.fromkeys((*empty, "bootstrap_low", "bootstrap_high", "detectable"))
    if not seeds:
        return result
    test = paired_t([float(part.mean()) for part in parts.values()])
    result |= {"mean": test.mean, "std": test.std, "t_low": test.low, "t_high": test.high, "p": test.p}
    if test.std is not None:
        wide = paired_t(list(result["differences"].values()), bonferroni_level(number))
        low, high = hierarchical_bootstrap(list(parts.values()), crossed=crossed and len(scored) == 1)
        result |= {"bonferroni_low": wide.low, "bonferroni_high": wide.high}
        result |= {"bootstrap_low": low, "bootstrap_high": high}
        result["detectable"] = None if test.p is None else detectable_difference(test.std, test.n)
    return result


def _result(study: Study, records: Records, name: str, seed: int) -> Mapping[str, Any]:
    arm, form = study.config.row(name)
    record = records[arm, seed]
    form = _form(record, form)
    if form not in record["results"]:
        known = ", ".join(record["results"])
        raise InputError(f"{study.path}: forms.{name}: runs of '{arm}' have no form '{form}', they have {known}")
    return record["results"][form]


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None] | None:
    """Return mean and t interval of the differences over seeds; None without differences."""
    if not ours:
        return None
    test = paired_t([first - second for first, second in zip(ours, theirs)])
    return {"mean": test.mean, "t_low": test.low, "t_high": test.high}


def _form(record: Mapping[str, Any], form: str | None) -> str:
    return form or kept_form(record)


def _selection(curves: Sequence[Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """Return the effect of selection on the test split: last epoch, best epoch of each run, best of all runs.

    Args:
        curves: curves of the row and of its reference: for each seed, the test accuracy after each epoch.
    """
    rules = {
        "last epoch": [[curve[-1] for curve in side] for side in curves],
        "best test epoch of each run": [[max(curve) for curve in side] for side in curves],
        f"best test epoch of the best of {len(curves[0])} runs": [[max(map(max, side))] for side in curves],
    }
    return [
        {"rule": rule, "oa": _mean(ours), "reference_oa": _mean(theirs), **(_paired(ours, theirs) or {})}
        for rule, (ours, theirs) in rules.items()
    ]


def _starts(environment: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what is known of each start of a run that was continued."""
    return [*environment.get("earlier", []), environment]


def _is_mixed(environments: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether two runs may have been made by different code: by two commits, or by one with changes."""
    starts = [start for environment in environments for start in _starts(environment)]
    commits = {str(start.get("git_commit") or "+") for start in starts}
    return len(commits) > 1 or any(commit.endswith("+") for commit in commits)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _hardware(environment: Mapping[str, Any]) -> str:
    gpus = environment.get("gpus") or []
    threads = f"{environment.get('num_threads')} thread(s) of {environment.get('processor')}"
    return f"{', '.join(gpus)}; {threads}" if gpus else threads


def _versions(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages") or {}
    torch, timm = packages.get("torch"), packages.get("timm")
    return f"Python {environment.get('python')}, torch {torch}, timm {timm}, s2d3d {environment.get('s2d3d')}"
