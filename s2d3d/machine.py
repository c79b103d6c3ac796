"""The machine of a run: device, processes, threads, memory allocator, versions."""

import contextlib
import ctypes
import functools
import importlib.metadata
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .errors import InputError, TrainingError
from .version import __version__

DEVICE_NAMES = re.compile(r"auto|cpu|cuda(:\d+)?", re.ASCII)
PEER_TIMEOUT = timedelta(minutes=10)
"""Timeout of a collective operation, for processes that hang. A process that has ended is detected at once."""
_PEER_GONE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused|was)|timed? ?out|broken pipe|tcpstore|socket|process ?group", re.I
)


@dataclass(frozen=True)
class Runtime:
    """Device and rank of this process.

    Attributes:
        device: of model and batches.
        rank: this process, in [0, world_size).
        world_size: number of processes; more than 1 under torchrun.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1


def start_runtime(device: str = "auto", num_threads: int | None = None) -> Runtime:
    """Choose the device and join the process group that torchrun announces (nccl on GPUs, gloo on CPUs).

    Raises:
        InputError: the requested CUDA device does not exist.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    keep_large_allocations()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device)
    if world_size == 1:
        return Runtime(chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PEER_TIMEOUT)
    return Runtime(chosen, dist.get_rank(), dist.get_world_size())


def stop_runtime(runtime: Runtime) -> None:
    """Leave the process group."""
    if runtime.is_distributed and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def watching_peers(runtime: Runtime, folder: Path | str) -> Iterator[None]:
    """Convert the errors of collective operations after another process has ended into one message.

    Args:
        runtime: of this process; without other processes, nothing is done.
        folder: of the run, for the message.

    Raises:
        TrainingError: another process has ended, or did not answer within `PEER_TIMEOUT`.
    """
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, dist.DistError) or _PEER_GONE.search(str(error))
        if isinstance(error, TrainingError) or not runtime.is_distributed or not known:
            raise
        reason = " ".join(str(error).split())[:160]
        raise TrainingError(
            f"process {runtime.rank} of {runtime.world_size}: another process of this run has ended or does not answer "
            f"({reason}); see its message above, if there is one, and continue with --resume {folder}"
        ) from error


def choose_device(name: str) -> torch.device:
    """Convert "auto", "cpu", "cuda" or "cuda:N" to an existing device; "cuda:N" becomes the current device.

    Kernels and events of other libraries, such as Triton, use the current device.

    Raises:
        InputError: the name is unknown, or the GPU does not exist.
    """
    if not DEVICE_NAMES.fullmatch(name):
        raise InputError(f"device '{name}' is unknown; use auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, _, index = name.partition(":")
    count = torch.cuda.device_count()
    if name != "cpu" and int(index or 0) >= count:
        raise InputError(f"device '{name}': this machine has {count} CUDA devices; use device cpu or auto")
    device = torch.device(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def keep_large_allocations() -> None:
    """Make glibc keep freed activations instead of returning them to the system at every step.

    Activations are larger than malloc's threshold for mapped memory. Each step would therefore map, clear and unmap the
    same gigabytes. Higher thresholds keep them in the heap. Nothing is changed without glibc, or if the user has chosen
    an allocator or thresholds.
    """
    chosen = any(key.startswith("MALLOC_") for key in os.environ) or "LD_PRELOAD" in os.environ
    if chosen or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def watch_parent(act: Callable[[], object]) -> None:
    """Call `act` in a thread after the parent process has ended for any reason.

    A process of `multiprocessing` watches its parent directly. Any other process waits for the end of its stdin, a pipe
    that the parent keeps open while it runs.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        else:
            while os.read(0, 1024):
                pass
        act()

    threading.Thread(target=wait, daemon=True).start()


def environment() -> dict[str, object]:
    """Return versions, hardware, code and command line of this process."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "s2d3d": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "num_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that affect results; None: not installed."""
    packages = ("torch", "torch-scatter", "timm", "numpy", "h5py", "open3d", "pydantic")
    return {name: installed_version(name) for name in packages}


@functools.cache
def installed_version(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _git_commit() -> str | None:
    """Return the commit of the package's checkout, with "+" if files differ from it: that of the code in memory."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
        new = [*git, "ls-files", "--others", "--exclude-standard", "--", "*.py"]  # of the package alone
        added = subprocess.run(new, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() or added.stdout.strip() else "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
