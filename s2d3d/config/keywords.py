"""Keyword arguments as config keys. A section such as `model` also accepts the keywords of the object that it names."""

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ..errors import did_you_mean
from .io import Problem, schema_problems
from .types import Bool, Float, Int, Plain, Str

Fields = Mapping[str, tuple[Any, Any]]
"""By keyword: type of the config value, and default."""

_TYPES = {bool: Bool, int: Int, float: Float, str: Str}


def keyword_fields(defaults: Mapping[str, Any], annotations: Mapping[str, Any] | None = None) -> Fields:
    """Return the keywords that a config can set, with their types: by annotation or else by default.

    Args:
        defaults: by keyword. A keyword whose default cannot be a config value, such as a function, is left out.
        annotations: by keyword; annotations with other types than those of config values are ignored.

    Example:
        >>> list(keyword_fields({"depth": 4, "norm": print}))
        ['depth']
    """
    fields = {}
    for key, default in defaults.items():
        kind = _declared((annotations or {}).get(key, inspect.Parameter.empty))
        if default is None or isinstance(default, (bool, int, float, str, tuple, list)):
            fields[key] = (_of_default(default) if kind is None else kind | None if default is None else kind, default)
    return fields


def resolve_keywords(
    section: type[BaseModel], values: dict[str, Any], fields: Fields | None, whole: type[BaseModel]
) -> tuple[dict[str, Any], list[Problem]]:
    """Validate a section together with the keywords of the named object, and fill in their defaults.

    Args:
        section: schema of the keys that every such section has, including `name`.
        values: as given.
        fields: of the keywords; None: the name is unknown, so the keywords are unknown too.
        whole: schema of the config, in which to look for the right place of an unknown key.

    Returns:
        The section's keys, the keywords, and the problems.
    """
    own = section.model_fields
    taken = [key for key in fields or {} if key in own]
    if taken:
        text = f"has a keyword '{taken[0]}', which is a key of every such section; rename the keyword"
        return {}, [Problem(("name",), text)]
    schema = _with_keywords(section, fields)
    resolved, problems = {}, []
    try:
        resolved = dict(schema.model_validate(values))
    except ValidationError as error:
        problems = schema_problems(error, schema, whole)
    if fields is None:
        hints = {key: did_you_mean(key, own) for key in values if isinstance(key, str) and key not in own}
        problems += [Problem((key,), f"unknown key{hint}") for key, hint in hints.items() if hint]
    return resolved, problems


_SCHEMAS: dict[Any, type[BaseModel]] = {}
"""Sections with keywords: building one takes longer than a validation."""


def _with_keywords(section: type[BaseModel], fields: Fields | None) -> type[BaseModel]:
    """Return the schema of a section and of keywords; without keywords, one that takes any other key."""
    form = section, None if fields is None else repr(fields)
    if form not in _SCHEMAS:
        own = {key: (field.annotation, field) for key, field in section.model_fields.items()}
        extra: Literal["allow", "forbid"] = "allow" if fields is None else "forbid"
        both: dict[str, Any] = {**own, **(fields or {})}
        _SCHEMAS[form] = create_model(section.__name__, __config__=ConfigDict(extra=extra), **both)
    return _SCHEMAS[form]


def check_types(values: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Return keyword values that did not come through a config, as its types have them; unknown ones stay as they are.

    Raises:
        ValueError: a value is of another type.

    Example:
        >>> check_types({"depth": 2.0}, keyword_fields({"depth": 4}))
        Traceback (most recent call last):
        ValueError: depth: must be a whole number, got 2.0
    """
    own: dict[str, Any] = {key: field for key, field in fields.items() if key in values}
    schema = create_model("Keywords", __config__=ConfigDict(extra="allow"), **own)
    try:
        return dict(schema.model_validate(dict(values)))
    except ValidationError as error:
        problem = schema_problems(error, schema)[0]
        raise ValueError(f"{'.'.join(map(str, problem.loc))}: {problem.text}") from None


def _of_default(default: Any) -> Any:
    if isinstance(default, (tuple, list)):
        return types.GenericAlias(tuple, (_of_default(default[0]) if default else Plain, ...))
    return _TYPES.get(type(default), Plain)


def _declared(annotation: Any) -> Any:
    """Return the type of config values for an annotation of plain types; None for other annotations."""
    if isinstance(annotation, type):
        return _TYPES.get(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return annotation
    if origin in (Union, types.UnionType):
        kinds = [_declared(argument) for argument in arguments if argument is not types.NoneType]
        return kinds[0] | None if len(kinds) == 1 and kinds[0] is not None else None
    if origin in (tuple, list, Sequence) and arguments[1:] in ((), (...,)):
        item = _declared(arguments[0])
        return None if item is None else types.GenericAlias(tuple, (item, ...))
    return None
