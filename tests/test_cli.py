"""What all command lines share: exit codes, one line for each mistake, places to write to."""

import argparse
import errno
import logging

import pytest
import torch

from s2d3d.cli import add_overrides, check_overrides, refuse_existing, run_tool
from s2d3d.errors import InputError, TrainingError


def run(body, *arguments, parser=None):
    return run_tool(parser or argparse.ArgumentParser(prog="tool.py"), body, list(arguments))


def failing(error):
    def body(arguments):
        raise error

    return body


@pytest.mark.parametrize(("value", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_exit_code_is_that_of_the_body(capsys, value, code):
    assert run(lambda arguments: value) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (InputError("a.yaml: seed: must be at least 0"), ["a.yaml: seed: must be at least 0"]),
        (InputError("a: wrong\nb: wrong too"), ["a: wrong", "b: wrong too"]),
        (TrainingError("loss is not finite at update 3"), ["loss is not finite at update 3"]),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a/last.pt"), ["runs/a/last.pt: Permission denied"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["[Errno 28] No space left on device"]),
        (ValueError(), ["ValueError"]),
        *[
            (error, ["out of memory; use a smaller batch, a smaller model or fewer points"])
            for error in (
                MemoryError(),
                ImportError("libtorch.so: failed to map segment from shared object"),
                RuntimeError("can't start new thread"),
            )
        ],
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
            ["out of memory (20.00 MiB more were needed); use a smaller batch, a smaller model or fewer points"],
        ),
    ],
)
def test_mistakes_are_lines_on_stderr_and_debug_raises_them(capsys, error, lines):
    assert run(failing(error)) == 1
    assert capsys.readouterr() == ("", "".join(f"error: {line}\n" for line in lines))
    with pytest.raises(type(error)):
        run(failing(error), "--debug")


def test_memory_that_torch_cannot_get(capsys):
    assert run(lambda arguments: torch.empty(2**50) and None) == 1
    needed = f"{4 * 2**50} bytes more were needed"
    advice = "use a smaller batch, a smaller model or fewer points"
    assert capsys.readouterr().err == f"error: out of memory ({needed}); {advice}\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ImportError("no x"), KeyError("a"), TypeError("b"), AssertionError()]
)
def test_faults_of_the_program_are_not_hidden(error):
    with pytest.raises(type(error)):
        run(failing(error))


def test_ctrl_c(capsys):
    assert run(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_help_is_no_mistake(capsys):
    assert run(failing(AssertionError("not called")), "--help") == 0
    assert capsys.readouterr().out.startswith("usage: tool.py")


def test_flags_and_overrides_in_any_order():
    for arguments in (
        ["--n", "1", "c", "a.b=1", "a.c=2"],
        ["c", "a.b=1", "--n", "1", "a.c=2"],
        ["c", "a.b=1", "a.c=2", "--n", "1"],
    ):
        parser = argparse.ArgumentParser()
        parser.add_argument("config")
        add_overrides(parser)
        parser.add_argument("--n", type=int)
        seen = []
        assert run(seen.append, *arguments, parser=parser) == 0
        assert (seen[0].config, seen[0].overrides, seen[0].n) == ("c", ["a.b=1", "a.c=2"], 1)


def test_messages_go_to_stderr_plain_and_logging_is_as_before(capsys):
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def body(arguments):
        logging.getLogger("s2d3d.training.trainer").info("epoch 1")
        logging.getLogger("s2d3d.training.trainer").debug("detail")

    assert run(body) == 0
    assert capsys.readouterr() == ("", "epoch 1\n")
    assert run(failing(InputError("x"))) == 1
    assert (root.handlers, root.level) == before


# Overrides of a checkpoint's config


def test_overrides_of_other_sections_are_refused():
    check_overrides(["data.root=x", "seed=3", "data.num_pints=4", "what", "dta.root=x"], ("data", "seed"))
    with pytest.raises(InputError) as caught:
        check_overrides(["data.root=x", "model.depth=2", " s2d =3"], ("data", "seed"))
    assert str(caught.value).splitlines() == [
        "override 'model.depth=2': has no effect on a checkpoint; what can be replaced here is data.*, seed",
        "override ' s2d =3': has no effect on a checkpoint; what can be replaced here is data.*, seed",
    ]


# Outputs


def test_a_place_to_write_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a.pt", str(tmp_path / "a.pt"), "./a.pt"):
        assert refuse_existing(path, force=False).parent.resolve() == tmp_path
    (tmp_path / "a.pt").write_text("mine")
    with pytest.raises(InputError, match=r"^a\.pt: exists already; choose another output or pass --force$"):
        refuse_existing("a.pt", force=False)
    refuse_existing("a.pt", force=True)
    assert (tmp_path / "a.pt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_no_cloud_is_added_to_a_folder_that_is_read(tmp_path):
    """Nor one replaced, with --force."""
    (tmp_path / "scans" / "ball").mkdir(parents=True)
    scan = tmp_path / "scans" / "ball" / "1.xyz"
    scan.write_text("mine")
    for path in (scan, scan.with_name("new.ply"), tmp_path / "scans" / "a.npy"):
        with pytest.raises(InputError, match=r"which is read, and would be one of its clouds;"):
            refuse_existing(path, force=True, sources=[tmp_path / "scans"])
    (tmp_path / "scans" / ".hidden").mkdir()
    for path in (scan.with_name("a.json"), tmp_path / "a.ply", tmp_path / "scans2.ply", scan.with_name(".a.ply")):
        refuse_existing(path, force=False, sources=[tmp_path / "scans"])
    refuse_existing(tmp_path / "scans" / ".hidden" / "a.ply", force=False, sources=[tmp_path / "scans"])


def test_an_output_has_the_suffix_of_its_kind(tmp_path):
    with pytest.raises(InputError, match=r"^--output: must end in \.json, got '.*a\.csv'$"):
        refuse_existing(tmp_path / "a.csv", force=False, suffix=".json")
    refuse_existing(tmp_path / "a.JSON", force=False, suffix=".json")


def test_what_is_read_is_never_replaced(tmp_path):
    source, link, hard = tmp_path / "a.pt", tmp_path / "link.pt", tmp_path / "hard.pt"
    source.write_text("weights")
    link.symlink_to(source)
    hard.hardlink_to(source)
    for path in (source, link, hard, tmp_path / "." / "a.pt"):
        with pytest.raises(InputError, match=r"is what is read; choose another output$"):
            refuse_existing(path, force=True, sources=["no/such.pt", source])
    (tmp_path / "copy.pt").write_text("weights")
    refuse_existing(tmp_path / "copy.pt", force=True, sources=[source])
