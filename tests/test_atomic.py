"""Files and folders that appear whole, whoever else writes there; JSON files read back."""

import os
import signal

import pytest

from s2d3d.atomic import MARK, NEW, OLD, read_json, replacing, sweep, workspace, write_json, write_text
from s2d3d.errors import InputError


def test_what_was_written_is_read(tmp_path):
    content = {"oa": 0.5, "names": ["chaise longue", "фото"], "nested": {"none": None}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a JSON file"),
        (b"", "not a JSON file"),
        (b"\xff\xfe{}", "not a JSON file"),
        (b"[" * 100_000, "not a JSON file"),
        (b"[1]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
)
def test_a_damaged_file_is_one_line_with_the_advice(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path, advice="measure again", missing="make it")
    text = str(caught.value)
    assert text.startswith(f"{path}: {message}") and text.endswith("; measure again") and "\n" not in text


def test_a_missing_file_has_an_advice_of_its_own(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: no such file; make it$"):
        read_json(tmp_path / "a.json", advice="measure again", missing="make it")
    with pytest.raises(InputError, match=r"a\.json: no such file; measure again$"):
        read_json(tmp_path / "a.json", advice="measure again")


# Several writers, and what others have put there


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(b"OLD")
    with replacing(path) as first:
        first.write(b"A" * 50)
        first.flush()
        with replacing(path) as second:
            second.write(b"B" * 100)
        assert path.read_bytes() == b"B" * 100
        first.write(b"A" * 100)
    assert path.read_bytes() == b"A" * 150, "the last one to end, whole"
    assert list(tmp_path.iterdir()) == [path]


def kill_in(path, *, folder: bool, moved: bool = False) -> None:
    """Let a process die while it writes; with `moved`, when what stood there is aside and nothing new is in place."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    with workspace(path) as work:
        (work / NEW).mkdir() if folder else (work / NEW).write_text("half")
        if moved:
            os.replace(path, work / OLD)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_writer_left_goes_and_nothing_else(tmp_path, folder):
    path, other = tmp_path / "a", tmp_path / ".a.abcdefgh.tmp"
    other.mkdir()
    for name, text in ((MARK, "a"), ("mine", "kept")):
        (other / name).write_text(text)
    (tmp_path / "a.tmp").write_text("kept")
    before = set(tmp_path.rglob("*"))
    kill_in(path, folder=folder)
    assert set(tmp_path.rglob("*")) > before
    with workspace(tmp_path / "b"):
        sweep(tmp_path / "none")
    assert set(tmp_path.rglob("*")) > before, "it is of another target"
    with workspace(path):
        pass
    assert set(tmp_path.rglob("*")) == before
    kill_in(path, folder=folder)
    sweep(tmp_path)
    assert set(tmp_path.rglob("*")) == before


def test_what_a_killed_writer_had_moved_aside_comes_back(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    (path / "file").write_text("old")
    kill_in(path, folder=True, moved=True)
    assert not path.exists()
    sweep(tmp_path)
    assert (path / "file").read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_writer_at_work_is_not_swept(tmp_path):
    with replacing(tmp_path / "a") as file:
        file.write(b"whole")
        sweep(tmp_path)
        write_text(tmp_path / "a", "other")
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_mark_that_names_another_place_does_nothing(tmp_path):
    (tmp_path / "victim").write_text("kept")
    for number, text in enumerate(("../victim", "", ".", "..", "victim", "a\0b")):
        work = tmp_path / f".a.abcdefg{number}.tmp"
        work.mkdir()
        (work / MARK).write_text(text)
        (work / OLD).write_text("moved")
    before = set(tmp_path.rglob("*"))
    sweep(tmp_path)
    assert set(tmp_path.rglob("*")) == before and (tmp_path / "victim").read_text() == "kept"


def test_a_long_name_leaves_room_for_the_workspace(tmp_path):
    path = tmp_path / ("n" * 250)
    write_text(path, "whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
