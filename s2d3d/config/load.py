"""Loading the config of a run from a YAML file, overrides or a checkpoint. Its schema is in `schema.py`."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import InputError
from ..plugins import load_plugins, loaded_plugins
from .io import Loc, Problem, apply_overrides, read_yaml, schema_problems, set_values, show
from .schema import Config, OptimConfig
from .types import Bool, Float

__all__ = ["Config", "dump_config", "load_config", "load_layered_config", "parse_config"]

log = logging.getLogger(__name__)

_RETIRED: dict[Loc, tuple[TypeAdapter[Any], object]] = {
    ("s2d", "active_fraction"): (TypeAdapter(Float), 1.0),
    ("s2d", "average_moments"): (TypeAdapter(Bool), False),
    ("s2d", "rise_fraction"): (TypeAdapter(Float), 1.0),
}
"""Options that were removed because they did not help: type, and the value that had no effect."""
_LAST_WITH_THEM = "6eb7082"
_KEYS_OF_ALL_DATA_SETS = ("variant", "background")
"""Keys of one data set that older versions wrote into every config; null for all other data sets."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config from a YAML file, with `section.key=value` overrides on top.

    Args:
        path: a YAML file; every key without a default must be there.
        overrides: such as `"train.epochs=10"`; the value is YAML. A later override of the same key replaces an earlier
            one. `"~model.depth"` removes a key. If only the epochs are replaced, a warm-up that takes them all is cut
            to half of them, with a warning.

    Returns:
        The validated config.

    Raises:
        InputError: the config is invalid; the message lists all problems, one per line.

    Example:
        >>> load_config("configs/modelnet_s2d.yaml", ["s2d.num_experts=8"]).s2d.num_experts
        8
    """
    mapping, lines = read_yaml(path)
    origins, override_lines = apply_overrides(mapping, overrides)
    _cut_warmup(mapping, origins)
    _use_plugins(mapping, path)
    return _validate(mapping, str(path), origins, lines + override_lines)


def load_layered_config(
    path: str | Path, layers: Mapping[str, Mapping[str, object]], overrides: Sequence[str] = ()
) -> Config:
    """Read a config from a YAML file with layers of values on top, such as those of a study and one of its arms.

    Args:
        path: as for `load_config`.
        layers: by name of the layer (for errors): dotted key -> value. Later layers take precedence.
        overrides: as for `load_config`; they take precedence over the layers.

    Raises:
        InputError: the config is invalid; each line begins with the file, layer or override of the value.

    Example:
        >>> layers = {"arms.eight": {"s2d.num_experts": 8}}
        >>> load_layered_config("configs/modelnet_s2d.yaml", layers).s2d.num_experts
        8
    """
    mapping, lines = read_yaml(path)
    origins: dict[Loc, str] = {}
    for where, values in layers.items():
        origins, layer_lines = set_values(mapping, values, where, origins)
        lines += layer_lines
    own, override_lines = apply_overrides(mapping, overrides)
    hidden = {place for place in origins if any(place[: len(loc)] == loc for loc in own)}
    origins = {place: name for place, name in origins.items() if place not in hidden} | own
    _use_plugins(mapping, path)
    return _validate(mapping, str(path), origins, lines + override_lines)


def parse_config(mapping: Mapping[str, object], *, where: str, overrides: Sequence[str] = ()) -> Config:
    """Validate a config given as a mapping, such as the one stored in a checkpoint. Its plugins are not imported.

    Args:
        mapping: result of `Config.to_dict`; it is not changed.
        where: source of the mapping, for error messages.
        overrides: as for `load_config`.

    Raises:
        InputError: the config is invalid; the message has one line per problem.

    Example:
        >>> config = load_config("configs/modelnet_s2d.yaml")
        >>> parse_config(config.to_dict(), where="last.pt") == config
        True
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where}: must be a mapping of sections, got {show(mapping)}")
    content = copy.deepcopy(dict(mapping))
    origins, lines = apply_overrides(content, overrides)
    return _validate(content, where, origins, lines)


def dump_config(config: Config) -> str:
    """Return a config as YAML text; `load_config` reads it back to an equal config.

    Example:
        >>> "num_experts: 4" in dump_config(load_config("configs/modelnet_s2d.yaml"))
        True
    """
    return yaml.dump(config.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _validate(mapping: dict, where: str, origins: Mapping[Loc, str], lines: list[str]) -> Config:
    problems = _drop_retired(mapping)
    _drop_idle(mapping)
    try:
        config = Config.model_validate(mapping)
    except ValidationError as error:
        problems += schema_problems(error, Config)
    for problem in problems:
        if origins.keys() >= {("model", "name")} and problem.text.startswith("unknown key"):
            problem = Problem(problem.loc, f"{problem.text}; remove it by ~{'.'.join(map(str, problem.loc))}")
        places = (problem.loc[:size] for size in range(len(problem.loc), 0, -1))
        lines.append(problem.line(next((origins[place] for place in places if place in origins), where)))
    if lines:
        raise InputError("\n".join(lines))
    return config


def _cut_warmup(mapping: dict, origins: Mapping[Loc, str]) -> None:
    """Cut a warm-up that fills the epochs of an override, in place: a short trial needs no second override."""
    train, optim = mapping.get("train"), mapping.get("optim") or {}
    if ("train", "epochs") not in origins or ("optim", "warmup_epochs") in origins or not isinstance(optim, dict):
        return
    epochs = train.get("epochs") if isinstance(train, dict) else None
    warmup = optim.get("warmup_epochs", OptimConfig.model_fields["warmup_epochs"].default)
    if type(epochs) is int and epochs > 0 and isinstance(warmup, (int, float)) and warmup >= epochs:
        log.warning("optim.warmup_epochs: %g leaves nothing of %d epochs; cut to %g", warmup, epochs, epochs / 2)
        mapping["optim"] = optim | {"warmup_epochs": epochs / 2}


def _use_plugins(mapping: dict, path: str | Path) -> None:
    """Import the plugins that a config names, and add to it those that the command line named."""
    named = mapping.get("plugins") or []
    if isinstance(named, (list, tuple)) and all(isinstance(name, str) for name in named):  # else the schema refuses
        load_plugins(named, beside=Path(path).parent)
        if others := [name for name in loaded_plugins() if name not in named]:
            mapping["plugins"] = [*named, *others]


def _drop_retired(mapping: dict) -> list[Problem]:
    """Delete removed options from a config, in place; return those whose value had an effect."""
    problems = []
    for (section, key), (kind, idle) in _RETIRED.items():
        keys = mapping.get(section)
        if not isinstance(keys, dict) or key not in keys:
            continue
        value = keys.pop(key)
        try:
            if kind.validate_python(value) == idle:
                continue
        except ValidationError:
            pass
        text = f"was removed, it did not help (docs/results.md), got {show(value)}; remove the key, or use commit"
        problems.append(Problem((section, key), f"{text} {_LAST_WITH_THEM} of s2d3d"))
    return problems


def _drop_idle(mapping: dict) -> None:
    """Delete null keys of other data sets from the section `data`, in place."""
    from ..datasets import dataset_reader, list_datasets

    data = mapping.get("data")
    if not isinstance(data, dict) or data.get("name") not in list_datasets():
        return
    for key in _KEYS_OF_ALL_DATA_SETS:
        if key in data and data[key] is None and key not in dataset_reader(data["name"]).keywords():
            del data[key]
