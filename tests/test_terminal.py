"""What is printed: no name steers the terminal, and a reader that leaves loses no work."""

import argparse
import errno
import io
import logging
import os
import sys

import pytest

from s2d3d.cli import run_tool
from s2d3d.terminal import Output, open_streams, printable_lines

HOSTILE = "a\x1b[2J\x9b31m\rb\x07\u202e\udcffc"


def run(body, *arguments, output=False):
    parser = argparse.ArgumentParser(prog="tool.py")
    if output:
        parser.add_argument("--output")
    return run_tool(parser, body, list(arguments))


def test_tables_stay_and_escapes_go():
    assert printable_lines("a  b\n\tc é 点\n") == "a  b\n\tc é 点\n"
    shown = printable_lines(HOSTILE)
    assert shown == "a\\x1b[2J\\x9b31m\\rb\\x07\\u202e\\udcffc" and shown.isprintable()
    assert printable_lines("é 点", "latin-1") == "é \\u70b9"


def test_stdout_logs_and_errors_are_escaped(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # of pytest, whose records xdist cannot send on

    def body(arguments):
        print(f"{HOSTILE}\n| table |")
        logging.getLogger("s2d3d").warning("%s\nsecond", HOSTILE)
        raise ValueError(HOSTILE)

    assert run(body) == 1
    out, err = capsys.readouterr()
    assert out == f"{printable_lines(HOSTILE)}\n| table |\n"
    assert all(line.isprintable() for line in err.splitlines()) and err.count("\n") == 3


class Gone(io.StringIO):
    encoding = "utf-8"

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise (BrokenPipeError if self.number == errno.EPIPE else OSError)(self.number, os.strerror(self.number))


def test_a_reader_that_leaves_stops_a_tool_that_only_prints(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone(errno.EPIPE))
    done = []

    def body(arguments):
        print("a")
        done.append(1)

    assert run(body) == 141 and not done


def test_a_reader_that_leaves_does_not_stop_one_that_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "stdout", Gone(errno.EPIPE))

    def body(arguments):
        print("a")
        print("b", flush=True)
        (tmp_path / "out").write_text("whole")

    assert run(body, "--output", "x", output=True) == 141
    assert (tmp_path / "out").read_text() == "whole" and capsys.readouterr().err == ""


def test_a_full_disk_behind_stdout_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Gone(errno.ENOSPC))
    assert run(lambda arguments: print("a")) == 1
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


def test_streams_that_are_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    open_streams()
    print("a", flush=True)
    print("a", file=sys.stderr, flush=True)
    assert run(lambda arguments: print("a")) == 0


def test_everything_else_is_that_of_the_stream():
    stream = io.StringIO()
    assert not Output(stream, go_on=True).isatty() and Output(stream, go_on=True).newlines is stream.newlines


@pytest.mark.parametrize("given", [["--output=~/a"], ["--output", "~/a"]])
def test_the_home_folder(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    assert run(lambda arguments: seen.append(arguments.output), *given, output=True) == 0
    assert seen == [f"{tmp_path}/a"]
