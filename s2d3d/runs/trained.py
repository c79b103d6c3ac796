"""A trained model, opened from its checkpoint: the model, its config, its classes and its data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import XYZ
from ..config.data import build_dataset, check_classes
from ..config.io import override_key
from ..config.load import Config, parse_config
from ..config.schema import DataConfig
from ..datasets import LabelledDataset, dataset_reader, list_datasets
from ..datasets.labelled import TRAIN
from ..errors import InputError, printable, quoted
from ..export.facts import check_facts
from ..export.write import Exported, load_exported
from ..machine import choose_device
from ..models import list_models
from ..unpickle import file_numbers
from .checkpoint import build_model, load_checkpoint, stored_channels
from .trained_files import refuse_trained


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with its checkpoint and config.

    Attributes:
        path: path of the checkpoint, used in error messages.
        payload: the content of the checkpoint, see `load_checkpoint`.
        config: of its run, with the overrides.
        model: in eval mode.
        unknown_data: name of its data set if nothing in this process has registered it; `config` then has another.
    """

    path: str
    payload: dict[str, Any]
    config: Config
    model: nn.Module
    unknown_data: str | None = None

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of the logits; none of a pre-training."""
        return self.payload["class_names"]

    @property
    def channels(self) -> str:
        """The numbers of a point that the model takes, one of `s2d3d.channels.CHANNELS`."""
        return stored_channels(self.payload)

    @property
    def estimates_normals(self) -> bool:
        """Whether its data set estimates the normals of files that have none."""
        return bool(self.config.data.kwargs.get("estimate_normals", False))

    @property
    def up_axis_of_files(self) -> str:
        """The vertical axis of files that are named, unless their user says another: that of its own class folders."""
        return up_axis_of_files(self.config) if self.unknown_data is None else "z"

    def dataset(self, split: str = "test", *, scored: bool = True) -> LabelledDataset:
        """Read a split of the data set that the config names.

        Args:
            split: "train" or "test".
            scored: refuse a test split with files that the model was trained on.

        Raises:
            InputError: the data set cannot be read or is not registered, its classes differ from those of the model, or
                files of its test split were trained on.
        """
        if name := self.unknown_data:
            plugins = self.payload["config"].get("plugins") or ["FILE.py"]
            raise InputError(
                f"{self.path}: was trained on the data set {quoted(name)}, which is unknown here; name the Python file "
                f"that registers it by --plugin {printable(str(plugins[0]))}, or other data by data.name= and "
                "data.root="
            )
        labelled, root = self.config.task == "classify", self.config.data.root
        try:
            dataset = build_dataset(self.config.data, split, seed=self.config.seed, labelled=labelled)
        except InputError as error:
            own = self.payload["config"].get("data", {}).get("root") == root
            if not own or Path(root).is_absolute() or Path(root).exists():
                raise
            raise InputError(
                f"{self.path}: its data lies in '{printable(root)}', as seen from where it was trained, and not here; "
                "say where by data.root=DIR"
            ) from error
        if labelled:
            check_classes(dataset, self.class_names, self.path)
        if scored and split != TRAIN:
            self.refuse_trained(dataset)
        return dataset

    def refuse_trained(self, dataset: LabelledDataset, part: str = "test") -> None:
        """Refuse to score files that the model was trained on, see `trained_files.refuse_trained`."""
        advice = (
            "as files were added or divided otherwise; score new files by --files, or divide all into folders train/ "
            "and test/"
        )
        refuse_trained(dataset, self.payload, self.path, advice=advice, part=part)

    def require_clouds(self, use: str) -> None:
        """Check that the model takes point clouds; no data is read.

        Args:
            use: what needs clouds, for the message.

        Raises:
            InputError: its data set holds other samples.
        """
        name = self.config.data.name
        if not (reader := dataset_reader(name)).clouds:
            raise InputError(f"{self.path}: was trained on '{name}', {reader.kind.noun}; {use} needs point clouds")


def up_axis_of_files(config: Config) -> str:
    """Return the vertical axis of files, "y" or "z", unless their user says another: that of class folders, else z."""
    return (config.data.up_axis or "z") if config.data.name == "files" else "z"


UNKNOWN_DATA = "files"
"""The data set that stands in a config for one that is not registered."""
MAX_VOTES = 1000
"""Passes over a data set that a checkpoint may ask for; the caller may ask for more."""


def stored_config(payload: Mapping[str, Any], where: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config that a checkpoint holds, as far as a file from elsewhere may decide about this machine.

    A data set that is not registered here, because it is of a plugin, is replaced by the class folders of its root.
    `data.cache_dir`, where files would be written, is left out, and `eval.votes` is bounded; overrides may set both.

    Args:
        payload: of the checkpoint, see `load_checkpoint`.
        where: names it in errors.
        overrides: `section.key=value`, which replace values of the config.

    Raises:
        InputError: the config or an override is wrong, or it asks for more than `MAX_VOTES` passes.
    """
    given = {override_key(override) for override in overrides}
    stored = payload["config"]
    if (name := payload["model"].get("name")) not in list_models() and (plugins := stored.get("plugins")):
        raise InputError(
            f"{where}: its model {quoted(str(name))} is unknown here; name the Python file that registers it by "
            f"--plugin {printable(str(plugins[0]))}"
        )
    data = stored.get("data")
    if isinstance(data, dict) and "data.cache_dir" not in given:
        data = {key: value for key, value in data.items() if key != "cache_dir"}
    if isinstance(data, dict) and data.get("name") not in list_datasets():
        shared = {key: value for key, value in data.items() if key in DataConfig.model_fields}
        data = shared | {"name": UNKNOWN_DATA}
    stored = stored | ({} if data is None else {"data": data})
    config = parse_config(stored, where=str(where), overrides=overrides)
    if config.eval.votes > MAX_VOTES and "eval.votes" not in given:
        asked = f"asks for {config.eval.votes} votes, a checkpoint may ask for {MAX_VOTES}"
        raise InputError(f"{where}: eval.votes: {asked}; give the number yourself by eval.votes=N")
    return config


_OTHER_TASK = {
    "pretrain": (
        "is a pre-training, it has no classes; fine-tune it by model.pretrained={path}, score it with "
        "tools/linear_probe.py, or draw it with tools/visualize.py --kind reconstructions"
    ),
    "classify": "is a classifier, a pre-training is needed, as tools/pretrain.py makes it",
}
"""By the task of a checkpoint: why it does not do."""


def _unknown_data(payload: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """Return the name of the checkpoint's data set if nothing has registered it and no override names another."""
    stored = payload["config"].get("data")
    name = stored.get("name") if isinstance(stored, dict) else None
    known = name is None or name in list_datasets()
    return None if known or any(override_key(item) == "data.name" for item in overrides) else str(name)


def open_trained(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    device: torch.device | str = "cpu",
    merge: bool = False,
    task: str | None = "classify",
) -> TrainedModel:
    """Open a checkpoint: build its model and parse the config of its run. No data is read.

    Args:
        path: a checkpoint, sparse or dense.
        overrides: changes to the config, as `section.key=value`.
        device: device of the model.
        merge: merge the experts into dense FFNs.
        task: what the model must be for, "classify" or "pretrain"; None: either.

    Raises:
        InputError: the checkpoint or an override cannot be read, its model is for another task, an override asks for
            other channels than the model takes, or `merge` is set and the experts have a router.

    Example:
        >>> trained = open_trained("runs/demo/merged.pt")  # doctest: +SKIP
        >>> trained.model(trained.dataset().batch(torch.arange(2), augment=False)[0]).shape  # doctest: +SKIP
        torch.Size([2, 12])
    """
    payload = load_checkpoint(path)
    config = stored_config(payload, path, overrides)
    if task not in (None, config.task):
        raise InputError(f"{path}: {_OTHER_TASK[config.task].format(path=path)}")
    model = build_model(payload, where=str(path), merge=merge).to(device)
    if config.data.channels != stored_channels(payload):
        text = f"{path}: takes {stored_channels(payload)}, data.channels asks for {config.data.channels}"
        raise InputError(f"{text}; remove the override")
    return TrainedModel(str(path), payload, config, model, _unknown_data(payload, overrides))


class _Network(nn.Module):
    """An exported model as a module.

    Attributes:
        min_points: fewest points of a cloud.
    """

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.exported, self.min_points = exported, exported.metadata["min_points"]

    def forward(self, points: Tensor) -> Tensor:
        logits, count = self.exported(points), len(self.exported.metadata["class_names"])
        if logits.shape != (len(points), count):
            shape = tuple(logits.shape)
            raise InputError(
                f"{self.exported.path}: gives numbers of shape {shape}, not one for each of {count} classes"
            )
        return logits


@dataclass(frozen=True)
class ExportedModel(TrainedModel):
    """An exported model with the facts of its metadata; they do not say where its data set lies.

    Attributes:
        root_given: an override has named the folder of the data set.
    """

    root_given: bool = False

    def dataset(self, split: str = "test", *, scored: bool = True) -> LabelledDataset:
        """Read a split of the data set that metadata and overrides name.

        Raises:
            InputError: as `TrainedModel.dataset`; no override names the folder.
        """
        if not self.root_given:
            raise InputError(f"{self.path}: an exported model does not say where its data set lies; add data.root=DIR")
        return super().dataset(split, scored=scored)


def open_exported(path: str | Path, overrides: Sequence[str] = ()) -> ExportedModel:
    """Open an ONNX file of `tools/export.py`, which ONNX Runtime runs on the CPU.

    Args:
        path: the file.
        overrides: changes to the config, as `section.key=value`.

    Raises:
        InputError: the file cannot be read, or lacks metadata; an override is wrong; ONNX Runtime is missing.

    Example:
        >>> open_exported("model.onnx").class_names  # doctest: +SKIP
        ['box', 'mug']
    """
    exported = load_exported(path, threads=torch.get_num_threads())
    facts = exported.metadata
    check_facts(facts, str(path))
    sections = {key: value for key, value in facts.get("config", {}).items() if key in ("seed", "data", "eval")}
    data = {"name": UNKNOWN_DATA, "root": "."} | sections.pop("data", {})
    channels = facts.get("channels", XYZ)
    data |= {"num_points": facts["num_points"], "normalize": facts["normalize"] == "unit_sphere", "channels": channels}
    # A config has a model; that of the file need not be known here.
    model, s2d = {"name": "point_bert_tiny"}, {"kind": "none"}
    config = {"output_dir": "unused", "model": model, "s2d": s2d, **sections, "data": data}
    payload = {"config": config, "model": model | {"channels": channels}, "class_names": facts["class_names"]}
    if (files := file_numbers(facts.get("trained_files"))) is not None:
        payload["trained_files"] = files
    given = any(override_key(override) == "data.root" for override in overrides)
    return ExportedModel(
        str(path), payload, stored_config(payload, path, overrides), _Network(exported),
        _unknown_data(payload, overrides), given,
    )  # fmt: skip


def open_classifier(
    path: str | Path, overrides: Sequence[str] = (), *, device: str = "auto"
) -> tuple[TrainedModel, torch.device]:
    """Open a checkpoint or, by its suffix `.onnx`, an exported model; return it with the device of its clouds.

    Args:
        path: the file.
        overrides: changes to the config, as `section.key=value`.
        device: "auto", "cpu", "cuda" or "cuda:N"; exported models run on the CPU.

    Raises:
        InputError: as `open_trained`, `open_exported` and `choose_device`; an exported model on another device.
    """
    if Path(path).suffix != ".onnx":
        chosen = choose_device(device)
        return open_trained(path, overrides, device=chosen), chosen
    if device not in ("auto", "cpu"):
        raise InputError(f"device '{device}': {path} is run by ONNX Runtime on the CPU; use device cpu or auto")
    return open_exported(path, overrides), torch.device("cpu")
