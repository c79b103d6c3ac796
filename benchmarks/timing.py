"""Clocks: the time on the wall and the processor time of a piece of work."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

WALL, CPU = "wall", "cpu"
CLOCKS = (WALL, CPU)
"""Clocks that ratios can refer to. Processor time counts all threads of the process, and no time of other programs."""


class Timing(NamedTuple):
    """The time of one run, in seconds."""

    wall: float
    cpu: float
    """Processor time of the whole process, all threads together."""


Timer = Callable[[Callable[[], object], int], Timing]
"""Runs a function a number of times and returns the mean time of one run."""


def make_timer(
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
) -> Timer:
    """Return a timer for work on `device`: a clock, or events on a GPU; the device is idle before and after.

    Args:
        device: where the work runs.
        clock: seconds on the wall; not used on a GPU.
        cpu_clock: seconds of processor time.
    """

    def wall(run: Callable[[], object], repeat: int) -> Timing:
        started, cpu = clock(), cpu_clock()
        for _ in range(repeat):
            run()
        return Timing((clock() - started) / repeat, (cpu_clock() - cpu) / repeat)

    def events(run: Callable[[], object], repeat: int) -> Timing:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cpu = cpu_clock()
        first.record()
        for _ in range(repeat):
            run()
        last.record()
        torch.cuda.synchronize(device)
        return Timing(first.elapsed_time(last) / 1000 / repeat, (cpu_clock() - cpu) / repeat)

    return events if device.type == "cuda" else wall
