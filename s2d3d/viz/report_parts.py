"""The tables of a report: rows of texts out of what run folders hold, and their HTML."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config.compare import differing_keys, flatten
from .sheet import escape

if TYPE_CHECKING:
    from .report import ReportRun

Rows = tuple[list[str], list[list[str]]]
"""Head and rows of a table."""
TITLES = {
    "sparse": "before merge", "merged": "merged or dense", "routed": "routed", "recalibrated": "BatchNorm recalibrated",
    "voting": "voting", "ema": "moving average",
}  # fmt: skip
"""What metrics.json measures."""


def summary_rows(runs: Sequence["ReportRun"]) -> Rows:
    """Return the accuracies, parameters and times of runs, a column for each; rows that no run has are left out."""
    table: dict[str, list[str | None]] = {
        "model": [_get(run.config, "model.name") for run in runs],
        "data": [_get(run.config, "data.name") for run in runs],
        "experts": [_experts(run.config) for run in runs],
        "epochs": [_epochs(run) for run in runs],
        "seed": [_get(run.config, "seed") for run in runs],
    }
    for form, title in TITLES.items():
        reports = [run.metrics.get(form) for run in runs]
        table[f"OA, {title}"] = [_percent(report, "oa") for report in reports]
        table[f"mAcc, {title}"] = [_percent(report, "macc") for report in reports]
    table["scored on"] = [
        {"test": "test split", "validation": "validation part"}.get(str(run.metrics.get("split"))) for run in runs
    ]
    table["loss"] = [f"{run.final['loss']:.4f}" if run.final else None for run in runs]
    table["clouds"] = [str(run.final["num_samples"]) if run.final else None for run in runs]
    table["evaluated for this report, OA"] = [_evaluated(run) for run in runs]
    table["mean OA of corruptions"] = [_percent(run.robustness, "mean_oa") for run in runs]
    counts = [run.metrics.get("parameters", {}) for run in runs]
    table["parameters in training"] = [_count(count.get("training")) for count in counts]
    final = [next((value for key, value in count.items() if key != "training"), None) for count in counts]
    table["parameters afterwards"] = [_count(value) for value in final]
    seconds = [run.metrics.get("train_seconds") for run in runs]
    table["training time"] = [value and f"{value / 60:.1f} min" for value in seconds]
    rows = [[title, *(value or "" for value in values)] for title, values in table.items() if any(values)]
    return ["", *(run.name for run in runs)], rows


def config_rows(runs: Sequence["ReportRun"]) -> Rows:
    """Return the keys of the configs in which runs differ, a column for each; all keys of a single run."""
    configs = [flatten(run.config) for run in runs]
    keys = differing_keys(configs) if len(runs) > 1 else list(configs[0])
    rows = [[key, *(_text(config.get(key, "-")) for config in configs)] for key in keys]
    return ["key", *(run.name for run in runs)], rows


def environment_rows(runs: Sequence["ReportRun"]) -> Rows:
    """Return what the runs ran on, a column for each."""
    environments = [flatten(run.environment) for run in runs]
    keys = list(dict.fromkeys(key for environment in environments for key in environment))
    rows = [[key, *(_text(environment.get(key, "-")) for environment in environments)] for key in keys]
    return ["", *(run.name for run in runs)], rows


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, mark_differences: bool = False) -> str:
    """Return a table, the first column as heads of the rows; rows whose values differ are marked if asked for.

    Example:
        >>> html_table(["", "a"], [["seed", "0"]])
        '<table><thead><tr><th></th><th>a</th></tr></thead><tbody><tr><th>seed</th><td>0</td></tr></tbody></table>'
    """
    if not rows:
        return "<p>none</p>"
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for first, *values in rows:
        mark = ' class="differs"' if mark_differences and len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f"<tr{mark}><th>{escape(first)}</th>{cells}</tr>")
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _get(config: Mapping[str, Any], key: str) -> str | None:
    value = flatten(config).get(key)
    return None if value is None else str(value)


def _experts(config: Mapping[str, Any]) -> str | None:
    s2d = config.get("s2d")
    if not s2d:
        return None
    if s2d["kind"] == "none":
        return "none (dense)"
    experts = f"{s2d['num_experts']} in every {s2d['every']}. FFN, share rate {s2d['share_rate']:g} {s2d['schedule']}"
    return f"top-{s2d['top_k']} of {experts}" if s2d["kind"] == "topk" else experts


def _epochs(run: "ReportRun") -> str:
    done = int(run.log[-1]["epoch"])
    planned = run.config.get("train", {}).get("epochs", done)
    return str(done) if done == planned else f"{done} of {planned}"


def _evaluated(run: "ReportRun") -> str | None:
    if run.predictions is None:
        return None
    right = run.predictions.probabilities.argmax(1) == run.predictions.labels
    return f"{100 * float(right.double().mean()):.2f} %"


def _percent(report: Mapping[str, Any] | None, key: str) -> str | None:
    return f"{100 * report[key]:.2f} %" if report else None


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)) and not value:
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) if all(isinstance(item, str) for item in value) else str(list(value))
    return "null" if value is None else str(value)
