"""`make test` gets a browser where that is possible, and goes on in every other case."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SKIPPED = "tests that open pages in a browser are skipped; for them: sudo apt-get install chromium-headless-shell"
BEGINS = "installing a browser for the tests that open pages"


@pytest.fixture
def make(repository, tmp_path):
    """Run the rule of the browser where only the given programs are there; return what it said, and the stamp."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("touch", "timeout", "sh"):
        os.symlink(shutil.which(name), tools / name)
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / ".python").touch()

    def run(**programs: str) -> tuple[list[str], bool]:
        for name, body in programs.items():
            path = tools / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        process = subprocess.run(
            [shutil.which("make"), "--no-print-directory", f"VENV={venv}", f"{venv}/.browser"],
            cwd=repository, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert process.returncode == 0 and not process.stderr, process.stderr
        return process.stdout.splitlines(), (venv / ".browser").exists()

    return run


def test_a_browser_that_is_there_is_taken(make):
    said, stamped = make(id="echo 0", apt_get="exit 9", chromium="true")
    assert said == [] and stamped


def test_root_installs_one(make, tmp_path):
    log = tmp_path / "apt"
    said, stamped = make(id="echo 0", apt_get=f'echo "$@" >> {log}')
    assert said == [BEGINS] and stamped
    assert log.read_text().splitlines() == [
        "update -qq",
        "install -y -qq --no-install-recommends chromium-headless-shell",
    ]


@pytest.mark.parametrize(
    "programs, expected",
    [
        ({"id": "echo 1000", "apt_get": "exit 9"}, [SKIPPED]),
        ({"id": "echo 0"}, [SKIPPED]),
        ({"id": "echo 0", "apt_get": "echo trouble; echo more >&2; exit 100"}, [BEGINS, SKIPPED]),
    ],
    ids=["no root", "no apt-get", "apt-get fails"],
)
def test_otherwise_one_line_says_that_tests_are_skipped(make, programs, expected):
    assert make(**programs) == (expected, False)


def test_the_names_are_those_that_the_tests_look_for(repository):
    """Otherwise make is content with a browser that no test finds."""
    names = next(
        line.split()[2:]
        for line in (repository / "Makefile").read_text().splitlines()
        if line.startswith("BROWSERS :=")
    )
    source = (Path(__file__).parent / "viz" / "chromium.py").read_text()
    scope: dict[str, tuple[str, ...]] = {}
    exec(source[source.index("NAMES = (") : source.index("PATIENCE")], scope)
    assert sorted(names) == sorted(scope["NAMES"])
