"""Fuzzing of checkpoint files: damaged, edited and hostile ones."""

import copy
import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from faults.damage import damage
from faults.fuzz import Outcome, accepted, refused
from faults.values import leaf, paths, pick, remove_at, replace_at, tree
from s2d3d.config.load import parse_config
from s2d3d.errors import InputError
from s2d3d.runs.checkpoint import build_model
from s2d3d.runs.resume import check_same_run, read_run, restoring
from s2d3d.runs.training_state import checked_progress

STORED = Path(__file__).parents[1] / "runs" / "fixtures" / "checkpoint_v1.pt"
"""A checkpoint of a run under way, with everything that one can hold."""


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class CheckpointCases:
    """Files derived from a good checkpoint, read as `evaluate.py` and `train.py --resume` read them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.victim = folder, folder / "case.pt", folder / "executed"
        self.content = torch.load(STORED, weights_only=True)
        self.bytes = STORED.read_bytes()
        self.points = torch.rand(2, 32, 3)

    def run(self, rng: random.Random) -> Outcome:
        """Make one file and read it; nothing may be run or written by that."""
        make = pick(rng, MAKERS)
        self.path.write_bytes(make(self, rng))
        before = sorted(self.folder.iterdir())
        try:
            outcome = self._use(make.__name__)
        except InputError as error:
            outcome = refused(str(error), (str(self.path),), make.__name__)
        if self.victim.exists():
            self.victim.unlink()
            return Outcome("failed", f"{make.__name__}: code in the file was run")
        if sorted(self.folder.iterdir()) != before:
            return Outcome("failed", f"{make.__name__}: files were made")
        return outcome

    def _use(self, what: str) -> Outcome:
        path, state = read_run(self.path)
        model = build_model(state, where=str(path))
        config = parse_config(state["config"], where=str(path))
        check_same_run(state, config, path)
        with restoring(str(path)):
            checked_progress(state, str(path), epochs=config.train.epochs)
        try:
            with torch.no_grad():
                logits = model(self.points)
        except ValueError as error:  # more groups than points, which the weights do not tell
            return accepted("points per cloud" in str(error), str(error), what)
        return accepted(logits.shape == (2, model_classes(state)), f"logits {tuple(logits.shape)}", what)


def model_classes(state: dict) -> int:
    """Return the number of classes that a checkpoint declares."""
    return state["model"]["num_classes"]


def _saved(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _edited(content: dict, rng: random.Random, times: int, inside: tuple[str, ...]) -> dict:
    content = copy.deepcopy(content)
    for _ in range(times):
        key = rng.choice(inside)
        if key not in content:
            continue
        places = [place for place in paths(content[key], (key,)) if len(place) > 1] or [(key,)]
        place = rng.choice(places)
        try:
            if rng.random() < 0.2:
                remove_at(content, place)
            else:
                replace_at(content, place, tree(rng) if rng.random() < 0.5 else leaf(rng))
        except (TypeError, LookupError):  # an earlier edit has put a scalar there
            continue
    return content


def damaged(cases: CheckpointCases, rng: random.Random) -> bytes:
    """Damage to the bytes."""
    return damage(cases.bytes, rng)


def damaged_end(cases: CheckpointCases, rng: random.Random) -> bytes:
    """Damage to the directory of the archive, at its end."""
    return cases.bytes[:-3000] + damage(cases.bytes[-3000:], rng)


def damaged_pickle(cases: CheckpointCases, rng: random.Random) -> bytes:
    """A damaged pickle under a right checksum."""
    return _rewritten(cases.bytes, lambda name, data: damage(data, rng) if name.endswith("data.pkl") else data)


def described(cases: CheckpointCases, rng: random.Random) -> bytes:
    """Another description: model, experts, classes, config, version."""
    keys = ("model", "model", "s2d", "class_names", "config", "format_version", "format", "s2d3d_version", "versions")
    return _saved(_edited(cases.content, rng, rng.choice([1, 1, 2, 3]), keys))


def kwargs(cases: CheckpointCases, rng: random.Random) -> bytes:
    """Another architecture, up to absurd sizes."""
    content = copy.deepcopy(cases.content)
    section = rng.choice([content["model"]["kwargs"], content["model"], content["s2d"]])
    section[rng.choice(list(section))] = rng.choice([leaf(rng), 10**6, 10**9, 2**40, 10**18, -1, 0, 1e9, [1] * 50])
    return _saved(content)


def state(cases: CheckpointCases, rng: random.Random) -> bytes:
    """Another training state."""
    keys = ("progress", "history", "optimizer", "ewa", "ema", "sums", "rng")
    return _saved(_edited(cases.content, rng, rng.choice([1, 2, 4]), keys))


def weights(cases: CheckpointCases, rng: random.Random) -> bytes:
    """Other weights: shapes, types, views that declare far more than there is."""
    content = copy.deepcopy(cases.content)
    key = rng.choice(list(content["state_dict"]))
    weight = content["state_dict"][key]
    changed = [
        lambda: weight.half(), lambda: weight.to(torch.int32), lambda: weight.flatten(), lambda: weight.unsqueeze(0),
        lambda: weight.to(torch.complex64), lambda: torch.zeros(0), lambda: torch.full(weight.shape, float("nan")),
        lambda: torch.zeros(1).expand(10**9), lambda: torch.zeros(1).expand(10**6, 10**6), lambda: weight.to_sparse(),
        lambda: torch.empty(10**9, device="meta"), lambda: torch.zeros(1).expand(weight.shape), lambda: leaf(rng),
        lambda: torch.nn.Parameter(weight.float()),
    ]  # fmt: skip
    content["state_dict"][key if rng.random() < 0.8 else "more"] = pick(rng, changed)()
    if rng.random() < 0.2:
        del content["state_dict"][rng.choice(list(content["state_dict"]))]
    return _saved(content)


def hostile(cases: CheckpointCases, rng: random.Random) -> bytes:
    """Code, in every place and form."""
    victim = str(cases.victim)
    attack = rng.choice(
        [
            Call(os.system, f"touch {victim}"), Call(open, victim, "w"), Call(eval, f"open({victim!r}, 'w')"),
            Call(exec, f"open({victim!r}, 'w')"), Call(os.mkdir, victim), Call(Path.touch, Path(victim)),
            Call(getattr, Call(__import__, "os"), "getcwd"), Call(torch.load, victim), Call(bytearray, 2**40),
            Call(np.zeros, 2**40), Call(pickle.loads, b"."),
        ]
    )  # fmt: skip
    content = dict(cases.content)
    kind = rng.randrange(5)
    if kind == 0:
        content[rng.choice([*content, "more"])] = attack
    elif kind == 1:
        content["state_dict"] = {**content["state_dict"], "more": attack}
    elif kind == 2:
        return pickle.dumps(attack, protocol=rng.choice([0, 2, 4, 5]))
    elif kind == 3:
        return _saved({"format": "s2d3d", "x": attack}, _use_new_zipfile_serialization=rng.random() < 0.5)
    else:
        content = [content, attack]
    return _saved(content)


def archive(cases: CheckpointCases, rng: random.Random) -> bytes:
    """An archive as torch would not write it: packed, repeated, overlapping, with other names, or a bomb."""
    kind = rng.randrange(5)
    if kind == 0:
        return _rewritten(cases.bytes, lambda name, data: data, zipfile.ZIP_DEFLATED)
    if kind == 1:
        bomb = rng.choice([10**6, 3 * 10**8])
        return _rewritten(
            cases.bytes, lambda name, data: bytes(bomb) if name.endswith("/data/0") else data, zipfile.ZIP_DEFLATED
        )
    if kind == 2:
        return _rewritten(cases.bytes, lambda name, data: None if rng.random() < 0.1 else data)
    if kind == 3:
        content, directory = cases.bytes, cases.bytes.rindex(b"PK\x01\x02")
        place = directory + rng.choice([10, 20, 24, 42])  # method, sizes, offset of the last part
        return content[:place] + struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1])) + content[place + 4 :]
    return cases.bytes + cases.bytes


def others(cases: CheckpointCases, rng: random.Random) -> bytes:
    """Files of other programs."""
    return rng.choice(
        [
            b"", b"\x80\x02.", b"\x80\x02}.", b"PK\x05\x06" + bytes(18), rng.randbytes(200), b"\x89HDF\r\n\x1a\n",
            b"seed: 0\n", _saved(tree(rng, 4)), _saved(torch.zeros(3)),
            _saved(cases.content, _use_new_zipfile_serialization=False),
            pickle.dumps(tree(rng, 4)), b"\x80\x02" + rng.randbytes(60) + b".", b"\x80\x02" + b"(" * 100_000 + b".",
            b"\x80\x02" + b"]" + b"]a" * 50_000 + b".",
        ]
    )  # fmt: skip


def good(cases: CheckpointCases, rng: random.Random) -> bytes:
    """The file itself, or its content in another version that can be read."""
    return _saved(cases.content | {"format_version": rng.choice([1, 2])})


def _rewritten(content: bytes, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", method) as target:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                target.writestr(name, data)
    return buffer.getvalue()


MAKERS: list[Callable[[CheckpointCases, random.Random], bytes]] = [
    *[damaged] * 4, damaged_end, *[damaged_pickle] * 3, *[described] * 4, *[kwargs] * 2, *[state] * 4, *[weights] * 3,
    *[hostile] * 3, archive, others, good,
]  # fmt: skip
