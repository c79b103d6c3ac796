"""Worker processes for the preparation of data; they end with the process that started them, however it ends."""

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from .errors import InputError
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
    with executor as pool:
        try:
            yield partial(pool.map, chunksize=CHUNK)
        except BrokenProcessPool as error:
            raise InputError(f"a {doing} process died, perhaps for lack of memory; {remedy}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(start: Callable[..., None] | None, arguments: tuple) -> None:
    if start is not None:
        start(*arguments)
    # A process that is killed cannot stop its workers, and they would wait for work forever.
    watch_parent(lambda: os._exit(1))
