"""What the fault tests noted, and the table of it in docs/reliability.md: `python -m faults.report` in tests/."""

import json
import platform
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d3d.markdown import markdown_table

REPOSITORY = Path(__file__).parents[2]
NOTES, PAGE = REPOSITORY / "docs" / "results" / "faults.json", REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin, written by tests/faults/report.py -->", "<!-- faults: end -->"
NOT_RUN = "not run yet"
NOTES_OF_SESSION = pytest.StashKey[dict[str, dict[str, Any]]]()

GONE = "faults/test_machine.py::test_the_others_notice_that_a_process_is_gone"
COMPILED = "faults/test_numerics.py::test_the_compiled_model_stays_within_its_tolerance_of_the_plain_one"
STREAMED = "faults/test_memory.py::test_a_large_set_is_not_read_at_once"

KINDS = {
    "kill -9 at every write of a run": "faults/test_kills.py::test_a_kill_at_every_write",
    "SIGKILL at random moments": "faults/test_kills.py::test_signals_at_random_moments[kill]",
    "SIGTERM at random moments": "faults/test_kills.py::test_signals_at_random_moments[terminate]",
    "full disk": "faults/test_machine.py::test_full_disks_of_many_sizes",
    "data cut short, replaced or removed during a run": "faults/test_machine.py::test_data_that_changes_under_a_run",
    "rank 1 dies under torchrun": f"{GONE}[rank 1 dies]",
    "rank 0 dies under torchrun": f"{GONE}[rank 0 dies]",
    "rank 1 hangs under torchrun": f"{GONE}[rank 1 hangs]",
    "input: yaml": "faults/test_fuzz.py::test_a_thousand_cases[yaml]",
    "input: override": "faults/test_fuzz.py::test_a_thousand_cases[override]",
    "input: h5": "faults/test_fuzz.py::test_a_thousand_cases[h5]",
    "input: checkpoint": "faults/test_fuzz.py::test_a_thousand_cases[checkpoint]",
    "input: command": "faults/test_fuzz.py::test_a_thousand_cases[command]",
    "input: files of points": "faults/test_file_variants.py::test_variants_are_read_as_by_others_or_refused",
    "a file that could be lost": "faults/test_lost_files.py",
    "files of other trainers, wrong or damaged weights": "models/test_pretrained.py",
    "a hostile training state": "runs/test_training_state.py::test_a_hostile_state_is_refused_before_it_is_used",
    "damaged JSON files of a run or a study": "test_stored.py",
    "a hostile description of an ONNX model": "export/test_write.py::test_the_example_refuses_hostile_descriptions",
    "links in data sets": (
        "datasets/test_modelnet40.py::test_links_out_of_the_folder_are_refused_and_links_inside_are_not",
        "datasets/test_modelnet40.py::test_a_link_to_itself_is_one_line",
        "datasets/test_modelnet40.py::test_a_tree_of_links_is_read_where_the_user_says_so",
        "datasets/test_scanobjectnn.py::test_links_out_of_the_folder_follow_the_rule_of_every_reader",
        "datasets/test_class_folders.py::test_links_out_of_the_folder_need_permission",
        "datasets/test_class_folders.py::test_a_link_to_a_folder_above_is_not_entered",
        "datasets/test_file_set.py",
        "datasets/test_h5.py::test_links_groups_and_outside_storage_are_refused",
    ),
    "downloads and archives": "prepare/test_download.py",
    "terminal escapes in names, outputs that are closed or full": "test_terminal.py",
    "torch.compile of point_bert_tiny against float32": f"{COMPILED}[point_bert_tiny]",
    "torch.compile of point_transformer_tiny against float32": f"{COMPILED}[point_transformer_tiny]",
    "memory over 2,000 updates": "faults/test_memory.py::test_memory_is_flat_over_two_thousand_updates",
    "1,000,000 shapes of 192 points, streamed": f"{STREAMED}[1000000-192-0.05]",
    "1,500 shapes of 100,000 points, streamed": f"{STREAMED}[1500-100000-0.05]",
}  # fmt: skip
"""Kind of fault or input -> its test in tests/, or the tests or files of tests that are its cases."""


def cases_of(kind: str) -> tuple[str, ...]:
    tests = KINDS[kind]
    return (tests,) if isinstance(tests, str) else tests


def note_cases(config: pytest.Config, kind: str, cases: int, failures: list[str], **outcomes: int) -> None:
    """Add cases to what this session noted of a kind, and merge it into the report: a long session may be cut off."""
    target = config.getoption("--faults-report")
    if target is None:
        return
    noted = config.stash.setdefault(NOTES_OF_SESSION, {})
    entry = noted.setdefault(kind, {"cases": 0, "outcomes": {}, "failures": []})
    entry["cases"] += cases
    entry["failures"] += failures
    for name, count in outcomes.items():
        if count:
            entry["outcomes"][name] = entry["outcomes"].get(name, 0) + count
    entry |= {
        "outcomes": dict(sorted(entry["outcomes"].items())),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}, {sys.platform}",
    }
    path = config.invocation_params.dir / target  # the test may be in another folder
    known = json.loads(path.read_text()) if path.exists() else {}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(dict(sorted((known | noted).items())), indent=1) + "\n")
    temporary.replace(path)


def note_test(item: pytest.Item, report: pytest.TestReport) -> None:
    """Count a test that is one case of a kind.

    Those with the fixture `record` note their cases themselves; those called `test_there_are...` only count others.
    """
    if item.name.startswith("test_there_are"):
        return
    if "record" in getattr(item, "fixturenames", ()) or (report.when != "call" and not report.failed):
        return
    for kind in KINDS:
        if any(
            report.nodeid.startswith((f"tests/{test}[", f"tests/{test}::")) or report.nodeid == f"tests/{test}"
            for test in cases_of(kind)
        ):
            failures = [report.nodeid] if report.failed else []
            note_cases(item.config, kind, 1, failures, as_it_should_be=report.passed, skipped=report.skipped)


def table(notes: dict[str, dict]) -> str:
    """Return the table as Markdown; a kind without notes has not been run."""
    rows = []
    for kind in KINDS:
        name = ", ".join(f"`tests/{test}`" for test in cases_of(kind))
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
    if sys.argv[1:] == ["--tests"]:  # of all kinds, as arguments for pytest
        functions = {f"tests/{test.partition('[')[0]}" for kind in KINDS for test in cases_of(kind)}
        print(*sorted(functions))
        return 0
    notes = read_notes()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), notes), encoding="utf-8")
    failed = [kind for kind, note in notes.items() if note["failures"]]
    print(f"{PAGE.name}: {len(notes)} of {len(KINDS)} kinds run, {len(failed)} with failures {failed or ''}".rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
