"""Training states that are not what s2d3d wrote: refused before any use, in one line that names file and entry."""

import copy
import math
from pathlib import Path

import pytest
import torch
from cases import quick
from timm.optim import list_optimizers

from s2d3d import Trainer, load_checkpoint, save_checkpoint
from s2d3d.config.load import dump_config, parse_config
from s2d3d.errors import InputError
from s2d3d.prepare.shapes import write_shapes
from s2d3d.runs.resume import Progress, restoring
from s2d3d.runs.training_state import checked_optimizer
from s2d3d.training.optim import build_optimizer, build_scheduler
from s2d3d.training.task import Classification

NOT_BUILT = {
    "adahessian", *(name for name in list_optimizers() if name.startswith(("bnb", "fused"))), "kron", "kronc", "kronw",
}  # fmt: skip
"""Optimizers that need a graph of the gradient or a GPU, and those with random numbers of their own."""
STORED = Path(__file__).parent / "fixtures" / "checkpoint_v1.pt"
"""Update 2 of 6 of a run on 24 clouds, written by format version 1."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config of the stored run, with an average of the weights."""
    home = tmp_path_factory.mktemp("states")
    write_shapes(home / "shapes", num_train=24, num_test=12, num_points=32, seed=0)
    overrides = [f"data.root={home / 'shapes'}", f"output_dir={home / 'run'}", "train.ema_decay=0.9"]
    stored = torch.load(STORED, weights_only=True)["config"]
    return parse_config(stored, where="stored", overrides=[*overrides, "train.max_steps=4", "train.epochs=3"])


@pytest.fixture(scope="module")
def trainer(config):
    """A run that stopped in its second epoch, with all of its parts."""
    trainer = Trainer(config)
    trainer.fit()
    assert trainer.progress.epoch >= 1 and trainer.progress.step > 0
    return trainer


@pytest.fixture(scope="module")
def good(trainer):
    return load_checkpoint(trainer.folder.last)


def put(*place, value):
    """Return an edit that sets one entry; a function is called with what is there."""

    def edit(state):
        for key in place[:-1]:
            state = state[key]
        old = state.get(place[-1]) if isinstance(state, dict) else state[place[-1]]
        state[place[-1]] = value(old) if callable(value) else value

    return edit


def drop(*place):
    def edit(state):
        for key in place[:-1]:
            state = state[key]
        del state[place[-1]]

    return edit


def moment(name, value):
    return put("optimizer", "state", 0, name, value=value)


def group(key, value):
    return put("optimizer", "param_groups", 0, key, value=value)


def python(index, value):
    return put("rng", 0, "python", value=lambda old: tuple(value if i == index else v for i, v in enumerate(old)))


def numpy(index, value):
    return put("rng", 0, "numpy", value=lambda old: tuple(value if i == index else v for i, v in enumerate(old)))


HOSTILE = {
    "optimizer": [
        moment("exp_avg", torch.zeros(1)), moment("exp_avg", torch.zeros(0)), moment("exp_avg_sq", torch.zeros(9, 9)),
        moment("exp_avg", lambda old: old[None]), moment("exp_avg", lambda old: old.double()),
        moment("exp_avg", lambda old: old.to(torch.int32)), moment("exp_avg", lambda old: old.to(torch.complex64)),
        moment("exp_avg", lambda old: old.to_sparse()), moment("exp_avg", lambda old: old.to("meta")),
        moment("exp_avg", lambda old: old * math.nan), moment("exp_avg", lambda old: old + math.inf),
        moment("exp_avg", None), moment("exp_avg", "text"), moment("exp_avg", [1.0]), moment("exp_avg", 1.0),
        moment("step", torch.zeros(3)), moment("step", torch.tensor(-1.0)), moment("step", torch.tensor(1e9)),
        moment("step", torch.tensor(math.nan)), moment("step", 2), moment("step", "2"), moment("step", None),
        drop("optimizer", "state", 0, "exp_avg"), drop("optimizer", "state", 0, "step"),
        put("optimizer", "state", value={}), put("optimizer", "state", value=[]),
        put("optimizer", "state", value=lambda old: {str(key): entry for key, entry in old.items()}),
        put("optimizer", "state", value=lambda old: old | {10**6: old[0]}),
        put("optimizer", "state", value=lambda old: old | {-1: old[0]}),
        put("optimizer", "state", 0, value=[]), put("optimizer", "state", 0, value=None),
        put("optimizer", "state", value=lambda old: {key: old[len(old) - 1 - key] for key in old}),
        moment("extra", torch.zeros(3, 3, 3)), moment("extra", "text"),
        group("fused", False), group("fused", "yes"), group("foreach", True), group("betas", [0.9, 0.999]),
        group("betas", "0.9"), group("betas", (2.0, 0.9)), group("betas", (torch.tensor(0.9), 0.9)), group("eps", 0.0),
        group("eps", "1e-8"), group("weight_decay", -1.0), group("weight_decay", torch.zeros(4)), group("lr", "0.1"),
        group("lr", math.nan), group("lr", -1.0), group("lr", torch.zeros(3)), group("lr", 10**400),
        group("amsgrad", True), group("maximize", True), group("capturable", True), group("differentiable", True),
        group("params", []), group("params", lambda old: old[::-1]), group("params", lambda old: [0] * len(old)),
        group("params", 3), group("initial_lr", 1.0), drop("optimizer", "param_groups", 0, "lr"),
        drop("optimizer", "param_groups", 0, "params"), put("optimizer", "param_groups", value=[]),
        put("optimizer", "param_groups", value=lambda old: old[:1]), put("optimizer", "param_groups", 0, value=None),
        drop("optimizer", "param_groups"), drop("optimizer", "state"), put("optimizer", value=[1]),
    ],
    "ewa": [
        put("ewa", value=None), put("ewa", value={}), put("ewa", value=[4]), put("ewa", "num_steps", value=-1),
        put("ewa", "num_steps", value=10**30), put("ewa", "num_steps", value=4.0), put("ewa", "num_steps", value=True),
    ],
    "ema": [
        put("ema", value=None), put("ema", value={}), put("ema", value=[]),
        put("ema", value=lambda old: {key: weight[None] for key, weight in old.items()}),
        put("ema", value=lambda old: {key: weight.to("meta") for key, weight in old.items()}),
        put("ema", value=lambda old: {key: weight * math.nan for key, weight in old.items()}),
        put("ema", value=lambda old: dict.fromkeys(old, "text")),
        put("ema", value=lambda old: {3: torch.zeros(2)}),
    ],
    "progress": [
        put("progress", value=None), put("progress", value={}), put("progress", "epoch", value=-1),
        put("progress", "epoch", value="1"), put("progress", "epoch", value=True),
        put("progress", "epoch", value=10**40),
        put("progress", "step", value=1.0), put("progress", "updates", value=None),
        put("progress", "seconds", value=math.nan), put("progress", "seconds", value=-1.0),
        put("progress", "seconds", value="1"), put("progress", "best", value="best"),
        put("progress", "best", value=math.inf), put("progress", "best", value=[1.0]),
        put("progress", "best_epoch", value=-1), put("progress", "best_epoch", value=99),
        put("progress", "best_epoch", value="1"),
    ],
    "history": [
        put("history", value=None), put("history", value=5), put("history", value="text"),
        put("history", value=["text"]),
        put("history", value=[]), put("history", value=lambda old: old * 1000), put("history", 0, value={}),
        put("history", 0, "train_loss", value="1.0"), put("history", 0, "train_loss", value=math.nan),
        put("history", 0, "epoch", value=7), put("history", 0, "seconds", value=None),
        put("history", 0, value=lambda old: old | {"__class__": 1}), drop("history", 0, "updates"),
    ],
    "sums": [
        put("sums", value=[]), put("sums", value=None), put("sums", 0, value=torch.zeros(9)), put("sums", 0, value=1.0),
        put("sums", 0, value=lambda old: old.float()), put("sums", 0, value=lambda old: old * math.nan),
        put("sums", value=lambda old: old * 2),
    ],
    "rng": [
        put("rng", value=[{}]), put("rng", value=3), put("rng", value={}), put("rng", 0, value=None),
        put("rng", 0, "torch", value=torch.zeros(3)), put("rng", 0, "torch", value=torch.zeros(3, dtype=torch.uint8)),
        put("rng", 0, "torch", value="text"), put("rng", 0, "python", value=3), put("rng", 0, "numpy", value=()),
        python(0, 2), python(1, (1, 2)), python(1, (0,) * 624 + (9999,)), python(1, ("x",) * 625), python(2, "text"),
        numpy(0, "PCG64"), numpy(1, [0]), numpy(1, [-1] * 624), numpy(2, 10**6), numpy(2, -1), numpy(3, 7),
        numpy(4, math.nan),
    ],
}  # fmt: skip
"""By entry of a checkpoint, edits of a good one."""
CASES = [(entry, number) for entry, edits in HOSTILE.items() for number in range(len(edits))]


def edited(good, entry, number):
    state = copied(good)
    HOSTILE[entry][number](state)
    return state


def copied(value):
    """Copy dicts and lists; edits put other tensors in, they change none."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def test_there_are_many():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("entry", "number"), quick(len(CASES) // 2, CASES[::2] + CASES[1::2]))
def test_a_hostile_state_is_refused_before_it_is_used(trainer, good, entry, number):
    state = edited(good, entry, number)
    before = copy.deepcopy(trainer.optimizer.state_dict()), trainer.progress, torch.get_rng_state()
    weights = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(InputError) as caught, restoring("file.pt"):
        trainer._load_state(state, "file.pt")
    message = str(caught.value)
    assert message.startswith(("file.pt: ", "file.pt: ema: ")) and message.isprintable() and len(message) < 700
    assert entry in message.split(" is ")[0] or entry in ("rng", "sums", "progress") or "ema" in message
    assert same(trainer.optimizer.state_dict(), before[0]) and trainer.progress is before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(one, other) for one, other in zip(weights, trainer.model.parameters()))


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_the_state_itself_is_taken_over(trainer, good):
    trainer._load_state(copy.deepcopy(good), "file.pt")
    assert same(trainer.optimizer.state_dict(), good["optimizer"])
    assert vars(trainer.progress) == good["progress"] and trainer.history == good["history"]
    assert same(dict(trainer.ema.state_dict()), good["ema"])


def test_moments_that_share_memory_get_memory_of_their_own(trainer, good):
    state = copy.deepcopy(good)
    shape = state["optimizer"]["state"][0]["exp_avg"].shape
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1).expand(shape)
    trainer._load_state(state, "file.pt")
    loaded = next(iter(trainer.optimizer.state.values()))["exp_avg"]
    assert loaded.is_contiguous() and loaded.untyped_storage().nbytes() == loaded.nbytes


@pytest.mark.parametrize("name", quick(30, [name for name in list_optimizers() if name not in NOT_BUILT]))
def test_the_state_of_every_optimizer_is_taken_over(name):
    """What an optimizer keeps, in its groups too, is found out by a step of a copy: it must be all that it writes."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
        optimizer = build_optimizer(model, name=name, lr=1e-3, weight_decay=0.05)
        build_scheduler(optimizer, schedule="cosine", min_lr=0, warmup_lr=0, warmup_steps=2, total_steps=9)
        return model, optimizer

    def train(model, optimizer, steps):
        for step in steps:
            model(torch.full((2, 6), 0.1 * step)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in model.parameters()]

    model, optimizer = make()
    train(model, optimizer, range(7))
    state = copy.deepcopy(optimizer.state_dict())
    other_model, other = make()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(checked_optimizer({"optimizer": copy.deepcopy(state)}, "file.pt", other, 7))
    assert same(other.state_dict(), state)
    torch.manual_seed(1)
    expected = train(model, optimizer, range(7, 9))
    torch.manual_seed(1)
    assert same(train(other_model, other, range(7, 9)), expected)


@pytest.mark.parametrize(("entry", "number"), [("optimizer", 0), ("optimizer", 34), ("history", 3), ("rng", 11)])
def test_the_command_line_says_it_in_one_line(config, good, tool, tmp_path, capsys, entry, number):
    path, home = save_checkpoint(tmp_path / "hostile.pt", edited(good, entry, number)), tmp_path / "other"
    yaml = tmp_path / "config.yaml"
    yaml.write_text(dump_config(config))
    assert tool("train").main([str(yaml), f"output_dir={home}", "--resume", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: {entry}") and not home.exists()


# The best epoch


def test_a_tie_is_decided_once():
    progress = Progress()
    rows = [{"epoch": epoch, "val_oa": oa, "train_loss": 1.0} for epoch, oa in ((1, 0.5), (2, 0.5), (3, 0.7), (4, 0.5))]
    found = []
    for row in rows:
        progress.epoch = row["epoch"]
        found.append((progress.select(row), progress.is_best()))
    assert found == [(True, True), (False, False), (True, True), (False, False)]
    progress.epoch, progress.step = 3, 2
    assert not progress.is_best(), "the epoch after it is under way"


def test_best_is_the_same_after_a_resume_when_scores_tie(tiny_config, monkeypatch):
    """All epochs score alike: the first is the best, also for a run that is resumed right after the second."""
    evaluate = Classification.evaluate

    def tied(self, model, loader, *arguments, **options):
        return type(evaluate(self, model, loader, *arguments, **options))(
            **{**vars(evaluate(self, model, loader, *arguments, **options)), "oa": 0.5}
        )

    monkeypatch.setattr(Classification, "evaluate", tied)
    trainer = Trainer(tiny_config("data.val_fraction=0.25", "train.epochs=3", "eval.every=0"))
    kill = KeyboardInterrupt()

    def killed(*arguments):
        if trainer.progress.epoch == 2:
            raise kill

    monkeypatch.setattr(trainer.folder, "write_log", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert load_checkpoint(trainer.folder.last)["progress"]["epoch"] == 2
    assert load_checkpoint(trainer.folder.best)["progress"]["epoch"] == 1
    second = Trainer(tiny_config("data.val_fraction=0.25", "train.epochs=3", "eval.every=0", "train.max_steps=9"))
    second.fit(resume=trainer.folder.root)
    assert load_checkpoint(trainer.folder.best)["progress"]["epoch"] == 1


def test_a_file_without_the_best_epoch_tells_it_by_its_scores(trainer, good):
    state = copy.deepcopy(good)
    del state["progress"]["best_epoch"]
    trainer._load_state(state, "file.pt")
    assert trainer.progress.best_epoch == good["progress"]["best_epoch"] > 0
