"""The performance targets: each with its bound and the reasons for the result."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .section import Measure

AT_MOST, AT_LEAST, EQUALS = "at most", "at least", "equals"
HIT, MISSED, UNDECIDED, NOT_MEASURED = STATES = ("hit", "missed", "undecided", "not measured")
EQUAL_WITHIN = 0.01
"""A ratio equals its bound when its interval is no further away."""
PLACEHOLDER = re.compile(r"\{([\w.]+):([^}]*)\}")


@dataclass(frozen=True)
class Target:
    """A target number.

    Attributes:
        key: of the measure.
        title: for readers.
        sense: `AT_MOST`, `AT_LEAST` or `EQUALS`.
        bound: in the measure's unit.
        unit: "x" for ratios, else the text after the number.
        why: the limiting factors; `{key:format}` is replaced by a measure.
        missed: additional text if the target is missed.
    """

    key: str
    title: str
    sense: str
    bound: float
    unit: str = "x"
    why: str = ""
    missed: str = ""


@dataclass(frozen=True)
class Verdict:
    """A target with its result.

    Attributes:
        target: the target.
        state: of `STATES`.
        measured: the number with its interval as text; "not measured: REASON" where there is none.
        why: the reasons, with numbers filled in.
    """

    target: Target
    state: str
    measured: str
    why: str


_TRAIN_LIMIT = (
    "matrix products alone would allow {{cpu.step.{0}.limit_{1}:.2f}}x at the {{cpu.step.matmul_float32:.0f}} GFLOP/s "
    "attained here beside (float32, the FFN's size)"
)
_EVALUATION_LIMIT = (
    "matrix products alone would allow {{cpu.inference.{0}.limit_{1}:.2f}}x at the "
    "{{cpu.inference.matmul_float32:.0f}} GFLOP/s attained here beside"
)
_MEMORY_BOUND = "; most of its time is memory traffic of gathered neighbours, not matrix products"
_ALLOCATOR = "; with the system's allocator ours takes {{cpu.{0}.{1}.allocator:.2f}}x its time as shipped"
_EXTRA_WEIGHTS = "gradients, clipping, AdamW and EWA of the additional weights take time that no batch size shortens"


def _bf16(section: str) -> str:
    """Return the reason of a target in bf16: the rates that were attained beside."""
    rates = (f"{{cpu.{section}.matmul_{kind}:.0f}}" for kind in ("bf16", "float32"))
    return "attained matrix products: {} GFLOP/s in bf16, {} in float32".format(*rates)


def _versus(name: str, title: str, train: tuple[float, float], evaluate: tuple[float, float]) -> list[Target]:
    """Return the targets of a model against its reference module, in training and evaluation, conditions A and B."""
    listed = []
    for section, verb, bounds, limit in (
        ("step", "training", train, _TRAIN_LIMIT),
        ("inference", "evaluation", evaluate, _EVALUATION_LIMIT),
    ):
        folded = "folded_" if section == "inference" else ""
        work = f"{verb} with BatchNorm folded" if folded else verb
        for condition, bound in zip("AB", bounds):
            why = limit.format(name, condition) + (_MEMORY_BOUND if name == "point_transformer" else "")
            why += _ALLOCATOR.format(section, name) if condition == "A" else ""
            listed.append(
                Target(
                    f"cpu.{section}.{name}.{folded}{condition}",
                    f"{title}, {work}, condition {condition}, over its reference", AT_LEAST, bound, why=why,
                )
            )  # fmt: skip
    return listed


TARGETS: tuple[Target, ...] = (
    Target(
        "cpu.layer.rup", "RUP-MoF layer over the dense FFN", AT_MOST, 1.03,
        why="the same matrix products, in slices, beside a permutation, a gather and a scatter; a loop over experts: "
        "{cpu.layer.loop:.2f}x",
        missed="the gradients of 4x the weights are written as well",
    ),
    Target(
        "cpu.step.point_bert.s2d", "S2D step over the dense step, EWA included, ViT-S", AT_MOST, 1.01,
        why="experts in 6 of 12 FFNs; the same step against itself: {cpu.step.point_bert.noise:.3f}x",
        missed=_EXTRA_WEIGHTS,
    ),
    Target(
        "cpu.step.point_bert_small.s2d", "the same, point_bert_small", AT_MOST, 1.03,
        why="the same step against itself: {cpu.step.point_bert_small.noise:.3f}x", missed=_EXTRA_WEIGHTS,
    ),
    Target(
        "cpu.step.point_transformer_ffn.s2d", "the same, Point Transformer with FFNs", AT_MOST, 1.03,
        why="the same step against itself: {cpu.step.point_transformer_ffn.noise:.3f}x", missed=_EXTRA_WEIGHTS,
    ),
    Target(
        "cpu.step.point_bert.noise", "the same step against itself, ViT-S", EQUALS, 1.0,
        why="the noise that the intervals above must hold",
    ),
    Target(
        "cpu.step.memory.extra", "peak memory of S2D above dense, over the additional experts' state", AT_MOST, 1.0,
        why="{cpu.step.memory.dense_mib:.0f} and {cpu.step.memory.s2d_mib:.0f} MiB at the peak; parameters, gradients "
        "and moments of the additional experts: {cpu.step.memory.experts_mib:.0f} MiB; with the system's allocator the "
        "ratio is {cpu.step.memory.extra_default:.2f}",
        missed="resident memory counts the holes of a heap that keeps freed blocks; they move the peak of one "
        "model by hundreds of MiB",
    ),
    Target(
        "cpu.profile.point_bert.attained", "matrix products of the ViT-S step, each alone, over the step",
        AT_LEAST, 0.9,
        why="the step's own shapes and layouts, timed in the same run; with experts "
        "{cpu.profile.point_bert_s2d.attained:.2f}x",
        missed="normalisation, activations, maxima over points, the optimizer: memory traffic that no product hides",
    ),
    *_versus("point_bert", "ViT-S Point-BERT", (1.8, 1.35), (2.3, 1.3)),
    Target(
        "cpu.step.point_bert.bf16_A", "ViT-S, training in bf16 against the float32 reference, condition A",
        AT_LEAST, 2.5, why=_bf16("step"),
    ),
    Target(
        "cpu.inference.point_bert.bf16_A", "ViT-S, evaluation in bf16 against the float32 reference, condition A",
        AT_LEAST, 2.0, why=_bf16("inference"),
    ),
    Target(
        "cpu.step.point_bert_small.bf16_loss", "mean loss of 200 steps in bf16 over that in float32, point_bert_small",
        AT_MOST, 1.02, why="8 seeds; weights, batches and dropout of a seed are the same in both",
    ),
    Target(
        "cpu.data.prefix.point_bert", "samples of the data path over those that ViT-S training consumes",
        AT_LEAST, 20.0,
        why="{cpu.data.prefix.samples_per_second:.0f} samples/s in one process from cached farthest-point prefixes",
    ),
    Target(
        "cpu.data.prefix.point_bert_small", "the same, point_bert_small", AT_LEAST, 20.0,
        why="a step of the small model is short",
    ),
    *_versus("point_transformer", "Point Transformer as published", (1.5, 1.5), (1.5, 1.5)),
    Target(
        "cpu.inference.point_bert.merged", "evaluation of the merged model over the dense one, ViT-S", EQUALS, 1.0,
        why="the same modules; the dense model against itself: {cpu.inference.point_bert.noise:.3f}x",
    ),
    Target(
        "cpu.inference.point_bert_small.merged", "the same, point_bert_small", EQUALS, 1.0,
        why="the dense model against itself: {cpu.inference.point_bert_small.noise:.3f}x",
    ),
    Target(
        "cpu.ops.knn_64.torch_cluster", "32 nearest of 1,024 points to 64 centres, over torch_cluster", AT_LEAST, 1.0,
    ),
    Target(
        "cpu.ops.fps_1024.fpsample", "64 farthest of 1,024 points, over fpsample's bucket form", AT_LEAST, 1.0,
    ),
    Target(
        "cpu.ops.fps_8192.fpsample", "1,200 farthest of 8,192 points, over fpsample's bucket form", AT_LEAST, 1.0,
    ),
    Target("cuda.gpu.batch_512.s2d", "GPU: S2D step over the dense step, ViT-S, batch 512, bf16", AT_MOST, 1.03),
    Target(
        "cuda.gpu.batch_512.samples_per_second", "GPU: ViT-S training at batch 512", AT_LEAST, 20000.0,
        unit="samples/s",
        why="batch 32: {cuda.gpu.batch_32.samples_per_second:.0f} samples/s, the step as a CUDA graph: "
        "{cuda.gpu.batch_32.recorded.samples_per_second:.0f}; four seeds side by side, a graph each: "
        "{cuda.gpu.seeds_4.samples_per_second:.0f}",
    ),
)  # fmt: skip


def judge(target: Target, measures: Mapping[str, Measure]) -> Verdict:
    """Return whether a target is reached. Its interval decides, where the number has one, never the number alone.

    A bound from one side is hit if the whole interval is on its good side, and missed if the whole interval is on the
    other. `EQUALS` is hit if the interval is within `EQUAL_WITHIN` of the bound, and missed if all of it is outside.

    Args:
        target: the target.
        measures: of one machine, by key. A key that is missing was not measured.

    Example:
        >>> judge(Target("a", "A", AT_MOST, 1.03), {"a": Measure(1.02, 1.01, 1.04, level=0.95)}).state
        'undecided'
    """
    measure = measures.get(target.key)
    why = fill(target.why, measures)
    if measure is None or measure.value is None:
        reason = measure.reason if measure else _missing(target.key)
        return Verdict(target, NOT_MEASURED, f"not measured: {reason}", "")
    exact = measure.low is None and measure.level is None
    low = measure.value if exact else -math.inf if measure.low is None or measure.level is None else measure.low
    high = measure.value if exact else math.inf if measure.high is None or measure.level is None else measure.high
    tolerance = EQUAL_WITHIN if target.sense == EQUALS else 0.0
    least = -math.inf if target.sense == AT_MOST else target.bound - tolerance
    most = math.inf if target.sense == AT_LEAST else target.bound + tolerance
    state = HIT if least <= low and high <= most else MISSED if high < least or low > most else UNDECIDED
    if state == MISSED:
        short = f"{100 * abs(measure.value / target.bound - 1):.0f} % short of the bound"
        why = "; ".join(filter(None, [short, why, fill(target.missed, measures)]))
    return Verdict(target, state, format_measure(measure, target.unit), why)


def fill(text: str, measures: Mapping[str, Measure]) -> str:
    """Replace `{key:format}` by the measure's value, or by "(not measured)"."""

    def value(match: re.Match) -> str:
        measure = measures.get(match[1])
        if measure is None or measure.value is None:
            return "(not measured)"
        return format(measure.value, match[2]) + match[3]

    return re.sub(f"{PLACEHOLDER.pattern}(x?)", value, text)


def format_bound(target: Target) -> str:
    """Return sense and bound as text."""
    number = f"{target.bound:,.2f}x" if target.unit == "x" else f"{target.bound:,.0f} {target.unit}"
    return f"{target.sense} {number}"


def format_measure(measure: Measure, unit: str) -> str:
    """Return a value with its interval as text."""
    digits, end = ("{:,.2f}", "x") if unit == "x" else ("{:,.0f}", f" {unit}")
    show = digits.format
    if measure.low is None:
        return f"{show(measure.value)}{end}" + ("" if measure.level is None else " (one round)")
    ends = f" ({show(measure.low)}-{show(measure.high)})"
    return f"{show(measure.value)}{end}{ends}"


def _missing(key: str) -> str:
    device, section, *_ = key.split(".")
    if device == "cuda":
        return "no GPU was at hand"
    return f"section '{section}' was not run, or not on the processor"
