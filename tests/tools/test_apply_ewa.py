"""tools/apply_ewa.py: the experts come closer by the closed form, the merged model stays, one line for each mistake."""

import pytest
import torch

from s2d3d import load_checkpoint, load_model

LAYER = "blocks.blocks.1.mlp"


def table(text: str) -> dict[str, tuple[float, float]]:
    """Layer -> divergence before and after, as printed."""
    rows = [line.split() for line in text.splitlines() if line.startswith("blocks.")]
    return {name: (float(before), float(after)) for name, before, after in rows}


def experts_of(path) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_checkpoint(path)["state_dict"].items() if key.startswith(LAYER)}


def test_process_contracts_the_experts_and_keeps_the_merged_model(fork, trained, tmp_path):
    output = tmp_path / "averaged.pt"
    process = fork("apply_ewa", "--checkpoint", trained.last, "--share-rate", 0.3, "--output", output)
    assert (process.returncode, process.stderr) == (0, "")
    printed = table(process.stdout)
    assert printed.keys() == {LAYER}
    before, after = printed[LAYER]
    assert before > 1e-3 and after == pytest.approx(before * (1 - 0.3 * 4 / 3), abs=1e-6)
    assert process.stdout.splitlines()[-2:] == [
        "The mean of the experts is unchanged, and so is the merged model.", f"written to {output}",
    ]  # fmt: skip

    for key, old in experts_of(trained.last).items():
        new, mean = experts_of(output)[key], old.double().mean(0)
        others = (old.double().sum(0) - old.double()) / 3
        torch.testing.assert_close(new.double(), 0.7 * old.double() + 0.3 * others, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(new.double().mean(0), mean, atol=1e-8, rtol=1e-6)
    points = torch.randn(4, 128, 3)
    merged, same = (load_model(path, merge=True)(points) for path in (trained.last, output))
    torch.testing.assert_close(same, merged, atol=1e-6, rtol=1e-5)
    rest = load_checkpoint(trained.last)["state_dict"].keys() - experts_of(trained.last).keys()
    ours, theirs = (load_checkpoint(path)["state_dict"] for path in (output, trained.last))
    assert all(torch.equal(ours[key], theirs[key]) for key in rest)


def test_process_refuses_a_dense_checkpoint(fork, trained, tmp_path):
    process = fork("apply_ewa", "--checkpoint", trained.merged, "--share-rate", 0.3, "--output", tmp_path / "a.pt")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith(f"error: {trained.merged}: is dense, a sparse checkpoint is needed")
    assert process.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("share_rate", "factor"), [(0, 1), (0.75, 0), (1, 1 / 3)])
def test_bounds_of_the_share_rate(call, trained, tmp_path, share_rate, factor):
    """0 changes nothing, (K - 1) / K makes the experts equal, 1 overshoots by a third."""
    output = tmp_path / "averaged.pt"
    result = call("apply_ewa", "--checkpoint", trained.last, "--share-rate", share_rate, "--output", output)
    before, after = table(result.out)[LAYER]
    assert result.code == 0 and after == pytest.approx(factor * before, abs=1e-6)
    for key, old in experts_of(trained.last).items():
        new = experts_of(output)[key]
        deviation = (old - old.mean(0)) * (1 - share_rate * 4 / 3)
        torch.testing.assert_close(new - new.mean(0), deviation, atol=1e-7, rtol=1e-5)


def test_output_holds_no_training_state(call, refuses, trained, tmp_path):
    output = tmp_path / "averaged.pt"
    assert call("apply_ewa", "--checkpoint", trained.last, "--share-rate", 0.3, "--output", output).code == 0
    line = refuses("train", trained.config, f"output_dir={tmp_path / 'run'}", "--resume", output)
    assert line == f"{output}: holds a model but no training state; resume from checkpoints/last.pt"


@pytest.mark.parametrize("share_rate", ["-0.1", "1.01", "nan", "inf"])
def test_share_rate_out_of_range(refuses, trained, tmp_path, share_rate):
    arguments = ["--checkpoint", trained.last, f"--share-rate={share_rate}", "--output", tmp_path / "a.pt"]
    assert refuses("apply_ewa", *arguments) == f"--share-rate is {float(share_rate)}, must be in [0, 1]"


def test_wrong_arguments_exit_with_2(refuses, trained, tmp_path):
    arguments = ["--checkpoint", trained.last, "--output", tmp_path / "a.pt"]
    line = refuses("apply_ewa", *arguments, code=2)
    assert line == "the following arguments are required: --share-rate; see apply_ewa.py --help"
    line = refuses("apply_ewa", *arguments, "--share-rate", "much", code=2)
    assert line == "argument --share-rate: invalid float value: 'much'; see apply_ewa.py --help"


def test_broken_checkpoints(refuses, broken_checkpoint, tmp_path):
    path, message = broken_checkpoint
    line = refuses("apply_ewa", "--checkpoint", path, "--share-rate", 0.3, "--output", tmp_path / "averaged.pt")
    assert line.startswith(f"{path}: ") and (message or "is a folder; name the file") in line
