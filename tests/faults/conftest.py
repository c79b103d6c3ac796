"""What the fault tests share: their report, and runs of `tools/train.py` in processes that can be killed."""

import pytest

from faults.report import note_cases
from faults.training import Launcher, Runs
from s2d3d import load_config
from s2d3d.config.load import dump_config


@pytest.fixture
def record(request):
    """Note what a test tried; with `--faults-report FILE` the notes of a session are merged into that file.

    Call it with the name of the kind of fault, the number of cases and what became of them.
    """

    def note(kind: str, cases: int, *, failures: list[str], **outcomes: int) -> None:
        note_cases(request.config, kind, cases, failures, **outcomes)

    return note


@pytest.fixture(scope="session")
def launcher(repository):
    """A process that has the package imported and forks runs, each of which can be killed."""
    with Launcher(repository) as started:
        yield started


@pytest.fixture
def runs(launcher, repository, shapes_root, tmp_path) -> Runs:
    """Runs of one tiny config: 3 epochs of 6 updates, a checkpoint every 4, the models of epoch 2 kept."""
    overrides = [
        f"data.root={shapes_root}", "data.num_points=128", "model.depth=2", "model.trans_dim=24", "model.num_heads=2",
        "model.num_group=12", "model.group_size=8", "model.encoder_dims=16", "model.encoder_width=8",
        "optim.warmup_epochs=1", "train.epochs=3", "train.batch_size=16", "train.checkpoint_every=4",
        "train.keep_every=2", "train.device=cpu", "train.num_threads=1", "log.report=false",
        f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(load_config(repository / "configs" / "demo.yaml", overrides)))
    return Runs(launcher, config, tmp_path)
