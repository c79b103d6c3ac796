"""Whole training steps as CUDA graphs: recorded once, replayed, several seeds in parallel.

With small batches, kernel launches on the host limit the speed of a step. A CUDA graph launches all kernels at once.
Values that the host sets at each update are in tensors that the graph reads, see `TrainingStep.prepare`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from s2d3d.errors import InputError
from s2d3d.s2d.ewa import expert_layers

from .interleave import Task, deviation
from .training import LEARNING_RATE, ModelSpec, TrainingStep, without_dropping

WARMUP = 3
"""Updates before recording: kernels are compiled, libraries choose algorithms, the optimizer makes its state."""
CHECKED = 4
"""Updates after which weights are compared."""
CHECK_TOLERANCE = 1e-4
"""Of a weight: an update moves it by at most 5e-4, and EWA moves experts that are 0.02 apart by up to 0.008."""
CHECK_EPS = 1e-2
"""AdamW's epsilon in the comparison, so that gradients that are nothing but rounding do not become full updates."""
SPREAD = 0.02


@contextlib.contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Make all draws from the default generator of a device use `generator` inside the context.

    On a GPU both generators then share one state, so that a graph recorded inside uses the state of `generator`.
    """
    if generator.device.type == "cpu":
        state = torch.default_generator.get_state()
        torch.default_generator.set_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(state)
        return
    index = generator.device.index
    default = torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]
    shared = default.graphsafe_get_state()
    default.graphsafe_set_state(generator)
    try:
        yield
    finally:
        default.graphsafe_set_state(shared)


class RecordedStep:
    """A training step recorded as a CUDA graph, with its own stream and random numbers.

    Each replay draws other partitions and drops other paths, because it advances the state of `generator`. Two graphs
    that run at the same time must not write to the same memory. Each therefore has its own stream (and workspace of the
    matrix library), memory pool and generator. Illegal memory accesses were seen when `torch.compile` recorded graphs
    in the same process (mode reduce-overhead): use a separate process for each.
    """

    def __init__(self, step: TrainingStep, generator: torch.Generator) -> None:
        """Record the step. Weights, buffers, optimizer, schedule and generator are unchanged afterwards.

        Args:
            step: recordable, on a GPU, before its first update.
            generator: generator of that GPU for all draws of the modules.
        """
        self.step, self.generator = step, generator
        self.device = generator.device
        self.stream, self.graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        drawn = generator.get_state()
        state = [*step.model.parameters(), *step.model.buffers()]
        before = [tensor.detach().clone() for tensor in state]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with drawing_from(generator):
            with torch.cuda.stream(self.stream):
                for _ in range(WARMUP):
                    step.run()
                with torch.no_grad():
                    for tensor, value in zip(state, before):
                        tensor.copy_(value)
                    for values in step.optimizer.state.values():
                        for value in values.values():
                            value.zero_()  # moments and counts, in place: the graph goes on with these tensors
            if step.ewa:
                step.ewa.num_steps = 0
            self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph, stream=self.stream):  # records and computes nothing
                self.loss = step.compute()
        generator.set_state(drawn)

    def launch(self, learning_rate: float = LEARNING_RATE) -> None:
        """Start an update after the earlier work of the current stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.step.prepare(learning_rate)
            self.graph.replay()

    def join(self) -> None:
        """Make the current stream wait for the update."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


def run_side_by_side(recorded: Sequence[RecordedStep], learning_rate: float = LEARNING_RATE) -> None:
    """Start one update of each graph in parallel."""
    for one in recorded:
        one.launch(learning_rate)
    for one in recorded:
        one.join()


def build_recorded(spec: ModelSpec, count: int = 1) -> Task:
    """Make the task of one recorded update of each of `count` runs of different seeds, side by side.

    Raises:
        InputError: recorded and plain updates end with other weights.
    """
    torch._dynamo.config.recompile_limit = 64  # one entry for each seed, more than the default allows
    check_recorded(spec, count)
    recorded = [record(TrainingStep(one, recordable=True), one.seed) for one in _seeds(spec, count)]
    return Task(partial(run_side_by_side, recorded), recorded[0].step.logits)


def record(step: TrainingStep, seed: int) -> RecordedStep:
    """Record a step with its own generator."""
    return RecordedStep(step, torch.Generator(step.points.device).manual_seed(seed))


def check_recorded(spec: ModelSpec, count: int = 1) -> None:
    """Compare weights after a few updates, recorded and side by side, with those of plain updates, run after run.

    Learning rate and share rate change from update to update, experts start apart, partitions are drawn from equal
    seeds; dropout and drop path are off.

    Raises:
        InputError: they differ by more than `CHECK_TOLERANCE`.
    """
    found = _weights_recorded(spec, count)
    for one, weights in zip(_seeds(spec, count), found, strict=True):
        distance = deviation(weights, _weights_plain(one))
        if not distance <= CHECK_TOLERANCE:
            raise InputError(
                f"{spec.name}: after {CHECKED} recorded updates of {count} seed(s), weights of seed {one.seed} differ "
                f"from those of plain updates by {distance:.2g}, the tolerance is {CHECK_TOLERANCE:g}: what computes "
                "something else is not compared"
            )


def _seeds(spec: ModelSpec, count: int) -> list[ModelSpec]:
    return [spec.but(seed=spec.seed + index) for index in range(count)]


def _check_step(spec: ModelSpec, recordable: bool) -> TrainingStep:
    step = TrainingStep(spec, recordable=recordable, schedule="linear", total_steps=CHECKED)
    for group in step.optimizer.param_groups:
        group["eps"] = CHECK_EPS
    if spec.experts:
        generator = torch.Generator().manual_seed(spec.seed)
        with torch.no_grad():
            for layer in expert_layers(step.model):
                for parameter in layer.expert_parameters():
                    drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                    parameter.add_(SPREAD * drawn)
    return step


def _learning_rates() -> list[float]:
    return [LEARNING_RATE * (index + 1) / CHECKED for index in range(CHECKED)]


def _weights_recorded(spec: ModelSpec, count: int) -> list[list[Tensor]]:
    steps = [_check_step(one, recordable=True) for one in _seeds(spec, count)]
    with contextlib.ExitStack() as stack:
        for step in steps:
            stack.enter_context(without_dropping(step.model))
        recorded = [record(step, one.seed) for step, one in zip(steps, _seeds(spec, count))]
        for learning_rate in _learning_rates():
            run_side_by_side(recorded, learning_rate)
    return [[parameter.detach().cpu() for parameter in step.parameters] for step in steps]


def _weights_plain(spec: ModelSpec) -> list[Tensor]:
    step = _check_step(spec, recordable=False)
    generator = torch.Generator(step.points.device).manual_seed(spec.seed)
    with without_dropping(step.model), drawing_from(generator):
        for learning_rate in _learning_rates():
            step.run(learning_rate)
    return [parameter.detach().cpu() for parameter in step.parameters]
