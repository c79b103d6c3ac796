"""tools/analyze.py: text, numbers and picture of an S2D run."""

import json
import shutil

import matplotlib.image
import pytest

from s2d3d import Trainer
from s2d3d.runs.analysis import analysis_table, analyze_run


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return tmp_path_factory.mktemp("stock") / "run"


@pytest.fixture
def run(tiny_config, tmp_path, stock):
    """A run whose models were kept; trained once and copied."""
    if not stock.exists():
        Trainer(tiny_config("train.keep_every=1", "s2d.num_experts=2", f"output_dir={stock}")).fit()
    return shutil.copytree(stock, tmp_path / "run")


def test_text_numbers_and_picture(call, run):
    arguments = (run, "--shapes", 12, "--positions", 3, "--device", "cpu")
    first = call("analyze", *arguments)
    assert first.code == 0
    result = json.loads((run / "analysis.json").read_text())
    assert result == json.loads(json.dumps(analyze_run(run, num_shapes=12, num_positions=3)))
    assert [point["epoch"] for point in result["checkpoints"]] == [1, 2] and result["num_shapes"] == 12
    assert [len(line["positions"]) for line in result["between_checkpoints"]] == [3]
    assert first.out == f"{analysis_table(result)}\nwritten to {run / 'analysis.json'} and analysis.png\n"
    picture = matplotlib.image.imread(run / "analysis.png")[..., :3]
    assert picture.shape == (880, 1650, 3)
    for row in (0, 440):
        for column in (0, 550, 1100):  # every panel holds coloured marks, not only black axes on white
            panel = picture[row : row + 440, column : column + 550]
            assert float((panel.max(-1) - panel.min(-1)).max()) > 0.3
    again = call("analyze", *arguments)
    assert again.code == 1 and "analysis.json: exists already" in again.err


def test_overrides_that_would_falsify_it(refuses, run):
    line = refuses("analyze", run, "s2d.num_experts=4")
    assert line.startswith("override 's2d.num_experts=4': has no effect on a checkpoint; what can be replaced here is")
    assert not (run / "analysis.json").exists()


def test_process_good_and_bad(fork, run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    good = fork("analyze", run, "--output", other, "--shapes", 12, "--positions", 3)
    assert good.returncode == 0 and "merged OA" in good.stdout, good.stderr
    assert {path.name for path in other.iterdir()} == {"analysis.json", "analysis.png"}
    bad = fork("analyze", tmp_path)
    assert bad.returncode == 1 and bad.stdout == "" and bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("error: ") and "holds no config.yaml; the folder of a run is needed" in bad.stderr
