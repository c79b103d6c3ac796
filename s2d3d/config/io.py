"""Strict reading of YAML files, overrides, and error messages with one line per problem."""

import contextlib
import copy
import re
import reprlib
import shlex
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import yaml
import yaml.reader
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from ..errors import InputError, did_you_mean

Loc = tuple[str | int, ...]
"""A place in a config, as the path of keys and list positions."""

_MAX_BYTES = 256 * 1024
_MAX_DEPTH = 20

_WORDS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_unicode": "must be valid Unicode text",
    "tuple_type": "must be a list",
    "model_type": "must be a section of keys and values",
    "dict_type": "must be a mapping of keys and values",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
}


class Problem(NamedTuple):
    """A problem with the value at a place in the config."""

    loc: Loc
    text: str

    def line(self, where: str) -> str:
        """Return the problem as one line that starts with its file or override."""
        path = ".".join(key if str(key).isprintable() else repr(key)[1:-1] for key in map(str, self.loc))
        return f"{where}: {path}: {self.text}" if path else f"{where}: {self.text}"


def read_yaml(path: str | Path) -> tuple[dict[str, object], list[str]]:
    """Read the mapping in a YAML file.

    Aliases, tags, deep nesting and large files are refused, so that reading is safe and takes bounded time.

    Returns:
        The mapping, and one line for each duplicate key (the last value is kept).

    Raises:
        InputError: the file cannot be read, is not YAML, or holds no mapping.
    """
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):  # opening it could wait for ever
            raise InputError(f"{path}: is a pipe or a device, expected a YAML file")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory, expected a YAML file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path}: larger than {_MAX_BYTES // 1024} KiB, this is no config")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: not UTF-8 text") from None
    try:
        mapping, problems = _parse(text)
    except yaml.YAMLError as error:
        line, problem = _yaml_error(error, text)
        raise InputError(f"{path}: line {line}: {problem}") from None
    if mapping is None:
        raise InputError(f"{path}: the file is empty, expected a config")
    if not isinstance(mapping, dict):
        raise InputError(f"{path}: must be a mapping of sections, got {show(mapping)}")
    return mapping, [problem.line(str(path)) for problem in problems]


def apply_overrides(mapping: dict, overrides: Sequence[str]) -> tuple[dict[Loc, str], list[str]]:
    """Set `section.key=value` overrides in `mapping`, in place; for equal keys the last override is used.

    `~section.key` removes a key that the mapping has, such as one of another model.

    Returns:
        The source override of each changed place, and one line per problem.
    """
    origins: dict[Loc, str] = {}
    lines: list[str] = []
    for override in overrides:
        where = override_name(override)
        if override.startswith("~"):
            lines += _remove(mapping, override, where)
            continue
        key, equals, text = override.partition("=")
        loc = tuple(part.strip() for part in key.split("."))
        if not equals or not all(loc):
            lines.append(f"{where}: expected section.key=value")
            continue
        try:
            value, problems = _parse(text)
        except yaml.YAMLError as error:
            advice = _quoted(key, text) if isinstance(error, yaml.MarkedYAMLError) else ""
            lines.append(f"{where}: {_yaml_error(error, text)[1]}{advice}")
            continue
        if _has_comment(text, value):
            lines.append(f"{where}: what follows # would be a comment{_quoted(key, text)}")
            continue
        lines += [Problem(loc + problem.loc, problem.text).line(where) for problem in problems]
        origins, problem = _set(mapping, loc, value, where, origins)
        lines += problem
    return origins, lines


def _has_comment(text: str, value: object) -> bool:
    """Tell whether YAML takes a part of a text for a comment."""
    for mark in re.finditer(r"(?:^|\s)#", text):
        with contextlib.suppress(yaml.YAMLError):
            if repr(_parse(text[: mark.start()])[0]) == repr(value):  # NaN is not equal to itself
                return True
    return False


def _quoted(key: str, text: str) -> str:
    """Advise to write an override with quotes, if it needs no others."""
    right = f'{key}="{text}"'
    plain = right.isprintable() and right.count('"') == 2 and len(right) < 100
    return f"; text needs quotes here: {shlex.quote(right)}" if plain else ""


def _remove(mapping: dict, override: str, where: str) -> list[str]:
    """Remove the key of a `~section.key` override, in place; return a line if there is none."""
    *sections, last = override[1:].strip().split(".")
    place: object = mapping
    for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        return [f"{where}: the config has no such key to remove"]
    del place[last]
    return []


def set_values(
    mapping: dict, values: Mapping[str, object], where: str, origins: Mapping[Loc, str]
) -> tuple[dict[Loc, str], list[str]]:
    """Set values by dotted key, such as {"s2d.share_rate": 0.1}, in `mapping`, in place.

    Args:
        mapping: the config so far.
        values: values to set.
        where: name of their source in errors.
        origins: the source of each place that was set so far.

    Returns:
        `origins` with the places set now, and one line per problem.
    """
    origins, lines = dict(origins), []
    for key, value in values.items():
        loc = tuple(key.split("."))
        if not all(loc):
            lines.append(f"{where}: {show(key)}: expected section.key")
            continue
        origins, problem = _set(mapping, loc, copy.deepcopy(value), where, origins)
        lines += problem
    return origins, lines


def override_key(override: str) -> str:
    """Return the dotted key of an override, as on the command line.

    Example:
        >>> override_key(" s2d.kind =none")
        's2d.kind'
    """
    return override.partition("=")[0].strip()


def override_name(override: str) -> str:
    """Name an override in an error message."""
    return f"override {show(override)}"


def raise_problems(problems: list[Problem]) -> None:
    """Several problems of a section, raised by a validator; `schema_problems` turns them into messages."""
    if problems:
        raise PydanticCustomError("problems", "several problems", {"problems": problems})


def schema_problems(
    error: ValidationError, schema: type[BaseModel], whole: type[BaseModel] | None = None
) -> list[Problem]:
    """Turn the errors of pydantic into messages: what each value must be, and the nearest valid key for unknown keys.

    Args:
        error: of a mapping that does not match `schema`.
        schema: of the mapping.
        whole: schema in which to look for the right place of an unknown key, if the mapping is a section; default
            `schema`.
    """
    problems = []
    for item in error.errors(include_url=False):
        kind, loc, context = item["type"], item["loc"], item.get("ctx", {})
        if kind == "problems":
            problems += [Problem(loc + problem.loc, problem.text) for problem in context["problems"]]
        elif kind == "missing":
            problems.append(Problem(loc, "required key is missing"))
        elif kind == "extra_forbidden":
            problems.append(Problem(loc, _unknown_key(schema, loc, whole or schema)))
        elif kind == "value_error":
            problems.append(Problem(loc, one_line(context["error"])))
        elif kind == "invalid_key":
            problems.append(Problem(loc, "keys must be text"))
        else:
            problems.append(Problem(loc, _refused(schema, item)))
    return problems


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a message for an unknown name; a short list of known names is shown."""
    known = sorted(known)
    hint = did_you_mean(name, known)
    listed = f" (known: {', '.join(known)})" if len(known) <= 20 else ""
    return f"unknown {kind} {show(name)}{hint}{listed}"


def show(value: object) -> str:
    """Return a value as short text on one line, in YAML syntax."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = _SHORT.repr(value)
    return short if isinstance(value, str) else one_line(short)


def one_line(error: object) -> str:
    """Return the message of an error without line breaks."""
    return " ".join(str(error).split())


def _set(
    mapping: dict, loc: tuple[str, ...], value: object, where: str, origins: dict[Loc, str]
) -> tuple[dict[Loc, str], list[str]]:
    """Set one value in place; return the origins including this one, and a line if the place does not exist."""
    section: dict = mapping
    made: dict[Loc, str] = {}
    for depth, part in enumerate(loc[:-1], 1):
        if part not in section:
            section[part] = {}
            made[loc[:depth]] = where
        section = section[part]
        if not isinstance(section, dict):
            return origins | made, [Problem(loc, f"'{'.'.join(loc[:depth])}' is not a section").line(where)]
    section[loc[-1]] = value
    kept = {place: name for place, name in origins.items() if place[: len(loc)] != loc}
    return kept | made | {loc: where}, []


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else "a very large number"


_SHORT = _Short()


class _Mark(Protocol):
    """The common attributes of the marks of PyYAML's two parsers."""

    line: int


class _Refused(yaml.YAMLError):
    """Valid YAML that is not allowed in a config."""

    def __init__(self, text: str, mark: _Mark | None) -> None:
        super().__init__(text)
        assert mark is not None  # the parser in Python marks whatever it reads
        self.text, self.line = text, mark.line + 1


class _Loader(yaml.SafeLoader):
    """YAML's plain data only: null, booleans, numbers, text, lists and mappings."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(":")[2] in ("null", "bool", "int", "float")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"aliases (*{event.anchor}) are not allowed, write the value out", event.start_mark)
        if event.tag:
            raise _Refused(f"tags ({event.tag}) are not allowed", event.start_mark)
        if self.depth >= _MAX_DEPTH:
            raise _Refused(f"nested more than {_MAX_DEPTH} levels deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same with the parser of libyaml, ten times as fast."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _parse(text: str) -> tuple[object, list[Problem]]:
    if yaml.__with_libyaml__ and not yaml.reader.Reader.NON_PRINTABLE.search(text):
        try:
            if _is_plain(text):
                return _parse_with(_FastLoader, text)
        except yaml.YAMLError:
            pass  # the parser in Python says it in the same words everywhere
    return _parse_with(_Loader, text)


def _is_plain(text: str) -> bool:
    """Tell whether a text holds nothing that `_Loader` refuses."""
    depth = 0
    for event in yaml.parse(text, Loader=_FastLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            return False
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth >= _MAX_DEPTH:
            return False
    return True


def _parse_with(kind: type[_Loader] | type[_FastLoader], text: str) -> tuple[object, list[Problem]]:
    loader = kind(text)
    try:
        node = loader.get_single_node()
        problems: list[Problem] = []
        return (None if node is None else _build(loader, node, (), problems)), problems
    finally:
        loader.dispose()


def _build(loader: _Loader | _FastLoader, node: yaml.Node, loc: Loc, problems: list[Problem]) -> object:
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*loc, index), problems) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        try:
            return loader.construct_object(node)
        except ValueError:
            raise _Refused(f"{show(node.value)} is not a number", node.start_mark) from None
    result: dict[str, object] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _Refused("a key must be text", key_node.start_mark)
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in result:
            problems.append(Problem((*loc, key), f"duplicate key (lines {lines[key]} and {line})"))
        lines[key] = line
        result[key] = _build(loader, value_node, (*loc, key), problems)
    return result


def _yaml_error(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    if isinstance(error, _Refused):
        return error.line, error.text
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        return mark.line + 1, "not valid YAML: " + one_line(f"{error.context or ''} {error.problem or ''}")
    assert isinstance(error, yaml.reader.ReaderError)  # which has a position instead of a mark
    line = text.count("\n", 0, error.position) + 1
    return line, f"not valid YAML: character U+{ord(text[error.position]):04X}"


def _unknown_key(schema: type[BaseModel], loc: Loc, whole: type[BaseModel]) -> str:
    key = str(loc[-1])
    section = _schema_at(schema, loc[:-1])
    hint = did_you_mean(key, section.model_fields)
    if not hint:
        elsewhere = [path for path in _paths(whole) if path.split(".")[-1] == key]
        hint = f"; did you mean '{elsewhere[0]}'?" if len(elsewhere) == 1 else ""
    return f"unknown key{hint or '; valid keys: ' + ', '.join(section.model_fields)}"


def _refused(schema: type[BaseModel], item: Mapping) -> str:
    context = {key: f"{value:g}" if isinstance(value, float) else value for key, value in item.get("ctx", {}).items()}
    kind = "int_type" if item["type"].startswith("int_") else item["type"]
    must = _WORDS[kind].format(**context) if kind in _WORDS else one_line(item["msg"])
    nullable = " (or null)" if _is_nullable(schema, item["loc"]) else ""
    got = item["input"]
    hint = did_you_mean(got, re.findall("'(.*?)'", must)) if kind == "literal_error" and isinstance(got, str) else ""
    if kind == "string_type" and isinstance(got, (bool, int, float)):
        hint = '; for text, put quotes around it: "..."'
    return f"{must}{nullable}, got {show(got)}{hint}"


def _schema_at(schema: type[BaseModel], loc: Loc) -> type[BaseModel]:
    for key in loc:
        annotation = schema.model_fields[str(key)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        schema = annotation
    return schema


def _is_nullable(schema: type[BaseModel], loc: Loc) -> bool:
    for index, key in enumerate(loc):
        annotation = schema.model_fields[str(key)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
            return union and index == len(loc) - 1 and types.NoneType in typing.get_args(annotation)
        schema = annotation
    return False


def _paths(schema: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for key, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += _paths(field.annotation, f"{prefix}{key}.")
        else:
            paths.append(prefix + key)
    return paths
