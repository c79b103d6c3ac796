"""Several processes: weak scaling of ranks, and all cores for one training or for several side by side."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from s2d3d.s2d import EWA
from s2d3d.training.optim import build_optimizer

from .comparison import Comparison
from .interleave import KEPT, Contestant, Runner, Task, interleave
from .section import Settings
from .timing import Timing
from .training import CLIP, LEARNING_RATE, SHARE_RATE, ModelSpec, build_model, build_step, clouds
from .worker import WorkerRunner

ONE_PROCESS, RANKS, SIDE_BY_SIDE = "one process", "ranks of DDP", "trainings side by side"


def weak_scaling(settings: Settings, spec: ModelSpec, ranks: int = 2) -> Comparison:
    """Time a step of DDP training on 1 rank and on `ranks`, with the same batch and threads for each rank.

    Ranks share the processor's cores (gloo) or have a GPU each (nccl).

    Args:
        settings: threads of all ranks together, or a device with a GPU for each.
        spec: the model, its batch that of one rank.
        ranks: processes.
    """
    on_gpus = settings.device.type == "cuda"
    threads = max(1, settings.num_threads // ranks)
    devices = [f"cuda:{rank}" if on_gpus else "cpu" for rank in range(ranks)]
    backend = "nccl" if on_gpus else "gloo"

    with tempfile.TemporaryDirectory() as folder:

        def start(contestant: Contestant) -> Runner:
            world = 1 if contestant.name == "1 rank" else ranks
            meeting = str(Path(tempfile.mkdtemp(dir=folder)) / "ranks")  # of this start: a file is used once
            builds = [
                partial(build_rank, spec.but(device=device), rank, world, backend, meeting)
                for rank, device in enumerate(devices[:world])
            ]
            return Ranks(contestant.name, builds, devices, threads)

        names = ("1 rank", f"{ranks} ranks")
        return interleave(
            f"weak scaling, {spec.name}",
            [
                Contestant(name, _never, same_math=False, note=f"{backend}, {threads} thread(s) a rank")
                for name in names
            ],
            title=f"{spec.name}: S2D training step with DDP, batch {spec.batch} on each rank",
            start=start,
            samples=spec.batch,
            **settings.interleaving(8),
        )


def all_cores(settings: Settings, spec: ModelSpec) -> Comparison:
    """Time as many training steps as there are threads: by one process, by ranks of DDP, by trainings side by side.

    Args:
        settings: threads of all processes together. The largest number that divides the batch is used.
        spec: the model, its batch that of one step, which ranks share.
    """
    count = max(n for n in range(1, settings.num_threads + 1) if spec.batch % n == 0)
    rank = partial(build_rank, spec.but(batch=spec.batch // count), world=count, backend="gloo")

    with tempfile.TemporaryDirectory() as folder:

        def start(contestant: Contestant) -> Runner:
            meeting = str(Path(tempfile.mkdtemp(dir=folder)) / "ranks")
            builds, threads = {
                ONE_PROCESS: ([partial(build_steps, partial(build_step, spec), count)], count),
                RANKS: ([partial(build_steps, partial(rank, rank=i, meeting=meeting), count) for i in range(count)], 1),
                SIDE_BY_SIDE: ([partial(build_step, spec.but(seed=i)) for i in range(count)], 1),
            }[contestant.name]
            return Ranks(contestant.name, builds, ["cpu"] * len(builds), threads)

        return interleave(
            f"all cores, {spec.name}",
            [
                Contestant(ONE_PROCESS, _never, same_math=False, note=f"{count} threads"),
                Contestant(RANKS, _never, same_math=False, note=f"{count} processes, batch {spec.batch // count} each"),
                Contestant(SIDE_BY_SIDE, _never, same_math=False, note=f"{count} processes, each its own training"),
            ],
            title=f"{spec.name}: {count} S2D training steps of batch {spec.batch} on {count} cores",
            start=start,
            samples=count * spec.batch,
            **settings.interleaving(8),
        )


def build_steps(build: Callable[[], Task], count: int) -> Task:
    """Make the task of several runs of another task."""
    task = build()
    return Task(lambda: [task.run() for _ in range(count)])


def _never() -> Task:
    raise AssertionError("processes are built by their starter")


class Ranks:
    """Worker processes that take each turn together: wall time of the slowest, processor time of all."""

    def __init__(
        self, name: str, builds: Sequence[Callable[[], Task]], devices: Sequence[str], num_threads: int
    ) -> None:
        # All at once: a rank is built when it has met the others.
        self.workers = [
            WorkerRunner(f"{name} ({rank})", build, KEPT, torch.device(device), num_threads, wait=False)
            for rank, (build, device) in enumerate(zip(builds, devices))
        ]
        try:
            self.ready()
        except BaseException:
            self.close()
            raise

    def ready(self) -> None:
        for worker in self.workers:
            worker.ready()

    def outputs(self) -> list[Tensor] | None:
        return None

    def run(self, repeat: int) -> Timing:
        for worker in self.workers:
            worker.send("run", repeat)
        timings = [worker.receive() for worker in self.workers]
        return Timing(max(timing.wall for timing in timings), sum(timing.cpu for timing in timings))

    def facts(self) -> dict[str, float]:
        for worker in self.workers:
            worker.send("facts")
        answers = [worker.receive() for worker in self.workers]
        return answers[0]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def build_rank(spec: ModelSpec, rank: int, world: int, backend: str, meeting: str) -> Task:
    """Make the task of one rank's S2D training step; it returns when all ranks of `meeting`, a file, are there."""
    if torch.device(spec.device).type == "cuda":
        torch.cuda.set_device(spec.device)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    model: nn.Module = build_model(spec).train()
    points, labels = clouds(spec.batch, spec.points, spec.seed + rank, spec.device)
    optimizer = build_optimizer(model, name="adamw", lr=LEARNING_RATE, weight_decay=0.05)
    ewa = EWA(model, share_rate=SHARE_RATE, schedule="constant", total_steps=1)
    network = DistributedDataParallel(model, device_ids=None if spec.device == "cpu" else [spec.device])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(points), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        ewa.step()

    return Task(step)


def exchanged_bytes(spec: ModelSpec) -> tuple[int, int]:
    """Return the bytes of gradients that DDP averages in each step, and the bytes of training state of one rank.

    The state is parameters, gradients and two moments of AdamW; activations come on top.
    """
    gradients = sum(parameter.nbytes for parameter in build_model(spec).parameters() if parameter.requires_grad)
    return gradients, 4 * gradients
