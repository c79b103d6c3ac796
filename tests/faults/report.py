"""The table of docs/reliability.md from what the fault tests noted: `python -m faults.report` in tests/."""

import json
import re
import sys
from pathlib import Path

from s2d3d.markdown import markdown_table

REPOSITORY = Path(__file__).parents[2]
NOTES, PAGE = REPOSITORY / "docs" / "results" / "faults.json", REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin, written by tests/faults/report.py -->", "<!-- faults: end -->"
NOT_RUN = "not run yet"

KINDS = {
    "kill -9 at every write of a run": ("kills", "test_a_kill_at_every_write"),
    "SIGKILL at random moments": ("kills", "test_signals_at_random_moments[kill]"),
    "SIGTERM at random moments": ("kills", "test_signals_at_random_moments[terminate]"),
    "full disk": ("machine", "test_full_disks_of_many_sizes"),
    "data cut short, replaced or removed during a run": ("machine", "test_data_that_changes_under_a_run"),
    "rank 1 dies under torchrun": ("machine", "test_the_others_notice_that_a_process_is_gone[rank 1 dies]"),
    "rank 0 dies under torchrun": ("machine", "test_the_others_notice_that_a_process_is_gone[rank 0 dies]"),
    "rank 1 hangs under torchrun": ("machine", "test_the_others_notice_that_a_process_is_gone[rank 1 hangs]"),
    "input: yaml": ("fuzz", "test_a_thousand_cases[yaml]"),
    "input: override": ("fuzz", "test_a_thousand_cases[override]"),
    "input: h5": ("fuzz", "test_a_thousand_cases[h5]"),
    "input: checkpoint": ("fuzz", "test_a_thousand_cases[checkpoint]"),
    "input: command": ("fuzz", "test_a_thousand_cases[command]"),
    "input: files of points": ("file_variants", "test_variants_are_read_as_by_others_or_refused"),
    "torch.compile of point_bert_tiny against float32": (
        "numerics", "test_the_compiled_model_stays_within_its_tolerance_of_the_plain_one[point_bert_tiny]",
    ),
    "torch.compile of point_transformer_tiny against float32": (
        "numerics", "test_the_compiled_model_stays_within_its_tolerance_of_the_plain_one[point_transformer_tiny]",
    ),
    "memory over 2,000 updates": ("memory", "test_memory_is_flat_over_two_thousand_updates"),
    "1,000,000 shapes of 192 points, streamed": ("memory", "test_a_large_set_is_not_read_at_once[1000000-192-0.05]"),
    "1,500 shapes of 100,000 points, streamed": ("memory", "test_a_large_set_is_not_read_at_once[1500-100000-0.05]"),
}  # fmt: skip
"""Kind of fault or input -> the file of its test in tests/faults, and the test."""


def table(notes: dict[str, dict]) -> str:
    """Return the table as Markdown; a kind without notes has not been run."""
    rows = []
    for kind, (file, test) in KINDS.items():
        name = f"`tests/faults/test_{file}.py::{test}`"
        if kind not in notes:
            rows.append([kind, *[NOT_RUN] * 4, name])
            continue
        note = notes[kind]
        outcomes = ", ".join(
            text.replace("_", " ") if count == 1 and " " in text else f"{count} {text.replace('_', ' ')}"
            for text, count in note["outcomes"].items()
        )
        rows.append([kind, str(note["cases"]), outcomes, str(len(note["failures"])), note["date"], name])
    return markdown_table(["fault or input", "cases", "outcome", "failures", "date", "test"], rows, right=(1, 3))


def with_table(page: str, notes: dict[str, dict]) -> str:
    """Return a page with its table replaced."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda match: f"{BEGIN}\n{table(notes)}\n{END}", page, flags=re.S)


def read_notes() -> dict[str, dict]:
    """Return the notes so far."""
    return json.loads(NOTES.read_text()) if NOTES.exists() else {}


def main() -> int:
    notes = read_notes()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), notes), encoding="utf-8")
    failed = [kind for kind, note in notes.items() if note["failures"]]
    print(f"{PAGE.name}: {len(notes)} of {len(KINDS)} kinds run, {len(failed)} with failures {failed or ''}".rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
