"""Worker processes: for the preparation of data, and for work whose time is bounded.

They end with the process that started them, however it ends.
"""

import contextlib
import logging
import multiprocessing
import os
import re
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .errors import InputError, printable
from .machine import watch_parent

log = logging.getLogger(__name__)

CHUNK = 8
"""Items that a worker is sent at once."""


@contextlib.contextmanager
def worker_pool(
    workers: int,
    module: str,
    *,
    doing: str,
    remedy: str = "try fewer --workers",
    start: Callable[..., None] | None = None,
    arguments: tuple = (),
) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a `map` that computes in worker processes and returns results in order; with one worker, in this process.

    Args:
        workers: processes, at least 1.
        module: which each process has imported before it starts.
        doing: what a process does, for the message when one dies: "scanning".
        remedy: what the user can do then.
        start: called in each process before its first item; not with one worker.
        arguments: of `start`.

    Raises:
        InputError: a process died.

    Example:
        >>> with worker_pool(1, __name__, doing="counting") as spread:
        ...     list(spread(abs, [-1, 2]))
        [1, 2]
    """
    if workers == 1:
        yield map
        return
    # Not fork: this process may run threads of torch, which a forked child would wait for.
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload([module])
    try:
        executor = ProcessPoolExecutor(workers, context, _start_worker, (start, arguments))
    except OSError as error:  # no semaphores: /dev/shm is missing or read-only
        log.warning("no worker processes (%s): %s in this one", error.strerror or error, doing)
        if start is not None:
            start(*arguments)
        yield map
        return

    def spread(*work: Any) -> Iterator[Any]:
        with _without_main():  # the processes are started here
            return pool.map(*work, chunksize=CHUNK)

    with executor as pool:
        try:
            yield spread
        except BrokenProcessPool as error:
            raise InputError(f"a {doing} process died, perhaps for lack of memory; {remedy}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let new processes import the package alone: a user's script, without the usual guard, would run again in each."""
    main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {key: main[key] for key in ("__file__", "__spec__") if key in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        del main["__spec__"]
        main.update(kept)


def _start_worker(start: Callable[..., None] | None, arguments: tuple) -> None:
    if start is not None:
        start(*arguments)
    # A process that is killed cannot stop its workers, and they would wait for work forever.
    watch_parent(lambda: os._exit(1))


def run_within(seconds: float, body: Callable[[], object]) -> str:
    """Run a function in a copy of this process, which is killed when its time is over.

    The copy has all that is in memory, so nothing is read or imported anew, and it may use one thread of torch and no
    GPU. Whatever happens in it, such as a crash or a lack of memory, leaves this process as it is.

    Args:
        seconds: that the function may take.
        body: the function; what it prints is dropped.

    Returns:
        Why it did not end well, in one line; empty if it did.

    Example:
        >>> run_within(20, lambda: None), run_within(20, lambda: int("x"))
        ('', "invalid literal for int() with base 10: 'x'")
        >>> run_within(0.1, lambda: time.sleep(60))
        'it took longer than 0.1 s'
    """
    receiver, sender = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_run_copy, args=(body, sender), daemon=True)
    with warnings.catch_warnings():  # of threads, whose locks could keep the copy waiting: until its time is over
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    os.close(sender)
    said, end = b"", time.monotonic() + seconds
    try:
        while select.select([receiver], [], [], max(0.0, end - time.monotonic()))[0]:
            part = os.read(receiver, 2**16)
            if not part:
                break
            said = (said + part)[-(2**16) :]
        process.join(max(0.0, end - time.monotonic()))
    finally:
        late = process.is_alive()
        process.kill()
        process.join()
        os.close(receiver)
    if late:
        return f"it took longer than {seconds:.1f} s"
    if process.exitcode == 0:
        return ""
    lines = said.decode(errors="replace").strip().splitlines()
    text = re.sub(r"^[\w.]+: ", "", lines[-1]) if lines and process.exitcode == 1 else ""
    return printable(text[:300]) or f"its process ended with exit code {process.exitcode}"


def _run_copy(body: Callable[[], object], sender: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(sender, stream)
    sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)  # those of the process that was copied are not here
    watch_parent(lambda: os._exit(1))
    body()
