"""The hardware and software of a measurement: processor, threads, allocator, versions, attained rates."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d3d.errors import InputError
from s2d3d.machine import environment, installed_version

from .timing import make_timer

CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile", "sve", "bf16")
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
PACKAGES = (
    "mixture-of-experts", "st-moe-pytorch", "soft-moe-pytorch", "tutel", "transformers", "fpsample", "torch-cluster",
    "torch-geometric", "torch-pointcloud", "pyg-lib",
)  # fmt: skip
"""Public packages that are contestants if they are installed."""


def hardware(device: torch.device, num_threads: int) -> dict[str, object]:
    """Describe machine, versions and allocator, in plain types for JSON.

    Example:
        >>> machine = hardware(torch.device("cpu"), num_threads=1)
        >>> machine["num_threads"], sorted(machine["allocator"])
        (1, ['libc', 'set_by_user', 'shipped'])
    """
    described = environment()
    del described["command"]  # it names folders of this machine
    installed = described["packages"]
    assert isinstance(installed, dict)
    described["packages"] = installed | {name: installed_version(name) for name in PACKAGES}
    chosen = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_") or key == "LD_PRELOAD"}
    return {
        **described,
        "num_threads": num_threads,
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cpu_flags": cpu_flags(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "allocator": {
            "libc": " ".join(platform.libc_ver()).strip() or "unknown",
            "set_by_user": chosen,
            "shipped": "as set by the user"
            if chosen
            else "glibc malloc that keeps large blocks (mallopt, `keep_large_allocations`)",
        },
    }


def machine_name(described: Mapping[str, Any]) -> str:
    """Name a machine by what decides its speed: processor, vector and matrix units, threads, GPU.

    Args:
        described: see `hardware`.

    Example:
        >>> machine_name({"processor": "AMD EPYC, 2 cores", "cpu_flags": ["avx2", "fma"], "num_threads": 1,
        ...               "gpu": None})
        'AMD EPYC, 2 cores, avx2 fma, 1 thread'
    """
    threads = described["num_threads"]
    parts = [described["processor"], " ".join(described["cpu_flags"]), described["gpu"]]
    parts.append(f"{threads} thread{'' if threads == 1 else 's'}")
    return ", ".join(part for part in parts if part)


def cpu_flags() -> list[str]:
    """Return which of the processor's vector and matrix units this system announces."""
    cpuinfo = Path("/proc/cpuinfo")
    words: set[str] = set()
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                words = set(line.split(":", 1)[1].split())
                break
    return [flag for flag in CPU_FLAGS if flag in words]


def missing_bf16(device: torch.device) -> str | None:
    """Return the reason why a device has no fast bf16, None if it has units for it."""
    if device.type == "cuda":
        return None if torch.cuda.is_bf16_supported(including_emulation=False) else "this GPU has no bf16 unit"
    found = set(cpu_flags()) & set(BF16_FLAGS)
    return None if found else f"this CPU has no bf16 unit (none of {', '.join(BF16_FLAGS)})"


def num_threads(wanted: int | None) -> int:
    """Return the number of threads; default: torch's choice.

    Raises:
        InputError: below 1.
    """
    if wanted is not None and wanted < 1:
        raise InputError(f"--threads is {wanted}, must be at least 1")
    return wanted or torch.get_num_threads()


def matmul_rate(
    rows: int, inner: int, columns: int, *, dtype: torch.dtype, device: torch.device, seconds: float = 1.0
) -> float:
    """Return the rate of a matrix product (rows, inner) x (inner, columns), GFLOP/s: the best of many short trials.

    The best trial is used because it is the upper limit for a model.

    Args:
        rows: such as the tokens of a batch.
        inner: inputs of a linear layer.
        columns: outputs of a linear layer.
        dtype: of both factors.
        device: where to compute.
        seconds: how long to try, at least two trials.
    """
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    best = _best_seconds(lambda: torch.nn.functional.linear(left, right), device, seconds)
    return 2e-9 * rows * inner * columns / best


def _best_seconds(run: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    timer = make_timer(device)
    timer(run, 1)
    ends = time.perf_counter() + seconds
    trials: list[float] = []
    while len(trials) < 2 or time.perf_counter() < ends:
        trials.append(timer(run, 1).wall)
    return min(trials)
