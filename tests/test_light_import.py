"""What is imported for what: nothing by `import s2d3d`, torch for the method, no torch for help and mistakes."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import s2d3d
from s2d3d.cli import CLOUD_FILES
from s2d3d.console import COMMANDS
from s2d3d.datasets.files import SUFFIXES

HEAVY = {"torch", "timm", "torchvision", "torch_scatter", "open3d", "h5py", "matplotlib", "scipy", "plotly"}
"""Packages that take from a fifth of a second to several seconds to import."""

TOOLS = {
    "analyze": ["no/such/run"],
    "apply_ewa": ["--checkpoint", "no/such.pt", "--share-rate", "0.1", "--output", "out.pt"],
    "benchmark": ["latency", "--checkpoint", "no/such.pt"],
    "evaluate": ["--checkpoint", "no/such.pt", "data.root=x"],
    "export": ["--checkpoint", "no/such.pt", "--output", "out.onnx"],
    "few_shot": ["no/such.yaml", "--output", "out.json"],
    "merge": ["--checkpoint", "no/such.pt", "--output", "out.pt"],
    "predict": ["--checkpoint", "no/such.pt", "cloud.ply"],
    "prepare_data": ["shapes"],
    "report": ["no/such/run", "--output", "out.html"],
    "study": ["no/such.yaml", "--dry-run"],
    "train": ["no/such.yaml", "seed=3"],
    "visualize": ["--checkpoint", "no/such.pt", "--output", "out.png"],
    "zoo": ["--output", "no/such/page.md"],
}
"""By tool, arguments that name a config, a checkpoint or a run that is not there, or lack one."""

CONSOLE = {
    ("--help",): (0, "usage: s2d3d"),
    ("--version",): (0, f"s2d3d {s2d3d.__version__}"),
    ("trian",): (2, "error: no command 'trian'; did you mean 'train'?"),
    ("--wrong",): (2, "error: unrecognized arguments: --wrong"),
    ("train", "--help"): (0, "usage: train.py"),
    ("train", "no/such.yaml"): (1, "error: no/such.yaml: no such file"),
}
"""Arguments of `s2d3d`, its exit code, and how its output begins."""

PROBE = """
import argparse, contextlib, importlib, io, json, logging, os, runpy, sys, typing

def tool(name, *arguments):
    return runpy.run_path(f"tools/{name}.py")["main"](arguments)

def command(*arguments):
    return importlib.import_module("s2d3d.console").main(arguments)

def module():
    runpy.run_module("s2d3d", run_name="__main__")

def statement(text):
    exec(text, {})

def run(kind, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = globals()[kind](*arguments)
        except SystemExit as stop:
            code = stop.code
    loaded = sorted({name.partition(".")[0] for name in sys.modules} - before)
    return {"code": code or 0, "out": out.getvalue(), "err": err.getvalue(), "loaded": loaded}

before = {name.partition(".")[0] for name in sys.modules}
for steps in json.load(sys.stdin):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps([run(*step) for step in steps]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        print(file.read())
    os.wait()
"""
"""Takes the steps of each trial in a fork of a process that has imported nothing of ours; prints what came of them."""


METHOD = "from s2d3d import EWA, MoFConfig, convert_to_mof_, merge_experts"

EVERYTHING = """
import json, os, sys, tempfile
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    import s2d3d, s2d3d.viz
    for name in s2d3d.__all__: getattr(s2d3d, name)
    print(json.dumps([sorted(sys.modules), os.listdir(folder)]))
"""

NO_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None  # what Python itself does to forbid an import
try:
    import s2d3d.viz
except ValueError as error:
    print(error)
"""


def trials() -> dict[object, list[list[str]]]:
    """Return what is tried, by a key: the steps of one process."""
    calls = {name: (["--help"], ["--wrong"], missing) for name, missing in TOOLS.items()}
    return {
        "package": [["statement", "import s2d3d"]],
        "method, then everything": [["statement", METHOD], ["statement", EVERYTHING]],
        "module": [["module"]],
        "no matplotlib": [["statement", NO_MATPLOTLIB]],
        "config": [["tool", "visualize", "--config", "no/such.yaml", "--output", "out.png"]],
        **{arguments: [["command", *arguments]] for arguments in CONSOLE},
        **{name: [["tool", name, *arguments] for arguments in calls[name]] for name in TOOLS},
    }


@pytest.fixture(scope="module")
def probe() -> dict[object, list[dict]]:
    """What came of the steps of each trial: exit code, output, top-level modules imported so far."""
    root = Path(__file__).parent.parent
    process = subprocess.run(
        [sys.executable, "-c", PROBE], input=json.dumps(list(trials().values())), capture_output=True, text=True,
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=600,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    return dict(zip(trials(), map(json.loads, process.stdout.splitlines())))


def loaded(results: list[dict]) -> set[str]:
    """Name what was imported that Python does not bring along."""
    return set(results[-1]["loaded"]) - sys.stdlib_module_names


# The package


def test_the_package_alone_imports_nothing_else(probe):
    assert loaded(probe["package"]) == {"s2d3d"}


def test_the_method_needs_torch_and_nothing_else_of_weight(probe):
    found = loaded(probe["method, then everything"][:1])
    assert "torch" in found
    assert found & ({*HEAVY, "pydantic", "yaml"} - {"torch"}) == set()


def test_importing_everything_is_silent_and_leaves_heavy_packages_alone(probe):
    result = probe["method, then everything"][1]
    assert (result["code"], result["err"], result["out"].count("\n")) == (0, "", 1)
    modules, written = json.loads(result["out"])
    assert {"s2d3d.training.trainer", "s2d3d.viz"} <= set(modules) and written == []
    assert {"open3d", "matplotlib.pyplot", "torch_scatter", "torchmetrics", "transformers"} & set(modules) == set()


def test_without_matplotlib_pictures_name_it_and_its_extra(probe):
    (result,) = probe["no matplotlib"]
    assert result["out"].startswith("drawing needs matplotlib (") and result["out"].count("\n") == 1
    assert result["out"].endswith('): pip install "s2d3d[plots]"\n')


def test_the_lists_of_public_names_agree():
    """Those for `import *`, for `__getattr__` and for type checkers."""
    tree = ast.parse(Path(s2d3d.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert typed == s2d3d._HOMES
    assert sorted(s2d3d.__all__) == sorted([*(name for names in typed.values() for name in names), "__version__"])


def test_every_way_to_a_name_gives_the_same():
    from s2d3d.s2d import EWA
    from s2d3d.training.trainer import Trainer

    everything: dict[str, object] = {}
    exec("from s2d3d import *", everything)
    assert everything.keys() - {"__builtins__"} == set(s2d3d.__all__) <= set(dir(s2d3d))
    assert s2d3d.EWA is EWA is everything["EWA"] and s2d3d.Trainer is Trainer
    assert s2d3d.models.create_model is s2d3d.create_model
    with pytest.raises(AttributeError, match=r"^module 's2d3d' has no attribute 'Trianer'$"):
        s2d3d.Trianer  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Trianer' from 's2d3d'"):
        from s2d3d import Trianer  # noqa: F401


# The command lines


def test_every_tool_is_tried(repository):
    assert set(TOOLS) == {path.stem for path in (repository / "tools").glob("*.py")}
    assert set(TOOLS) == {command.replace("-", "_") for command in COMMANDS}


@pytest.mark.parametrize("arguments", CONSOLE, ids=" ".join)
def test_the_command_is_light(probe, arguments):
    (result,) = probe[arguments]
    code, beginning = CONSOLE[arguments]
    assert (result["code"], (result["out"] + result["err"])[: len(beginning)]) == (code, beginning)
    assert loaded(probe[arguments]) & HEAVY == set()


def test_the_package_is_a_command(probe):
    (result,) = probe["module"]
    assert (result["code"], result["err"]) == (2, "error: a command is missing; see s2d3d --help\n")
    assert loaded(probe["module"]) & HEAVY == set()


@pytest.mark.parametrize("name", TOOLS)
def test_help_and_mistakes_of_a_tool_are_light(probe, name):
    shown, wrong, missing = probe[name]
    assert shown["code"] == 0 and shown["out"].startswith(f"usage: {name}.py")
    assert (wrong["code"], missing["code"]) == (2, 2 if name == "prepare_data" else 1)
    assert "no/such" in missing["err"] or name == "prepare_data"
    for mistake in (wrong, missing):
        assert mistake["err"].startswith("error: ") and mistake["err"].count("\n") == 1 and not mistake["out"]
    assert loaded(probe[name]) & HEAVY == set()


def test_a_missing_config_is_found_before_anything_that_draws(probe):
    (result,) = probe["config"]
    assert (result["code"], result["err"]) == (1, "error: no/such.yaml: no such file\n")
    assert loaded(probe["config"]) & HEAVY == set()


def test_the_help_names_the_files_that_are_read():
    assert set(CLOUD_FILES.split()) == set(SUFFIXES)
