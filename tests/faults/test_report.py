"""The table in the documentation is what was noted, and every slow test has a row in it."""

import json
import re
from types import SimpleNamespace

import pytest

from faults.report import BEGIN, END, KINDS, NOT_RUN, PAGE, cases_of, note_test, read_notes, table, with_table

NOTE = {"cases": 30, "outcomes": {"resumed": 29, "slope 3 bytes": 1}, "failures": ["hit 4: lost"], "date": "2026-01-01"}


def test_the_page_shows_the_notes():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert with_table(page, read_notes()) == page, "run: make faults-table"


def test_notes_become_cells_and_their_absence_is_said():
    rows = table({"full disk": NOTE}).splitlines()
    assert "| full disk | 30 | 29 resumed, slope 3 bytes | 1 | 2026-01-01 |" in rows[5]
    assert sum(NOT_RUN in row for row in rows) == len(KINDS) - 1


def test_every_row_is_a_test_that_exists(repository):
    for kind in KINDS:
        for test in cases_of(kind):
            file, _, name = test.partition("::")
            text = (repository / "tests" / file).read_text()
            assert not name or re.search(rf"def {re.escape(name.partition('[')[0])}\(", text), test
    noted = set(read_notes())
    assert noted <= set(KINDS), noted - set(KINDS)


def test_each_test_of_a_kind_is_one_case(tmp_path):
    report, test = tmp_path / "faults.json", "tests/datasets/test_file_set.py::test_links_in_a_circle_end"
    started = SimpleNamespace(dir=tmp_path)
    config = SimpleNamespace(getoption=lambda name: "faults.json", stash=pytest.Stash(), invocation_params=started)
    for outcome in ("passed", "failed"):
        for when in ("setup", "call", "teardown"):
            said = outcome if when == "call" else "passed"
            item = SimpleNamespace(name="test_links_in_a_circle_end", config=config, fixturenames=("tmp_path",))
            note_test(item, pytest.TestReport(test, ("", 0, ""), {}, said, None, when))
    note = json.loads(report.read_text())["links in data sets"]
    assert (note["cases"], note["outcomes"], note["failures"]) == (2, {"as_it_should_be": 1}, [test])
