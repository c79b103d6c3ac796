"""Try the conversion on many model families and write the compatibility page."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is part of a clone, not of the package

from s2d3d.cli import described, refuse_existing, run_tool
from s2d3d.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo.py", **described(__doc__, "s2d3d zoo --only 'timm:*vit*'"))
    parser.add_argument("--output", metavar="FILE.md", help="also write the page to this file")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="families, such as 'timm:*vit*'")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="families at a time (default: 1)")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    return parser


def run(arguments: argparse.Namespace) -> None:
    output = None if arguments.output is None else refuse_existing(arguments.output, arguments.force)

    from tqdm import tqdm

    from benchmarks.zoo import examine_named, families
    from benchmarks.zoo.page import page
    from s2d3d.atomic import write_text
    from s2d3d.machine import environment

    names = [family for family in families() if any(fnmatch(family.title, only) for only in arguments.only)]
    if not names:
        raise InputError(f"--only: no family matches {', '.join(arguments.only)}")
    titles, rows = [family.title for family in names], []
    with contextlib.ExitStack() as stack:
        apart = arguments.processes > 1
        tried = stack.enter_context(Pool(arguments.processes)).imap if apart else map
        for row in tqdm(tried(examine_named, titles), total=len(titles), disable=None):
            rows.append(row)
            print(row.line(), flush=True)
    if output is not None:
        write_text(output, page(rows, str(environment()["git_commit"])))
    wrong = [row.name for row in rows if row.status == "wrong"]
    if wrong:
        raise InputError(f"trained wrong: {', '.join(wrong)}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
