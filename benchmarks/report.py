"""The page `docs/benchmarks.md`. Every number in it comes from a JSON file of the tool."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from s2d3d.atomic import read_json, write_json, write_text
from s2d3d.errors import InputError

from .section import Measure, Section
from .tables import hardware_lines, section_text, table
from .targets import NOT_MEASURED, STATES, TARGETS, Target, Verdict, format_bound, judge
from .timing import WALL

MARK = "<!-- made by tools/benchmark.py: change what it measures, not this page -->"
FORMAT = 1
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
METHOD = """\
**In turn.** Contestants do not run one after the other but in rounds: in each round every contestant runs once,
another one first each round, and the other way round after each full cycle. What slows the machine down for a while
slows all of them, and a steady drift cancels.

**Ratios and their intervals.** Each round gives one ratio of two contestants. The estimate is the mean of the middle
half of the logarithms of these ratios, and a bootstrap gives its interval of 95 %, which stands behind it. With
`--resolve 0.01` a comparison goes on until the intervals are at most 1 % wide to each side, or `--budget` minutes are
over. Contestants are started anew six times or more, with `--resolve` after each full cycle, and the bootstrap
resamples whole starts: two processes of the same program can differ for as long as they live. On a GPU, where a start
compiles for minutes, there is one start, and the interval holds for it alone. So it is in older results with one start.

**Hit, missed, undecided.** A target is hit if its whole interval is on the good side of the bound, missed if the whole
interval is on the other side, and undecided otherwise. "Equals" means that the interval is within 1 % of the bound.
"The same against itself" shows the noise: its interval must hold 1.00.

**Two clocks.** Wall time is what a user waits for. Processor time counts the threads of the process alone; other
programs disturb it less, and it is shown beside. `--clock cpu` makes it the time that all ratios refer to, for a
machine that others use as well: with one thread, because threads that wait for each other count as well.

**Several machines.** Machines are told apart by processor, instruction sets, GPU and threads. Results of another
machine never replace those of this one.

**Equal results first.** Before anything is timed, contestants of equal mathematics compute from the same weights
and inputs, and the largest absolute deviation of a number is compared with the tolerance (1e-4 unless said
otherwise): logits in evaluation and in training for models, outputs and gradients for layers. Beyond it the tool
refuses to compare. Layers that route tokens by a gate compute something else; they are marked "routed", not
checked, and compared in time alone.

**Two conditions.** Training and evaluation of whole models run in processes of their own, of which one computes at
a time. Condition A is "as users run it": the reference with the system's allocator and the default AdamW of torch,
ours as shipped. Condition B gives the reference our allocator settings and the fused AdamW, so that what is left is
the model.

**The allocator.** glibc maps blocks above a threshold straight from the system and returns them when they are
freed. The activations of a training step are such blocks: each step maps, clears page by page and unmaps the same
gigabytes. Our programs raise the two thresholds with `mallopt` when they start (`keep_large_allocations` in
`s2d3d/machine.py`), so that freed blocks stay in the heap; nobody has to export a variable, and one who does
is obeyed. The rows "default allocator" show the same model without it.

**The reference modules** are `tests/reference/point_bert.py` and `point_transformer.py`: the public classifiers in
plain torch, Conv1d encoder, loop over points for farthest point sampling, explicit softmax attention; they import
nothing of this package. Point-BERT: 384 wide, 12 blocks, 6 heads, 64 groups of 32 points, batch 32 of 1024 points.
Point Transformer: stages of 32, 64, 128, 256, 512 channels with 0, 1, 2, 4, 1 attention blocks behind the
transitions, strides 1, 4, 4, 4, 4, 8 or 16 neighbours, no FFN, batch 8 of 1024 points. A training step is forward,
backward, clipping at 10, AdamW, and with experts EWA. Clouds are random shells; no data set is needed.

**Public packages** take part where they are installed, see the [FAQ](faq.md#the-packages-of-the-benchmark). Layers
are built at the size of the FFN that they stand for. torch-pointcloud's Point-BERT and Point Transformer get our
weights, the latter our head as well; their sampling and neighbour search need pyg-lib and start at a random point in
training, so ours stand in their place, and logits are compared as everywhere. tutel is built from its repository.

**CUDA graphs** (on a GPU). "CUDA graphs" is `train.compile_mode: reduce-overhead`, which records the model; "step
recorded" is a whole update, from clearing gradients over forward, backward, clipping and fused AdamW to EWA, as one
graph. Learning rate and share rate are numbers on the device that the host sets before a replay; random numbers go on
from replay to replay. Several seeds side by side have a graph, a stream and a generator each. Before they are timed,
weights after four recorded updates, side by side, are compared with those of plain updates.

**Limits.** The rate of a matrix product of the FFN's size is measured beside, the floating-point operations of the
matrix products of a step are counted, and their quotient is about the time that these products take alone. It is no
strict limit: products of other shapes can be some per cent faster. "Would allow" is the reference's time over it.

**Profile.** Every operation of a few training steps is timed where torch calls it. The matrix products among them are
then done alone, as often as in the step and on operands of the same shapes and layouts, in turn with the whole step:
their time over the step's is the share of the attainable that is attained. The tables by operation come from steps
that are recorded; the recorder's own time is in their last row.
"""
NO_GPU = "No GPU was at hand for this page: what stands here on GPUs and CUDA graphs was not measured for it."


def write_results(path: str | Path, sections: Iterable[Section]) -> None:
    """Write sections as JSON."""
    write_json(path, {"format": FORMAT, "sections": [section.to_dict() for section in sections]})


def read_results(path: str | Path) -> list[Section]:
    """Read a file of `write_results`.

    Raises:
        InputError: the file is missing or has other content.
    """
    content = read_json(path, advice="results are made by: python tools/benchmark.py all --output FILE.md")
    try:
        if content["format"] != FORMAT:
            raise InputError(
                f"{path}: results of format {content['format']}, this version reads {FORMAT}; measure again"
            )
        sections = [Section.from_dict(section) for section in content["sections"]]
        for section in sections:
            hardware_lines(section)  # the parts that the page needs are there
        if not sections:
            raise InputError(f"{path}: holds no section; measure one, such as: python tools/benchmark.py ops")
        return sections
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not results of tools/benchmark.py ({error})") from error


def merge_results(results: Iterable[Sequence[Section]]) -> list[Section]:
    """Join results of several files; of two sections of one name, device and machine, the later stays.

    Raises:
        InputError: results of `--quick` would replace measured ones.
    """
    merged: dict[tuple[str, str, str], Section] = {}
    for sections in results:
        for section in sections:
            key = (section.name, section.device, section.machine)
            replaced = merged.pop(key, None)
            if replaced and section.settings["quick"] and not replaced.settings["quick"]:
                raise InputError(f"{section.name}: --quick would replace measured results; choose another --output")
            merged[key] = section
    return list(merged.values())


def target_table(sections: Sequence[Section], targets: Sequence[Target] = TARGETS) -> str:
    """Return every target with its measurement and state on each machine, and the reasons below."""
    names = machines(sections)
    verdicts: dict[str, list[Verdict]] = {}
    for name in names:
        measures: dict[str, Measure] = {}
        for section in sections:
            if section.machine == name:
                measures |= section.measures
        verdicts[name] = [judge(target, measures) for target in targets]
    # What one kind of device is for says nothing about a machine that has only the other.
    shown = {
        name: [v if _concerns(v.target, name, sections) else None for v in listed] for name, listed in verdicts.items()
    }
    lines, rows = [], []
    for letter, name in zip(LETTERS, names):
        states = [verdict.state for verdict in shown[name] if verdict]
        counts = ", ".join(f"{states.count(state)} {state}" for state in STATES)
        lines.append(f"- Machine {letter}: {name}: {counts}. Code and day of each section: {_origins(name, sections)}.")
    for index, target in enumerate(targets):
        cells = [_cell(shown[name][index], len(names) == 1) for name in names]
        rows.append([target.title, format_bound(target), *cells])
    head = ["target", "bound", *(f"machine {letter}" for letter in LETTERS[: len(names)])]
    parts = ["\n".join(lines), table(head, rows)]
    for letter, name in zip(LETTERS, names):
        reasons = [[v.target.title, v.state, v.why] for v in shown[name] if v and v.why and v.state != NOT_MEASURED]
        if reasons:
            parts.append(f"**Machine {letter}**\n\n" + table(["target", "", "why"], reasons))
    return "\n\n".join(parts)


def _origins(machine: str, sections: Iterable[Section]) -> str:
    """Return code and day of each section of a machine, and its clock if that is not the wall's."""
    names: dict[str, list[str]] = {}
    for section in sections:
        if section.machine == machine:
            code, clock = section.hardware["git_commit"], section.settings.get("clock", WALL)
            origin = f"{(code or 'unknown')[:7]}{'+' * (code or '').endswith('+')}, {section.hardware['time'][:10]}"
            names.setdefault(origin + (f", {clock} time" if clock != WALL else ""), []).append(section.name)
    return "; ".join(f"{', '.join(listed)} ({origin})" for origin, listed in names.items())


def machines(sections: Iterable[Section]) -> list[str]:
    """Return the names of the machines, in the order of their first section."""
    return list(dict.fromkeys(section.machine for section in sections))


def _concerns(target: Target, machine: str, sections: Sequence[Section]) -> bool:
    """Tell whether a target is for a kind of device that a machine was measured on, or that none was."""
    kind = target.key.split(".")[0]
    of_machine = {section.device for section in sections if section.machine == machine}
    return kind in of_machine or kind not in {section.device for section in sections}


def _cell(verdict: Verdict | None, alone: bool) -> str:
    if verdict is None:
        return ""
    if verdict.state == NOT_MEASURED:
        return verdict.measured if alone else NOT_MEASURED
    return f"{verdict.measured}, {verdict.state}"


def report(sections: Sequence[Section], command: str) -> str:
    """Return the whole page.

    Args:
        sections: results, of one machine or several.
        command: the command that reproduces the page.
    """
    parts = [f"# Benchmarks\n\n{MARK}\n\nMade by `{command}`; the numbers behind it are in the JSON file beside it."]
    if any(section.settings["quick"] for section in sections):
        parts.append("**Measured with `--quick`: tiny sizes, to see that the tool works. The numbers mean nothing.**")
    parts += ["## Targets", target_table(sections), "## How it is measured", METHOD.strip()]
    if all(section.device == "cpu" for section in sections):
        parts.append(NO_GPU)
    letters = dict(zip(machines(sections), LETTERS))
    titles = dict.fromkeys((section.name, section.device, section.title) for section in sections)
    for name, device, title in titles:
        where = "" if device == "cpu" else " on a GPU"
        parts.append(f"## {title}{where} (`{name}`)")
        for section in sections:
            if (section.name, section.device) == (name, device):
                parts += [f"**Machine {letters[section.machine]}**"] if len(letters) > 1 else []
                parts += ["\n".join(hardware_lines(section)), section_text(section)]
    return "\n\n".join(parts) + "\n"


def write_report(path: str | Path, sections: Sequence[Section], command: str) -> None:
    """Write the page."""
    write_text(path, report(sections, command))


def is_ours(path: Path) -> bool:
    """Return whether a file is a page of this tool, which may be replaced."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")
