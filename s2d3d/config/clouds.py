"""The config keys of point clouds, which a data set of other samples does not have."""

from collections.abc import Mapping
from typing import Any

from .io import Problem

NO_AUGMENTATION = {"scale": None, "shift": 0.0, "rotate": False, "jitter": 0.0, "dropout": 0.0}
"""The section `data.augment` of a data set that holds no clouds."""


def cloud_key_problems(
    data: Mapping[str, Any], defaults: Mapping[str, Any], augment: Mapping[str, Any]
) -> list[Problem]:
    """Return a problem for each key of point clouds that is set in the section `data` of another kind of data set.

    A resolved config holds these keys with their defaults, and `NO_AUGMENTATION`; they are accepted.

    Args:
        data: as given; its data set is known.
        defaults: of the keys `num_points`, `channels`, `up_axis` and `normalize`.
        augment: defaults of the section `augment`.
    """
    changed = [key for key, value in defaults.items() if data.get(key, value) != value]
    given = data.get("augment", NO_AUGMENTATION)
    if not isinstance(given, dict) or {**augment, **given} != NO_AUGMENTATION:
        changed.append("augment")
    return [Problem((key,), f"{_reason(data['name'])}; remove it") for key in changed]


def votes_problems(name: str, votes: int) -> list[Problem]:
    """Return the problem of `eval.votes` above 1 for a data set without clouds."""
    from ..datasets import dataset_reader

    refused = votes > 1 and not dataset_reader(name).clouds
    return [Problem(("eval", "votes"), f"{_reason(name)}; set it to 1")] if refused else []


def _reason(name: str) -> str:
    from ..datasets import dataset_reader

    return f"is for point clouds, '{name}' holds {dataset_reader(name).kind.noun}"
