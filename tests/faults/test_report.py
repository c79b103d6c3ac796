"""The table in the documentation is what was noted, and every slow test has a row in it."""

import re

from faults.report import BEGIN, END, KINDS, NOT_RUN, PAGE, read_notes, table, with_table

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
    for file, test in KINDS.values():
        text = (repository / "tests" / "faults" / f"test_{file}.py").read_text()
        assert re.search(rf"def {re.escape(test.partition('[')[0])}\(", text), test
    noted = set(read_notes())
    assert noted <= set(KINDS), noted - set(KINDS)
