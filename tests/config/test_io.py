"""Reading configs: files, overrides, and junk that must raise nothing but InputError."""

from pathlib import Path

import pytest
import yaml
from base_config import BASE, changed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2d3d.config.io import override_name
from s2d3d.config.load import dump_config, load_config, parse_config
from s2d3d.errors import InputError


def problem_of_text(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


# Files


def test_duplicate_keys_with_their_lines(tmp_path):
    text = yaml.safe_dump(BASE) + "optim:\n  lr: 1e-3\n  schedule: cosine\n  lr: 1e-4\n"
    first = text.split("\n").index("  lr: 1e-3") + 1
    assert problem_of_text(tmp_path, text) == f"optim.lr: duplicate key (lines {first} and {first + 2})"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty, expected a config"),
        ("# a comment\n---\n", "the file is empty, expected a config"),
        ("- a\n- b\n", "must be a mapping of sections, got ['a', 'b']"),
        ("just text\n", "must be a mapping of sections, got 'just text'"),
        ("seed: 1\na: b: c\n", "line 2: not valid YAML: mapping values are not allowed here"),
        ("seed: 1\ndata:\n\tname: x\n", ("line 3: not valid YAML: while scanning for the next token found character "
         "'\\t' that cannot start any token")),
        ("seed: [1\n", ("line 2: not valid YAML: while parsing a flow sequence expected ',' or ']', "
         "but got '<stream end>'")),
        ("seed: 1\n---\nseed: 2\n", ("line 2: not valid YAML: expected a single document in the stream "
         "but found another document")),
        ("seed: 1\nx: \x07\n", "line 2: not valid YAML: character U+0007"),
        ("seed: 1\n? [a]\n: 2\n", "line 2: a key must be text"),
        ("seed: 1\na: 0b_\n", "line 2: '0b_' is not a number"),
        ("a: !!python/object/apply:os.system [ls]\n", ("line 1: tags (tag:yaml.org,2002:python/object/apply:os.system) "
         "are not allowed")),
        ("a: !!binary aGk=\n", "line 1: tags (tag:yaml.org,2002:binary) are not allowed"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases (*x) are not allowed, write the value out"),
        ("[" * 5000, "line 1: nested more than 20 levels deep"),
        ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 50)), "line 20: nested more than 20 levels deep"),
        (b"seed: 1\nname: caf\xe9\n", "line 2: not UTF-8 text"),
        ("x: " + "a" * 300_000, "larger than 256 KiB, this is no config"),
    ],
    ids=lambda item: repr(item)[:30],
)  # fmt: skip
def test_files_that_are_no_config(tmp_path, text, expected):
    assert problem_of_text(tmp_path, text) == expected


def test_alias_bomb_is_refused_at_its_first_alias(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    assert problem_of_text(tmp_path, bomb) == "line 2: aliases (*a0) are not allowed, write the value out"


def test_merge_keys_are_unknown_keys(tmp_path):
    assert "<<: unknown key" in problem_of_text(tmp_path, yaml.safe_dump(BASE) + "<<: {seed: 1}\n")


def test_dates_and_ids_stay_text(base):
    base.write_text(base.read_text().replace("runs/test", "2024-13-45"))
    assert load_config(base).output_dir == "2024-13-45"


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "no.yaml")
    assert str(caught.value) == f"{tmp_path / 'no.yaml'}: no such file"
    with pytest.raises(InputError) as caught:
        load_config(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a directory, expected a YAML file"


def test_byte_order_mark_and_windows_line_ends_are_read(base):
    base.write_bytes(b"\xef\xbb\xbf" + base.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(base) == parse_config(BASE, where="base")


# Overrides


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("s2d.share_rate=1e-1", "s2d.share_rate", 0.1),
        ("data.augment.scale=[0.8, 1.2]", "data.augment.scale", (0.8, 1.2)),
        ("data.augment.scale=null", "data.augment.scale", None),
        ("optim.clip_grad=", "optim.clip_grad", None),
        ("output_dir=a=b", "output_dir", "a=b"),
        ("output_dir=a#b", "output_dir", "a#b"),
        ('output_dir="a #b"', "output_dir", "a #b"),
        ("output_dir='3'", "output_dir", "3"),
        ("train.compile=true", "train.compile", True),
        ("s2d={kind: none}", "s2d.kind", "none"),
        ("model.depth=2", "model.depth", 2),
        (" seed =7", "seed", 7),
    ],
)
def test_override(base, override, path, expected):
    got = load_config(base, [override])
    for key in path.split("."):
        got = getattr(got, key)
    assert got == expected


def test_of_two_overrides_the_later_wins(base):
    assert load_config(base, ["seed=1", "seed=2"]).seed == 2
    assert load_config(base, ["s2d.every=1", "s2d={num_experts: 2}"]).s2d.every == 2
    assert load_config(base, ["seed=-1", "seed=2"]).seed == 2


def test_an_override_can_repair_the_file(base):
    base.write_text(base.read_text() + "seed: -1\n")
    assert load_config(base, ["seed=1"]).seed == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("s2d.foo=1", "s2d.foo: unknown key; valid keys: kind, num_experts"),
        ("s2d.num_expert=1", "s2d.num_expert: unknown key; did you mean 'num_experts'?"),
        ("sd2.num_experts=1", "sd2: unknown key; did you mean 's2d'?"),
        ("s2d.share_rate=null", "s2d.share_rate: must be a number, got null"),
        ("train.epochs=ten", "train.epochs: must be a whole number, got 'ten'"),
        ("data.augment.scale=[2, 1]", "data.augment.scale: must be [low, high] with 0 < low <= high, got [2.0, 1.0]"),
        ("data.augment.scale=[2, x]", "data.augment.scale.1: must be a number, got 'x'"),
        ("data.augment.scale=[2, 1", "not valid YAML: "),
        (
            "data.name=*.npy",
            "not valid YAML: while scanning an alias expected alphabetic or numeric character, but found '.'; "
            "text needs quotes here: 'data.name=\"*.npy\"'",
        ),
        ("data.root=scans #2", "what follows # would be a comment; text needs quotes here: 'data.root=\"scans #2\"'"),
        ("output_dir=#2", "what follows # would be a comment; text needs quotes here: 'output_dir=\"#2\"'"),
        ("train={epochs: 20, epochs: 30}", "train.epochs: duplicate key"),
        ("train={epochs: 0}", "train.epochs: must be at least 1, got 0"),
        ("train.epochs.x=1", "train.epochs: must be a whole number, got {'x': 1}"),
        ("model.depht=1", "model.depht: unknown key; did you mean 'depth'?"),
        ("output_dir.x=1", "output_dir.x: 'output_dir' is not a section"),
        ("seed", "expected section.key=value"),
        ("--seed", "expected section.key=value"),
        ("=1", "expected section.key=value"),
        ("s2d.=1", "expected section.key=value"),
        ("s2d..every=1", "expected section.key=value"),
        ("", "expected section.key=value"),
        ("seed=!!python/name:os.system", "tags (tag:yaml.org,2002:python/name:os.system) are not allowed"),
        ("seed=*x", "aliases (*x) are not allowed"),
    ],
)
def test_refused_override(base, override, expected):
    with pytest.raises(InputError) as caught:
        load_config(base, [override])
    lines = str(caught.value).split("\n")
    assert lines[0].startswith(f"{override_name(override)}: {expected}")
    assert all(line.startswith(override_name(override)) for line in lines)


# Junk: nothing but InputError, and what is accepted round-trips

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
# The constructor's time grows with these counts; nothing else about them is special.
COUNTS = ("model.depth", "s2d.num_experts")


def leaf_paths(mapping: dict, prefix: str = "") -> list[str]:
    paths = []
    for key, value in mapping.items():
        paths += [prefix + key, *(leaf_paths(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return paths


PATHS = [path for path in leaf_paths(parse_config(BASE, where="base").to_dict()) if path not in COUNTS]
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(junk=JUNK)
def test_junk_files_raise_input_errors_only(junk, tmp_path):
    path = tmp_path / "junk.yaml"
    path.write_text(yaml.safe_dump(junk), encoding="utf-8")
    with pytest.raises(InputError):
        load_config(path)


@SHARED
@given(data=st.binary(max_size=40) | st.text(alphabet="abc:-[]{}&*!|>%@`'\"\n\t ?,#<0x_.e", max_size=40))
def test_junk_bytes_raise_input_errors_only(data, tmp_path):
    path = tmp_path / "junk.yaml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(InputError):
        load_config(path)


@SHARED
@given(path=st.sampled_from(PATHS), junk=JUNK, key=st.text(max_size=6))
def test_junk_values_and_keys_raise_input_errors_only(path, junk, key):
    for mapping in (changed(path, junk), BASE | {key: junk}):
        try:
            config = parse_config(mapping, where="junk")
        except InputError as error:
            assert all(line.startswith("junk: ") for line in str(error).split("\n"))
        else:
            assert parse_config(yaml.safe_load(dump_config(config)), where="again") == config


@SHARED
@given(override=st.text(max_size=20) | st.builds("{}={}".format, st.sampled_from(PATHS), st.text(max_size=8)))
def test_junk_overrides_raise_input_errors_only(override, tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    try:
        load_config(path, [override])
    except InputError as error:
        assert str(error)
