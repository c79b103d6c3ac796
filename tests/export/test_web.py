"""The web page of an exported model, in a real browser: what it says is what `predict` says, and damage is one line."""

import functools
import http.server
import json
import os
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_onnx import POINTS, write_tiny_model

from s2d3d import create_dataset
from s2d3d.datasets.files import read_cloud
from s2d3d.errors import InputError
from s2d3d.export.web import PACKAGE, RUNTIME_FILES, check_site, find_runtime, new_site, page_files, write_site
from s2d3d.ops.points import farthest_point_sample
from s2d3d.prepare.shapes import make_shape

NAMES = ["ball", "box", "cone", "<b>rod</b>"]
ENDED = "['done', 'error'].includes(document.body.dataset.state)"
CUBE = [(x, y, z) for x in (0, 2) for y in (0, 1) for z in (0, 1)]
QUADS = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]


@pytest.fixture(scope="module")
def runtime() -> dict[str, bytes]:
    """ONNX Runtime for browsers, which `make test` fetches; S2D3D_ORT_WEB names another place."""
    folder = Path(os.environ.get("S2D3D_ORT_WEB") or Path(sys.prefix) / "onnxruntime-web")
    if not folder.exists():
        pytest.skip(f"no {PACKAGE} here: make {sys.prefix}/.web, or name its folder by S2D3D_ORT_WEB")
    return find_runtime(str(folder))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """What `python -m http.server` answers with, without its log."""

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def serve():
    """Serve a folder from this machine alone; return its address."""
    servers = []

    def start(folder: Path) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def site(runtime, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("web") / "site"
    with new_site(output) as folder:
        write_site(folder, write_tiny_model(folder / "model.onnx", NAMES), runtime)
    return output


@pytest.fixture(scope="module")
def page(site, serve, tmp_path_factory):
    """The page, ready for files."""
    from chromium import Chromium

    browser = Chromium(tmp_path_factory.mktemp("profile"))
    browser.open(serve(site) + "index.html")
    browser.wait("['ready', 'error'].includes(document.body.dataset.state)")
    assert browser.evaluate("document.body.dataset.state") == "ready", message(browser)
    yield browser
    browser.close()


def message(browser) -> str:
    return browser.evaluate("document.getElementById('message').textContent")


def shown_classes(browser) -> dict[str, float]:
    rows = "Array.from(document.querySelectorAll('#classes li'), row => [row.dataset.name, Number(row.dataset.share)])"
    return dict(browser.evaluate(rows))


def classify(browser, path: Path) -> dict[str, float]:
    """Choose a file; return the classes that the page shows, with their probabilities."""
    browser.choose_file("#file", path)
    browser.wait(f"{ENDED} && document.getElementById('message').textContent.startsWith({json.dumps(path.name)})")
    return shown_classes(browser)


def write_ply(path: Path, points: np.ndarray) -> None:
    head = "".join(f"property float {axis}\n" for axis in "xyz")
    text = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{head}end_header\n"
    path.write_bytes(text.encode() + points.astype("<f4").tobytes())


def write_pcd(path: Path, points: np.ndarray) -> None:
    head = "FIELDS x y z\nSIZE 8 8 8\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {0}\nHEIGHT 1\nPOINTS {0}\nDATA binary\n"
    path.write_bytes(head.format(len(points)).encode() + points.astype("<f8").tobytes())


def write_xyz(path: Path, points: np.ndarray) -> None:
    path.write_text("".join(f"{x!r} {y!r} {z!r}\n" for x, y, z in points.tolist()))


WRITERS = {".ply": write_ply, ".pcd": write_pcd, ".xyz": write_xyz}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Clouds with more, fewer and exactly as many points as the model takes, far off, with gaps; meshes."""
    folder = tmp_path_factory.mktemp("files")
    shapes = [make_shape(0, "test", index, 200) for index in range(6)]
    far = shapes[2] + np.array([5e6, 4e5, 30.0])
    gaps = np.concatenate([shapes[3], np.full((9, 3), np.nan)])
    clouds = {
        "more.ply": shapes[0] * 7 + 3, "exact.pcd": shapes[1][:POINTS], "far.pcd": far, "gaps.xyz": gaps,
        "fewer.xyz": shapes[4][:40], "long.pcd": np.concatenate(shapes),
    }  # fmt: skip
    paths = {name: folder / name for name in clouds}
    for name, points in clouds.items():
        WRITERS[paths[name].suffix](paths[name], points)
    paths["cube.off"] = folder / "cube.off"
    rows = ["OFF8 6 0", *("{} {} {}".format(*vertex) for vertex in CUBE), *("4 {} {} {} {}".format(*q) for q in QUADS)]
    paths["cube.off"].write_text("\n".join(rows) + "\n")
    paths["cube.obj"] = folder / "cube.obj"
    faces = ["f {} {} {} {}".format(*(corner + 1 for corner in quad)) for quad in QUADS]
    paths["cube.obj"].write_text("\n".join([*("v {} {} {}".format(*vertex) for vertex in CUBE), *faces]) + "\n")
    return paths


@pytest.mark.parametrize("axis", ["z", "y"])
def test_the_page_says_what_predict_says(page, site, files, tool, tmp_path, capsys, axis):
    output = tmp_path / "said.json"
    command = ["--checkpoint", str(site / "model.onnx"), "--output", str(output), "--up-axis", axis]
    assert tool("predict").main([*command, *map(str, files.values())]) == 0, capsys.readouterr().err
    said = {Path(entry["file"]).name: entry["probabilities"] for entry in json.loads(output.read_text())["predictions"]}
    assert len({max(shares, key=shares.get) for shares in said.values()}) > 1, "they are not all of one class"
    page.evaluate(f"document.getElementById('up').value = '{axis}'")
    for name, path in files.items():
        ours = classify(page, path)
        assert list(ours) == sorted(said[name], key=said[name].get, reverse=True), name
        assert ours == pytest.approx(said[name], abs=1e-4), name
    assert page.errors == []
    page.evaluate("document.getElementById('up').value = 'z'")


def test_it_names_what_it_did_to_the_cloud_and_asks_nobody_else(page, site, files):
    classify(page, files["gaps.xyz"])
    notes = page.evaluate("document.getElementById('notes').innerText")
    assert "9 of 209 points are not finite and left out" in notes
    assert f"{POINTS} of 200 points, chosen by farthest point sampling" in notes
    assert page.evaluate("document.querySelector('#classes li b') === null"), "names are text"
    addresses = {request.rsplit("/", 1)[0] for request in page.requests}
    own = page.evaluate("location.origin")
    assert addresses <= {own, f"{own}/runtime", "data:image"} and len(page.requests) > 10


def test_the_patch_that_matters_most_is_the_one_of_the_text(page, site, files):
    """Remove each patch by hand and ask the model."""
    from s2d3d.runs.trained import open_exported

    best, *_ = classify(page, files["exact.pcd"])
    model = open_exported(site / "model.onnx").model
    cloud = read_cloud(files["exact.pcd"], POINTS)
    centres = farthest_point_sample(cloud[None], POINTS // 8)[0]
    owner = torch.cdist(cloud.double(), cloud[centres].double()).argmin(1)
    left = []
    for patch in range(POINTS // 8):
        changed, kept = cloud.clone(), torch.nonzero(owner != patch).flatten()
        gone = torch.nonzero(owner == patch).flatten()
        changed[gone] = cloud[kept[torch.arange(len(gone)) % len(kept)]]
        left.append(float(model(changed[None]).softmax(1)[0, NAMES.index(best)]))
    assert float(page.evaluate("document.getElementById('effect').dataset.left")) == pytest.approx(min(left), abs=1e-4)
    warm = (
        "(() => { const c = document.getElementById('cloud'), d = c.getContext('2d').getImageData(0, 0, 380, 380).data;"
        " let count = 0; for (let i = 0; i < d.length; i += 4) count += d[i] > d[i + 1] + 60; return count; })()"
    )
    assert page.evaluate(warm) < 5, "coloured by height"
    choose = "c.value = 'matters'; c.dispatchEvent(new Event('change'));"
    page.evaluate(f"(() => {{ const c = document.getElementById('coloured'); {choose} }})()")
    assert page.evaluate(warm) > 20


def test_a_damaged_file_is_one_line_and_shows_no_cloud(page, files, tmp_path):
    assert classify(page, files["more.ply"])
    content = files["more.ply"].read_bytes()
    damaged = {
        "cut.ply": (content[:-50], "is cut short: 2400 bytes are announced, 2350 follow the header"),
        "few.xyz": (b"0 0 1\n1 0 0\n", "2 points are fewer than the 16 that the model needs"),
        "flat.xyz": (b"1 2 3\n" * 99, "all 99 points are equal, a cloud without extent"),
        "text.xyz": (b"0 0 1\n1 zero 0\n", "cannot be read as a table: line 2: 'zero' is not a number"),
        "kind.glb": (b"glTF", "unknown kind of file (known here: .ply, .pcd, .off, .obj, .xyz, .txt, .csv, .pts)"),
        "empty.pcd": (b"", "holds no points, or is not a .pcd file: its header has no DATA"),
    }  # fmt: skip
    for name, (bytes_, reason) in damaged.items():
        path = tmp_path / name
        path.write_bytes(bytes_)
        assert classify(page, path) == {} and message(page) == f"{name}: {reason}"
        assert page.evaluate("document.getElementById('result').hidden && document.body.dataset.state === 'error'")
    assert classify(page, files["more.ply"]) and page.errors == []


def test_a_dropped_file_is_taken(page, files):
    expected = classify(page, files["fewer.xyz"])
    text = json.dumps(files["fewer.xyz"].read_text())
    page.evaluate(
        f"(() => {{ const data = new DataTransfer(); data.items.add(new File([{text}], 'dropped.xyz'));"
        " document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true})); })()"
    )
    page.wait(f"{ENDED} && document.getElementById('message').textContent === 'dropped.xyz'")
    assert shown_classes(page) == expected


def open_with(browser, site, serve, folder: Path, **changes) -> str:
    """Open a copy of the page whose model.json has other values; return what it says."""
    folder.mkdir()
    for path in site.iterdir():
        if path.name != "model.json":
            (folder / path.name).symlink_to(path)
    facts = json.loads((site / "model.json").read_text()) | changes
    (folder / "model.json").write_text(json.dumps(facts) if changes else "{")
    browser.open(serve(folder) + "index.html")
    browser.wait("document.body.dataset.state === 'error'")
    return message(browser)


def test_a_page_that_lacks_something_says_what(site, serve, tmp_path, tmp_path_factory):
    from chromium import Chromium

    browser = Chromium(tmp_path_factory.mktemp("profile"))
    said = open_with(browser, site, serve, tmp_path / "a", channels="xyz+normal")
    assert said == "the model takes the channels xyz+normal; this page reads x, y and z only"
    assert open_with(browser, site, serve, tmp_path / "b") == "model.json is damaged; export the page again"
    said = open_with(browser, site, serve, tmp_path / "c", file="other.onnx")
    assert said == "other.onnx is missing beside this page (404); export the page again"
    said = open_with(browser, site, serve, tmp_path / "d", file="model.json")
    assert said.startswith("model.json cannot be run (") and said.endswith("; export the page again")
    browser.open(site / "index.html")
    assert message(browser).startswith("This page needs a server: run python -m http.server in its folder")
    browser.close()


# Making the folder


def test_the_package_is_named_once(repository):
    (line,) = [line for line in (repository / "Makefile").read_text().splitlines() if line.startswith("WEB_PACKAGE")]
    assert line.split()[-1] == PACKAGE


def test_the_package_is_read_from_a_folder_or_an_archive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"^onnxruntime-web is not here; the page needs this npm package; get it by: npm"
    ):
        find_runtime(None)
    with pytest.raises(InputError, match=r"^a\.tgz: no such file or folder; the page needs this npm package"):
        find_runtime("a.tgz")
    dist = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for number, name in enumerate(RUNTIME_FILES):
        (dist / name).write_bytes(bytes([number]))
    found = find_runtime(None)
    assert found == {"ort.js": b"\0", "ort-wasm.js": b"\1", "ort-wasm.wasm": b"\2"}
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.add(dist, "package/dist")
    assert find_runtime("a.tgz") == found == find_runtime("node_modules/onnxruntime-web/dist")
    (dist / "ort.wasm.min.mjs").unlink()
    with pytest.raises(InputError, match=r"^node_modules/onnxruntime-web: holds no ort\.wasm\.min\.mjs; the package"):
        find_runtime(None)
    Path("b.tgz").write_bytes(Path("a.tgz").read_bytes()[:90])
    with pytest.raises(InputError, match=r"^b\.tgz: cannot be read as a package of npm"):
        find_runtime("b.tgz")


def test_npm_is_asked_only_when_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"^--runtime npm: npm cannot be run \(.*\); install Node\.js$"):
        find_runtime("npm")
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho "npm error code E404" >&2\nexit 1\n')
    npm.chmod(0o755)
    with pytest.raises(InputError, match=r"npm pack onnxruntime-web@.* failed \(npm error code E404\); name a file"):
        find_runtime("npm")
    assert (tmp_path / "npm.asked").read_text().split() == ["pack", PACKAGE, "--silent"]


def test_a_folder_is_replaced_only_if_it_is_such_a_page(tmp_path):
    output, runtime = tmp_path / "site", dict.fromkeys(RUNTIME_FILES.values(), b"0")
    with new_site(output) as folder:
        (folder / "model.onnx").write_bytes(b"first")
        write_site(folder, {"class_names": ["a"]}, runtime)
    assert {path.name for path in output.iterdir()} == {*page_files(), "model.onnx", "model.json", "runtime"}
    with pytest.raises(InputError, match=r"site: exists; choose another --output, or --force to replace it"):
        check_site(output, force=False)
    with pytest.raises(KeyError), new_site(output, force=True) as folder:
        raise KeyError
    assert (output / "model.onnx").read_bytes() == b"first"
    with new_site(output, force=True) as folder:
        (folder / "model.onnx").write_bytes(b"second")
        write_site(folder, {"class_names": ["a"]}, runtime)
    assert (output / "model.onnx").read_bytes() == b"second"
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt: is not of such a page, so --force does not replace"):
        check_site(output, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.slow
@pytest.mark.real_data
def test_real_clouds_and_a_trained_model(runtime, modelnet40_root, tool, serve, tmp_path, capsys):
    """Export a model that was trained on five classes; its page says what `predict` says with the checkpoint."""
    from chromium import Chromium

    from s2d3d import Trainer, load_config

    config = load_config(
        "configs/demo.yaml",
        ["data.name=modelnet40", f"data.root={modelnet40_root}", "data.num_points=512", "train.epochs=3",
         "data.classes=[chair,airplane,lamp,sofa,bottle]", f"output_dir={tmp_path / 'run'}", "data.fraction=0.2",
         f"data.cache_dir={tmp_path / 'cache'}", "train.device=cpu"],
    )  # fmt: skip
    merged = Trainer(config).fit()
    export = ["--checkpoint", str(merged), "--format", "web", "--output", str(tmp_path / "site"), "--clouds", "8"]
    folder = tmp_path / "ort"
    folder.mkdir()
    for name, own in RUNTIME_FILES.items():
        (folder / name).write_bytes(runtime[own])
    assert tool("export").main([*export, "--runtime", str(folder)]) == 0, capsys.readouterr().err
    test = create_dataset("modelnet40", modelnet40_root, "test", classes=config.data.classes)
    files = []
    for place, index in enumerate(range(0, len(test), max(1, len(test) // 24))):
        path = tmp_path / f"{place}{list(WRITERS)[place % 3]}"
        cloud = test.batch(torch.tensor([index]), augment=False)[0][0].numpy().astype(float)
        WRITERS[path.suffix](path, cloud * 3 + [2, -5, 9])
        files.append(path)
    output = tmp_path / "said.json"
    assert tool("predict").main(["--checkpoint", str(merged), "--output", str(output), *map(str, files)]) == 0
    browser = Chromium(tmp_path / "profile")
    browser.open(serve(tmp_path / "site") + "index.html")
    browser.wait("document.body.dataset.state === 'ready'")
    for path, entry in zip(files, json.loads(output.read_text())["predictions"], strict=True):
        ours = classify(browser, path)
        assert next(iter(ours)) == entry["class"] and ours == pytest.approx(entry["probabilities"], abs=1e-4), path
    assert browser.errors == []
    browser.close()
