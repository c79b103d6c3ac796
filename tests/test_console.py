"""The command s2d3d, from the repository and from the wheel alone."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import zipfile

import pytest

from s2d3d import __version__, console
from s2d3d.console import COMMANDS, load_tool, main


def test_every_tool_is_a_command(repository):
    tools = {path.stem.replace("_", "-") for path in (repository / "tools").glob("*.py")}
    assert set(COMMANDS) == tools
    for command in COMMANDS:
        assert callable(load_tool(command.replace("-", "_")).main)


def test_version_help_and_mistakes(capsys, tmp_path):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"s2d3d {__version__}\n"
    assert main(["--help"]) == 0
    assert "prepare-data" in capsys.readouterr().out
    for argv, word in (
        ([], "a command is missing"),
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["--cofnig"], "unrecognized"),
    ):
        assert main(argv) == 2
        line = capsys.readouterr().err
        assert word in line and line.startswith("error: ") and line.count("\n") == 1
    assert main(["merge", "--checkpoint", str(tmp_path / "no.pt"), "--output", str(tmp_path / "m.pt")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/no.pt: no such checkpoint")


def test_configs_can_be_copied_once(capsys, tmp_path, repository):
    assert main(["--copy-configs", str(tmp_path / "configs")]) == 0
    ours, theirs = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.yaml")}
        for root in (tmp_path / "configs", repository / "configs")
    )
    assert ours == theirs and len(ours) > 20
    assert main(["--copy-configs", str(tmp_path / "configs")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/configs: ")


def parsers_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return a parser and those of its sub-commands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [deeper for choice in action.choices.values() for deeper in parsers_of(choice)]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_an_example_that_the_command_takes(command):
    whole = load_tool(command.replace("-", "_")).build_parser()
    parsers = parsers_of(whole)
    for parser in parsers:
        usage, example = parser.format_help().split("\n\n")[:2]
        assert usage.startswith("usage: ") and len(usage.splitlines()) <= 3
        program, name, *arguments = shlex.split(example.removeprefix("example: "))
        assert (program, name) == ("s2d3d", command)
        if len(parsers) > 1:
            assert parser.prog.split()[1:] in ([], arguments[:1])
            assert vars(whole.parse_args(arguments))["command"] == arguments[0]
        else:
            assert vars(whole.parse_intermixed_args(arguments))


COMPLETE = """
source {script}
try() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_s2d3d; echo "${{COMPREPLY[@]}}"; }}
"""


def test_bash_completes_commands_flags_choices_and_files(tmp_path, capsys):
    assert main(["--print-completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "clouds").mkdir()
    (tmp_path / "cloud.pt").touch()
    expected = {
        "tr": {"train"},
        "train --re": {"--resume"},
        "prepare-data s": {"shapes", "scan"},
        "prepare-data scan --up-axis ": {"y", "z"},
        "export --form": {"--format"},
        "export --checkpoint clo": {"clouds", "cloud.pt"},
        "prepare-data scan --from clo": {"clouds"},
    }
    lines = [f"try s2d3d {shlex.join(words.split(' '))}\n" for words in expected]
    program = COMPLETE.format(script=tmp_path / "script") + "".join(lines)
    process = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (0, "")
    assert [set(line.split()) for line in process.stdout.splitlines()] == list(expected.values())


def test_completion_names_the_package_that_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "zsh"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: --print-completion needs shtab (") and 's2d3d[completion]"' in err


SHIPPED = """
import json, setuptools
from distutils.core import run_setup

build = run_setup("setup.py", stop_after="init").get_command_obj("build_py")
build.ensure_finalized()
print(json.dumps([f"{package}.{module}" for package, module, _ in build.find_all_modules()]))
"""


def test_the_wheel_ships_all_of_the_package_and_no_benchmark_or_test(repository):
    """What setup.py would put into it."""
    process = subprocess.run(
        [sys.executable, "-c", SHIPPED], cwd=repository, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    shipped = set(json.loads(process.stdout.splitlines()[-1]))
    package = {
        ".".join(path.relative_to(repository).with_suffix("").parts) for path in repository.glob("s2d3d/**/*.py")
    }
    tools = {f"s2d3d.tools.{path.stem}" for path in (repository / "tools").glob("*.py")}
    assert shipped == (package | tools) - {"s2d3d.tools.benchmark", "s2d3d.tools.zoo"}
    assert not [name for name in shipped if "bench" in name or "test" in name]


def test_a_tool_that_needs_a_clone_says_so(monkeypatch, tmp_path, capsys):
    """As where the wheel is installed: the folder of the tools lies inside of the package."""
    (tmp_path / "tools").mkdir()
    monkeypatch.setattr(console, "HERE", tmp_path)
    assert main(["benchmark", "layer"]) == 1
    needed = "error: benchmark: needs a clone of the repository; there: python tools/benchmark.py\n"
    assert capsys.readouterr() == ("", needed)


@pytest.mark.slow
def test_the_wheel_alone_trains_and_evaluates(repository, tmp_path):
    """Unpacked away from the repository, with the packages it depends on beside it."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, tmp_path, repository], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    web = [f"s2d3d/export/web/{path.name}" for path in (repository / "s2d3d" / "export" / "web").iterdir()]
    for needed in ("s2d3d/py.typed", "s2d3d/tools/train.py", "s2d3d/configs/demo.yaml", "s2d3d/viz/report.html", *web):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests/", "docs/")) or "bench" in name]
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "s2d3d = s2d3d.console:main" in (tmp_path / "site" / entry).read_text()

    work = tmp_path / "work"
    work.mkdir()

    def s2d3d(*arguments: str) -> str:
        program = "import sys; from s2d3d.console import HERE, main; assert 'site' in HERE.parts; sys.exit(main())"
        process = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=work, capture_output=True, text=True, timeout=600,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return process.stdout

    s2d3d("--copy-configs", "configs")
    s2d3d("prepare-data", "shapes", "--output", "data/shapes", "--num-train", "48", "--num-test", "24")
    s2d3d("train", "configs/demo.yaml", "train.epochs=1", "optim.warmup_epochs=0", "train.batch_size=16")
    assert "OA" in s2d3d("evaluate", "--checkpoint", "runs/demo/merged.pt")
