"""Fuzzing of command lines: flags missing, repeated, unknown or with absurd values, over good and bad files."""

import contextlib
import importlib.util
import io
import os
import random
import shutil
from pathlib import Path

from faults.fuzz import Outcome
from faults.fuzz_checkpoint import STORED
from faults.values import TEXTS, leaf
from s2d3d.prepare.shapes import write_shapes

SAFE_TEXTS = tuple(text for text in TEXTS if not text.startswith(("/", "..")) and "\x00" not in text)
"""No text that names a place outside of the folder in which the tools run: some of them are told to write there."""
TINY = (
    "data.root=data", "output_dir=run", "data.num_points=32", "model.depth=2", "model.trans_dim=8", "model.num_heads=2",
    "model.num_group=4", "model.group_size=4", "model.encoder_dims=8", "model.encoder_width=4", "train.epochs=2",
    "optim.warmup_epochs=1", "train.batch_size=8",
)  # fmt: skip


class CommandCases:
    """Calls of `main(argv)` of the tools, in this process and in a folder of their own."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.home, self.repository = folder.resolve(), repository
        os.chdir(self.home)
        if not (self.home / "data").exists():
            write_shapes(self.home / "data", num_train=24, num_test=12, num_points=32, seed=0)
        shutil.copyfile(STORED, self.home / "good.pt")
        (self.home / "bad.pt").write_bytes(STORED.read_bytes()[:5000])
        (self.home / "bad.yaml").write_text("seed: [\n")
        (self.home / "good.yaml").write_text((repository / "configs" / "demo.yaml").read_text())
        self.tools = {name: self._load(name) for name in MAKERS}

    def run(self, rng: random.Random) -> Outcome:
        """Call one tool with one command line."""
        name = rng.choice(list(MAKERS))
        argv = [str(argument) for argument in MAKERS[name](rng)]
        before = self._listing()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = self.tools[name].main(argv)
        made = self._listing() - before
        outcome = self._judge(code, out.getvalue(), err.getvalue(), made)
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return outcome if not outcome.detail else Outcome("failed", f"{name} {argv}: {outcome.detail}")

    @staticmethod
    def _judge(code: int, out: str, err: str, made: set[Path]) -> Outcome:
        if code == 0:
            partial = [path for path in made if path.name.endswith(".tmp")]
            return Outcome("failed", f"left {partial}") if partial else Outcome("accepted")
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        if code not in (1, 2) or not errors or "Traceback" in err:
            return Outcome("failed", f"exit code {code}, stderr {err[-1500:]!r}")
        if made:
            return Outcome("failed", f"refused, but left {sorted(map(str, made))}")
        if not all(line.isprintable() and len(line) < 6000 for line in errors):
            return Outcome("failed", f"unreadable message {err[-1500:]!r}")
        return Outcome("refused")

    def _listing(self) -> set[Path]:
        return set(self.home.iterdir())

    def _load(self, name: str):
        spec = importlib.util.spec_from_file_location(f"tools_{name}", self.repository / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _train(rng: random.Random) -> list[object]:
    argv = [rng.choice([*["good.yaml"] * 6, "bad.yaml", "absent.yaml", _text(rng)]), *TINY]
    if rng.random() < 0.15:  # a run of one update, or a resume that must be refused
        argv += ["train.max_steps=1"]
        return argv + rng.choice([[], ["--resume", rng.choice(["bad.pt", "good.pt", "data", _text(rng)])], ["--force"]])
    argv += ["--device", rng.choice(["cpu", "auto", "cuda:77", _text(rng)])] if rng.random() < 0.3 else []
    return [*_mutated(argv, rng), "--dry-run"]


def _merge(rng: random.Random) -> list[object]:
    argv = ["--checkpoint", _checkpoint(rng), "--output", _output(rng, ".pt")]
    return _mutated(argv + (["--force"] if rng.random() < 0.3 else []), rng)


def _apply_ewa(rng: random.Random) -> list[object]:
    rate = rng.choice([0, 0.3, 1, -1, 2, "nan", "inf", "x", leaf(rng)])
    return _mutated(["--checkpoint", _checkpoint(rng), "--share-rate", rate, "--output", _output(rng, ".pt")], rng)


def _evaluate(rng: random.Random) -> list[object]:
    argv = ["--checkpoint", _checkpoint(rng), f"data.root={rng.choice(['data', 'absent', 'good.pt'])}"]
    argv += rng.choice([[], ["--votes", rng.choice([1, 2, 0, -3, "x", 1.5])], ["--corruption", _corruption(rng)]])
    argv += rng.choice([[], ["--output", _output(rng, ".json")], ["--reference", _text(rng)], ["--device", _text(rng)]])
    return _mutated(argv, rng)


def _prepare_data(rng: random.Random) -> list[object]:
    kind = rng.choice(["shapes", "modelnet40", "scan", _text(rng)])
    argv = [kind, "--output", _output(rng, "")]
    if kind == "shapes":
        argv += ["--num-train", rng.choice([12, 24, 0, -1, "x"]), "--num-test", rng.choice([12, 0, -5])]
        argv += ["--num-points", rng.choice([16, 1, 0, -1, "1e3"]), "--seed", rng.choice([0, -1, 2**70, "x"])]
    else:
        argv += ["--from", rng.choice(["data", "absent", "good.pt", _text(rng)])]
        argv += ["--workers", 1, "--views", rng.choice([0, -1])] if kind == "scan" else []
    return argv if rng.random() < 0.5 else [*argv, rng.choice(["--force", "--unknown", "--up-axis", "--debugging"])]


def _few_shot(rng: random.Random) -> list[object]:
    wrong = rng.choice(
        [["--ways", rng.choice([0, -1, 99, "x"])], ["--shots", rng.choice([0, -2, 10**6])], ["--nothing"]]
    )
    return [rng.choice(["good.yaml", "bad.yaml", _text(rng)]), *TINY, *wrong]


def _analyze(rng: random.Random) -> list[object]:
    wrong = rng.choice([["--shapes", 0], ["--positions", "x"], [], ["--output", "good.pt"], ["--device", "cuda:55"]])
    return _mutated([rng.choice(["data", "absent", "bad.pt", _text(rng)]), *wrong], rng)


MAKERS = {
    "train": _train, "merge": _merge, "apply_ewa": _apply_ewa, "evaluate": _evaluate, "prepare_data": _prepare_data,
    "few_shot": _few_shot, "analyze": _analyze,
}  # fmt: skip


def _mutated(argv: list[object], rng: random.Random) -> list[object]:
    argv = list(argv)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        kind, place = rng.randrange(5), rng.randrange(len(argv))
        if kind == 0:
            del argv[place]
        elif kind == 1 and argv[place - 1] != "--output":
            argv[place] = _text(rng)
        elif kind == 2:
            argv.insert(
                place, rng.choice(["--unknown", "-x", "--", "-1", "--output", "--force", "a.b=c", "seed=1", "="])
            )
        elif kind == 3:
            argv.append(rng.choice(argv))
        else:
            argv.append(f"{rng.choice(['data', 'model', 'train', 'eval', 'x'])}.{_text(rng)[:40]}={_text(rng)[:40]}")
        argv = argv or [""]
    return argv


def _text(rng: random.Random) -> str:
    return rng.choice(SAFE_TEXTS)


def _checkpoint(rng: random.Random) -> str:
    return rng.choice([*["good.pt"] * 6, "bad.pt", "absent.pt", "data", "good.yaml", _text(rng)])


def _output(rng: random.Random, suffix: str) -> str:
    good = ["new" + suffix] * 5
    return rng.choice([*good, "good.pt", "data", "absent/new" + suffix, "", "/proc/new", "new" * 99])


def _corruption(rng: random.Random) -> str:
    return rng.choice(["jitter:3", "jitter:9", "jitter", "x:1", ":", "scale:-1", "drop_global:5", _text(rng)])
