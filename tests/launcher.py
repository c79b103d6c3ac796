"""One process a session that has imported the package: it says what was imported, then forks for each command."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

LAUNCHER = """
import contextlib, io, json, os, runpy, sys, tempfile, traceback

def imported(statement):
    out, err = io.StringIO(), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        exec(statement, {})
        return {"modules": sorted(sys.modules), "written": os.listdir(folder), "said": out.getvalue() + err.getvalue()}

print(json.dumps([
    imported("from s2d3d import EWA, MoFConfig, convert_to_mof_, merge_experts"),
    imported("import s2d3d, s2d3d.viz; [getattr(s2d3d, name) for name in s2d3d.__all__]"),
]), flush=True)

import torch
from s2d3d import *

# Import what builds a model and draws numbers here, not in each child; building experts would import torch-scatter.
load_config("configs/demo.yaml", ["s2d.kind=none"])
torch.manual_seed(0)

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number in (1, 2):
        os.dup2(os.open(request["streams"][number - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = request["arguments"]
    code = 0
    try:
        exec(request["prelude"])
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
os._exit(0)  # ending in the ordinary way takes torch a second
"""


@dataclass(frozen=True)
class Import:
    """What an import brought along: all modules, what it wrote into the folder it ran in, and what it printed."""

    modules: list[str]
    written: list[str]
    said: str


@dataclass(frozen=True)
class Launcher:
    """The process, and what came of its imports: of the method, and of all public names and the pictures after it."""

    process: subprocess.Popen
    method: Import
    everything: Import

    def run(self, arguments: list[str], streams: list[Path], prelude: str) -> int:
        """Run a tool in a fork, its output in two files; return its exit code."""
        request = {"arguments": arguments, "streams": list(map(str, streams)), "prelude": prelude}
        self.process.stdin.write(json.dumps(request) + "\n")
        return int(self.process.stdout.readline())


@functools.cache
def launcher() -> Launcher:
    """Start the process at the first call; it ends when its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    method, everything = (Import(**found) for found in json.loads(process.stdout.readline()))
    return Launcher(process, method, everything)
