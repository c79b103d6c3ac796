"""Contestants in separate processes, timed one at a time. Allocator and threads are settings of a whole process."""

import contextlib
import multiprocessing
import os
import resource
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
from torch import Tensor

from s2d3d.errors import InputError
from s2d3d.machine import choose_device, keep_large_allocations
from s2d3d.s2d.dispatch import scatter_backend

from .interleave import KEPT, Contestant, LocalRunner, Skip, Start, Task
from .timing import Timing, make_timer

PRELOAD = ("__main__", "benchmarks.training", "benchmarks.parallel")


def workers(device: torch.device, num_threads: int, *, ahead: bool | None = None) -> Start:
    """Return a function that starts each contestant in a separate process, which then waits for its turns.

    Args:
        device: device of all contestants.
        num_threads: of each process.
        ahead: let all contestants build, compute their outputs and run once in parallel before the first turn. None:
            only on a GPU, where most of that time is compilation.
    """
    at_once = device.type == "cuda" if ahead is None else ahead

    def start(contestant: Contestant) -> WorkerRunner:
        runner = WorkerRunner(
            contestant.name, contestant.build, contestant.allocator, device, num_threads, wait=not at_once
        )
        if at_once:
            runner.send_ahead(("outputs", "try") if contestant.same_math else ("try",))
        return runner

    return start


class WorkerRunner:
    """Makes a process build a task and run it repeatedly.

    The process is forked from a server that has only imported the package, so that it starts fast and shares no
    computed data.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Task],
        allocator: str,
        device: torch.device,
        num_threads: int,
        wait: bool = True,
    ) -> None:
        """Start the process.

        Args:
            name: of the contestant, for messages.
            build: makes the task; picklable.
            allocator: `KEPT` or `DEFAULT`.
            device: that the task computes on, whose memory and time are measured.
            num_threads: of the process.
            wait: until the task is built. Otherwise the caller calls `ready` once, which does.

        Raises:
            Skip: the task cannot be built here.
            InputError: a mistake of the user, or the process died.
        """
        self.name = name
        self._built, self._ahead = False, deque[str]()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self.connection, theirs = context.Pipe()
        arguments = (theirs, build, allocator, str(device), num_threads)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        if not wait:
            return
        try:
            self.ready()
        except BaseException:
            self.close()
            raise

    def ready(self) -> None:
        """Wait until the task is built; see `__init__` for what is raised."""
        if not self._built:
            self.receive()
            self._built = True

    def send_ahead(self, requests: Sequence[str]) -> None:
        """Send requests whose answers are asked for later, in this order, or never: "outputs", and "try", a run."""
        with contextlib.suppress(OSError):  # it ended: `ready` says why
            for request in requests:
                self.connection.send((request, 0))
                self._ahead.append(request)

    def outputs(self) -> list[Tensor] | None:
        arrays = self.ask("outputs")
        return None if arrays is None else [torch.from_numpy(array) for array in arrays]

    def run(self, repeat: int) -> Timing:
        return self.ask("run", repeat)

    def facts(self) -> dict[str, float]:
        return self.ask("facts")

    def ask(self, request: str, argument: int = 0) -> Any:
        """Send a request and wait for the answer; where it was sent ahead, wait for that answer."""
        while self._ahead:
            if self._ahead.popleft() == request:
                return self.receive()
            self.receive()
        self.send(request, argument)
        return self.receive()

    def send(self, request: str, argument: int = 0) -> None:
        """Send a request; `receive` waits for its answer."""
        try:
            self.connection.send((request, argument))
        except OSError:
            self._died()

    def receive(self) -> Any:
        """Wait for an answer, and raise here what was raised there."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            self._died()
        if kind == "skip":
            raise Skip(content)
        if kind == "input":
            raise InputError(content)
        if kind == "fault":
            raise RuntimeError(f"in the process of contestant '{self.name}':\n{content}")
        return content

    def close(self) -> None:
        """End the process."""
        self.connection.close()  # which ends its loop
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _died(self) -> NoReturn:
        self.process.join(10)
        code = self.process.exitcode
        likely = "; killed, probably for lack of memory" if code == -signal.SIGKILL else ""
        raise InputError(f"contestant '{self.name}': its process ended with code {code}{likely}") from None


def serve(connection: Connection, build: Callable[[], Task], allocator: str, device: str, num_threads: int) -> None:
    """Build a task and answer requests until the other end closes: the body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    try:
        torch.set_num_threads(num_threads)
        if allocator == KEPT:
            keep_large_allocations()
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
        scatter_backend()  # loads its library before memory is counted
        choose_device(device)  # makes a GPU of a given number the current one
        before = peak_memory(torch.device(device))
        task = build()
        runner = LocalRunner(task, make_timer(torch.device(device)))
        connection.send(("ready", None))
        while True:
            request, argument = connection.recv()
            answer: object
            if request == "run":
                answer = runner.run(argument)
            elif request == "try":
                answer = runner.run(1)
            elif request == "outputs":
                tensors = runner.outputs()
                answer = None if tensors is None else [t.detach().float().cpu().numpy() for t in tensors]
            else:
                peak = peak_memory(torch.device(device))
                answer = {**runner.facts(), "peak_bytes": peak, "peak_bytes_above_start": peak - before}
            connection.send(("answer", answer))
    except (EOFError, ConnectionError):
        pass
    except Skip as reason:
        connection.send(("skip", str(reason)))
    except InputError as error:
        connection.send(("input", str(error)))
    except BaseException:  # whatever it was belongs to the process that asked
        connection.send(("fault", traceback.format_exc()))
    finally:
        connection.close()
        os._exit(0)  # no clean-up of a library, such as of a process group, may hang


def peak_memory(device: torch.device) -> int:
    """Return the most memory so far: of this process in bytes, or of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
