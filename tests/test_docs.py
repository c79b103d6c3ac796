"""What the pages show is run as it stands: the extension guide, the notebook, the configuration reference, the site."""

import json
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import yaml
from nbclient import NotebookClient

import s2d3d
from s2d3d import Trainer, datasets, load_config, load_model, models
from s2d3d.config.reference import config_reference
from s2d3d.config.schema import Config


@pytest.fixture
def blocks(repository):
    return re.findall(r"```python\n(.*?)```", (repository / "docs" / "extend.md").read_text(), flags=re.DOTALL)


def test_a_backbone_and_a_data_set_of_one_s_own_train(blocks, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_MODELS", dict(models._MODELS))
    monkeypatch.setattr(datasets, "_DATASETS", dict(datasets._DATASETS))
    backbone, reader, training, command = blocks
    for block in (backbone, reader):
        body = [line for line in block.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(body) <= 20
        exec(compile(block, "docs/extend.md", "exec"), {"__name__": "extend"})
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
    trainer = Trainer(load_config("my_config.yaml"))
    dataset = s2d3d.create_dataset("scans", tmp_path / "scans", "test", num_points=128)
    assert np.ptp(dataset.points[-1, :, 2].numpy()) > 2 * np.ptp(dataset.points[-1, :, 0].numpy()), (
        "the tall ones stand"
    )
    model = load_model(trainer.folder.merged)
    assert type(model).__name__ == "Patchless"
    assert float((model(dataset.points).argmax(1) == dataset.labels).float().mean()) > 0.9
    (tmp_path / "my.py").write_text(backbone + reader + command)
    evaluate = [sys.executable, "my.py", "evaluate", "--checkpoint", trainer.folder.merged]
    process = subprocess.run(evaluate, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0 and "(8 samples)" in process.stdout, process.stderr


def test_names_that_are_taken_are_refused():
    from s2d3d.errors import InputError

    for register, name in ((s2d3d.register_model, "point_bert"), (s2d3d.register_dataset, "modelnet40")):
        with pytest.raises(InputError, match=f"'{name}' is there already"):
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


def test_the_notebook_runs_in_a_kernel(repository, tmp_path):
    notebook = nbformat.read(repository / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "kept without output"
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert f"s2d3d {s2d3d.__version__}" in said
    assert len(re.findall(r"^\w+ +taken for \w+ +\d+ %$", said, flags=re.MULTILINE)) == 6
    metrics = json.loads((tmp_path / "quickstart" / "run" / "metrics.json").read_text())
    assert metrics["merged"]["oa"] > 2 / 12, "it learns"
    (picture,) = (output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    assert len(picture) > 5000 and (tmp_path / "quickstart" / "clouds.png").stat().st_size > 5000


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
