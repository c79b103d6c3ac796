"""Comparing configs: one dotted key for each value, and the lists of keys that a comparison leaves out.

A list names keys, such as "train.device", and whole sections, such as "log".
"""

from collections.abc import Mapping, Sequence
from typing import Any

FOLDERS = ("output_dir", "data.root", "data.cache_dir", "data.allow_links")
"""Where files lie on the machine that computes."""
SAME_RESULT = (
    *FOLDERS, "data.memory_budget_gb", "train.device", "train.num_threads", "train.compile", "train.compile_mode",
    "train.save_every", "train.checkpoint_every", "train.keep_every", "eval.every", "log",
)  # fmt: skip
"""Keys that change neither the weights nor the final score of a run.

`eval.batch_size` is none of them: votes and re-estimated BatchNorm statistics depend on it."""
SAME_WEIGHTS = (*SAME_RESULT, "train.max_steps", "eval")
"""Keys that do not alter the trajectory of the weights: a resumed run may change them."""
WHERE_AND_HOW_FAST = ("seed", *FOLDERS, "train.device", "train.num_threads", "log")
"""Keys that a study does not list as changes of its base config: where and how fast a run computes, and its seed."""
SET_BY_STUDY = ("seed", "output_dir", "eval.split", "eval.every", "train.max_steps")
"""Keys that a study decides itself."""


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys.

    Args:
        mapping: such as `Config.to_dict` returns it; one that is flat already stays as it is.
        prefix: put before each key.

    Example:
        >>> flatten({"a": {"b": 1}, "c": [2]})
        {'a.b': 1, 'c': [2]}
    """
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def is_named(key: str, names: Sequence[str]) -> bool:
    """Tell whether a dotted key is one of `names`, or lies in a section that is.

    Example:
        >>> [is_named(key, ("log", "train.device")) for key in ("log.wandb", "train.device", "logs", "train.devices")]
        [True, True, False, False]
    """
    return any(key == name or key.startswith(f"{name}.") for name in names)


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ignored: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return the values (ours, theirs) by dotted key where two configs differ; None for a key that one lacks.

    Args:
        ours: as `Config.to_dict` returns it, or flat.
        theirs: likewise.
        ignored: keys and sections to leave out, such as `SAME_RESULT`.

    Example:
        >>> differences({"a": {"b": 1, "c": 2}, "log": {"d": 3}}, {"a": {"b": 1, "c": 4}}, ("log",))
        {'a.c': (2, 4)}
    """
    first, second = flatten(ours), flatten(theirs)
    pairs = {key: (first.get(key), second.get(key)) for key in first | second if not is_named(key, ignored)}
    return {key: (own, other) for key, (own, other) in pairs.items() if own != other}


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the dotted keys in which at least two of several configs differ; a key that one lacks is a difference.

    Args:
        configs: at least one, each as `Config.to_dict` returns it, or flat.

    Example:
        >>> differing_keys([{"seed": 0, "log": {"wandb": None}}, {"seed": 1, "log": {}}])
        ['seed', 'log.wandb']
    """
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    return [key for key in keys if any(key not in config or config[key] != flat[0].get(key) for config in flat)]
