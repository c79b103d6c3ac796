"""Measure speed and memory: layers, training steps, point operations, data path, scaling, evaluation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is part of a clone, not of the package

from benchmarks import SECTIONS, measure_section
from benchmarks.hardware import num_threads
from benchmarks.report import is_ours, merge_results, read_results, target_table, write_report, write_results
from benchmarks.section import Section, Settings
from benchmarks.tables import hardware_lines, section_text
from s2d3d.cli import refuse_existing, run_tool
from s2d3d.errors import InputError
from s2d3d.machine import choose_device, keep_large_allocations


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, title in SECTIONS.items():
        command = commands.add_parser(name, help=title)
        _add_settings(command)
        command.add_argument("--output", metavar="FILE.json", help="write the results there as well")
        command.add_argument("--force", action="store_true", help="replace the output if it exists")
    everything = commands.add_parser("all", help="all of them, as a page and its numbers")
    _add_settings(everything)
    _add_page(everything)
    page = commands.add_parser("report", help="the page from results that exist")
    page.add_argument("inputs", nargs="+", metavar="FILE.json", help="results; of equal sections the later counts")
    _add_page(page)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a process; default torch's choice")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of every comparison; default its own number")
    parser.add_argument("--root", metavar="DATA", help="a folder in ModelNet40 layout, for the data path")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--compile", action="store_true", help="measure compiled models as well")
    parser.add_argument("--bf16", action="store_true", help="measure bf16 even without a unit for it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; no result")


def _add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FILE.md", help="the page; its numbers go to FILE.json")
    parser.add_argument("--force", action="store_true", help="replace a file that this tool did not make")


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "report":
        page, numbers = _places(arguments, arguments.inputs)
        sections = merge_results(read_results(path) for path in arguments.inputs)
        _write(page, numbers, sections, "report FILE.json ... --output docs/benchmarks.md")
        return
    settings = _settings(arguments)
    keep_large_allocations()
    if arguments.command == "all":
        page, numbers = _places(arguments)
        sections = []
        for name in SECTIONS:
            if name == "gpu" and settings.device.type != "cuda":
                continue
            sections.append(measure_section(name, settings))
            print(f"{section_text(sections[-1])}\n", flush=True)
            write_results(numbers, sections)  # what was measured stays when a later section fails
        _write(page, numbers, sections, _command(settings))
        return
    output = refuse_existing(arguments.output, arguments.force) if arguments.output is not None else None
    section = measure_section(arguments.command, settings)
    print("\n".join(hardware_lines(section)), section_text(section), sep="\n\n")
    if output:
        write_results(output, [section])
        print(f"written to {output}")


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.rounds is not None and arguments.rounds < 1:
        raise InputError(f"--rounds is {arguments.rounds}, must be at least 1")
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
    )


def _places(arguments: argparse.Namespace, sources: Sequence[str] = ()) -> tuple[Path, Path]:
    """Return where page and numbers go; a page of this tool, and the numbers beside it, may be made anew."""
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
    """Return the command that makes the page again, without the folders of this machine."""
    flags: dict[str, object] = {"--root DATA": settings.root, "--quick": settings.quick, "--compile": settings.compile}
    flags |= {"--bf16": settings.force_bf16, f"--seed {settings.seed}": settings.seed}
    flags |= {f"--rounds {settings.rounds}": settings.rounds, f"--device {settings.device}": True}
    chosen = [flag for flag, given in flags.items() if given]
    return " ".join(["all --output docs/benchmarks.md", *chosen, f"--threads {settings.num_threads}"])


def _write(page: Path, numbers: Path, sections: list[Section], command: str) -> None:
    write_results(numbers, sections)
    write_report(page, sections, f"python tools/benchmark.py {command}")
    print(f"{target_table(sections)}\n\nwritten to {page} and {numbers}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
