"""A web page that classifies files: the exported model, its facts, ONNX Runtime for browsers, and the page itself."""

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import needs_force, whole_folder, write_json
from ..errors import InputError, first_line

PAGE = Path(__file__).parent / "web"
"""The files of the page."""
MODEL, FACTS, RUNTIME = "model.onnx", "model.json", "runtime"
PACKAGE = "onnxruntime-web@1.30.0"
"""The npm package that runs models in a browser, in the tested version."""
RUNTIME_FILES = {
    "ort.wasm.min.mjs": "ort.js",
    "ort-wasm-simd-threaded.mjs": "ort-wasm.js",
    "ort-wasm-simd-threaded.wasm": "ort-wasm.wasm",
}
"""Files of the package, and their names beside the page: servers know the type of .js, but not always that of .mjs."""


def find_runtime(given: str | None) -> dict[str, bytes]:
    """Return the files of ONNX Runtime for browsers by their names beside the page. Nothing is fetched unasked.

    Args:
        given: the package as `npm pack` writes it (.tgz), its folder, or "npm": npm fetches it into a temporary folder.
            None: the folder node_modules/onnxruntime-web, where `npm install` puts it.

    Raises:
        InputError: there is no package, or it lacks a file.
    """
    advice = (
        f"get it by: npm pack {PACKAGE}, and name the file that npm prints by --runtime; "
        "with --runtime npm, this command calls npm"
    )
    if given == "npm":
        return _packed_by_npm()
    path = Path(given or "node_modules/onnxruntime-web")
    if not path.exists():
        missing = f"{path}: no such file or folder" if given else "onnxruntime-web is not here"
        raise InputError(f"{missing}; the page needs this npm package; {advice}")
    return _from_archive(path) if path.is_file() else _from_folder(path)


def _packed_by_npm() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", PACKAGE, "--silent"]
        try:
            process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"--runtime npm: npm cannot be run ({first_line(error)}); install Node.js") from error
        found = sorted(Path(folder).glob("*.tgz"))
        if process.returncode or not found:
            lines = [line for line in process.stderr.splitlines() if line.strip()]
            reason = lines[0][:200] if lines else f"exit code {process.returncode}"
            raise InputError(f"--runtime npm: npm pack {PACKAGE} failed ({reason}); name a file or a folder instead")
        return _from_archive(found[0])


def _from_archive(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in RUNTIME_FILES and member.isfile() and (file := archive.extractfile(member)):
                    found[RUNTIME_FILES[name]] = file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a package of npm ({first_line(error)})") from error
    return _whole(path, found)


def _from_folder(path: Path) -> dict[str, bytes]:
    places = [path, path / "dist", path / "package" / "dist"]
    files = {name: next((place / name for place in places if (place / name).is_file()), None) for name in RUNTIME_FILES}
    return _whole(path, {RUNTIME_FILES[name]: file.read_bytes() for name, file in files.items() if file})


def _whole(path: Path, found: dict[str, bytes]) -> dict[str, bytes]:
    missing = [name for name, own in RUNTIME_FILES.items() if own not in found]
    if missing:
        raise InputError(f"{path}: holds no {missing[0]}; the package {PACKAGE} or one of its folders is needed")
    return found


def page_files() -> list[str]:
    """Return the names of the files of the page, without the model and the runtime.

    Example:
        >>> "index.html" in page_files()
        True
    """
    return sorted(path.name for path in PAGE.iterdir() if path.suffix in (".html", ".css", ".js"))


@contextmanager
def new_site(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `output`; it becomes `output` if the body ends without an error.

    Args:
        output: must not exist, or be an empty folder.
        force: replace a folder that holds such a page and nothing else.

    Raises:
        InputError: `output` exists and may not be replaced, or cannot be made.
    """
    with whole_folder(output, lambda: check_site(output, force)) as fresh:
        yield fresh


def check_site(output: Path, force: bool) -> None:
    """Raise InputError unless a page may be made at `output`; see `new_site`."""
    if not needs_force(output, force):
        return
    own = {output / name for name in (*page_files(), MODEL, FACTS, RUNTIME)}
    own |= {output / RUNTIME / name for name in RUNTIME_FILES.values()}
    others = sorted(path for path in output.rglob("*") if path not in own or path.is_symlink())
    if others or not (output / FACTS).is_file():
        shown = others[0] if others else output
        raise InputError(f"{shown}: is not of such a page, so --force does not replace {output}; move it elsewhere")


def write_site(folder: Path, facts: Mapping[str, Any], runtime: Mapping[str, bytes]) -> None:
    """Write all files of the page but the model into a folder.

    Args:
        folder: where the model lies as `MODEL`.
        facts: its metadata, which become model.json. The page also gets the state of `numpy.random.default_rng(0)`, by
            which it draws the same points from a mesh as `predict`.
        runtime: from `find_runtime`.
    """
    state = np.random.default_rng(0).bit_generator.state["state"]
    generator = {"state": str(state["state"]), "increment": str(state["inc"])}
    write_json(folder / FACTS, {"file": MODEL, **facts, "mesh_generator": generator})
    for name in page_files():
        shutil.copyfile(PAGE / name, folder / name)
    (folder / RUNTIME).mkdir()
    for name, content in runtime.items():
        (folder / RUNTIME / name).write_bytes(content)
