"""tools/few_shot.py: one line a fold, the mean at the end, and a second call that repeats nothing."""

import json

import pytest

from s2d3d.config.load import dump_config


@pytest.fixture
def config_file(tiny_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        dump_config(
            tiny_config(
                "train.batch_size=4", "train.epochs=1", "optim.warmup_epochs=0", f"output_dir={tmp_path / 'few'}"
            )
        )
    )
    return path


def test_second_call_repeats_nothing(tool, config_file, tmp_path, capsys):
    output = tmp_path / "folds.json"
    arguments = [str(config_file), "--ways", "2", "--shots", "3", "--queries", "2", "--output", str(output)]
    assert tool("few_shot").main([*arguments, "--folds", "2"]) == 0
    first, content = capsys.readouterr().out, json.loads(output.read_text())
    lines = first.splitlines()
    assert [line.split(":")[0] for line in lines] == ["fold 0", "fold 1", "2-way 3-shot", f"written to {output}"]
    for line, fold in zip(lines, content["folds"]):
        assert f"OA {100 * fold['oa']:.2f} %" in line and ", ".join(fold["classes"]) in line
    assert f"OA {100 * content['mean_oa']:.2f} +- {100 * content['std_oa']:.2f} % (2 folds" in lines[2]
    merged = tmp_path / "few" / "2way_3shot" / "fold_1" / "merged.pt"
    written = merged.stat().st_mtime_ns
    assert tool("few_shot").main([*arguments, "--folds", "2"]) == 0
    assert capsys.readouterr().out == first and merged.stat().st_mtime_ns == written


def test_process_good_and_bad(fork, tool, config_file, tmp_path):
    task = ("--ways", 2, "--shots", 2, "--queries", 1, "--folds", 1, "--output", tmp_path / "f.json")
    good = fork("few_shot", config_file, *task)
    assert good.returncode == 0 and "2-way 2-shot: OA " in good.stdout, good.stderr
    bad = fork("few_shot", config_file, *task, "train.max_steps=1")
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr == "error: train.max_steps: folds run to their last epoch, remove it\n"
    assert tool("few_shot").main([str(config_file), "--ways", "2"]) == 2  # no --output
