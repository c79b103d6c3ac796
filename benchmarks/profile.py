"""Where the time of a training step goes, and how near the step is to its own matrix products, each timed alone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from s2d3d.errors import InputError

from .interleave import Contestant, Task, interleave
from .presets import PUBLIC_BERT, SMALL_BERT, spec_for
from .section import Section, Settings, new_section
from .stats import spread
from .training import ModelSpec, TrainingStep, build_step
from .versus import EXPERTS

STEP, PRODUCTS = "the training step", "its matrix products alone"
SMALLEST_SHARE = 0.01
"""Share of the time above which an operation has a row of its own."""
ATTENTION = {
    "aten._scaled_dot_product_flash_attention_for_cpu": (1, 1),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": (1, 3),
}
"""Products of query and key, and of weights and values, that an attention needs."""

Product = tuple[Callable[..., Any], tuple[Any, ...]]
"""An operation and its arguments, with an `Operand` in the place of each tensor."""


def measure(settings: Settings) -> Section:
    """Measure the dense step of the ViT-S and of the small model, and the ViT-S with experts.

    Raises:
        InputError: the device is not a CPU, whose operations end when their call returns.
    """
    if settings.device.type != "cpu":
        raise InputError("benchmark profile measures operations of a CPU; for a GPU use torch.profiler")
    section = new_section("profile", "Where a training step spends its time", settings)
    vit, small = (spec_for(preset, settings) for preset in (PUBLIC_BERT, SMALL_BERT))
    for name, spec in (("point_bert", vit), ("point_bert_small", small), ("point_bert_s2d", vit.but(experts=EXPERTS))):
        rows, products = profile(spec, settings.pick(3, 1))
        section.tables[f"{name}, one training step of batch {spec.batch}, by operation"] = [
            ["operation", "calls", "ms", "share"], *rows,
        ]  # fmt: skip
        comparison = interleave(
            f"{name} products",
            [
                Contestant(STEP, partial(build_step, spec)),
                Contestant(
                    PRODUCTS, partial(build_products, products), same_math=False,
                    note=f"{sum(products.values())} products of {len(products)} kinds, shapes and layouts of the step",
                ),
            ],
            title=f"{name}: the step and its own matrix products, batch {spec.batch}, {spec.points} points",
            start=settings.here(),
            base=STEP,
            samples=spec.batch,
            **settings.interleaving(8, min_seconds=0.2),
        )  # fmt: skip
        section.comparisons.append(comparison)
        section.add_ratio(f"{name}.attained", comparison, PRODUCTS, STEP)
    return section


class Operand(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Records time and number of all operations of torch in its context, and their matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func._overloadpacket)
        start = perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[name] += perf_counter() - start
        self.calls[name] += 1
        if func._overloadpacket in flop_registry:
            self.products.update(_products(func, name, args))
        return result


def profile(spec: ModelSpec, steps: int) -> tuple[list[list[str]], Counter[Product]]:
    """Record training steps.

    Args:
        spec: of the model.
        steps: how many are recorded, after two that are not; times are their medians.

    Returns:
        rows of a table: operation, calls, milliseconds and share of the step; the matrix products of one step.
    """
    step = TrainingStep(spec)
    recorders, totals = [], []
    for index in range(2 + steps):
        recorder = Recorder()
        start = perf_counter()
        with recorder:
            step.run()
        if index >= 2:
            totals.append(perf_counter() - start)
            recorders.append(recorder)
    total = spread(totals).median
    seconds = {name: spread([recorder.seconds[name] for recorder in recorders]).median for name in recorders[0].calls}
    calls = recorders[0].calls
    large = sorted(
        (name for name in seconds if seconds[name] >= SMALLEST_SHARE * total), key=lambda name: -seconds[name]
    )
    small = seconds.keys() - set(large)
    rows = [_row(name.removeprefix("aten."), calls[name], seconds[name], total) for name in large]
    rows.append(_row("all others", sum(calls[name] for name in small), sum(seconds[name] for name in small), total))
    outside = max(0.0, total - sum(seconds.values()))
    rows.append(_row("outside of torch's operations: Python, autograd, numpy's sampling and search", 1, outside, total))
    return rows, recorders[0].products


def build_products(products: Counter[Product]) -> Task:
    """Make the task that does matrix products one after the other, on operands of their own."""
    calls = [(partial(func, *map(_fresh, arguments)), count) for (func, arguments), count in products.items()]

    @torch.no_grad()
    def run() -> None:
        for call, count in calls:
            for _ in range(count):
                call()

    return Task(run)


def _products(func: Any, name: str, args: tuple[Any, ...]) -> Iterator[Product]:
    if name not in ATTENTION:
        yield func, tuple(map(_operand, args))
        return
    # An attention's products alone: what surrounds them is not counted as attainable.
    query, key, value = args[1:4] if name.endswith("backward") else args[:3]
    (batch, heads, tokens, width), keys = query.shape, key.shape[2]
    shapes = ((tokens, width), (width, keys)), ((tokens, keys), (keys, value.shape[3]))
    for pair, count in zip(shapes, ATTENTION[name]):
        operands = tuple(_operand(query.new_empty(batch * heads, *shape)) for shape in pair)
        yield from [(torch.ops.aten.bmm.default, operands)] * count


def _operand(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Operand(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_operand, value)) if isinstance(value, list | tuple) else value


def _fresh(value: Any) -> Any:
    if not isinstance(value, Operand):
        return value
    shape = [1 if stride == 0 else size for size, stride in zip(value.shape, value.strides)]  # an expanded tensor
    return torch.empty_strided(shape, value.strides, dtype=value.dtype).normal_().expand(value.shape)


def _row(name: str, calls: int, seconds: float, total: float) -> list[str]:
    return [name, f"{calls:,}", f"{1e3 * seconds:,.1f}", f"{100 * seconds / total:.1f} %"]
