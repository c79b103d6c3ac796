"""The work of `tools/benchmark.py` after argument parsing: measure, print, write results and pages."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from s2d3d.atomic import write_text
from s2d3d.cli import check_overrides, refuse_existing
from s2d3d.errors import InputError
from s2d3d.machine import choose_device, keep_large_allocations
from s2d3d.runs.checkpoint import require_dense
from s2d3d.runs.clouds import sample_clouds
from s2d3d.runs.trained import open_trained

from . import ONLY_ON, SECTIONS, measure_section
from .hardware import num_threads
from .latency import latency_page
from .report import is_ours, merge_results, read_results, target_table, write_report, write_results
from .section import BUDGET, Section, Settings
from .tables import hardware_lines, section_text
from .timing import WALL


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Run one of the sub-commands of `tools/benchmark.py`."""
    if arguments.command == "report":
        page, numbers = _places(arguments, arguments.inputs)
        earlier = read_results(numbers) if is_ours(page) and numbers.exists() and not arguments.force else []
        sections = merge_results([earlier, *map(read_results, arguments.inputs)])
        _write(page, numbers, sections, "report FILE.json ... --output docs/benchmarks.md")
        return
    if arguments.command == "latency":
        _latency(arguments)
        return
    settings = _settings(arguments)
    keep_large_allocations()
    if arguments.command == "all":
        page, numbers = _places(arguments)
        # Results of other machines stay; an earlier one of this machine is replaced section by section.
        earlier = read_results(numbers) if is_ours(page) and numbers.exists() else []
        sections = []
        for name in SECTIONS:
            if name in ONLY_ON and settings.device.type != ONLY_ON[name]:
                continue
            sections.append(measure_section(name, settings))
            print(f"{section_text(sections[-1])}\n", flush=True)
            write_results(numbers, merge_results([earlier, sections]))  # kept if a later section fails
        _write(page, numbers, merge_results([earlier, sections]), _command(settings))
        return
    output = refuse_existing(arguments.output, arguments.force) if arguments.output is not None else None
    section = measure_section(arguments.command, settings)
    print("\n".join(hardware_lines(section)), section_text(section), sep="\n\n")
    if output:
        write_results(output, [section])
        print(f"written to {output}")


def _latency(arguments: argparse.Namespace) -> None:
    for name in ("num_points", "clouds", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, must be at least 1")
    page = None
    if arguments.output is not None:
        page = refuse_existing(arguments.output, arguments.force, sources=[arguments.checkpoint])
    check_overrides(arguments.overrides, ("data", "seed"))
    overrides = list(arguments.overrides)
    if arguments.num_points is not None:
        overrides.append(f"data.num_points={arguments.num_points}")
    trained = open_trained(arguments.checkpoint, overrides, merge=arguments.merge)
    trained.require_clouds("latency")
    if not arguments.merge:
        require_dense(trained.payload, arguments.checkpoint)
    points, source = sample_clouds(
        trained, arguments.clouds,
        required=any(override.startswith("data.root") for override in arguments.overrides),
    )  # fmt: skip
    table = latency_page(trained.model, trained.payload, points, rounds=arguments.rounds)
    text = f"{table}\n\nmeasured on {len(points)} {source}"
    print(text)
    if page:
        write_text(page, f"{text}\n")
        print(f"written to {page}")


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.rounds is not None and arguments.rounds < 1:
        raise InputError(f"--rounds is {arguments.rounds}, must be at least 1")
    if arguments.resolve is not None and not 0 < arguments.resolve < 1:
        raise InputError(f"--resolve is {arguments.resolve}, must be between 0 and 1, such as 0.01")
    if not arguments.budget > 0:
        raise InputError(f"--budget is {arguments.budget}, must be greater than 0")
    root = Path(arguments.root) if arguments.root is not None else None
    if root is not None and not (root / "train_files.txt").is_file():
        raise InputError(
            f"{root}: holds no train_files.txt, a data set in ModelNet40 layout is needed; see data/README.md"
        )
    return Settings(
        device=choose_device(arguments.device),
        num_threads=num_threads(arguments.threads),
        rounds=arguments.rounds,
        quick=arguments.quick,
        root=root,
        compile=arguments.compile,
        force_bf16=arguments.bf16,
        seed=arguments.seed,
        clock=arguments.clock,
        resolve=arguments.resolve,
        budget=arguments.budget,
    )


def _places(arguments: argparse.Namespace, sources: Sequence[str] = ()) -> tuple[Path, Path]:
    """Return the paths of page and numbers; existing files of this tool may be replaced."""
    page = Path(arguments.output)
    if page.suffix == ".json":
        raise InputError(f"{page}: is the name of the numbers; name the page, such as {page.with_suffix('.md')}")
    force = arguments.force or is_ours(page)
    numbers = page.with_suffix(".json")
    page = refuse_existing(page, force, sources=sources)
    if not any(numbers.exists() and numbers.samefile(source) for source in sources if Path(source).exists()):
        refuse_existing(numbers, force)
    return page, numbers


def _command(settings: Settings) -> str:
    """Return the command that reproduces the page, without folders of this machine."""
    flags: dict[str, object] = {"--root DATA": settings.root, "--quick": settings.quick, "--compile": settings.compile}
    flags |= {"--bf16": settings.force_bf16, f"--seed {settings.seed}": settings.seed}
    flags |= {f"--clock {settings.clock}": settings.clock != WALL, f"--resolve {settings.resolve}": settings.resolve}
    flags |= {f"--budget {settings.budget:g}": settings.resolve and settings.budget != BUDGET}
    flags |= {f"--rounds {settings.rounds}": settings.rounds, f"--device {settings.device}": True}
    chosen = [flag for flag, given in flags.items() if given]
    return " ".join(["all --output docs/benchmarks.md", *chosen, f"--threads {settings.num_threads}"])


def _write(page: Path, numbers: Path, sections: list[Section], command: str) -> None:
    write_results(numbers, sections)
    write_report(page, sections, f"python tools/benchmark.py {command}")
    print(f"{target_table(sections)}\n\nwritten to {page} and {numbers}")
