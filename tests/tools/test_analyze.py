"""tools/analyze.py: text, numbers and picture of an S2D run."""

import json
import subprocess
import sys

import matplotlib.image
import pytest

from s2d3d import Trainer
from s2d3d.engine.run_analysis import analysis_table, analyze_run


@pytest.fixture
def run(tiny_config):
    trainer = Trainer(tiny_config("train.keep_every=1", "s2d.num_experts=2"))
    trainer.fit()
    return trainer.folder.root


def test_text_numbers_and_picture(tool, run, tmp_path, capsys):
    main = tool("analyze").main
    assert main([str(run), "--shapes", "24", "--positions", "3", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    result = json.loads((run / "analysis.json").read_text())
    assert result == json.loads(json.dumps(analyze_run(run, num_shapes=24, num_positions=3)))
    assert out == f"{analysis_table(result)}\nwritten to {run / 'analysis.json'} and analysis.png\n"
    picture = matplotlib.image.imread(run / "analysis.png")[..., :3]
    assert picture.shape == (880, 1650, 3)
    for row in (0, 440):
        for column in (0, 550, 1100):  # every panel holds coloured marks, not only black axes on white
            panel = picture[row : row + 440, column : column + 550]
            assert float((panel.max(-1) - panel.min(-1)).max()) > 0.3

    assert main([str(run)]) == 1
    assert "analysis.json: exists already" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    assert main([str(run), "--output", str(other), "--shapes", "12", "--positions", "3"]) == 0
    assert {path.name for path in other.iterdir()} == {"analysis.json", "analysis.png"}


def test_process_good_and_bad(run, repository, tmp_path):
    def start(*arguments):
        command = [sys.executable, str(repository / "tools" / "analyze.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    good = start(run, "--shapes", 12, "--positions", 3)
    assert good.returncode == 0 and "merged OA" in good.stdout, good.stderr
    bad = start(tmp_path)
    assert bad.returncode == 1 and bad.stdout == "" and "Traceback" not in bad.stderr
    assert bad.stderr.startswith("error: ") and "no such file; the folder of an S2D run is needed" in bad.stderr
