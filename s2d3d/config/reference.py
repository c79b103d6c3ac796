"""The configuration reference. It is generated from the schema."""

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from ..datasets import dataset_reader, list_datasets
from ..markdown import markdown_table
from ..models import list_models, model_kwargs
from .schema import Config, Section


def config_reference() -> str:
    """Return every key of a config as Markdown: a table for each section, data set with keywords, and model.

    Example:
        >>> "| `optim.lr` |" in config_reference()
        True
    """
    parts = [
        "# Configuration reference",
        "A config is a YAML file with these keys. The command line can replace each of them: `section.key=value`. "
        "Unknown keys, wrong types and values out of range are all reported at once, before data is touched. "
        "This page is made from the schema by `make docs`.",
    ]
    head = ["key", "default", "meaning"]
    parts += ["## Top level", markdown_table(head, _rows(Config, ""))]
    for prefix, section in _sections(Config, ""):
        title = (section.__doc__ or "").strip().splitlines()[0]
        parts += [f"## {prefix}", title, markdown_table(head, _rows(section, f"{prefix}."))]
    parts += [
        "## Keywords of the data sets",
        "They are additional keys of the section `data`. Data sets that are not listed have no keywords.",
    ]
    for name in list_datasets():
        reader = dataset_reader(name)
        meanings = _arguments(inspect.getdoc(reader.read) or "")
        own = [
            [f"`data.{key}`", f"`{_shown(parameter.default)}`", " ".join(meanings.get(key, "").split())]
            for key, parameter in reader.keywords().items()
        ]
        parts += [f"### {name}", markdown_table(head, own)] if own else []
    parts += [
        "## Keywords of the models",
        "They are additional keys of the section `model`. Defaults:",
    ]
    for name in list_models(task="classify"):
        rows = [[f"`model.{key}`", f"`{_shown(value)}`"] for key, value in model_kwargs(name).items()]
        parts += [f"### {name}", markdown_table(head[:2], rows)]
    return "\n\n".join(parts) + "\n"


def _sections(model: type[Section], prefix: str) -> Iterator[tuple[str, type[Section]]]:
    for name, field in model.model_fields.items():
        section = _section_of(field)
        if section is not None:
            yield f"{prefix}{name}", section
            yield from _sections(section, f"{prefix}{name}.")


def _rows(model: type[Section], prefix: str) -> list[list[str]]:
    """Return key, default and meaning of the keys that are not sections."""
    rows = []
    for name, field in model.model_fields.items():
        if _section_of(field) is None:
            default = "required" if field.is_required() else f"`{_shown(field.default)}`"
            rows.append([f"`{prefix}{name}`", default, field.description or ""])
    return rows


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def _arguments(docstring: str) -> dict[str, str]:
    """Return the descriptions in the section `Args` of a docstring by argument, each as a sentence."""
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", docstring.partition("Args:\n")[2].partition("\n\n")[0], re.M)
    return {name: (text[:1].upper() + text[1:]).replace("None", "null") for name, text in found}


def _shown(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)
