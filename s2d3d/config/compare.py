"""Comparing configs: one dotted key for each value, and the lists of keys that a comparison leaves out.

A list names keys, such as "train.device", and whole sections, such as "log".
"""

from collections.abc import Mapping, Sequence
from typing import Any

FOLDERS = ("output_dir", "plugins", "data.root", "data.cache_dir", "data.allow_links")
"""Keys of file locations on the computing machine."""
SAME_RESULT = (
    *FOLDERS, "data.memory_budget_gb", "train.device", "train.num_threads", "train.compile", "train.compile_mode",
    "train.save_every", "train.checkpoint_every", "train.keep_every", "eval.every", "log",
)  # fmt: skip
"""Keys that change neither the weights nor the final score of a run.

`eval.batch_size` is not in the list: votes and re-estimated BatchNorm statistics depend on it."""
SAME_WEIGHTS = (*SAME_RESULT, "train.max_steps", "eval")
"""Keys that do not affect the weights during training. A resumed run may change them."""
WHERE_AND_HOW_FAST = ("seed", *FOLDERS, "train.device", "train.num_threads", "log")
"""Keys that a study does not list as changes of its base config: location, speed and seed of a run."""
SET_BY_STUDY = ("seed", "output_dir", "eval.split", "eval.every", "train.max_steps")
"""Keys that the study sets."""


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys.

    Args:
        mapping: for example the result of `Config.to_dict`; a flat mapping is returned unchanged.
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
    """Return whether a dotted key, or a section that contains it, is one of `names`.

    Example:
        >>> [is_named(key, ("log", "train.device")) for key in ("log.wandb", "train.device", "logs", "train.devices")]
        [True, True, False, False]
    """
    return any(key == name or key.startswith(f"{name}.") for name in names)


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ignored: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return the values (ours, theirs) of the keys in which two configs differ; None for a missing key.

    Args:
        ours: result of `Config.to_dict`, or a flat mapping.
        theirs: the same for the other config.
        ignored: keys and sections to leave out, such as `SAME_RESULT`.

    Example:
        >>> differences({"a": {"b": 1, "c": 2}, "log": {"d": 3}}, {"a": {"b": 1, "c": 4}}, ("log",))
        {'a.c': (2, 4)}
    """
    first, second = flatten(ours), flatten(theirs)
    pairs = {key: (first.get(key), second.get(key)) for key in first | second if not is_named(key, ignored)}
    return {key: (own, other) for key, (own, other) in pairs.items() if own != other}


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the dotted keys in which at least two of several configs differ; a missing key is a difference.

    Args:
        configs: at least one, each a result of `Config.to_dict` or a flat mapping.

    Example:
        >>> differing_keys([{"seed": 0, "log": {"wandb": None}}, {"seed": 1, "log": {}}])
        ['seed', 'log.wandb']
    """
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    return [key for key in keys if any(key not in config or config[key] != flat[0].get(key) for config in flat)]
