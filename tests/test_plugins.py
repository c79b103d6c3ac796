"""Plugins: a user's file is imported where she names it, and a checkpoint alone never runs one."""

import json

import pytest
import yaml

from s2d3d import load_config
from s2d3d.datasets import _DATASETS
from s2d3d.errors import InputError
from s2d3d.plugins import _LOADED, load_plugins

DATA = """
import torch
from s2d3d import register_dataset
from s2d3d.datasets import PointCloudDataset

def read(root, split, *, num_points, transform=None, copies=8, **_):
    points = torch.randn(2 * copies, 64, 3, generator=torch.Generator().manual_seed(int(split == "train")))
    points[copies:, :, 2] *= 0.1
    labels = torch.tensor([0] * copies + [1] * copies)
    options = dict(split=split, num_points=num_points, transform=transform)
    return PointCloudDataset(points, labels, ["ball", "plate"], **options)

register_dataset("mine", read)
"""


@pytest.fixture
def forgetting(monkeypatch):
    """Forget what is registered and loaded in the test, as another process would have."""

    def forget():
        _DATASETS.pop("mine", None)
        _LOADED.clear()

    yield forget
    forget()


@pytest.fixture
def plugin(tmp_path, forgetting):
    path = tmp_path / "my_data.py"
    path.write_text(DATA)
    return path


@pytest.fixture
def config(tmp_path, plugin):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'run'}\nplugins: [my_data.py]\n"
        "data: {name: mine, root: nowhere, num_points: 48, copies: 12}\n"
        "model: {name: point_bert_tiny, depth: 1, trans_dim: 24, num_heads: 2, num_group: 8, group_size: 8}\n"
        "s2d: {every: 1}\noptim: {warmup_epochs: 0}\ntrain: {epochs: 1, batch_size: 8}\n"
    )
    return path


def test_a_checkpoint_works_without_its_plugin_and_names_it(config, plugin, forgetting, tool, tmp_path, capsys):
    assert tool("train").main([str(config)]) == 0
    forgetting()
    plugin.write_text(f"raise SystemExit('a checkpoint ran it')\n{DATA}")
    merged, cloud = str(tmp_path / "run" / "merged.pt"), tmp_path / "plate" / "a.xyz"
    cloud.parent.mkdir()
    cloud.write_text("\n".join(f"{x} {y} 0" for x in range(8) for y in range(8)))
    capsys.readouterr()
    assert tool("predict").main(["--checkpoint", merged, str(cloud)]) == 0
    assert tool("evaluate").main(["--checkpoint", merged, "--files", str(cloud)]) == 0
    assert tool("evaluate").main(["--checkpoint", merged]) == 1
    advice = "the data set 'mine', which is unknown here; name the Python file that registers it by --plugin my_data.py"
    assert advice in capsys.readouterr().err
    folders = tmp_path / "scans"
    for place in ("ball/0", "ball/1", "plate/0", "plate/1"):
        (folders / place).parent.mkdir(parents=True, exist_ok=True)
        (folders / f"{place}.xyz").write_text(cloud.read_text())
    assert tool("evaluate").main(["--checkpoint", merged, "data.name=files", f"data.root={folders}"]) == 0
    assert "(2 samples)" in capsys.readouterr().out, "other data, as the message says"
    plugin.write_text(DATA)
    assert tool("evaluate").main(["--checkpoint", merged, "--plugin", str(plugin)]) == 0
    assert "(24 samples)" in capsys.readouterr().out, "copies: 12, a key of the plugin's own"


@pytest.fixture
def study(config, tmp_path):
    """A study of two runs on the plugin's data set; the plugin lies beside it and not in the working directory."""
    content = {
        "name": "tiny", "question": "Does it run?", "base": config.name, "evaluate": "test", "seeds": [0],
        "reference": "dense", "output_dir": str(tmp_path / "runs"), "arms": {"dense": {"s2d.kind": "none"}, "s2d": {}},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_worker_of_a_study_imports_the_plugin(study, forgetting):
    from s2d3d.studies.cell import cell_from_dict, cell_to_dict
    from s2d3d.studies.plan import load_study
    from s2d3d.studies.worker import run_cell

    cell = load_study(study).cells[0]
    task = json.dumps(cell_to_dict(cell))
    forgetting()
    received = cell_from_dict(json.loads(task))
    assert received == cell and "mine" in _DATASETS
    metrics = json.loads((run_cell(received) / "metrics.json").read_text())
    assert metrics["merged"]["num_samples"] == 24


@pytest.mark.slow  # two new processes
def test_a_study_in_several_processes_uses_the_plugin(study, tool, tmp_path):
    assert tool("study").main([str(study), "--jobs", "2", "--results", str(tmp_path / "results")]) == 0
    records = [json.loads(line) for line in (tmp_path / "results" / "tiny.jsonl").read_text().splitlines()]
    assert sorted(record["arm"] for record in records) == ["dense", "s2d"]


def test_a_plugin_that_the_command_line_names_with_its_folder_is_that_of_the_config(config, plugin, tmp_path):
    """As where a run is continued from another folder than that of its first config."""
    moved = tmp_path / "elsewhere" / "mine.yaml"
    moved.parent.mkdir()
    moved.write_text(config.read_text())
    with pytest.raises(InputError, match=r"my_data\.py: no such plugin"):
        load_config(moved)
    load_plugins([plugin])
    assert load_config(moved).data.name == "mine"


def test_the_command_lines_plugins_are_kept_in_the_config(config, plugin, forgetting):
    text = config.read_text().replace("plugins: [my_data.py]\n", "")
    config.write_text(text)
    with pytest.raises(InputError, match="unknown dataset 'mine'"):
        load_config(config)
    load_plugins([plugin])
    assert load_config(config).plugins == (str(plugin),)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.py", None, "no such plugin; name a Python file"),
        ("bad.py", "import nothing_of_this_name", r"cannot be imported \(ModuleNotFoundError: No module named"),
        ("bad.txt", "1", "is no Python file"),
    ],
)
def test_plugins_that_cannot_be_used(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        load_plugins([path])
