"""Training with the gated baseline: its experts stay, everything else is as for any run."""

import csv
import json

import pytest
import torch

from s2d3d import TopKMoE, Trainer, evaluate, is_sparse, load_checkpoint, load_config, load_model
from s2d3d.errors import InputError
from s2d3d.s2d.analysis import expert_divergence

pytestmark = pytest.mark.usefixtures("enough_updates")

TOPK = ("s2d.kind=topk", "s2d.share_rate=0.0")


def log_rows(trainer):
    with open(trainer.folder.log) as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture
def finished(tiny_config):
    trainer = Trainer(tiny_config(*TOPK, "s2d.capacity_factor=0.8", "eval.votes=2"))
    trainer.fit()
    return trainer


def test_a_run_ends_with_the_routed_model(finished):
    folder = finished.folder
    assert folder.final.is_file() and not folder.merged.exists()
    assert set(finished.reports) == {"routed", "voting"}
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["routed"] == finished.reports["routed"].to_dict()
    assert metrics["parameters"]["routed"] == metrics["parameters"]["training"] > finished.parts.dense_parameters
    summary = finished.summary()
    assert str(folder.final) in summary and "merge" not in summary

    rows = log_rows(finished)
    assert len(rows) == 2
    for row in rows:
        assert 1 <= float(row["balance_loss"]) < 4
        assert 0.2 <= float(row["dropped"]) < 0.8  # a capacity factor of 0.8 drops a fifth of the choices at least


def test_final_file_reloads_as_the_same_routed_model(finished):
    model = load_model(finished.folder.final)
    layers = [module for module in model.modules() if isinstance(module, TopKMoE)]
    assert is_sparse(model) and len(layers) == 1
    assert (layers[0].num_experts, layers[0].top_k, layers[0].capacity_factor) == (4, 2, 0.8)
    report = evaluate(model, finished.data.test, device="cpu", progress=False)
    assert report.to_dict() == finished.reports["routed"].to_dict()


def test_resume_in_mid_epoch_is_bit_exact(tiny_config, tmp_path):
    options = (*TOPK, "s2d.share_rate=0.3", "s2d.stop_fraction=0.5", "train.epochs=4")
    whole = Trainer(tiny_config(*options, f"output_dir={tmp_path / 'whole'}"))
    whole.fit()
    stopped = Trainer(tiny_config(*options, "train.max_steps=15"))  # in the third epoch of 6 updates
    assert stopped.fit() == stopped.folder.last
    assert not stopped.folder.final.exists()
    resumed = Trainer(tiny_config(*options))
    assert resumed.fit(resume=stopped.folder.root) == resumed.folder.final
    for name in ("last", "final"):
        first, second = (load_checkpoint(getattr(t.folder, name))["state_dict"] for t in (whole, resumed))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert log_rows(resumed) == log_rows(whole)


def test_averaging_stops_after_its_fraction_of_the_updates(tiny_config):
    trainer = Trainer(
        tiny_config(*TOPK, "s2d.share_rate=0.75", "s2d.schedule=constant", "s2d.stop_fraction=0.25", "train.epochs=4")
    )
    trainer.fit()
    rows = log_rows(trainer)
    assert [float(row["share_rate"]) for row in rows] == [0.75, 0, 0, 0]
    # A rate of (K - 1) / K keeps the experts equal; without it they part.
    divergence = [float(row["divergence"]) for row in rows]
    assert divergence[0] < 1e-6 < 1e-3 < divergence[1] < divergence[3]
    assert expert_divergence(trainer.model).keys() == {"blocks.blocks.1.mlp"}


def test_gradient_is_that_of_the_task_plus_the_weighted_one_of_the_balance_loss(tiny_config):
    gradients = []
    for weight in (0.0, 0.5, 1.0):
        trainer = Trainer(tiny_config(*TOPK, f"s2d.balance_weight={weight}", "train.max_steps=1"), force=True)
        trainer.fit()
        trainer._build_model()
        trainer.network.eval()
        points, labels = next(iter(trainer.data.train))
        trainer._forward_backward(points, labels)
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    router = "blocks.blocks.1.mlp.router.weight"
    step = gradients[1][router] - gradients[0][router]
    assert step.abs().max() > 1e-6
    torch.testing.assert_close(gradients[2][router] - gradients[0][router], 2 * step, rtol=1e-3, atol=1e-8)
    head = next(name for name in gradients[0] if "head" in name)
    assert torch.equal(gradients[0][head], gradients[1][head])


def test_moving_average_is_evaluated_with_its_routers(tiny_config):
    trainer = Trainer(tiny_config(*TOPK, "train.ema_decay=0.9", "s2d.num_experts=2", "s2d.top_k=1", "train.amp=bf16"))
    trainer.fit()
    assert set(trainer.reports) == {"routed", "ema"}
    assert is_sparse(trainer.ema.module)


def test_merging_is_refused_with_one_line(finished, tool, tmp_path, capsys):
    output = tmp_path / "merged.pt"
    assert tool("merge").main(["--checkpoint", str(finished.folder.final), "--output", str(output)]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: {finished.folder.final}: ") and "s2d.kind=topk" in error[0]
    assert not output.exists()
    with pytest.raises(InputError, match=r"final\.pt: was trained with s2d\.kind=topk"):
        load_model(finished.folder.final, merge=True)


def test_tools_evaluate_and_average_the_routed_model(finished, tool, tmp_path, capsys):
    report = tmp_path / "report.json"
    final = str(finished.folder.final)
    assert tool("evaluate").main(["--checkpoint", final, "--votes", "1", "--output", str(report)]) == 0
    assert json.loads(report.read_text())["confusion"] == finished.reports["routed"].confusion

    averaged = tmp_path / "averaged.pt"
    assert tool("apply_ewa").main(["--checkpoint", final, "--share-rate", "0.75", "--output", str(averaged)]) == 0
    assert "this changes the model" in capsys.readouterr().out
    model, before = load_model(averaged), load_checkpoint(final)["state_dict"]
    assert max(expert_divergence(model).values()) < 1e-6
    router = "blocks.blocks.1.mlp.router.weight"
    assert torch.equal(model.state_dict()[router], before[router])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["s2d.top_k=5"], r"top_k is 5, must be in \[1, num_experts\] = \[1, 4\]"),
        (["s2d.capacity_factor=0"], "s2d.capacity_factor: must be greater than 0"),
        (["s2d.balance_weight=-1"], "s2d.balance_weight: must be at least 0"),
        (["s2d.stop_fraction=0"], "s2d.stop_fraction: must be greater than 0"),
        (["s2d.share_rate=0.8"], r"s2d.share_rate: must be at most 0.75 = \(4 - 1\) / 4"),
        (["s2d.kind=top"], "did you mean 'topk'"),
    ],
)
def test_settings_out_of_range_are_config_errors(tiny_config, overrides, message):
    with pytest.raises(InputError, match=message):
        tiny_config(*TOPK, *overrides)


def test_keys_of_the_router_do_not_bind_other_kinds(tiny_config):
    assert tiny_config("s2d.num_experts=1").s2d.top_k == 2


def test_shipped_configs_differ_from_the_s2d_config_in_method_and_folder_only(repository):
    paths = [repository / "configs" / f"modelnet_{name}_small.yaml" for name in ("s2d", "topk", "topk_ewa")]
    configs = [load_config(path).to_dict() for path in paths]
    for config in configs:
        config["s2d"] = {key: config["s2d"][key] for key in ("num_experts", "targets", "every", "init", "init_noise")}
        del config["output_dir"]
    assert configs[0] == configs[1] == configs[2]
