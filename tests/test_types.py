"""Type hints and lint rules, checked as `make types` and `make lint` do."""

import subprocess
import sys
from pathlib import Path

import pytest

# Half the time of a first run is spent on transformers, which one example imports; `make types` reads it too.
SHORTER = """
[[tool.mypy.overrides]]
module = ["transformers.*"]
follow_imports = "skip"
"""


def check(repository: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=repository, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture
def mypy(repository, tmp_path):
    """Run mypy with the settings of `make types`."""
    pytest.importorskip("mypy")
    settings = tmp_path / "settings.toml"
    settings.write_text((repository / "pyproject.toml").read_text(encoding="utf-8") + SHORTER, encoding="utf-8")
    cache = repository / ".mypy_cache" / "tests"
    return lambda *files: check(repository, "mypy", f"--config-file={settings}", f"--cache-dir={cache}", *files)


def test_ruff_finds_nothing(repository):
    result = check(repository, "ruff", "check", ".")
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_module_is_left_out_of_type_checking(repository):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["files"] == ["s2d3d", "benchmarks", "tools", "examples"]
    assert "overrides" not in settings and "exclude" not in settings and not settings.get("ignore_errors")
    assert "ignore-without-code" in settings["enable_error_code"]


@pytest.mark.slow  # `make types`, which .ci/run calls as well
def test_mypy_finds_nothing(mypy):
    result = mypy()
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy_finds_a_wrong_type(mypy, tmp_path):
    """The check above can fail: the settings look into functions."""
    (tmp_path / "wrong.py").write_text("def half(x: int) -> float:\n    return x / 2\n\n\nhalf('four')\n")
    result = mypy(str(tmp_path / "wrong.py"))
    assert result.returncode == 1 and 'has incompatible type "str"; expected "int"' in result.stdout, result.stdout


@pytest.mark.slow  # reads the package and torch
def test_mypy_finds_a_wrong_use_of_the_package(mypy, tmp_path):
    (tmp_path / "wrong.py").write_text("from s2d3d import MoFConfig\n\nMoFConfig(num_experts='four')\n")
    result = mypy(str(tmp_path / "wrong.py"))
    assert result.returncode == 1 and 'has incompatible type "str"; expected "int"' in result.stdout, result.stdout
