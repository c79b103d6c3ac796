"""Results as tables: Markdown for `docs/benchmarks.md`, which reads well on a terminal too."""

import math
from collections.abc import Sequence

from s2d3d.markdown import markdown_table

from .comparison import Comparison
from .section import Section, Series
from .stats import Interval
from .timing import CLOCKS, CPU, WALL

CLOCK_TITLES = {WALL: "wall", CPU: "CPU"}

BUSY = 0.5
"""Load average of the last minute above which a machine is not idle."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns; the first is text, numbers in others are on the right.

    Example:
        >>> print(table(["name", "ms"], [["a", "1.0"], ["bcdef", "12.0"]]))
        | name  |   ms |
        | ----- | ---: |
        | a     |  1.0 |
        | bcdef | 12.0 |
    """
    right = [column for column in range(1, len(head)) if all(_is_number(row[column]) for row in rows)]
    return markdown_table(head, rows, right=right, padded=True)


def comparison_table(comparison: Comparison) -> str:
    """Return times, spreads and ratios of all contestants, then the contestants that were not measured with reasons."""
    unit, factor = ("ms", 1e3) if comparison.time(comparison.base).median < 10 else ("s", 1.0)
    other = next((clock for clock in CLOCKS if clock != comparison.clock and comparison.cpu_times), None)
    rows = []
    for name in comparison.times:
        time = comparison.time(name)
        distance = comparison.deviations.get(name)
        rows.append(
            [
                name,
                _number(time.median * factor),
                f"{_number(time.low * factor)}-{_number(time.high * factor)}",
                *_ratio_cells(comparison.ratio(name)),
                *([" ".join(_ratio_cells(comparison.ratio(name, clock=other)))] if other else []),
                *([f"{comparison.samples / time.median:,.1f}"] if comparison.samples else []),
                "base" if name == comparison.base else "-" if distance is None else f"{distance:.1e}",
                comparison.notes.get(name, ""),
            ]
        )
    head = ["contestant", unit, "quartiles", "ratio", "95 %", *([f"{CLOCK_TITLES[other]} ratio"] if other else []),
            *(["items/s"] if comparison.samples else []), "deviation", "note"]  # fmt: skip
    rounds = len(next(iter(comparison.times.values())))
    most = max(comparison.repeats.values(), default=1)
    how = [f"{rounds} rounds" + (f" of up to {most} runs" if most > 1 else "")]
    how += [f"{len(comparison.starts)} starts"] if len(comparison.starts) > 1 else []
    how += [f"{CLOCK_TITLES[comparison.clock]} time"] if comparison.clock != WALL else []
    lines = [
        f"**{comparison.title}** ({', '.join(how)}; ratios to '{comparison.base}')",
        "",
        table(head, rows),
    ]
    if comparison.skipped:
        lines += ["", *(f"- {name}: did not take part: {reason}" for name, reason in comparison.skipped.items())]
    return "\n".join(lines)


def _ratio_cells(ratio: Interval) -> list[str]:
    ends = f"{ratio.low:.2f}-{ratio.high:.2f}" if math.isfinite(ratio.high) else "one round"
    return [f"{ratio.value:.2f}", ends]


def series_table(series: Sequence[Series]) -> str:
    """Return costs against sizes with measured and expected exponents."""
    rows = []
    for one in series:
        costs = ", ".join(f"{size:,.0f}: {_number(1e3 * cost)}" for size, cost in zip(one.sizes, one.seconds))
        rows.append(
            [one.name, one.title, costs, f"{one.exponent:.2f}", f"{one.last_exponent:.2f}", f"{one.expected:.0f}",
             one.note]
        )  # fmt: skip
    return table(["size", "what", "ms", "exponent", "of the last two", "expected", "note"], rows)


def section_text(section: Section) -> str:
    """Return everything that a section measured."""
    parts = [comparison_table(comparison) for comparison in section.comparisons]
    if section.series:
        parts.insert(0, series_table(section.series))
    shown = {name for name in section.measures if _stands_alone(name)}
    if shown:
        rows = [[key.split(".", 2)[2], _measure(section, key)] for key in section.measures if key in shown]
        parts.append(table(["measure", "value"], rows))
    parts += [f"**{title}**\n\n{table(rows[0], rows[1:])}" for title, rows in section.tables.items()]
    parts += [f"{title}: {text}." for title, text in section.facts.items()]
    return "\n\n".join(parts)


def hardware_lines(section: Section) -> list[str]:
    """Return lines on the machine, its software and its load."""
    machine = section.hardware
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    absent = ", ".join(name for name, version in machine["packages"].items() if not version)
    allocator = machine["allocator"]
    chosen = ", ".join(f"{key}={value}" for key, value in allocator["set_by_user"].items()) or "none"
    return [
        f"- processor: {machine['processor']}; units: {', '.join(machine['cpu_flags']) or 'unknown'}; "
        f"{machine['memory_gib']} GiB of memory",
        f"- GPU: {machine['gpu'] or 'none used'}" + (f", CUDA {machine['cuda']}" if machine["cuda"] else ""),
        f"- threads: {machine['num_threads']}; load average before: "
        + ", ".join(f"{value:.2f}" for value in section.settings["load_average"])
        + (
            " (**other programs were running: absolute times are too long; ratios hold where contestants have equally "
            "many processes and threads**)"
            if section.settings["load_average"][0] > BUSY
            else ""
        ),
        f"- allocator: {allocator['libc']}; as shipped: {allocator['shipped']}; set by the user: {chosen}",
        f"- software: Python {machine['python']}, {versions}" + (f"; not installed: {absent}" if absent else ""),
        f"- code: {machine['git_commit'] or 'not a checkout'}, {machine['time']}",
    ]


def _stands_alone(key: str) -> bool:
    """Return whether a measure is in no other table: rates, memory, limits, plans."""
    words = ("matmul_", "memory.", "limit_", "gflop", "plan.", "seeds_", "bf16_loss", "weak_scaling")
    return any(word in key for word in words)


def _measure(section: Section, key: str) -> str:
    measure = section.measures[key]
    if measure.value is None:
        return f"not measured: {measure.reason}"
    low, high = measure.low, measure.high
    quartiles = "" if low is None or high is None else f" ({_number(low)}-{_number(high)})"
    return f"{_number(measure.value)}{quartiles}"


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").isdigit()
