"""The package as a whole: what importing it does, what it offers, and which room may know of which."""

import ast
import functools
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import s2d3d
from s2d3d import Trainer

PACKAGE = Path(s2d3d.__file__).parent
FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists())


# The public API


def test_promised_names_are_there():
    promised = {
        "list_models", "create_model", "create_dataset", "MoFConfig", "convert_to_mof_", "RUPMoF", "apply_ewa_", "EWA",
        "merge_experts", "is_sparse", "load_config", "Trainer", "evaluate", "save_checkpoint", "load_checkpoint",
        "load_model", "recalibrate_batchnorm_",
    }  # fmt: skip
    assert promised <= set(s2d3d.__all__)
    names = {name: getattr(s2d3d, name) for name in dir(s2d3d) if not name.startswith("_")}
    public = {name for name, item in names.items() if not inspect.ismodule(item) and item not in (TYPE_CHECKING, Any)}
    assert public == set(s2d3d.__all__) - {"__version__"}


@pytest.mark.parametrize("name", [name for name in s2d3d.__all__ if name != "__version__"])
def test_public_names_are_documented_and_typed(name):
    item = getattr(s2d3d, name)
    assert item.__doc__ and item.__doc__.strip().splitlines()[0].endswith((".", ":"))
    if inspect.isclass(item):
        return
    assert ">>> " in item.__doc__, "an example"
    signature = inspect.signature(item)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        typed = parameter.annotation is not inspect.Parameter.empty
        assert typed or parameter.kind is inspect.Parameter.VAR_KEYWORD, parameter.name


# The rooms


FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
"""The modules of the package by their dotted name below it; a folder is its `__init__`."""
TOOLS = [path for path in sorted((PACKAGE.parent / "tools").glob("*.py")) if path.stem != "__init__"]
NAMES = {name.removesuffix(".__init__") for name in FILES}


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"), filename=str(FILES[name]))


@functools.cache
def module_imports(name: str) -> set[str]:
    return imports_of(name, tree_of(name))


def imports_of(name: str, tree: ast.Module) -> set[str]:
    """Name what a module imports, ours as dotted names below the package behind a dot, others as they are.

    `from ..models import layers` in `training.parts` is `.models.layers`, as `layers` is a module; imports inside of
    functions count as well, those for type checkers alone do not.
    """
    found = set()
    base = name.split(".")[:-1]
    unused = {id(node) for block in ast.walk(tree) if is_type_checking(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.replace("s2d3d.", ".", 1) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            start = base[: len(base) - node.level + 1]
            target = ".".join([*start, *filter(None, [node.module])])
            inner = {".".join(filter(None, [target, alias.name])) for alias in node.names} & NAMES
            others = any(".".join(filter(None, [target, alias.name])) not in NAMES for alias in node.names)
            found |= {f".{module}" for module in inner} | ({f".{target}"} if others else set())
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.replace("s2d3d.", ".", 1) if node.module != "s2d3d" else "s2d3d")
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def rooms(names: set[str]) -> set[str]:
    """Of imported names, those of ours by room; a module beside the rooms is one itself."""
    return {name[1:].split(".")[0] for name in names if name.startswith(".")}


FLOORS = {
    "__main__": 11, "console": 10, "completion": 9, "cli": 8, "studies": 8, "integrations": 8, "training": 7, "viz": 7,
    "runs": 6, "evaluation": 5, "config": 4, "prepare": 4, "export": 4, "models": 3, "datasets": 3, "ops": 2, "s2d": 2,
    "workers": 2, "atomic": 2, "plugins": 1, "unpickle": 1, "machine": 1, "optional": 1, "stored": 1, "terminal": 1,
    "channels": 1, "random_state": 0, "markdown": 0, "errors": 0, "version": 0,
}  # fmt: skip
"""An arrow runs to a lower floor, or stays in its room. `__init__` hands names on, from all of them."""


def test_the_reader_of_imports_sees_them():
    assert {"torch", "timm.utils", ".models", ".config.load", ".s2d"} <= module_imports("training.parts")
    assert rooms(module_imports("config.schema")) >= {"models", "s2d"}, "inside of functions"
    example = ast.parse(
        "import s2d3d.runs.folder\nfrom s2d3d.models import x\nfrom .. import errors\nfrom . import clouds, y"
    )
    assert imports_of("viz.plots", example) == {".runs.folder", ".models", ".errors", ".viz.clouds", ".viz"}


@pytest.mark.parametrize("name", FILES)
def test_nothing_imports_the_package_from_above_or_the_tools(name):
    """`from s2d3d import x` inside of the package is an arrow to everything."""
    roots = {target.split(".")[0] for target in module_imports(name)}
    assert not roots & {"s2d3d", "tools", "tests", "benchmarks"}


def test_every_room_has_its_floor():
    assert {name.split(".")[0] for name in NAMES} - {"__init__"} == set(FLOORS)
    assert set(FOLDERS) == {name.split(".")[0] for name in NAMES if "." in name}


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_arrows_run_down(name):
    own = name.split(".")[0]
    for room in rooms(module_imports(name)) - {own}:
        assert FLOORS[room] < FLOORS[own], f"{name} -> {room}"


def test_no_module_leads_back_to_itself():
    arrows = {name.removesuffix(".__init__"): {t[1:] for t in module_imports(name) if t[1:] in NAMES} for name in FILES}
    for name in arrows:
        reached, waiting = set(), list(arrows[name])
        while waiting:
            step = waiting.pop()
            if step not in reached:
                reached.add(step)
                waiting += arrows[step]
        assert name not in reached, f"{name} imports itself, through {sorted(reached)}"


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_tool_needs_no_other_tool(path):
    """Nor a test or, but for those of a clone, a benchmark: nothing leads from the package back to them."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found = imports_of(path.stem, tree)
    roots = {name.split(".")[0] for name in found if not name.startswith(".")}
    assert "s2d3d" in roots or rooms(found), "the reader sees what it imports"
    assert not roots & {"tools", "tests", *(tool.stem for tool in TOOLS)}
    assert "benchmarks" not in roots or path.stem in ("benchmark", "zoo")


@pytest.mark.parametrize("room", ["training", "evaluation"])
def test_training_and_evaluation_do_not_load_what_makes_data_or_pictures(room):
    for name in FILES:
        if name.split(".")[0] == room:
            top = ast.Module([node for node in tree_of(name).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
            assert not rooms(imports_of(name, top)) & {"prepare", "viz"}, name


def test_the_method_stands_alone():
    """Nothing of ours, and of others torch and torch-scatter alone: the folder can be copied into another project.

    The file of GPU kernels needs Triton, which torch brings along where there are GPUs; nothing imports it elsewhere.
    """
    for name in FILES:
        if name.split(".")[0] == "s2d":
            targets = module_imports(name)
            kernels = {"triton"} if name.endswith("_triton") else set()
            allowed = {"torch", "torch_scatter"} | kernels | sys.stdlib_module_names
            assert rooms(targets) <= {"s2d"}, name
            assert {target.split(".")[0] for target in targets if not target.startswith(".")} <= allowed, name


# Output


def test_the_package_never_prints():
    """`cli` words errors for the tools; everything else returns, logs or raises."""
    calls = {
        (name, node.lineno)
        for name in FILES
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert {name for name, _ in calls} == {"cli"}


def test_a_whole_run_writes_nothing_to_stdout_or_stderr(tiny_config, capfd):
    Trainer(tiny_config("train.epochs=1", "optim.warmup_epochs=0", "eval.votes=2", "data.val_fraction=0.2")).fit()
    assert capfd.readouterr() == ("", "")
