"""The page of a study, docs/results/NAME.md. It is made only from the study's numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_json, write_text
from ..config.io import show
from ..errors import InputError
from ..markdown import markdown_table
from .plan import load_study
from .store import read_failures, read_records
from .summary import summarize

LOSSES = {"scored": "on the {} that are scored", "training": "training, last epoch"}
"""By key: the column of a loss; {} stands for what is scored, such as shapes."""
BEGIN, END = "<!-- studies: made by tools/study.py -->", "<!-- end of studies -->"
"""Marks in the overview page; the text between them is replaced."""


def write_report(summary: Mapping[str, Any], results: str | Path, command: str) -> list[Path]:
    """Write NAME.json and NAME.md; return their paths.

    Args:
        summary: from `summarize`.
        results: folder to write to; it is created.
        command: command line that computes this study, for the page.
    """
    folder = Path(results)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{summary['study']}.json", folder / f"{summary['study']}.md"]
    write_json(paths[0], _rounded(summary))
    write_text(paths[1], report_text(summary, command))
    return paths


def _rounded(content: Any) -> Any:
    """Round to twelve digits. Sums differ between machines in the sixteenth; the file must be the same everywhere."""
    if isinstance(content, float):
        return float(f"{content:.12g}")
    if isinstance(content, Mapping):
        return {key: _rounded(value) for key, value in content.items()}
    return [_rounded(item) for item in content] if isinstance(content, (list, tuple)) else content


def report_text(summary: Mapping[str, Any], command: str) -> str:
    """Return the page as Markdown. Accuracies are in percent, differences in percentage points."""
    name = summary["study"]
    split = {"test": "official test split", "validation": "validation part of the training split"}[summary["split"]]
    samples = sorted({count for row in summary["rows"] for count in row["num_samples"]})
    parts = [
        f"# Study {name}",
        summary["question"],
        f"Scored on the {split}"
        + (f" ({', '.join(map(str, samples))} {_noun(summary)})" if samples else "")
        + _when_scored(summary)
        + f"; accuracy is that of the {summary['selection']}. Base config `{Path(summary['base']).name}`"
        + (f", with {_changes(summary['common'])} in all configurations" if summary["common"] else "")
        + "".join(
            f", with `{override}` in all configurations from the command line" for override in summary["overrides"]
        )
        + ". Runs of one seed are paired: they have the same initial dense weights, batches and augmentation.",
        "## Configurations",
        _arms_table(summary),
        "## Paired differences in OA",
        _comparisons_table(summary),
        _mixed_code(summary),
        _how_compared(summary),
        f"![paired differences]({name}.png)",
        _selection(summary),
        "## Paired differences in loss",
        _losses_table(summary),
        "## Missing runs",
        _empty_cells(summary),
        "## How it was computed",
        f"    {command}",
        "The same command continues what is missing. With `--report-only` it computes this page from "
        f"`{name}.jsonl` alone.",
        "\n".join(f"- {line}" for line in (*summary["hardware"], *summary["versions"], *_commits(summary))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def report_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the result as short lines for a terminal: first the rows, then the comparisons."""
    seeds = len(summary["seeds"])
    lines = [f"{row['name']:<24} {_accuracy(row, 'oa'):>16}  ({row['n']} of {seeds} seeds)" for row in summary["rows"]]
    for item in summary["comparisons"]:
        interval = _interval(item, "t")
        title = f"{item['name']} - {item['reference']}"
        lines.append(f"{title:<32} {_points(item['mean'])} points, 95 % t interval {interval} (n = {item['n']})")
    if summary["empty"]:
        lines.append(f"{len(summary['empty'])} runs are missing")
    return lines


def _arms_table(summary: Mapping[str, Any]) -> str:
    seeds = summary["seeds"]
    header = [
        "configuration", "changes", "OA %, mean +- deviation", *(f"seed {seed}" for seed in seeds), "mAcc %", "n",
        "updates", "training s", "parameters, training / after",
    ]  # fmt: skip
    rows = []
    for row in summary["rows"]:
        each = [f"{100 * row['oa'][str(seed)]:.2f}" if str(seed) in row["oa"] else "empty" for seed in seeds]
        form = _form(row)
        counts = row["parameters"] or {}
        seconds = "" if row["train_seconds_mean"] is None else f"{row['train_seconds_mean']:.0f}"
        updates = ", ".join(map(str, row["updates"]))
        rows.append([
            row["name"] + form, _changes(row["changes"]), _accuracy(row, "oa"), *each, _accuracy(row, "macc"),
            str(row["n"]), updates, seconds, " / ".join(f"{count:,}" for count in counts.values()),
        ])  # fmt: skip
    note = "Deviations are those of a sample (n - 1). Seconds depend on the load of the machine: do not compare them."
    return f"{markdown_table(header, rows)}\n\n{note}"


def _form(row: Mapping[str, Any]) -> str:
    """Return which form of a run's model a row shows; empty for the usual one."""
    if row["name"] != row["arm"]:
        return f" (configuration {row['arm']}, {row['form']})"
    return "" if row["form"] in (None, "merged", "routed") else f" ({row['form']})"


def _comparisons_table(summary: Mapping[str, Any]) -> str:
    header = [
        "comparison", "n", "difference, points", "95 % paired t", "95 % bootstrap", "p", "p, Holm",
        "simultaneous 95 % (Bonferroni)", "detectable", *_equivalence_header(summary), "each seed",
    ]  # fmt: skip
    rows = []
    for item in summary["comparisons"]:
        unequal = " (other number of updates)" if item["equal_updates"] is False else ""
        mixed = item.get("mixed_code", {"seeds": []})["seeds"]
        marks = {str(seed): "*" for seed in mixed}
        each = ", ".join(_points(value) + marks.get(seed, "") for seed, value in item["differences"].items()) or "empty"
        rows.append([
            f"{item['name']} - {item['reference']}{unequal}", str(item["n"]), _points(item["mean"]),
            _interval(item, "t"), _interval(item, "bootstrap"), _p_value(item["p"]), _p_value(item["p_holm"]),
            _interval(item, "bonferroni"), _detectable(item["detectable"]),
            *([_p_value(item["equivalence"]["p"])] if "equivalence" in item else []), each,
        ])  # fmt: skip
    return markdown_table(header, rows)


def _equivalence_header(summary: Mapping[str, Any]) -> list[str]:
    margins = {item["equivalence"]["margin"] for item in summary["comparisons"] if "equivalence" in item}
    return [f"p, equivalent within {100 * margin:g} points" for margin in margins]


def _when_scored(summary: Mapping[str, Any]) -> str:
    if summary["split"] == "validation":
        return ", the test split was not used"
    return ", after each epoch" if "curve" in summary else ", once, at the end"


def _selection(summary: Mapping[str, Any]) -> str:
    """Return the section on selection by the test split; empty if the study did not score it after each epoch."""
    rows = [
        [
            f"{item['name']} - {item['reference']}", choice["rule"], f"{100 * choice['oa']:.2f}",
            f"{100 * choice['reference_oa']:.2f}", _points(choice["mean"]), _interval(choice, "t"),
        ]
        for item in summary["comparisons"]
        for choice in item.get("selection", [])
    ]  # fmt: skip
    if not rows:
        return ""
    header = ["comparison", "model", "OA %", "OA % of the reference", "difference, points", "95 % paired t"]
    note = (
        "The last epoch is the result of this study. The other rows choose an epoch, or a run, by its accuracy on the "
        "test split. They show how much this selection adds. They are not results."
    )
    return f"## Selection on the test split\n\n{note}\n\n{markdown_table(header, rows)}"


def _mixed_code(summary: Mapping[str, Any]) -> str:
    """Return the comparisons without the pairs of runs from different code; empty if there are no such pairs."""
    rows = []
    for item in summary["comparisons"]:
        if "mixed_code" not in item:
            continue
        seeds, count, without = (item["mixed_code"][key] for key in ("seeds", "n_without", "without"))
        cells = [_points(without["mean"]), _interval(without, "t")] if without else ["empty", "-"]
        rows.append([f"{item['name']} - {item['reference']}", ", ".join(map(str, seeds)), str(count), *cells])
    if not rows:
        return ""
    note = (
        "\\* Code states may differ: the two runs of this pair were made at different commits, or with uncommitted "
        "changes. The comparisons without these pairs:"
    )
    header = ["comparison", "marked seeds", "n without", "difference, points", "95 % paired t"]
    return f"{note}\n\n{markdown_table(header, rows)}"


def _losses_table(summary: Mapping[str, Any]) -> str:
    pretraining = summary.get("task") == "pretrain"
    rows = [
        [
            f"{item['name']} - {item['reference']}",
            str(item["n"]),
            *(_loss(item["losses"][key], 6 if pretraining else 4, "-" if item["n"] else "empty") for key in LOSSES),
        ]
        for item in summary["comparisons"]
    ]
    unit, smoothing = ("Reconstruction loss", "") if pretraining else ("Nats", " and label smoothing")
    note = (
        f"{unit}, mean and 95 % paired t, not corrected for their number. The training loss is the mean over the "
        f"batches of the last epoch, with augmentation{smoothing}."
    )
    header = ["comparison", "n", *(title.format(_noun(summary)) for title in LOSSES.values())]
    return f"{markdown_table(header, rows)}\n\n{note}"


def _noun(summary: Mapping[str, Any]) -> str:
    """Return what the samples of a study are, in the plural."""
    return summary.get("samples", "shapes")


def _how_compared(summary: Mapping[str, Any]) -> str:
    bootstrap, number, noun = summary["bootstrap"], summary["num_comparisons"], _noun(summary)
    drawn = (
        f"{noun.capitalize()} are drawn once for all seeds of a resample, because all seeds score the same {noun}."
        if bootstrap["shapes"] == "crossed"
        else f"{noun.capitalize()} are drawn anew for each seed, because each seed holds out {noun} of its own."
    )
    return (
        f"n: paired seeds. Paired t: n - 1 degrees of freedom. Bootstrap: hierarchical, over seeds and {noun}, "
        f"{bootstrap['resamples']:,} resamples, seed {bootstrap['seed']}, percentiles. {drawn} With few seeds the "
        "bootstrap interval is too narrow: use the t interval. p by Holm and the simultaneous intervals are corrected "
        f"for the {number} comparison(s) of this study, including those that are still empty. Other numbers are not "
        "corrected. Detectable: the true difference that a paired t test of n pairs with this deviation finds four "
        "times out of five. An interval that holds zero says little about smaller differences. Equal differences have "
        f"no t interval: accuracies are counts of {noun}, and a few counts are equal by chance. Comparisons with one "
        "reference share its runs, so their errors are correlated."
    )


def _empty_cells(summary: Mapping[str, Any]) -> str:
    if not summary["empty"]:
        return "None: every configuration has all its seeds."
    by_arm: dict[str, list[str]] = {}
    for arm, seed in summary["empty"]:
        by_arm.setdefault(arm, []).append(str(seed))
    lines = [f"- {arm}: seed {', '.join(seeds)}" for arm, seeds in by_arm.items()]
    failed = [f"- {name}: {reason}" for name, reason in summary.get("failed", {}).items()]
    return "\n".join(
        [*lines, *(["", "Of these, the following were started and failed:", "", *failed] if failed else [])]
    )


def _commits(summary: Mapping[str, Any]) -> list[str]:
    return [f"code at {', '.join(summary['commits'])} (+: with changes)"] if summary["commits"] else []


def _changes(changes: Mapping[str, object]) -> str:
    return ", ".join(f"`{key}={_plain(value)}`" for key, value in changes.items()) or "the base"


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    return value if isinstance(value, str) else show(value)


def _accuracy(row: Mapping[str, Any], key: str) -> str:
    mean, std = row[f"{key}_mean"], row[f"{key}_std"]
    if mean is None:
        return "empty"
    return f"{100 * mean:.2f}" + ("" if std is None else f" +- {100 * std:.2f}")


def _points(value: float | None) -> str:
    return "empty" if value is None else f"{100 * value:+.2f}"


def _detectable(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _interval(item: Mapping[str, Any], kind: str) -> str:
    low, high = item[f"{kind}_low"], item[f"{kind}_high"]
    return "-" if low is None else f"[{100 * low:+.2f}, {100 * high:+.2f}]"


def _loss(loss: Mapping[str, float | None] | None, digits: int, absent: str) -> str:
    if loss is None:
        return absent
    interval = "" if loss["t_low"] is None else f" [{loss['t_low']:+.{digits}f}, {loss['t_high']:+.{digits}f}]"
    return f"{loss['mean']:+.{digits}f}{interval}"


def _p_value(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def summarize_folder(folder: str | Path, results: str | Path, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compute the numbers of all studies of a folder from their records; nothing is run.

    Args:
        folder: folder of the studies, NAME.yaml.
        results: folder of the records.
        overrides: for all runs, as "section.key=value".

    Returns:
        Results of `summarize`, in the order of the file names.

    Raises:
        InputError: the folder has no study, or a study is invalid.
    """
    files = sorted(Path(folder).glob("*.yaml"))
    if not files:
        raise InputError(f"{folder}: there is no study (*.yaml) in this folder")
    studies = [load_study(file, overrides) for file in files]
    return [
        summarize(study, read_records(results, study.cells), read_failures(results, study.config.name))
        for study in studies
    ]


def overview_text(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row for each comparison of a study, and one row for a study without runs.

    The studies with the most finished runs come first.
    """
    header = ["study", "scored on", "runs", "comparison", "n", "difference in OA, points", "95 % paired t"]
    rows, finished, planned = [], 0, 0
    for summary in sorted(summaries, key=lambda summary: -_done(summary)):
        done, cells = _done(summary), _done(summary) + len(summary["empty"])
        finished, planned = finished + done, planned + cells
        name = summary["study"]
        title = f"[{name}](results/{name}.md)" if done else name
        if not done and len(summary["comparisons"]) > 1:
            rows.append(
                [title, summary["split"], f"0 of {cells}", f"all {len(summary['comparisons'])}", "0", "empty", "-"]
            )
            continue
        for item in summary["comparisons"]:
            comparison = f"{item['name']} - {item['reference']}"
            found = [str(item["n"]), _points(item["mean"]), _interval(item, "t")]
            rows.append([title, summary["split"], f"{done} of {cells}", comparison, *found])
            title = ""
    return f"{finished} of {planned} runs are finished; each study counts the runs that it shares with another.\n\n" + (
        markdown_table(header, rows)
    )


def write_overview(path: str | Path, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Replace the text between the marks of a page by the table of these studies.

    Raises:
        InputError: the page is missing or has no marks.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{path}: has no place for the table; put these two lines where it shall stand: {BEGIN} {END}")
    write_text(path, f"{before}{BEGIN}\n\n{overview_text(summaries)}\n\n{END}{after}")


def _done(summary: Mapping[str, Any]) -> int:
    arms = {row["arm"]: row["n"] for row in summary["rows"]}
    return sum(arms.values())
