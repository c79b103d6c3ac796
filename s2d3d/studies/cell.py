"""One run of a study: its description, its conversion to plain types, and its config with one thread."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..config.load import Config, parse_config
from ..plugins import load_plugins, plugin_files


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        study: its name.
        arm: name of its configuration, a key of `arms`.
        seed: of the run.
        config: of the run.
        changes: dotted keys in which `config` differs from the study's base, without seed and folders.
        data_folder: name of the folder that `data.root` has in the study's files, before overrides for this machine.
    """

    study: str
    arm: str
    seed: int
    config: Config
    changes: dict[str, object]
    data_folder: str

    def __str__(self) -> str:
        return f"{self.arm}/seed{self.seed}"


def single_threaded(cell: Cell) -> Cell:
    """Return the run with one torch thread, for parallel runs. The number of threads affects only rounding."""
    train = cell.config.train.model_copy(update={"num_threads": 1})
    return dataclasses.replace(cell, config=cell.config.model_copy(update={"train": train}))


_PLAIN = ("study", "arm", "seed", "changes", "data_folder")


def cell_to_dict(cell: Cell) -> dict[str, Any]:
    """Return a run as plain types for JSON, with the plugins of this process, which its config may need."""
    plain = {name: getattr(cell, name) for name in _PLAIN}
    return {**plain, "config": cell.config.to_dict(), "plugins": plugin_files()}


def cell_from_dict(plain: dict[str, Any]) -> Cell:
    """Return the run that `cell_to_dict` converted.

    Raises:
        InputError: the config is not valid.
    """
    load_plugins(plain.get("plugins", ()))  # in a worker of our own study
    config = parse_config(plain["config"], where=f"{plain['study']}/{plain['arm']}/seed{plain['seed']}")
    return Cell(config=config, **{name: plain[name] for name in _PLAIN})
