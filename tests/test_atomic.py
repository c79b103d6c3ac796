"""JSON files read back; writing files whole is tested with the run folder."""

import pytest

from s2d3d.atomic import read_json, write_json
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
