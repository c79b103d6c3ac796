"""The machine: devices that exist, random state that comes back, a description that can be written."""

import json
import random
import sys

import numpy as np
import pytest
import torch

from s2d3d import save_checkpoint
from s2d3d.errors import InputError
from s2d3d.machine import choose_device, environment, keep_large_allocations, start_runtime, stop_runtime
from s2d3d.random_state import rng_state, seed_all, set_rng_state
from s2d3d.unpickle import load_data

CPU = torch.device("cpu")


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


# Devices


@pytest.mark.parametrize(
    ("count", "name", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "cpu", "cpu"),
        (1, "auto", "cuda"),
        (1, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_devices_that_exist(monkeypatch, count, name, device):
    gpus(monkeypatch, count)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device(name) == torch.device(device)
    assert current == ([torch.device(device)] if ":" in device else []), "Triton launches on the current one"


@pytest.mark.parametrize(
    ("count", "name"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:2"), (2, "cuda:9999999999")]
)
def test_gpus_that_do_not(monkeypatch, count, name):
    gpus(monkeypatch, count)
    message = f"^device '{name}': this machine has {count} CUDA devices; use device cpu or auto$"
    with pytest.raises(InputError, match=message):
        choose_device(name)
    with pytest.raises(InputError, match=message):
        start_runtime(name)


@pytest.mark.parametrize(
    "name", ["", "gpu", "GPU", "mps", "meta", "xpu", "cpu:0", "cuda:", "cuda:-1", "cuda:1.0", "cuda:²", " cpu", "cpu\n"]
)
def test_names_that_are_no_device(monkeypatch, name):
    gpus(monkeypatch, 4)
    with pytest.raises(InputError) as caught:
        choose_device(name)
    assert str(caught.value) == f"device '{name}' is unknown; use auto, cpu, cuda or cuda:N"


def test_one_process_is_rank_0_of_1(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()
    try:
        runtime = start_runtime("cpu", num_threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert (runtime.device, runtime.rank, runtime.world_size) == (CPU, 0, 1)
    assert runtime.is_main and not runtime.is_distributed
    stop_runtime(runtime)
    assert not torch.distributed.is_initialized()


# Random state


def draws():
    """A number of each global generator, and one of torch's and Python's second normal, which they hold back."""
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


def test_random_state_comes_back_through_a_checkpoint(tmp_path):
    seed_all(3)
    draws()
    state = rng_state(CPU)
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"rng": state})
    expected = [draws() for _ in range(3)]
    seed_all(4)
    assert draws() not in expected
    set_rng_state(load_data(path)["rng"], CPU)
    assert [draws() for _ in range(3)] == expected


def test_reading_the_state_does_not_move_it():
    seed_all(1)
    expected = draws()
    seed_all(1)
    rng_state(CPU)
    assert draws() == expected


def test_one_seed_gives_one_sequence_and_another_seed_another():
    sequences = []
    for seed in (5, 5, 6, 2**32 - 1):
        seed_all(seed)
        sequences.append(draws())
    assert sequences[0] == sequences[1] and len(set(sequences)) == 3
    assert all(a != b for a, b in zip(sequences[0], sequences[2])), "each generator is seeded"


@pytest.mark.gpu
def test_random_state_of_a_gpu_comes_back():
    device = torch.device("cuda")
    state = rng_state(device)
    first = torch.rand(3, device=device)
    set_rng_state(state, device)
    assert torch.equal(torch.rand(3, device=device), first)


# Description


def test_environment_is_json_and_tells_versions_hardware_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/tools/train.py", "configs/a.yaml", "seed=3"])
    content = json.loads(json.dumps(environment()))
    assert content["command"] == ["train.py", "configs/a.yaml", "seed=3"]
    assert (
        content["packages"]["torch"] == torch.__version__.partition("+")[0]
        or content["packages"]["torch"] == torch.__version__
    )
    assert content["packages"]["numpy"] == np.__version__
    assert content["num_threads"] == torch.get_num_threads()
    assert content["python"] == ".".join(map(str, sys.version_info[:3])) and content["processor"]
    assert len(content["gpus"]) == torch.cuda.device_count()


def test_environment_names_the_commit_and_whether_files_differ(repository):
    import subprocess

    if not (repository / ".git").exists():
        assert environment()["git_commit"] is None
        return
    git = ["git", "-C", str(repository)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert environment()["git_commit"] in (commit, commit + "+")


def test_large_allocations_are_kept_only_where_the_user_chose_nothing(monkeypatch):
    import ctypes
    import platform

    calls = []

    class Libc:
        def __init__(self, name):
            pass

        def mallopt(self, option, value):
            calls.append((option, value))

    monkeypatch.setattr(ctypes, "CDLL", Libc)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    keep_large_allocations()
    assert calls == [(-3, 1 << 30), (-1, (1 << 31) - 1)]
    calls.clear()
    for name, value in (("MALLOC_ARENA_MAX", "2"), ("LD_PRELOAD", "libjemalloc.so")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            keep_large_allocations()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    keep_large_allocations()
    assert calls == []
