"""The config of a study: arms (changes of a base config) times seeds, and how runs are scored and compared."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..config.compare import SET_BY_STUDY, WHERE_AND_HOW_FAST, differences, flatten, is_named
from ..config.io import Problem, override_key, raise_problems, read_yaml, schema_problems, show
from ..config.load import Config, load_config, load_layered_config
from ..config.types import Float, Int, Name, PathStr, Str, check_not_empty, check_plain, check_unique
from ..errors import InputError, did_you_mean
from ..runs.folder import FORMS
from .cell import Cell

SEED = "{seed}"
"""In `model.pretrained` of a study, stands for the seed of the run: each run has its own pre-training."""
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)


def _check_arm_name(name: str) -> str:
    if not _ARM_NAME.fullmatch(name):
        raise ValueError(f"must be letters, digits, '_', '-' and '.', as it names a folder, got {show(name)}")
    return name


def _check_arms(arms: dict) -> dict:
    if not arms:
        raise ValueError("must name at least one arm")
    return arms


def _check_reference(reference: object) -> object:
    pairs = reference.items() if isinstance(reference, dict) else [("", reference)]
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError(f"must be the name of an arm, or a mapping of arm: its reference, got {show(reference)}")
    return reference


def _check_value(value: object) -> object:
    if not isinstance(value, dict):
        return check_plain(value)
    return {key: _check_value(item) for key, item in value.items()}


Label = Annotated[Name, AfterValidator(_check_arm_name)]
Seed = Annotated[Int, Field(ge=0, le=2**32 - 1)]
Values = dict[Str, Annotated[Any, AfterValidator(_check_value)]]


class StudyConfig(BaseModel):
    """The content of a file in configs/studies/."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Label = Field(description="Name of the study: of its results, and of its folder of runs.")
    question: Name = Field(description="Question that the study answers, one sentence.")
    base: PathStr = Field(description="Config that all arms change, relative to the study's file.")
    evaluate: Literal["validation", "test"] = Field(
        description="'validation': score the part that data.val_fraction holds out, to choose; 'test': the test split."
    )
    seeds: Annotated[tuple[Seed, ...], AfterValidator(check_not_empty), AfterValidator(check_unique)] = Field(
        description="Seeds of each arm; runs of one seed are paired."
    )
    reference: Annotated[Any, BeforeValidator(_check_reference)] = Field(
        description="Arm (or form) that all others are compared with, or a mapping of arm: its reference."
    )
    arms: Annotated[dict[Label, Values], AfterValidator(_check_arms)] = Field(
        description="By name of the arm, its changes: section.key: value, or a whole section; {}: the base."
    )
    common: Values = Field({}, description="Changes of all arms.")
    forms: dict[Label, Name] = Field(
        {}, description="Further rows: NAME: ARM.FORM, another form of an arm's models, such as 's2d.ema'."
    )
    along: Name | None = Field(
        None, description="Config key on the x axis of the figure, such as 'train.epochs'; null: one line per arm."
    )
    equivalence: Annotated[Float, Field(gt=0)] | None = Field(
        None, description="Margin in points of OA: test that a difference is smaller than this; null: no such test."
    )
    curve: Literal["test"] | None = Field(
        None,
        description="'test': score the test split after each epoch, to show how much selecting an epoch or a run by it "
        "adds; null: only at the end.",
    )
    output_dir: PathStr | None = Field(None, description="Folder of the runs; null: runs/studies/NAME.")

    @model_validator(mode="after")
    def _check_names(self) -> "StudyConfig":
        problems = []
        for place, values in (("common", self.common), *((f"arms.{arm}", arm_) for arm, arm_ in self.arms.items())):
            set_here = flatten(values)
            problems += [
                Problem((place, key), "is decided by the study; remove it") for key in SET_BY_STUDY if key in set_here
            ]
        for name, target in self.forms.items():
            arm, _, form = target.rpartition(".")
            if name in self.arms:
                problems.append(Problem(("forms", name), "is the name of an arm as well; choose another"))
            if arm not in self.arms or form not in FORMS:
                text = f"must be ARM.FORM with FORM one of {', '.join(FORMS)}, got {show(target)}"
                problems.append(Problem(("forms", name), text + did_you_mean(arm, self.arms)))
        if self.curve == "test" and self.evaluate != "test":
            problems.append(Problem(("curve",), f"needs evaluate: test, got {show(self.evaluate)}"))
        rows = [*self.arms, *self.forms]
        chosen = self.reference
        pairs: list[tuple[str | None, str]] = [*chosen.items()] if isinstance(chosen, dict) else [(None, chosen)]
        for compared, reference in pairs:
            where = ("reference",) if compared is None else ("reference", compared)
            for row in (compared, reference):
                if row is not None and row not in rows:
                    problems.append(Problem(where, f"unknown arm {show(row)}{did_you_mean(row, rows)}"))
            if compared == reference:
                problems.append(Problem(where, "an arm is no reference of itself"))
        raise_problems(problems)
        return self

    def pairs(self) -> list[tuple[str, str]]:
        """Return the comparisons, in order: (row, its reference)."""
        if isinstance(self.reference, dict):
            return list(self.reference.items())
        return [(row, self.reference) for row in (*self.arms, *self.forms) if row != self.reference]

    def row(self, name: str) -> tuple[str, str | None]:
        """Return the arm of a table row and the form of its models; None: the form that the run saved."""
        if name in self.arms:
            return name, None
        arm, _, form = self.forms[name].rpartition(".")
        return arm, form


@dataclass(frozen=True)
class Study:
    """A study: its config, and its runs. The runs are ordered by seed, so that pairs are complete early."""

    path: str
    config: StudyConfig
    cells: list[Cell]
    overrides: tuple[str, ...] = ()
    """Overrides of all runs, as given. Those that only say where and how fast to compute are left out."""

    def select(self, only: Sequence[str]) -> list[Cell]:
        """Return the runs of the named arms; without names, all runs.

        Raises:
            InputError: an arm does not exist.
        """
        for arm in only:
            if arm not in self.config.arms:
                known = ", ".join(self.config.arms)
                raise InputError(f"{self.path}: no arm '{arm}'{did_you_mean(arm, self.config.arms)} (known: {known})")
        return [cell for cell in self.cells if not only or cell.arm in only]


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study, and validate the config of every run.

    Args:
        path: a YAML file.
        overrides: `section.key=value` for all runs; they take precedence over the arms.

    Raises:
        InputError: the study or a run's config is invalid; the message has one line per problem.

    Example:
        >>> study = load_study("configs/studies/budget.yaml")
        >>> study.config.evaluate, str(study.cells[0])
        ('validation', 'dense_15/seed0')
    """
    mapping, lines = read_yaml(path)
    try:
        config = StudyConfig.model_validate(mapping)
    except ValidationError as error:
        lines += [problem.line(str(path)) for problem in schema_problems(error, StudyConfig)]
    if lines:
        raise InputError("\n".join(lines))
    _check_overrides(overrides)
    base_path = Path(path).parent / config.base
    base = load_config(base_path).to_dict()
    configs = _arm_configs(config, str(path), base_path, overrides)
    folders = {arm: _data_folder(config, base_path, arm) for arm in configs}
    folder = Path(config.output_dir or f"runs/studies/{config.name}")
    cells = []
    for seed in config.seeds:
        for arm, arm_config in configs.items():
            own: dict[str, Any] = {"seed": seed, "output_dir": str(folder / arm / f"seed{seed}")}
            if SEED in (source := arm_config.model.pretrained or ""):
                own["model"] = arm_config.model.model_copy(update={"pretrained": source.replace(SEED, str(seed))})
            differing = differences(base, arm_config.to_dict(), WHERE_AND_HOW_FAST)
            changes = {key: value for key, (_, value) in differing.items()}
            cells.append(Cell(config.name, arm, seed, arm_config.model_copy(update=own), changes, folders[arm]))
    kept = [text for text in overrides if not is_named(override_key(text), WHERE_AND_HOW_FAST)]
    return Study(str(path), config, cells, tuple(kept))


def _data_folder(study: StudyConfig, base: Path, arm: str) -> str:
    roots = [flatten(layer).get("data.root") for layer in (study.arms[arm], study.common, read_yaml(base)[0])]
    return next(Path(str(root)).name for root in roots if root is not None)


def _arm_configs(study: StudyConfig, where: str, base: Path, overrides: Sequence[str]) -> dict[str, Config]:
    every = 1 if study.curve else 0
    protocol = {"eval.split": study.evaluate, "eval.every": every}
    configs, problems = {}, {}
    for arm, values in study.arms.items():
        own = f"{where}: arms.{arm}"
        layers = {f"{where}: common": study.common, own: values, f"{where}: evaluate": protocol}
        try:
            configs[arm] = load_layered_config(base, layers, overrides)
        except InputError as error:
            problems[arm] = [(line, line.startswith(f"{own}: ")) for line in str(error).splitlines()]
    if problems:
        shared = set.intersection(*(set(lines) for lines in problems.values())) if len(problems) > 1 else set()
        lines = [
            line if is_own or (line, is_own) in shared else f"{line} (in arm '{arm}')"
            for arm, found in problems.items()
            for line, is_own in found
        ]
        raise InputError("\n".join(dict.fromkeys(lines)))
    for arm, config in configs.items():
        if config.task == "pretrain" and (study.curve or not config.eval.probe):
            wanted = "curve: has no meaning for a pre-training" if study.curve else "eval.probe: must be true"
            raise InputError(f"{where}: {wanted} (arm '{arm}'); runs of a study are compared by accuracy")
    limited = [arm for arm, config in configs.items() if config.train.max_steps]
    if limited:
        raise InputError(f"{base}: train.max_steps: runs of a study go to their last epoch; remove it")
    for config in configs.values():
        if (config.eval.split, config.eval.every) != (study.evaluate, every):  # an override of the whole section
            raise InputError("overrides: eval.split and eval.every are decided by the study; change its file")
        keys = flatten(config.to_dict())
        if study.along and study.along not in keys:
            raise InputError(f"{where}: along: unknown config key {show(study.along)}{did_you_mean(study.along, keys)}")
    return configs


def _check_overrides(overrides: Sequence[str]) -> None:
    lines = [
        f"override {show(override)}: is decided by the study; change it in the study's file"
        for override in overrides
        if override_key(override) in SET_BY_STUDY
    ]
    if lines:
        raise InputError("\n".join(lines))
