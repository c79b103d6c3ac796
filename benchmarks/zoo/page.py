"""The compatibility page, written whole from its rows."""

import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .check import TOLERANCE, Row

PACKAGES = ("torch", "timm", "transformers", "torchvision", "vit-pytorch", "torch-pointcloud")
STATUSES = ("exact", "refused", "no FFN found", "wrong", "not built")

INTRODUCTION = """# Compatibility

This page lists the model families that were tried, and what `convert_to_mof_` does with each of them. A program made
it. To make it again:

    pip install "s2d3d[zoo]"
    python tools/zoo.py --output docs/compatibility.md --force

Each family is a tiny model with random weights, built from its package. Every FFN that the pattern finds becomes four
experts (`every=1`). Dropout and stochastic depth are 0. The models run in float64, or in float32 where one does not
run in float64, with a batch of 4 and one of 5.

| Column | Meaning |
|---|---|
| pattern | `targets` of `MoFConfig`. "default" is `None`: the FFN of each transformer block |
| FFNs | Number of converted FFNs |
| training | Largest relative difference in training, with identical experts: outputs, gradients, statistics of norms |
| merge | Largest relative difference of the merged model to the sparse one in evaluation, with different experts |
| load | Whether the merged state dict loads into a new dense model with `strict=True` |

| Status | Meaning |
|---|---|
| exact | All differences are below {tolerance:g} |
| refused | The conversion raised an error, which is given |
| no FFN found | The model has no FFN of linear layers that takes tokens alone |
| not built | The family could not be built or run in this environment |
| wrong | A difference is larger, or training fails |
"""


def page(rows: Sequence[Row], commit: str) -> str:
    """Return the page in Markdown.

    Args:
        rows: in the order of the page.
        commit: the state of the repository that made them.
    """
    counts = Counter(row.status for row in rows)
    summary = ", ".join(f"{counts[status]} {status}" for status in STATUSES)
    built = len(rows) - counts["not built"]
    parts = [
        INTRODUCTION.format(tolerance=TOLERANCE),
        f"{len(rows)} families, {built} of them built: {summary}. Made at commit {commit} with Python "
        f"{platform.python_version()}, {', '.join(_versions())}, on a CPU.\n",
    ]
    for source in dict.fromkeys(row.source for row in rows):
        parts += [f"## {source}\n", _table([row for row in rows if row.source == source])]
    return "\n".join(parts)


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return found


def _table(rows: Sequence[Row]) -> str:
    lines = ["| family | pattern | FFNs | training | merge | load | status |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        reason = row.reason.replace("|", "\\|").replace("\n", " ")
        status = f"{row.status}: {reason}" if reason and row.status != "no FFN found" else row.status
        load = {True: "yes", False: "no", None: ""}[row.strict]
        cells = [row.name, row.targets.replace("*", "\\*"), str(row.num_ffns or ""), _number(row.training_error)]
        lines.append("| " + " | ".join([*cells, _number(row.merge_error), load, status]) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}" if value else "0"
