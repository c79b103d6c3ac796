"""Types of config values. A bool is not accepted as a number; `5e-4`, which YAML 1.1 reads as text, is accepted."""

import math
import os
import re
from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from .io import show, unknown_name

_SECOND_ORDER = ("adahessian",)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _to_number(value: object) -> object:
    # YAML 1.1 reads 5e-4 as text; bools and other text stay as they are and fail as non-numbers.
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1000:
        return float("inf")
    return value


def _to_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _check_size(value: int) -> int:
    if value >= 2**63:
        raise ValueError(f"must be at most {2**63 - 1}, got {show(value)}")
    return value


def _check_path(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError(f"must be a path, got {show(value)}")
    return os.path.expanduser(value)


def _check_device(value: str) -> str:
    from ..machine import DEVICE_NAMES

    if not DEVICE_NAMES.fullmatch(value):
        raise ValueError(f"must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {show(value)}")
    return value


def _check_pair(value: object) -> object:
    if isinstance(value, (list, tuple)) and len(value) != 2:
        raise ValueError(f"must be [low, high], got {show(value)}")
    return value


def _check_interval(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"must be [low, high] with 0 < low <= high, got {show(list(value))}")
    if value[0] < 1e-6 or value[1] > 1e6:
        raise ValueError(f"must be [low, high] within 1e-6 and 1e6, got {show(list(value))}")
    return value


def check_not_empty(value: tuple) -> tuple:
    if not value:
        raise ValueError("must not be empty")
    return value


def check_unique(value: tuple) -> tuple:
    twice = [name for name, count in Counter(value).items() if count > 1]
    if twice:
        raise ValueError(f"names {show(twice[0])} twice")
    return value


def _check_dataset(name: str) -> str:
    from ..datasets import list_datasets

    if name not in list_datasets():
        raise ValueError(unknown_name("dataset", name, list_datasets()))
    return name


def _check_model(name: str) -> str:
    from ..models import list_models

    if name not in list_models():
        raise ValueError(unknown_name("model", name, list_models()))
    return name


def _check_optimizer(name: str) -> str:
    from timm.optim import list_optimizers

    known = [item for item in list_optimizers() if isinstance(item, str) and item not in _SECOND_ORDER]
    if name in _SECOND_ORDER:
        raise ValueError(f"{show(name)} needs second derivatives, which training does not compute; choose another")
    if name not in known:
        raise ValueError(unknown_name("optimizer", name, known))
    return name


def check_plain(value: object) -> object:
    """Return a value that is text, a finite number, true, false, null or a list of these; lists become tuples.

    Raises:
        ValueError: the value has another type.
    """
    if isinstance(value, (list, tuple)):
        return tuple(check_plain(item) for item in value)
    if isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"must be a finite number, text, true, false, null or a list of these, got {show(value)}")


Int = Annotated[int, Strict(), AfterValidator(_check_size)]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False), BeforeValidator(_to_number)]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]
Name = Annotated[Str, Field(min_length=1)]
PathStr = Annotated[Str, AfterValidator(_check_path)]
Interval = Annotated[tuple[Float, Float], BeforeValidator(_check_pair), AfterValidator(_check_interval)]
Plain = Annotated[Any, AfterValidator(check_plain)]
DatasetName = Annotated[Str, AfterValidator(_check_dataset)]
ModelName = Annotated[Str, AfterValidator(_check_model)]
OptimizerName = Annotated[Str, AfterValidator(_check_optimizer)]
DeviceName = Annotated[Str, AfterValidator(_check_device)]
Names = Annotated[tuple[Name, ...], AfterValidator(check_not_empty)]
NameOrNames = Annotated[Names, BeforeValidator(_to_tuple)]
"""One name may stand without a list."""
ClassNames = Annotated[Names, AfterValidator(check_unique)]
