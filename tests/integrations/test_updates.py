"""EWA after real updates: a hook on the optimizer, against a loop that calls both by hand; accelerate's loop."""

import importlib
import sys

import pytest
import torch
from timm.layers import Mlp
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, TensorDataset

from s2d3d import EWA, MoFConfig, convert_to_mof_, merge_experts
from s2d3d.errors import InputError
from s2d3d.integrations.updates import average_after_updates


class Net(torch.nn.Module):
    """Maps (B, T, 6) to (B, 3) through one FFN."""

    def __init__(self):
        super().__init__()
        self.mlp, self.head = Mlp(6, 12), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head((x + self.mlp(x)).mean(1))


def sparse() -> Net:
    torch.manual_seed(1)
    net = Net()
    convert_to_mof_(net, MoFConfig(targets=("mlp",), every=1, init_noise=0.5))
    return net


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def loss_of(net: Net) -> torch.Tensor:
    return net(torch.linspace(-1, 1, 48).view(2, 4, 6)).square().sum()


def sgd(net: Net) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def fused(net: Net) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)


# The hook


@pytest.mark.parametrize("build", [sgd, fused])
def test_it_does_what_a_loop_by_hand_does(build):
    results = []
    for by_hand in (True, False):
        net = sparse()
        ewa, optimizer = EWA(net, share_rate=0.5, total_steps=3), build(net)
        if not by_hand:
            average_after_updates(ewa, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net).backward()
            optimizer.step()
            if by_hand:
                ewa.step()
        assert ewa.num_steps == 3
        results.append(weights(net))
    assert torch.equal(*results)


class Twice(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


def twice(net: Net) -> torch.optim.Optimizer:
    """Its step runs the hooks, and so does that of its parent class as soon as there is an instance of this."""
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    return Twice(net.parameters(), lr=0.1)


def lookahead(net: Net) -> torch.optim.Optimizer:
    """Has no hooks until its zero_grad is called."""
    return create_optimizer_v2(net, opt="lookahead_adamw", lr=0.1)


@pytest.mark.parametrize("build", [twice, lookahead])
def test_each_update_counts_once(build):
    net = sparse()
    ewa, optimizer = EWA(net, share_rate=0.5, total_steps=3), build(net)
    average_after_updates(ewa, optimizer)
    for updates in range(1, 4):
        net.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        assert ewa.num_steps == updates


def test_a_scheduler_that_was_built_before_the_hooks_is_refused(monkeypatch):
    net = sparse()
    ewa, optimizer = EWA(net, share_rate=0.5, total_steps=3), lookahead(net)
    kind = type(optimizer)  # may have hooks already, from another instance
    monkeypatch.setattr(kind, "step", getattr(kind.step, "__wrapped__", kind.step))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    with pytest.raises(InputError, match=r"call its zero_grad\(\) before you build the scheduler"):
        average_after_updates(ewa, optimizer)


@pytest.mark.parametrize("build", [sgd, fused])
def test_a_step_that_the_scaler_skips_is_not_an_update(build):
    """A fused optimizer is called even then, and changes nothing on its own."""
    net = sparse()
    ewa, optimizer = EWA(net, share_rate=0.5, schedule="constant", total_steps=3), build(net)
    average_after_updates(ewa, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = weights(net)
    for factor, expected in ((float("inf"), 0), (1.0, 1), (float("nan"), 1)):
        optimizer.zero_grad()
        scaler.scale(loss_of(net) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert ewa.num_steps == expected
        assert torch.equal(weights(net), before) == (expected == 0)


def test_a_step_without_gradients_is_not_an_update():
    net = sparse()
    ewa, optimizer = EWA(net, share_rate=0.5, total_steps=3), sgd(net)
    average_after_updates(ewa, optimizer)
    optimizer.step()
    assert ewa.num_steps == 0


def test_the_handle_ends_it():
    net = sparse()
    ewa, optimizer = EWA(net, share_rate=0.5, total_steps=3), sgd(net)
    handle = average_after_updates(ewa, optimizer)
    loss_of(net).backward()
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert ewa.num_steps == 1


def test_experts_outside_of_the_optimizer_are_refused():
    net = sparse()
    ewa = EWA(net, share_rate=0.5, total_steps=3)
    with pytest.raises(InputError, match="convert the model before the optimizer is built"):
        average_after_updates(ewa, torch.optim.SGD(net.head.parameters(), lr=0.1))
    net.mlp.requires_grad_(False)
    with pytest.raises(InputError, match="no expert requires a gradient"):
        average_after_updates(ewa, sgd(net))


def test_sharded_experts_are_refused():
    """As FSDP keeps them: a flat piece on each rank."""
    net = sparse()
    ewa = EWA(net, share_rate=0.5, total_steps=3)
    layer = next(layer for _, layer in net.mlp.stacked_layers())
    layer.weight = torch.nn.Parameter(layer.weight.detach().flatten()[:7])
    with pytest.raises(InputError, match="experts are sharded"):
        average_after_updates(ewa, sgd(net))


def test_an_optimizer_that_updates_in_the_backward_pass_is_refused():
    class Lomo(torch.optim.SGD):
        pass

    net = sparse()
    with pytest.raises(InputError, match=r"^Lomo makes its updates outside of a step with hooks: call ewa.step\(\)"):
        average_after_updates(EWA(net, share_rate=0.5, total_steps=3), Lomo(net.parameters(), lr=0.1))


@pytest.mark.parametrize("library", ["transformers", "accelerate", "lightning"])
def test_a_missing_library_is_named_with_its_install_line(library, monkeypatch):
    module = "lightning" if library == "lightning" else "transformers"
    monkeypatch.delitem(sys.modules, f"s2d3d.integrations.{module}", raising=False)
    for name in (library, f"{library}.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python itself does to forbid an import
    expected = rf'^s2d3d.integrations.{module} needs {module} \(.*\): pip install "s2d3d\[integrations\]"$'
    with pytest.raises(InputError, match=expected):
        importlib.import_module(f"s2d3d.integrations.{module}")


# The loop of accelerate


class Loop:
    """A training of 2 epochs with 6 batches each, of which 4 make an update: 2 updates an epoch, the second of 2."""

    updates = 4

    def __init__(self):
        from accelerate import Accelerator  # takes seconds

        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        self.ts: list[int] = []
        torch.manual_seed(3)
        x, y = torch.randn(12, 4, 6), torch.randint(3, (12,))
        net = sparse()
        loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
        self.net, self.optimizer, self.loader = self.accelerator.prepare(
            net, torch.optim.AdamW(net.parameters(), lr=0.01), loader
        )
        self.ewa = EWA(self.net, share_rate=0.5, schedule=self.schedule, total_steps=self.updates)
        average_after_updates(self.ewa, self.optimizer)
        self.accelerator.register_for_checkpointing(self.ewa)

    def schedule(self, t: int) -> float:
        self.ts.append(t)
        return t / self.updates

    def epoch(self) -> None:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.net):
                loss = torch.nn.functional.cross_entropy(self.net(x), y)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()


def test_accelerate_trains_resumes_and_merges(tmp_path):
    whole = Loop()
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path / "state"))
    whole.epoch()
    assert whole.ts == [0, 1, 2, 3], "one step for each update, not for each batch"

    resumed = Loop()
    resumed.accelerator.load_state(str(tmp_path / "state"))
    resumed.epoch()
    assert resumed.ts == [2, 3]
    assert torch.equal(weights(resumed.net), weights(whole.net))

    dense = merge_experts(resumed.accelerator.unwrap_model(resumed.net)).eval()
    stock = Net().eval()
    stock.load_state_dict(dense.state_dict(), strict=True)
    x = torch.randn(2, 4, 6)
    assert torch.equal(stock(x), resumed.net.eval()(x))
