"""Fixtures for all tests. They import what they need: the process that shares the tests out needs none of it."""

import gc
import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).parent.parent

# `pytest --hypothesis-profile thorough` tries more examples, and new ones each time.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=200, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser):
    parser.addoption(
        "--published-checkpoint",
        metavar="FILE",
        help="a checkpoint of the public Point-BERT or Point-MAE to test against",
    )
    parser.addoption(
        "--faults-report",
        metavar="FILE",
        help="where the tests of faults note what they tried, as JSON, such as docs/results/faults.json",
    )


def pytest_configure(config):
    """Let temporary files be in memory where there is room: the tests write ten thousand, and disks take a minute."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if item.config.getoption("--faults-report"):
        from faults.report import note_test

        note_test(item, report)
    return report


def pytest_collection_finish():
    """Keep the garbage collector from searching what the imports and the collection left: a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # without the stack trace that torch.manual_seed keeps for a GPU: 3 ms in each of thousands of tests
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """The power does not fail in a test; processes that are killed in tests do write to the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def _plugins_are_forgotten():
    """What a module's configs register, such as the image studies, is unknown to the next module."""
    from s2d3d.datasets import _DATASETS
    from s2d3d.models import _MODELS
    from s2d3d.plugins import _LOADED

    registries = (_LOADED, _DATASETS, _MODELS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before):
        registry.clear()
        registry.update(content)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def modelnet40_root() -> Path:
    """The real ModelNet40; when the variable is set, its absence is a failure and not a reason to skip."""
    root = os.environ.get("S2D3D_MODELNET40")
    if not root:
        pytest.skip("S2D3D_MODELNET40 does not name a folder with ModelNet40")
    assert (Path(root) / "train_files.txt").is_file(), f"S2D3D_MODELNET40={root} holds no ModelNet40"
    return Path(root)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A small procedural data set: 96 training and 36 test shapes of 12 classes, 128 points."""
    from s2d3d.prepare.shapes import write_shapes

    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, num_train=96, num_test=36, num_points=128, seed=0)
    return root


@pytest.fixture
def tiny_config(shapes_root, tmp_path, repository):
    """Make a valid config of a run of a second or two: 6 updates an epoch, 2 epochs, experts in 1 of 2 blocks."""
    from s2d3d import load_config

    def make(*overrides: str):
        return load_config(
            repository / "configs" / "demo.yaml",
            [
                f"data.root={shapes_root}",
                f"output_dir={tmp_path / 'run'}",
                "data.num_points=128",
                "model.depth=2",
                "model.trans_dim=24",
                "model.num_heads=2",
                "model.num_group=12",
                "model.group_size=8",
                "model.encoder_dims=16",
                "model.encoder_width=8",
                "s2d.share_rate=0.3",
                "optim.warmup_epochs=1",
                "train.epochs=2",
                "train.batch_size=16",
                "log.report=false",
                *overrides,
            ],
        )

    return make


@pytest.fixture
def tiny_pretraining(shapes_root, tmp_path, repository):
    """Make a valid config of a pre-training of a second: 6 updates an epoch, experts in encoder and decoder."""
    from s2d3d import load_config

    def make(*overrides: str):
        return load_config(
            repository / "configs" / "pretrain_mae_small.yaml",
            [
                "data.name=shapes", f"data.root={shapes_root}", f"output_dir={tmp_path / 'run'}", "data.num_points=128",
                "model.trans_dim=24", "model.encoder_dims=24", "model.depth=2", "model.num_heads=2",
                "model.decoder_depth=2", "model.decoder_num_heads=2", "model.num_group=12", "model.group_size=8",
                "model.encoder_width=8", "s2d.kind=rup", "s2d.num_experts=3", "optim.lr=3e-3", "optim.warmup_epochs=1",
                "train.epochs=2", "train.batch_size=16", "eval.every=0", *overrides,
            ],
        )  # fmt: skip

    return make


@pytest.fixture
def write_study(tiny_config, tmp_path):
    """Write a study of runs of a second, arms dense and s2d, seeds 0 and 1, scored on a quarter of 96 shapes."""
    import yaml

    from s2d3d.config.load import dump_config

    def write(**changes: object) -> Path:
        base = tmp_path / "base.yaml"
        base.write_text(dump_config(tiny_config("data.val_fraction=0.25", "optim.lr=4e-3", "output_dir=runs/unused")))
        study = {
            "name": "tiny",
            "question": "Does it run?",
            "base": "base.yaml",
            "evaluate": "validation",
            "seeds": [0, 1],
            "reference": "dense",
            "output_dir": str(tmp_path / "runs"),
            "arms": {"dense": {"s2d.kind": "none"}, "s2d": {}},
        }
        study = {key: value for key, value in (study | changes).items() if value is not None}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    return write


@pytest.fixture
def tool(repository):
    """Import a command line from tools/ by name; its `main(argv)` returns the exit code."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"tools_{name}", repository / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def drawing():
    """Open3D can draw here; where it cannot, the reason it gives is that of the skipped tests."""
    from s2d3d.errors import InputError
    from s2d3d.viz import render_clouds

    try:
        render_clouds([[[0.0, 0.0, 0.0]]], size=16)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def one_thread():
    """A fork of a process whose torch has started several threads would wait for them for ever."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def enough_updates():
    """Take the few updates of a tiny run for enough, so that BatchNorm statistics stay those of the training."""
    from s2d3d.evaluation import batchnorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batchnorm, "FORGOTTEN", 1.0)
        yield


@pytest.fixture
def browser(tmp_path_factory):
    """A page in a real browser; the test is skipped where there is none."""
    from chromium import Chromium

    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


CLASSES = ("apple", "boat", "chair")


@pytest.fixture
def clouds():
    """Make (n, P, 3) random clouds, no two alike, none centred."""
    import numpy as np

    def make(count: int, num_points: int, dtype=np.float32, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return (rng.normal(size=(count, num_points, 3)) * [1, 2, 3] + rng.normal(size=(count, 1, 3))).astype(dtype)

    return make


@pytest.fixture
def modelnet_folder(tmp_path, clouds):
    """Write a folder of two training files and one test file; labels take turns over three classes."""
    import numpy as np

    from s2d3d.datasets.h5 import write_h5

    def make(name="set", *, num_points=16, dtype=np.float32, up_axis=None, per_file=6, entry="{file}", **extras):
        root = tmp_path / name
        root.mkdir()
        (root / "shape_names.txt").write_text("\n".join(CLASSES) + "\n")
        for split, files in (("train", 2), ("test", 1)):
            lines = []
            for number in range(files):
                file = f"ply_data_{split}{number}.h5"
                points = clouds(per_file, num_points, dtype, seed=10 * files + number)
                write_h5(root / file, points, np.arange(per_file) % 3, up_axis=up_axis, **extras)
                lines.append(entry.format(file=file, name=name))
            (root / f"{split}_files.txt").write_text("\n".join(lines) + "\n")
        return root

    return make
