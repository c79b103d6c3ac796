"""One table over all studies, finished or not, kept up to date inside a page that people write."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .run_folder import write_text
from .study_config import load_study
from .study_record import read_records
from .study_report import difference, markdown_table
from .study_summary import summarize

BEGIN, END = "<!-- studies: made by tools/study.py -->", "<!-- end of studies -->"
"""Marks in the page; what stands between them is replaced."""


def summarize_folder(folder: str | Path, results: str | Path, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compute the numbers of all studies of a folder from their records; nothing is run.

    Args:
        folder: with the studies, NAME.yaml.
        results: folder of the records.
        overrides: for all runs, as "section.key=value".

    Returns:
        What `summarize` returns, in the order of the file names.

    Raises:
        InputError: no study in the folder, or one that is wrong.
    """
    files = sorted(Path(folder).glob("*.yaml"))
    if not files:
        raise InputError(f"{folder}: there is no study (*.yaml) in this folder")
    studies = [load_study(file, overrides) for file in files]
    return [summarize(study, read_records(results, study.cells)) for study in studies]


def overview_text(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: a row for each comparison of a study, one row for a study without any run.

    The studies with most finished runs come first.
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
            rows.append([title, summary["split"], f"{done} of {cells}", comparison, str(item["n"]), *difference(item)])
            title = ""
    return f"{finished} of {planned} runs are finished; each study counts the runs that it shares with another.\n\n" + (
        markdown_table(header, rows)
    )


def write_overview(path: str | Path, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Replace what stands between the marks of a page by the table of these studies.

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
