"""Merging in the middle of a training: weights and moments against their means, and a run that resumes across it."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

from s2d3d import RUPMoF, Trainer, load_checkpoint
from s2d3d.engine.config import dump_config
from s2d3d.engine.midway import merge_midway_
from s2d3d.engine.optim import build_optimizer
from s2d3d.s2d import TopKMoE


def network(num_experts: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), RUPMoF(Mlp(6, 12), num_experts), nn.LayerNorm(6))


def adamw(model: nn.Module, lr_multiplier: float = 1.0) -> torch.optim.Optimizer:
    return build_optimizer(model, name="adamw", lr=1e-2, weight_decay=0.05, lr_multiplier=lr_multiplier)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("lr_multiplier", [1.0, 2.0])
def test_state_of_the_merged_layers_is_the_mean_over_experts_in_their_layout(lr_multiplier):
    model = network()
    optimizer = adamw(model, lr_multiplier)
    train(model, optimizer, 5)
    layer, first = model[1], model[0]
    stacked = dict(layer.named_parameters())
    moments = {name: copy.deepcopy(optimizer.state[parameter]) for name, parameter in stacked.items()}
    weights = {name: parameter.detach().clone() for name, parameter in stacked.items()}
    kept = copy.deepcopy(optimizer.state[first.weight])
    merged = merge_midway_(model, optimizer, adamw)
    assert type(model[1]) is Mlp and model[0] is first
    for name, parameter in model[1].named_parameters():
        layout = torch.Tensor.t if name.endswith("weight") else torch.clone
        torch.testing.assert_close(parameter.detach(), layout(weights[name].mean(0)))
        state = merged.state[parameter]
        assert state["step"] == 5
        for key in ("exp_avg", "exp_avg_sq"):
            assert not torch.equal(moments[name][key][0], moments[name][key][1]), "a mean of equals would show nothing"
            torch.testing.assert_close(state[key], layout(moments[name][key].mean(0)))
    assert all(torch.equal(merged.state[first.weight][key], kept[key]) for key in kept)
    train(model, merged, 2)
    assert merged.state[model[1].fc1.weight]["step"] == 7


def test_one_expert_trains_on_as_the_dense_ffn_does():
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(6, 6), Mlp(6, 12))
    sparse = nn.Sequential(copy.deepcopy(dense[0]), RUPMoF(dense[1], 1))
    first, second = adamw(dense), adamw(sparse)
    train(dense, first, 3)
    train(sparse, second, 3)
    second = merge_midway_(sparse, second, adamw)
    train(dense, first, 3, seed=1)
    train(sparse, second, 3, seed=1)
    for name, parameter in sparse.named_parameters():
        torch.testing.assert_close(parameter, dense.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_an_optimizer_without_state_and_frozen_experts():
    model = network()
    model[1].fc1.weight.requires_grad_(False)
    optimizer = merge_midway_(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: adamw(m))
    assert not optimizer.state and not model[1].fc1.weight.requires_grad
    train(model, optimizer, 1)
    assert model[1].fc1.weight not in optimizer.state


def test_what_has_no_dense_form_is_refused():
    for model in (nn.Linear(2, 2), nn.Sequential(TopKMoE(Mlp(6, 12), 4, 2))):
        optimizer = adamw(model)
        with pytest.raises(ValueError, match=r"no RUP-MoF layer to merge|TopKMoE"):
            merge_midway_(model, optimizer, adamw)


# Runs: 4 epochs of 6 updates, experts in the first 13 of them


def weights(path):
    return load_checkpoint(path)["state_dict"]


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


OVERRIDES = ("train.epochs=4", "s2d.active_fraction=0.55", "train.ema_decay=0.9", "s2d.lr_multiplier=2")


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_resuming_across_the_merge_is_bit_exact(tiny_config, tmp_path):
    """Stopped at the end of an epoch before it, at it, and after it."""
    whole = Trainer(tiny_config(*OVERRIDES, f"output_dir={tmp_path / 'whole'}"))
    whole.fit()
    assert set(whole.reports) == {"merged", "ema"}
    for stop in (12, 13, 20):
        folder = f"output_dir={tmp_path / str(stop)}"
        stopped = Trainer(tiny_config(*OVERRIDES, folder, f"train.max_steps={stop}"))
        stopped.fit()
        assert (load_checkpoint(stopped.folder.last)["s2d"] is None) == (stop >= 13)
        resumed = Trainer(tiny_config(*OVERRIDES, folder))
        resumed.fit(resume=stopped.folder.root)
        assert_same_weights(weights(resumed.folder.last), weights(whole.folder.last))
        assert_same_weights(weights(resumed.folder.merged), weights(whole.folder.merged))
        assert resumed.reports == whole.reports
        assert without_time(resumed.history) == without_time(whole.history)


def test_the_run_is_that_of_s2d_before_the_merge_and_dense_after_it(tiny_config, tmp_path):
    runs = {}
    for name, overrides in (("half", OVERRIDES), ("s2d", (OVERRIDES[0], *OVERRIDES[2:]))):
        trainer = Trainer(tiny_config(*overrides, "s2d.schedule=constant", f"output_dir={tmp_path / name}"))
        trainer.fit()
        runs[name] = trainer
    first, second = runs["half"].history, runs["s2d"].history
    for ours, theirs in zip(first[:2], second[:2]):  # 12 updates
        assert ours["train_loss"] == theirs["train_loss"] and ours["divergence"] == theirs["divergence"] > 0
    assert all("divergence" not in row and row["share_rate"] == 0 for row in first[3:])
    assert first[3]["train_loss"] != second[3]["train_loss"]
    assert first[3]["lr"] == second[3]["lr"] and first[2]["lr"] == second[2]["lr"]
    counts = runs["half"]._parameter_counts()
    assert counts == runs["s2d"]._parameter_counts() and counts["training"] > counts["merged"]


RANK = """
import os, sys, torch
from s2d3d import Trainer, is_sparse, load_config

class Watched(Trainer):
    def _after_update(self, bar):
        seen.append(is_sparse(self.model))
        super()._after_update(bar)

state = {}
for name, folder, overrides, resume in (
    ("whole", "whole", [], False), ("stopped", "part", ["train.max_steps=8"], False), ("resumed", "part", [], True),
):
    seen, os.environ["MASTER_PORT"] = [], str(int(os.environ["MASTER_PORT"]) + 1)  # a store can be opened once
    trainer = Watched(load_config(sys.argv[1], [f"output_dir={sys.argv[2]}/{folder}", *overrides]))
    trainer.fit(resume=trainer.folder.root if resume else None)
    state[name] = {"seen": seen, "weights": trainer.model.state_dict()}
torch.save(state, f"{sys.argv[2]}/rank{trainer.runtime.rank}.pt")
"""


def test_experts_leave_on_two_processes_alike_and_resume_bit_exact(tiny_config, tmp_path):
    path, script = tmp_path / "config.yaml", tmp_path / "rank.py"
    path.write_text(dump_config(tiny_config("train.epochs=2", "s2d.active_fraction=0.5")))
    script.write_text(RANK)
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(20_000 + os.getpid() % 20_000)  # not that of a second run of these tests
    ranks = [
        subprocess.Popen(
            [sys.executable, script, path, tmp_path], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    experts = [True] * 5 + [False] * 7  # after each update; the sixth is the last with experts
    for state in (first, second):
        assert state["whole"]["seen"] == experts and state["stopped"]["seen"] == experts[:8]
        assert state["resumed"]["seen"] == experts[8:]
        assert_same_weights(state["resumed"]["weights"], state["whole"]["weights"])
    assert_same_weights(first["whole"]["weights"], second["whole"]["weights"])


def test_gradients_of_the_merged_model_are_those_of_a_dense_one(tiny_config, tmp_path):
    """No hook or parameter of before is left: one backward pass fills every parameter the optimizer has."""
    trainer = Trainer(tiny_config("train.epochs=2", "s2d.active_fraction=0.5"))
    trainer.fit()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    trainer.optimizer.zero_grad()
    points, labels = next(iter(trainer.train_loader))
    F.cross_entropy(trainer.network(points), labels).backward()
    assert all(p.grad is not None and p.grad.any() for p in trainer.model.parameters())
