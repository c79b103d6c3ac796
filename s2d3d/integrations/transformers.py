"""Hugging Face Trainer: EWA after each update, and a merged model in each checkpoint."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from safetensors.torch import save_model
from torch import nn
from typing_extensions import TypedDict

from ..atomic import read_json, write_json
from ..errors import InputError
from ..optional import optional
from ..s2d import merge_experts
from .updates import Averaging

with optional("transformers", "s2d3d.integrations.transformers", extra="integrations"):
    import accelerate  # noqa: F401, the Trainer needs it
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState

MERGED = "merged"
_FILE = "model.safetensors"
_FUNCTION = "a function"


class _Index(TypedDict):
    weight_map: dict[str, str]


class S2DCallback(TrainerCallback, ExportableState):
    """Averages the experts after each optimizer update of a Trainer, and saves the merged model.

    Convert the model before you build the Trainer. Then:

    - EWA follows each update, also with gradient accumulation and mixed precision. A step that the gradient scaler
      skips is not an update.
    - The schedule covers the training that the Trainer planned (`TrainerState.max_steps`). Its position is saved in
      `trainer_state.json` and restored by `resume_from_checkpoint`.
    - Each checkpoint gets a folder `merged/` with the dense model. The checkpoint's `config.json` names that file, so
      that `from_pretrained(checkpoint)` gives the merged model. The Trainer itself resumes from the sparse weights.
    - At the end of the training the model is merged in place, so that `trainer.save_model()` saves a dense model.

    Works on one process and under DDP; DeepSpeed, FSDP and hyperparameter search are refused.

    Example:
        >>> from transformers import Trainer, ViTConfig, ViTForImageClassification
        >>> from s2d3d import MoFConfig, convert_to_mof_
        >>> size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **size))
        >>> convert_to_mof_(model, MoFConfig(targets=("*.mlp",)))
        ['vit.layers.1.mlp']
        >>> Trainer(model, callbacks=[S2DCallback(share_rate=0.3)], train_dataset=images).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        share_rate: float,
        schedule: str | Callable[[int], float] = "linear",
        stop_fraction: float = 1.0,
        merge_at_end: bool = True,
    ) -> None:
        """Prepare the callback; EWA checks its settings when the training begins.

        Args:
            share_rate: b at the end of the schedule, in [0, (K - 1) / K] for K experts.
            schedule: see `EWA`.
            stop_fraction: see `EWA`.
            merge_at_end: merge `trainer.model` in place when the training ends. To train it further, convert it again.
        """
        self.merge_at_end = merge_at_end
        self.restored: dict[str, Any] = {}
        self._model: nn.Module | None = None
        self._averaging = Averaging(share_rate=share_rate, schedule=schedule, stop_fraction=stop_fraction)

    @property
    def num_steps(self) -> int:
        """Updates that EWA followed so far, those before a resume included."""
        return self._averaging.num_steps

    def state(self) -> dict[str, Any]:
        """Return what `trainer_state.json` keeps: the arguments, and the position in the schedule."""
        averaging = self._averaging
        arguments = {
            "share_rate": averaging.share_rate,
            "schedule": _FUNCTION if callable(averaging.schedule) else averaging.schedule,
            "stop_fraction": averaging.stop_fraction,
            "merge_at_end": self.merge_at_end,
        }
        weights = "" if self._model is None else _fingerprint(self._model)
        return {"args": arguments, "attributes": {"restored": {"num_steps": self.num_steps, "weights": weights}}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the training and put the hook on its optimizer.

        Raises:
            InputError: the model is not converted, its experts are not in the optimizer, the checkpoint to resume from
                was written without this callback or was not loaded, or the Trainer is set to something that is not
                supported.
        """
        saved = cast("dict[str, Any]", state.stateful_callbacks).get(type(self).__name__)
        self._check(args, state, saved)
        self._model = kwargs["model"]
        position = _position(saved, self._model, state.global_step)
        self._averaging.start(self._model, [kwargs["optimizer"]], total_steps=state.max_steps, num_steps=position)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the merged model beside the sparse one, and the sparse one so that the Trainer can load it.

        Raises:
            ValueError: merged weights are not finite; the message names the layer.
        """
        if args.should_save:
            checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
            _save_with_own_names(kwargs["model"], checkpoint)
            save_merged(kwargs["model"], checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hook; merge the model."""
        self._averaging.stop()
        self._model = None
        if self.merge_at_end:
            merge_experts(kwargs["model"], inplace=True)

    def _check(self, args: TrainingArguments, state: TrainerState, saved: object) -> None:
        if state.is_hyper_param_search:
            raise InputError("S2DCallback: hyperparameter search is not supported; train each trial on its own")
        if args.deepspeed_plugin is not None:
            raise InputError("S2DCallback: DeepSpeed keeps weights of its own, which EWA does not reach; use DDP")
        if args.push_to_hub and args.hub_strategy != "end":
            raise InputError("S2DCallback: set hub_strategy='end', others push sparse weights as the model")
        function = callable(self._averaging.schedule) or self._averaging.schedule == _FUNCTION
        if function and args.restore_callback_states_from_checkpoint:
            raise InputError(
                "S2DCallback: a checkpoint cannot hold a schedule that is a function; "
                "leave restore_callback_states_from_checkpoint at False, the position is restored without it"
            )
        if isinstance(saved, list):
            raise InputError(f"the Trainer has several {type(self).__name__}, which would average twice; give it one")


def save_merged(model: nn.Module, checkpoint: str | os.PathLike) -> Path:
    """Save the merged model in the folder `merged` of a checkpoint, and let its `config.json` name the merged weights.

    `from_pretrained` follows the entry `transformers_weights` of `config.json` to `merged/model.safetensors`. It thus
    gives the dense, merged model for the checkpoint as well as for the folder `merged`. Without the entry it would
    start the replaced FFNs at random, with a warning only. A model that is not a `PreTrainedModel` has no
    `config.json`; its merged state dict is saved.

    Args:
        model: sparse; it stays as it is.
        checkpoint: a folder in which the Trainer saved it.

    Returns:
        The folder with the merged model.

    Raises:
        InputError: the checkpoint has no readable `config.json`.
        ValueError: merged weights are not finite; the message names the layer.

    Example:
        >>> save_merged(trainer.model, "run/checkpoint-500")  # doctest: +SKIP
        PosixPath('run/checkpoint-500/merged')
    """
    dense = merge_experts(model)
    folder, temporary = Path(checkpoint, MERGED), Path(checkpoint, f"{MERGED}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(dense, PreTrainedModel):
        dense.save_pretrained(temporary, max_shard_size="1000TB")  # `transformers_weights` names one file
    else:
        temporary.mkdir()
        save_model(dense, str(temporary / _FILE))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    if isinstance(dense, PreTrainedModel):
        config = Path(checkpoint, "config.json")
        write_json(config, {**read_json(config), "transformers_weights": f"{MERGED}/{_FILE}"})
    return folder


def _position(saved: dict[str, Any] | None, model: nn.Module, global_step: int) -> int:
    """Return the number of updates before the checkpoint; `global_step` counts skipped ones too.

    Args:
        saved: what the checkpoint holds of the callback.
        model: as the Trainer restored it.
        global_step: 0 for a new training, for which the Trainer may keep the callback's state of the last one.
    """
    if not global_step:
        return 0
    if saved is None:
        raise InputError(
            f"the checkpoint of step {global_step} was written without S2DCallback, "
            "so that the position in its schedule is unknown; start the training anew"
        )
    restored = saved["attributes"]["restored"]
    if restored["weights"] != _fingerprint(model):
        raise InputError(
            f"the model does not have the weights that were saved at step {global_step}; "
            "convert it as before, or resume from an earlier checkpoint"
        )
    return int(restored["num_steps"])


def _save_with_own_names(model: nn.Module, checkpoint: Path) -> None:
    """Save the sparse weights again if the library changed their names, as the Trainer resumes by name.

    `save_pretrained` writes some models, ViT among them, with the names of older versions. `from_pretrained` translates
    them; the Trainer does not, and keeps random weights with a warning only: huggingface/transformers, issue 43701.
    """
    if isinstance(model, PreTrainedModel) and not _saved_names(checkpoint) <= model.state_dict().keys():
        model.save_pretrained(checkpoint, save_original_format=False)


def _saved_names(checkpoint: Path) -> set[str]:
    index = checkpoint / f"{_FILE}.index.json"
    if index.exists():
        return set(read_json(index, schema=_Index)["weight_map"])
    with safe_open(checkpoint / _FILE, framework="pt") as file:
        return set(file.keys())


def _fingerprint(model: nn.Module) -> str:
    """Return a short text that differs if any trained parameter does: of the first number of each."""
    first = [(name, float(p.detach().reshape(-1)[0])) for name, p in model.named_parameters() if p.numel()]
    return hashlib.blake2b(repr(first).encode(), digest_size=8).hexdigest()
