"""Folders in the layout of the Hugging Face hub: weights as safetensors, config.json and a model card."""

import contextlib
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..atomic import check_parent, write_json, write_text
from ..errors import InputError, first_line
from ..optional import optional
from ..runs.checkpoint import (
    build_model,
    description_of,
    load_checkpoint,
    require_dense,
    stored_channels,
    write_weights,
)
from ..runs.folder import HUB_CARD, HUB_CONFIG, HUB_WEIGHTS, RunFolder
from ..runs.record import RunRecord, read_runs
from ..runs.trained import open_trained, stored_config
from ..s2d import is_sparse

with optional("huggingface_hub", "s2d3d.integrations.hub", extra="hub"):
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .model_card import model_card

_FILES = (HUB_WEIGHTS, HUB_CONFIG, HUB_CARD)


class PointCloudClassifier(nn.Module, PyTorchModelHubMixin, library_name="s2d3d"):
    """A trained dense model with what its use needs; it is saved to and read from folders in the hub's layout.

    `save_pretrained(DIR)` writes `model.safetensors`, `config.json` and `README.md`, the model card. Its weights have
    the keys of the bare model. `s2d3d predict --checkpoint DIR` and every other command read such a folder.
    `push_to_hub("user/name")` uploads one.

    Attributes:
        model: the network, points (B, N, C) -> logits (B, num_classes).
        description: of the model: architecture, classes, and the config of its run.
        card: text of the model card.

    Example:
        >>> classifier = PointCloudClassifier.from_checkpoint("runs/demo/merged.pt")  # doctest: +SKIP
        >>> classifier.save_pretrained("demo")  # doctest: +SKIP
        >>> PointCloudClassifier.from_pretrained("demo").class_names[:2]  # doctest: +SKIP
        ['box', 'capsule']
    """

    def __init__(self, network: nn.Module, description: dict[str, Any], card: str) -> None:
        """Put together what `from_checkpoint` and `from_pretrained` read.

        Args:
            network: dense, in any mode.
            description: a checkpoint without weights and training state.
            card: text of the model card.

        Raises:
            InputError: the model has experts.
        """
        super().__init__()
        if is_sparse(network):
            raise InputError("the model has experts, which only training needs; merge it first with merge_experts")
        self.model, self.description, self.card = network, description, card
        self.train(network.training)

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of the logits."""
        return self.description["class_names"]

    @property
    def num_points(self) -> int:
        """Points of a cloud in its training."""
        return self.description["config"]["data"]["num_points"]

    @property
    def normalize(self) -> bool:
        """Whether clouds are centred and scaled into the unit sphere."""
        return self.description["config"]["data"]["normalize"]

    @property
    def channels(self) -> str:
        """The numbers of a point that the model takes, one of `s2d3d.channels.CHANNELS`."""
        return stored_channels(self.description)

    @property
    def up_axis(self) -> str:
        """The vertical axis of the clouds that the model takes."""
        return self.description["model"]["up_axis"]

    def forward(self, points: Tensor) -> Tensor:
        """Map points (B, N, C) to logits (B, num_classes)."""
        return self.model(points)

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, merge: bool = False) -> "PointCloudClassifier":
        """Read a checkpoint; the card tells what the run beside it recorded about this model.

        Args:
            path: a dense checkpoint, or with `merge` a sparse one.
            merge: merge the experts into dense FFNs.

        Raises:
            InputError: the checkpoint cannot be read, is sparse and `merge` is not set, or is of a model without
                classes or of other samples than clouds.
        """
        trained = open_trained(path, merge=merge)
        payload = trained.payload
        if not merge:
            require_dense(payload, path)
        if not trained.class_names:
            raise InputError(f"{path}: is a model without classes; the hub layout here is for classifiers")
        trained.require_clouds("the hub layout here")
        description = description_of(payload | {"s2d": None, "config": _portable(payload["config"])})
        return cls(trained.model, description, model_card(description, _record_of(Path(path))))

    def save_pretrained(self, save_directory: str | Path, *, force: bool = False, **options: Any) -> str | None:
        """Write the folder: weights, config and model card.

        Args:
            save_directory: is made where it does not exist.
            force: replace a model that is there.
            **options: of `huggingface_hub.PyTorchModelHubMixin.save_pretrained`.

        Returns:
            The address of the commit with `push_to_hub=True`, else None.

        Raises:
            InputError: a model or a card is there and `force` is not set, or no folder can be made there.
        """
        folder = Path(save_directory)
        present = [folder / name for name in _FILES if os.path.lexists(folder / name)]
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(f"{folder}: is no folder; name one for the model")
        if present and not force:
            raise InputError(f"{present[0]}: exists already; choose another folder or pass --force (force=True)")
        check_parent(folder / HUB_WEIGHTS if folder.is_dir() else folder)
        return super().save_pretrained(folder, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write all three files; the mixin writes none that is there."""
        write_weights(save_directory / HUB_WEIGHTS, self.model.state_dict())
        write_json(save_directory / HUB_CONFIG, {"architectures": [type(self).__name__], **self.description})
        write_text(save_directory / HUB_CARD, self.card)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "PointCloudClassifier":
        """Read a folder that `save_pretrained` wrote, or one of the hub. Nothing is unpickled.

        Args:
            pretrained_model_name_or_path: the folder, or the id of a repository on the hub, such as "user/name".
            **options: of `huggingface_hub.PyTorchModelHubMixin.from_pretrained`, such as `revision` and `token`.

        Raises:
            InputError: no such folder and no such id on the hub, the hub cannot be reached, or the files are damaged.
        """
        name = str(pretrained_model_name_or_path)
        if os.path.isdir(name):
            return cls._read(Path(name))
        try:
            return super().from_pretrained(name, **options)
        except InputError:
            raise
        except (OSError, ValueError) as error:  # all that the hub's library raises
            away = isinstance(error, LocalEntryNotFoundError)
            reason = "it cannot be reached, and no copy is in the cache" if away else first_line(error)
            raise InputError(f"{name}: no such folder, and not to be had from the hub ({reason})") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "PointCloudClassifier":
        """Fetch the files of a repository; other weights than safetensors are not looked for."""
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        chosen = {key: options[key] for key in known if key in options}
        for name in (HUB_WEIGHTS, HUB_CONFIG):
            folder = Path(hf_hub_download(model_id, name, **chosen)).parent
        with contextlib.suppress(EntryNotFoundError):  # a repository may have none
            hf_hub_download(model_id, HUB_CARD, **chosen)
        return cls._read(folder)

    @classmethod
    def _read(cls, folder: Path) -> "PointCloudClassifier":
        payload = load_checkpoint(folder)
        stored_config(payload, folder)  # refuses one that this package did not write
        card = folder / HUB_CARD
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else model_card(payload, None)
        return cls(build_model(payload, where=str(folder)), description_of(payload), text)


def _record_of(checkpoint: Path) -> RunRecord | None:
    """Return the record of the run that ended with this checkpoint, None for any other file."""
    folder = RunFolder(checkpoint.parent)
    if not folder.config.is_file() or not folder.metrics.is_file():
        return None
    (record,) = read_runs([folder.root])
    return record if record.checkpoint is not None and record.checkpoint.samefile(checkpoint) else None


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the absolute paths of the machine where the model was trained: their last part stays."""

    def short(value: Any) -> Any:
        if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
            return Path(value).name
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        return [short(item) for item in value] if isinstance(value, (list, tuple)) else value

    return short(config)
