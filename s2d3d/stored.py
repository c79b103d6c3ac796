"""Files that this package wrote, read back: their content is compared with a schema before any of it is used."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.types import Strict

from .errors import InputError, printable, quoted

Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Share = Annotated[Finite, Field(ge=0, le=1)]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Text = Annotated[str, Strict()]


def check_stored(content: Mapping[str, Any], schema: Any, *, where: object, advice: str) -> None:
    """Refuse content that this package does not write.

    Args:
        content: of a file.
        schema: a `TypedDict`; keys that it does not name are allowed.
        where: the file, for the message.
        advice: what to do about it; ends the message.

    Raises:
        InputError: a key is missing, or its value has another type or is out of range; the message names the first.

    Example:
        >>> from typing_extensions import TypedDict
        >>> check_stored({"oa": 2}, TypedDict("Result", {"oa": Share}), where="a.json", advice="write it again")
        Traceback (most recent call last):
        s2d3d.errors.InputError: a.json: oa is 2, which s2d3d does not write; write it again
    """
    try:
        _adapter(schema).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(printable(str(part))[:40] for part in first["loc"]) or "its content"
        value = first["input"]
        shown = quoted(value, 40) if isinstance(value, str) else printable(_short(value))
        state = "is missing" if first["type"] == "missing" else f"is {shown}, which s2d3d does not write"
        raise InputError(f"{where}: {key} {state}; {advice}") from None


@functools.cache
def _adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def _short(value: object) -> str:
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "a very large number" if isinstance(value, int) and value.bit_length() > 128 else repr(value)
