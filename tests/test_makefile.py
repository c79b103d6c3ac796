"""The rules of the environment: a disk that is too full is named, and a browser is had where that is possible."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from s2d3d import load_config

SKIPPED = "tests that open pages in a browser are skipped; for them: sudo apt-get install chromium-headless-shell"
BEGINS = "installing a browser for the tests that open pages"


@pytest.fixture
def make(repository, tmp_path):
    """Run a rule of the environment where only the given programs are there; return the process."""
    tools, venv = tmp_path / "bin", tmp_path / "venv"
    for folder in (tools, venv, venv / "bin"):
        folder.mkdir()
    for name in ("touch", "timeout", "sh", "awk", "rm", "sleep"):
        os.symlink(shutil.which(name), tools / name)
    (venv / ".python").touch()

    def run(stamp: str, **programs: str) -> subprocess.CompletedProcess:
        for name, body in programs.items():
            path = (venv / "bin" if name == "python" else tools) / name.replace("_", "-")
            path.unlink(missing_ok=True)
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        command = [shutil.which("make"), "--no-print-directory", f"VENV={venv}", f"{venv}/{stamp}"]
        environment = {"PATH": str(tools), "TMPDIR": str(tmp_path)}
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def browser(make, tmp_path):
    """Run the rule of the browser; return what it said, and whether it left its stamp."""

    def run(**programs: str) -> tuple[list[str], bool]:
        process = make(".browser", **programs)
        assert process.returncode == 0 and not process.stderr, process.stderr
        return process.stdout.splitlines(), (tmp_path / "venv" / ".browser").exists()

    return run


def test_a_browser_that_is_there_is_taken(browser):
    said, stamped = browser(id="echo 0", apt_get="exit 9", chromium="true")
    assert said == [] and stamped


def test_root_installs_one(browser, tmp_path):
    log = tmp_path / "apt"
    said, stamped = browser(id="echo 0", apt_get=f'echo "$@" >> {log}')
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
def test_otherwise_one_line_says_that_tests_are_skipped(browser, programs, expected):
    assert browser(**programs) == (expected, False)


def disk(gigabytes: int) -> str:
    """Return a df that shows so much free space on every disk, and a little more."""
    return f"echo Filesystem 1024-blocks Used Available; echo disk 0 0 {gigabytes * 1048576 + 7}"


def test_a_disk_without_room_for_torch_is_named_before_the_download(make, tmp_path, repository):
    log = tmp_path / "pip"
    process = make(".torch", df=disk(8), python=f'echo "$@" >> {log}')
    assert process.returncode != 0 and not log.exists() and not (tmp_path / "venv" / ".torch").exists()
    assert process.stderr.splitlines()[0] == f"torch needs 9 GB of free disk; {repository} has 8: make room there"


@pytest.mark.parametrize("df", [disk(9), "exit 1"], ids=["just enough", "unknown"])
def test_otherwise_torch_is_installed(make, tmp_path, df):
    log = tmp_path / "pip"
    process = make(".torch", df=df, python=f'echo "$@" >> {log}')
    assert process.returncode == 0 and (tmp_path / "venv" / ".torch").exists(), process.stderr
    assert log.read_text().split()[-2:] == ["torch", "torchvision"]


def test_torch_scatter_is_made_while_the_other_packages_are_installed(make, tmp_path):
    """The wheel is not ready before the others are installed, and is installed itself after it is made."""
    venv, log = tmp_path / "venv", tmp_path / "pip"
    for stamp in (".torch", ".system"):
        (venv / stamp).touch()
    others = tmp_path / "others_installed"
    waits = f"for i in $(seq 400); do [ ! -e {others} ] || exit 0; sleep 0.05; done; exit 1"
    body = f"""echo "$CFLAGS $@" >> {log}
case "$*" in *" wheel "*) {waits};; *" --requirement "*) touch {others};; esac"""
    process = make(".s2d3d", python=body, seq="i=0; while [ $i -lt $1 ]; do i=$((i+1)); echo $i; done")
    assert process.returncode == 0 and (venv / ".s2d3d").exists(), process.stderr
    lines = log.read_text().splitlines()
    (wheel,) = [line for line in lines if " wheel " in line]
    assert wheel.split()[0] == "-g0" and wheel.endswith("--constraint constraints.txt torch-scatter")
    wheel_installed, everything = [n for n, line in enumerate(lines) if line.endswith(("*.whl", ".[test]"))]
    assert lines.index(wheel) < wheel_installed < everything == len(lines) - 1
    said = "torch-scatter: taken from pip's cache or compiled for several minutes"
    assert [line.startswith(said) for line in process.stdout.splitlines()].count(True) == 1


def test_a_line_a_minute_while_it_is_compiled(make, tmp_path):
    (tmp_path / "venv" / ".torch").touch()
    seconds = tmp_path / "seconds"
    compiling = f"while [ ! -e {tmp_path}/enough ]; do {shutil.which('sleep')} 0.02; done"
    count = f"i=$(($(cat {seconds} 2>/dev/null || echo 0) + 1)); echo $i > {seconds}; "
    count += f"[ $i -lt 130 ] || touch {tmp_path}/enough"
    python = f'case "$*" in *" wheel "*) {compiling};; esac'
    process = make(".scatter", python=python, sleep=count, cat='while read -r line; do echo "$line"; done < "$1"')
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[1:3] == ["torch-scatter: 1 min", "torch-scatter: 2 min"]


def test_a_failed_compilation_fails_and_leaves_no_stamp(make, tmp_path):
    (tmp_path / "venv" / ".torch").touch()
    process = make(".scatter", python='case "$*" in *" wheel "*) echo broken >&2; exit 3;; esac')
    assert process.returncode != 0 and process.stderr.splitlines()[0] == "broken"
    assert not (tmp_path / "venv" / ".scatter").exists()


def test_the_other_packages_are_those_of_setup_py_without_torch_scatter(make, tmp_path):
    (tmp_path / "venv" / ".torch").touch()
    process = make(".others", python=f'case "$1" in -c) exec {sys.executable} "$@";; esac')
    assert process.returncode == 0, process.stderr
    names = {line.split(">")[0] for line in (tmp_path / "venv" / "others.txt").read_text().splitlines()}
    assert {"torch", "h5py", "pydantic", "pytest", "scipy", "onnxruntime"} <= names
    assert not {"torch-scatter", "torch_scatter", "mkdocs-material", "fpsample"} & names


def test_pip_shows_errors_and_no_warnings(make, tmp_path):
    """As an index that lacks a package would give; the options are those of the Makefile."""
    log = tmp_path / "pip"
    make(".torch", df=disk(9), python=f'echo "$@" >> {log}')
    options = log.read_text().split("\n")[-2].partition(" install ")[0].split()
    index = f"file://{tmp_path / 'nothing'}/"
    command = [sys.executable, *options, "download", "--no-deps", "--dest", tmp_path, "--extra-index-url", index]
    environment = {**os.environ, "PIP_NO_INDEX": "", "PIP_INDEX_URL": index}
    loud = [part for part in command if part != "--quiet"]
    said = [
        subprocess.run([*call, "nothing-of-this-name"], env=environment, capture_output=True, text=True).stderr
        for call in (loud, command)
    ]
    assert "WARNING: " in said[0] and "ERROR: " in said[0], "the comparison can fail"
    assert "WARNING: " not in said[1] and "ERROR: " in said[1]


def test_the_demo_ends_with_the_command_of_the_next_step(repository, tool):
    process = subprocess.run(
        [shutil.which("make"), "-n", "--no-print-directory", "VENV=venv", "demo"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
    )
    command = shlex.split(process.stdout.splitlines()[-1].removeprefix("echo ").strip('" '))
    assert process.returncode == 0 and command[:2] == ["venv/bin/python", "tools/open.py"]
    arguments = tool("open").build_parser().parse_args(command[2:])
    (trained,) = [line.split()[2] for line in process.stdout.splitlines() if "tools/train.py" in line]
    assert arguments.run == load_config(repository / trained).output_dir


def test_the_names_are_those_that_the_tests_look_for(repository):
    """Otherwise make is content with a browser that no test finds."""
    names = next(
        line.split()[2:]
        for line in (repository / "Makefile").read_text().splitlines()
        if line.startswith("BROWSERS :=")
    )
    source = (Path(__file__).parent / "chromium.py").read_text()
    scope: dict[str, tuple[str, ...]] = {}
    exec(source[source.index("NAMES = (") : source.index("PATIENCE")], scope)
    assert sorted(names) == sorted(scope["NAMES"])
