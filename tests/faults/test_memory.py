"""Memory: flat over thousands of updates, and far below the size of a set that stays in its files."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

STEPS, WARM_UP, EVERY = 2000, 400, 20
NOTE_MEMORY = (
    "import gc, json\n"
    "from functools import partialmethod\n"
    "from s2d3d import Callback, Trainer\n"
    "notes = []\n"
    "class Noted(Callback):\n"
    "    def on_update(self, trainer):\n"
    f"        if trainer.progress.updates % {EVERY} == 0:\n"
    "            pages = int(open('/proc/self/statm').read().split()[1])\n"
    "            notes.append((trainer.progress.updates, pages * 4096))\n"
    "            json.dump(notes, open('{path}', 'w'))\n"
    "Trainer.__init__ = partialmethod(Trainer.__init__, callbacks=[Noted()])\n"
)
"""Run before a training: notes its resident memory."""


def slope_of(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return the slope of a line through the values, per step, and its standard error."""
    centred = steps - steps.mean()
    slope = (centred * values).sum() / np.square(centred).sum()
    rest = values - values.mean() - slope * centred
    return float(slope), float(np.sqrt(np.square(rest).sum() / (len(steps) - 2) / np.square(centred).sum()))


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_updates(runs, tmp_path, record):
    """With checkpoints, evaluations and a log that grows by a row each epoch."""
    path = tmp_path / "memory.json"
    ended = runs.go(
        f"train.epochs={STEPS // 6 + 1}", "train.checkpoint_every=100", "train.keep_every=null", "eval.every=20",
        prelude=NOTE_MEMORY.replace("{path}", str(path)),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    notes = np.array(json.loads(path.read_text()), dtype=np.float64)
    notes = notes[notes[:, 0] >= WARM_UP]
    slope, error = slope_of(notes[:, 0], notes[:, 1])
    spread = np.ptp(notes[:, 1]) / 2**20
    grown = slope * (STEPS - WARM_UP) / 2**20
    note = f"slope {slope:.0f} +- {error:.0f} bytes an update, {grown:.2f} MiB in all, spread {spread:.1f} MiB"
    failures = [] if grown < max(2.0, 3 * error * (STEPS - WARM_UP) / 2**20) else [note]
    record("memory over 2,000 updates", STEPS, failures=failures, **{note: 1})
    assert not failures


READ = """
import json, resource, sys
import torch
from s2d3d.datasets import BatchLoader, create_dataset
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
root, points, budget, batches = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
before, highest = resident(), 0
train = create_dataset("modelnet40", root, "train", num_points=points, memory_budget_gb=budget, normalize=True)
loader = BatchLoader(train, 16, shuffle=True, prefetch=2)
for number, (clouds, labels) in enumerate(loader):
    assert clouds.shape == (16, points, 3) and clouds.isfinite().all()
    highest = max(highest, resident())
    if number == batches:
        break
print(json.dumps({"grown": highest - before, "shapes": len(train)}))
"""


def write_large(root, shapes: int, points: int) -> int:
    """Write a training split of many bytes piece by piece, without names; return the bytes of its points."""
    root.mkdir()
    (root / "shape_names.txt").write_text("a\nb\n")
    (root / "train_files.txt").write_text("large.h5\n")
    rows = max(1, min(64, 2**22 // (points * 6)))
    rng = np.random.default_rng(0)
    piece = rng.normal(size=(rows, points, 3)).astype(np.float16)
    with h5py.File(root / "large.h5", "w") as file:
        data = file.create_dataset("data", (shapes, points, 3), "f2", chunks=(rows, points, 3))
        for start in range(0, shapes, rows):
            data[start : start + rows] = piece[: min(rows, shapes - start)]
        file["label"] = np.arange(shapes) % 2
        file.attrs["up_axis"] = np.bytes_("z")
    return shapes * points * 6


@pytest.mark.slow
@pytest.mark.parametrize(("shapes", "points", "budget"), [(1_000_000, 192, 0.05), (1500, 100_000, 0.05)])
def test_a_large_set_is_not_read_at_once(tmp_path, repository, record, shapes, points, budget):
    size = write_large(tmp_path / "large", shapes, points)
    command = [sys.executable, "-c", READ, tmp_path / "large", points, budget, 40]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["shapes"] == shapes
    grown = result["grown"] / 1e6
    note = f"{size / 1e6:.0f} MB of points, {grown:.0f} MB of memory"
    # What remains in memory: the cache, labels, names and orders of the shapes, and a few batches of these clouds.
    allowed = budget * 1e3 + 250 * shapes / 1e6 + 30 * 16 * points * 12 / 1e6 + 50
    failures = [] if grown < allowed < size / 1e6 else [f"{note}, allowed {allowed:.0f} MB"]
    record(f"{shapes:,} shapes of {points:,} points, streamed", 41 * 16, failures=failures, **{note: 1})
    assert not failures
