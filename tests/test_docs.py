"""What the pages show is run as it stands: code, commands, links, figures, the notebook, the reference, the site."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import s2d3d
from s2d3d import Trainer, datasets, load_config, load_model, models
from s2d3d.config.reference import config_reference
from s2d3d.config.schema import Config
from s2d3d.s2d.analysis import expert_divergence
from s2d3d.studies.stats import paired_t

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")]
PAGES += sorted(REPOSITORY.glob("docs/**/*.md"))
CLOSED = ("configs/studies/beyond.yaml", "configs/studies/population.yaml")
"""Studies of options that are gone from the repository; their pages and records stay."""


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def output_of(block: str, page: str) -> list[str]:
    """Run a block of a page and return the lines that it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(block, page, "exec"), {"__name__": page})
    return said.getvalue().splitlines()


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the site and code hosts build them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower() for heading in headings]
    return {re.sub(r" ", "-", heading) for heading in plain}


@pytest.fixture
def blocks(repository):
    return python_blocks(repository / "docs" / "extend.md")


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_tools_configs_and_targets_that_exist(page, repository):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), flags=re.MULTILINE))
    for tool in re.findall(r"\b(tools/\w+\.py|examples/\w+\.(?:py|ipynb)|tests/[\w/]+\.py)\b", text):
        assert (repository / tool).is_file() or "NAME" in tool, tool
    for config in re.findall(r"\b(configs/(?:studies/)?\w+\.yaml)\b", text):
        assert (repository / config).is_file() or "NAME" in config or config in CLOSED, config
    for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_of_tools_exist(page, repository):
    """Each flag in a code line or table row that begins with a tool is one of that tool."""
    for name, rest in re.findall(r"tools/([a-z_]+)\.py((?:[^`\n]|\\\n)*)", page.read_text().replace("\\|", " ")):
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest.split(" #")[0]))
        assert flags <= flags_of(repository, name), f"tools/{name}.py {sorted(flags)}"


def flags_of(repository, name, cache={}):  # noqa: B006
    """Return all flags of a tool and of its sub-commands."""
    if name not in cache:
        spec = importlib.util.spec_from_file_location(f"docs_{name}", repository / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        waiting, found = [module.build_parser()], set()
        while waiting:
            for action in waiting.pop()._actions:
                found |= {option for option in action.option_strings if option.startswith("--")}
                if isinstance(action, argparse._SubParsersAction):
                    waiting += action.choices.values()
        cache[name] = found
    return cache[name]


def test_the_api_page_names_what_is_there(repository):
    names = re.findall(r"^::: (\S+)$", (repository / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert len(names) > 20
    for name in names:
        module, _, item = name.rpartition(".")
        assert getattr(importlib.import_module(module), item).__doc__, name


def test_the_architecture_page_shows_every_room(repository):
    page = (repository / "docs" / "architecture.md").read_text()
    picture = re.search(r"```text\n(.*?)```", page, flags=re.DOTALL)[1]
    rooms = {path.parent.name for path in (repository / "s2d3d").glob("*/__init__.py")}
    assert len(rooms) >= 12
    for room in rooms:
        assert re.search(rf"\b{room}/ ", picture) and f"| `{room}/` |" in page, room
    assert max(map(len, picture.splitlines())) <= 78


def test_the_readme_is_short_and_shows_the_result_on_its_first_screen(repository):
    lines = (repository / "README.md").read_text().splitlines()
    assert len(lines) <= 90 and max(map(len, lines)) <= 140
    first = "\n".join(lines[:35])
    for needed in (
        "W_i <- (1 - b) W_i + b * mean_{j != i} W_j",
        "no gain",
        "Segmentation and detection are not",
        ".svg",
    ):
        assert needed in first


def test_the_lines_of_the_readme_train_and_merge(repository):
    (block,) = python_blocks(repository / "README.md")
    model = s2d3d.create_model("point_bert_tiny", num_classes=3, head_dropout=0.0)
    keys = list(model.state_dict())
    optimizers = []

    def step(points, labels):
        if not optimizers:
            optimizers.append(torch.optim.AdamW(model.parameters(), lr=1e-3))
        torch.nn.functional.cross_entropy(model(points), labels).backward()
        optimizers[0].step()

    loader = [(torch.rand(4, 256, 3), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    names = {"model": model, "loader": loader, "total_steps": len(loader), "step": step}
    assert "    ...  # forward, backward, optimizer.step()\n" in block
    exec(block.replace("    ...  #", "    step(points, labels)  #"), names)
    assert optimizers[0].state and s2d3d.is_sparse(model)
    assert list(names["model"].state_dict()) == keys and not s2d3d.is_sparse(names["model"])
    s2d3d.create_model("point_bert_tiny", num_classes=3).load_state_dict(names["model"].state_dict(), strict=True)


def test_figures_of_the_results_page_follow_from_the_records(repository, monkeypatch):
    monkeypatch.chdir(repository)
    page = (repository / "docs" / "results.md").read_text()
    pairs, count = (output_of(block, "docs/results.md") for block in python_blocks(repository / "docs" / "results.md"))
    rows = {
        "headline": "| [headline](results/headline.md)",
        "scarce": "| [scarce](results/scarce.md)",
        "all_layers": "| [all_layers](results/all_layers.md)",
        "scarce without pair 209": "| scarce without pair 209",
        "rate": "| [rate](results/rate.md), `b_0.05`",
        "reporting": "| [reporting](results/reporting.md)",
        "together": "| **the five studies together**",
        "images_300, s2d": "| [images_300](results/images_300.md), `s2d`",
        "images_300, s2d_all": "| the same, `s2d_all`",
    }
    found = dict(line.split(": ", 1) for line in pairs if not line.startswith(" "))
    others = {"together without 105, 106 and 209", "together, the first three", "together, without reporting"}
    assert found.keys() == {*rows, *others, "together, b_0.75", "together, b_0.05_x2"}
    for name, line in found.items():
        number, mean, low, high, p = re.fullmatch(r"n (\d+), (\S+) \[(\S+), (\S+)\], p (\S+)", line).groups()
        if name not in rows:
            assert f"{mean} [{low}, {high}]" in page and number in ("44", "41", "37", "27"), name
            continue
        (row,) = (row for row in page.split("\n## ")[0].splitlines() if row.startswith(rows[name]))
        cells = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        assert cells == [number, mean, f"[{low}, {high}]", p.replace("0.000", "< 0.001")], name
    place = next(index for index, line in enumerate(pairs) if line.startswith("together: "))
    training, test = pairs[place + 1 : place + 3]
    for name, line in (("training loss, last epoch", training), ("test loss", test)):
        mean, low, high, higher = re.fullmatch(r"  (\S+) \[(\S+), (\S+)\], higher in (\d+)", line).groups()
        assert f"| {name} | 44 | {mean} | [{low}, {high}] | {higher} |" in page
    assert count == ["26 comparisons", "['every_1'] above zero", "['s2d_25'] below zero"]
    readme = (repository / "README.md").read_text()
    number, rest = re.fullmatch(r"n (\d+), (.*), p .*", found["images_300, s2d"]).groups()
    assert f"| {number} | {rest.replace(' [', ' | [')} |" in readme
    assert "| 44 | -0.20 | [-0.37, -0.03] |" in readme and "40 of 44 pairs" in readme
    assert "together: n 44, -0.20 [-0.37, -0.03], p 0.000" in pairs and training.endswith("higher in 40")


def test_figures_of_the_closed_study_population_follow_from_its_records(repository):
    pages = [(repository / "docs" / name).read_text() for name in ("results.md", "results/population.md")]
    comparisons = json.loads((repository / "docs/results/population.json").read_text())["comparisons"]
    rows = ["the dense model on batches of views", "experts with views of their own"]
    rows.append("the same, experts' learning rate x 2")
    for row, item in zip(rows, comparisons, strict=True):
        numbers = [item[key] for key in ("mean", "t_low", "t_high", "bonferroni_low", "bonferroni_high")]
        mean, low, high, first, last = (f"{100 * number:+.2f}" for number in numbers)
        assert f"| {row} | 10 | {mean} | [{low}, {high}] | [{first}, {last}] |" in pages[0]
    records = map(json.loads, (repository / "docs/results/population.jsonl").read_text().splitlines())
    scores = {(record["arm"], record["seed"]): 100 * record["results"][record["kept"]]["oa"] for record in records}
    for arm, shown in (("population", pages), ("population_x2", pages[1:])):
        pair = paired_t([scores[arm, seed] - scores["dense_views", seed] for seed in range(800, 810)])
        assert all(f"{pair.mean:+.2f} [{pair.low:+.2f}, {pair.high:+.2f}]" in page for page in shown)


def test_the_simulated_step_of_the_mean_is_that_of_the_page(repository):
    block = python_blocks(repository / "docs" / "why.md")[0]
    simulated = [list(map(float, line.split())) for line in output_of(block, "docs/why.md")]
    text = (repository / "docs" / "why.md").read_text()
    shown = re.findall(r"^\| ([\d.]+) \| (0\.\d\d) \|$", text, flags=re.MULTILINE)
    assert [list(map(float, row)) for row in shown] == [[signal, pytest.approx(x, abs=0.02)] for signal, x in simulated]


def test_a_backbone_and_a_data_set_of_one_s_own_train(blocks, tiny_config, tmp_path, monkeypatch, capsys):
    known = dict(models._MODELS), dict(datasets._DATASETS)
    monkeypatch.setattr(models, "_MODELS", dict(known[0]))
    monkeypatch.setattr(datasets, "_DATASETS", dict(known[1]))
    backbone, reader, numbers, training, callback, command = blocks
    for block in (backbone, reader, numbers):
        body = [line for line in block.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(body) <= 20
        exec(compile(block, "docs/extend.md", "exec"), {"__name__": "extend"})
    samples, labels = s2d3d.create_dataset("numbers", "anywhere", "train", count=6).batch(torch.tensor([4, 1]))
    assert samples.tolist() == [[4], [1]] and labels.tolist() == [0, 1]
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, size in (("flat", (1, 0.1, 1)), ("tall", (0.2, 1, 0.2))):  # y up
            (tmp_path / "scans" / split / name).mkdir(parents=True)
            for index in range(count):
                cloud = rng.uniform(-1, 1, (128, 3)).astype(np.float32) * np.float32(size)
                np.save(tmp_path / "scans" / split / name / f"{index:03d}.npy", cloud)
    config = tiny_config().to_dict()
    config["data"] |= {"name": "scans", "root": str(tmp_path / "scans"), "up_axis": "y", "val_fraction": 0.0}
    config["model"] = {"name": "patchless", "dim": 24}
    config["train"] |= {"epochs": 8, "batch_size": 8}
    config["optim"] |= {"lr": 3e-3}
    (tmp_path / "my_config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    exec(compile(training, "docs/extend.md", "exec"), {"__name__": "extend"})
    exec(compile(callback, "docs/extend.md", "exec"), {"__name__": "extend"})
    rows = json.loads(Path("runs/watched/divergence.json").read_text())
    assert [row.pop("epoch") for row in rows] == [1, 2]
    assert rows[-1] == expert_divergence(load_model("runs/watched/checkpoints/last.pt"))
    trainer = Trainer(load_config("my_config.yaml"))
    dataset = s2d3d.create_dataset("scans", tmp_path / "scans", "test", num_points=128)
    assert np.ptp(dataset.points[-1, :, 2].numpy()) > 2 * np.ptp(dataset.points[-1, :, 0].numpy()), (
        "the tall ones stand"
    )
    model = load_model(trainer.folder.merged)
    assert type(model).__name__ == "Patchless"
    assert float((model(dataset.points).argmax(1) == dataset.labels).float().mean()) > 0.9
    (tmp_path / "my.py").write_text(backbone + reader + command)
    monkeypatch.setattr(models, "_MODELS", known[0])  # as in a process of its own
    monkeypatch.setattr(datasets, "_DATASETS", known[1])
    monkeypatch.setattr(sys, "argv", ["my.py", "evaluate", "--checkpoint", str(trainer.folder.merged)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("my.py", run_name="__main__")
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and "(8 samples)" in out, err


def test_names_that_are_taken_are_refused():
    from s2d3d.errors import InputError

    for register, name in ((s2d3d.register_model, "point_bert"), (s2d3d.register_dataset, "modelnet40")):
        with pytest.raises(InputError, match=f"'{name}' exists already"):
            register(name, lambda *_: None)
    with pytest.raises(InputError, match="no parameter 'dept'; did you mean 'depth'"):
        s2d3d.register_model("mine", models.PointBERT, dept=3)


def test_the_reference_names_every_key_with_its_default(repository):
    page = config_reference()
    committed = (repository / "docs" / "configuration.md").read_text()
    assert committed == page, "make docs writes it"

    def keys(section, prefix=""):
        for key, value in section.items():
            if isinstance(value, dict) and f"{prefix}{key}" != "model":
                yield from keys(value, f"{prefix}{key}.")
            elif f"{prefix}{key}" != "model":
                yield f"{prefix}{key}", value

    minimal = {"output_dir": "x", "data": {"name": "shapes", "root": "y"}, "model": {"name": "point_bert_tiny"}}
    found = dict(keys(Config.model_validate(minimal).to_dict()))
    assert len(found) > 50
    for key in found:
        assert page.count(f"| `{key}` |") == 1, key
    assert "| `optim.lr` | `0.0005` |" in page and "| `data.root` | required |" in page
    assert "| `model.trans_dim` | `384` |" in page
    for key, field in (
        ("optim", Config.model_fields["optim"].annotation),
        ("log", Config.model_fields["log"].annotation),
    ):
        for name, info in field.model_fields.items():
            assert info.description.split(";")[0] in page, f"{key}.{name}"


@pytest.fixture
def notebook(repository):
    import nbformat

    notebook = nbformat.read(repository / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "kept without output"
    return notebook


def check_quickstart(said: str, folder: Path) -> None:
    """Compare what the cells of the notebook print and write in `folder` with what they promise."""
    assert f"s2d3d {s2d3d.__version__}" in said
    assert len(re.findall(r"^\w+ +taken for \w+ +\d+ %$", said, flags=re.MULTILINE)) == 6
    metrics = json.loads((folder / "quickstart" / "run" / "metrics.json").read_text())
    assert metrics["merged"]["oa"] > 2 / 12, "it learns"
    assert (folder / "quickstart" / "clouds.png").stat().st_size > 5000


def test_the_cells_of_the_notebook_run(notebook, tmp_path, monkeypatch):
    """One after another, in this process, on fewer shapes."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    monkeypatch.chdir(tmp_path)
    cells = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    sizes = "num_train=240, num_test=120"
    assert cells.count(sizes) == 1
    cells = cells.replace(sizes, "num_train=240, num_test=48")
    check_quickstart("\n".join(output_of(cells, "quickstart.ipynb")), tmp_path)
    assert len(shown[0].axes) == 6
    plt.close("all")


@pytest.mark.slow  # a process that imports everything anew
def test_the_notebook_runs_in_a_kernel(notebook, tmp_path):
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout")
    check_quickstart(said, tmp_path)
    (picture,) = (output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    assert len(picture) > 5000


@pytest.mark.slow
def test_the_site_builds_without_a_warning(repository, tmp_path):
    pytest.importorskip("material", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    process = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    page = (tmp_path / "site" / "configuration.html").read_text()
    assert "optim.lr" in page
    assert "register_model" in (tmp_path / "site" / "api.html").read_text()
