"""Checkpoint files. They are written atomically, read without running code, and sufficient to rebuild the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic import read_json, replacing, write_bytes
from ..channels import XYZ, num_channels
from ..config.keywords import check_types, keyword_fields
from ..errors import InputError, UnreadableError, first_line, quoted
from ..machine import package_versions
from ..models import create_for_classes, model_kwargs
from ..s2d import MoFConfig, convert_to_mof_, is_sparse, merge_experts
from ..unpickle import KEY, SAFETENSORS, file_numbers, load_data, read_safetensors, with_weights
from ..version import __version__
from .folder import HUB_CONFIG, HUB_WEIGHTS, is_hub_folder, require_checkpoint

FORMAT = "s2d3d"
FORMAT_VERSION = 2
MODEL_KEYS = ("model", "s2d", "state_dict", "class_names", "config")
"""Keys of every checkpoint. The checkpoint of an unfinished run also holds the training state."""
KEPT_KEYS = (*MODEL_KEYS, "trained_files")
"""What a checkpoint that is made of another keeps; the last, if it is there, is of `LabelledDataset.trained_files`."""
_SHAPE = {"num_classes": 1, "in_channels": 3}
MAX_EXPANSION = 4
"""Maximum bytes of weights per byte of the file. Without a limit, views of one storage could declare any number."""


def save_checkpoint(path: str | Path, payload: dict[str, Any], *, previous: str | Path | None = None) -> Path:
    """Write a checkpoint atomically: after a crash, `path` holds either the complete old or the complete new file.

    Each part of the file has a checksum, which `load_checkpoint` verifies.

    Args:
        path: file to write; its folder must exist. With the suffix ".safetensors", only the model is written, in that
            format, without training state.
        payload: result of `model_payload`, possibly with more keys; tensors and plain Python types only.
        previous: where to keep the checkpoint that `path` holds now.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; `path` is unchanged.

    Example:
        >>> save_checkpoint("dense.pt", load_checkpoint("runs/demo/merged.pt"))  # doctest: +SKIP
    """
    if Path(path).suffix == SAFETENSORS:
        return save_safetensors(path, payload)
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "s2d3d_version": __version__}
    header["versions"] = package_versions()
    with replacing(path, previous=previous) as file:
        torch.save(header | payload, file)
    return Path(path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this package, in the current format version or an older one. Pickled code is never run.

    Args:
        path: a file, or a folder in the layout of the Hugging Face hub, see `read_hub_folder`.

    Returns:
        The payload given to `save_checkpoint`, plus `format`, `format_version`, `s2d3d_version` and `versions`. Older
        files are converted to the current version.

    Raises:
        InputError: the file is missing, or has a newer format.
        UnreadableError: the file is damaged, incomplete or not a checkpoint of this package.

    Example:
        >>> load_checkpoint("runs/demo/merged.pt")["class_names"][:2]  # doctest: +SKIP
        ['box', 'capsule']
    """
    require_checkpoint(path)
    payload = read_hub_folder(path) if Path(path).is_dir() else load_data(path)
    if Path(path).suffix == SAFETENSORS and "format" not in payload:
        beside = Path(path).parent
        advice = f"name its folder, {beside}" if is_hub_folder(beside) else "it needs one of merge.py"
        raise UnreadableError(f"{path}: holds weights but no description by s2d3d; {advice}")
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        what = "it needs one written by tools/train.py or tools/merge.py"
        raise UnreadableError(f"{path}: not a checkpoint of s2d3d; {what}")
    version = payload.get("format_version")
    if type(version) is not int or version < 1:
        raise UnreadableError(f"{path}: checkpoint is damaged, its format_version cannot be what s2d3d wrote")
    if version > FORMAT_VERSION:
        newest = f"this s2d3d {__version__} reads up to {FORMAT_VERSION}"
        raise InputError(f"{path}: checkpoint format {version}, {newest}; update s2d3d")
    _check_content(payload, path)
    payload.setdefault("versions", {})
    for older in range(version, FORMAT_VERSION):
        payload = _MIGRATIONS[older](payload)
    return payload


def model_payload(
    model: nn.Module,
    *,
    name: str,
    in_channels: int,
    kwargs: dict[str, Any],
    class_names: list[str],
    mof: MoFConfig | None,
    config: dict[str, Any],
    channels: str | None = None,
) -> dict[str, Any]:
    """Describe a model for `load_model`: architecture, experts, weights, classes and run config.

    Args:
        model: the bare model (no DDP or compile wrapper); dense, or converted with `mof`.
        name: argument of `create_model`, like `in_channels` and `kwargs`.
        class_names: in the order of the logits; none of a pre-training model.
        mof: settings of the conversion; ignored if the model is dense.
        config: the run's config as plain types.
        channels: the `in_channels` numbers of a point, one of `s2d3d.channels.CHANNELS`; None: they have no name.
    """
    experts = None
    if is_sparse(model):
        assert mof is not None, "a sparse model needs its MoFConfig"
        targets = None if mof.targets is None else list(mof.targets)
        experts = {"kind": mof.kind, "num_experts": mof.num_experts, "targets": targets, "every": mof.every}
        if mof.kind == "topk":
            experts |= {"top_k": mof.top_k, "capacity_factor": mof.capacity_factor}
    return {
        "model": {
            "name": name,
            "num_classes": len(class_names),
            "in_channels": in_channels,
            "kwargs": kwargs,
            "up_axis": "z",
            **({} if channels is None else {"channels": channels}),
        },
        "s2d": experts,
        "state_dict": model.state_dict(),
        "class_names": list(class_names),
        "config": config,
    }


def stored_channels(payload: dict[str, Any]) -> str:
    """Return the numbers of a point that the model of a checkpoint takes; files that name none are of x, y, z."""
    return payload["model"].get("channels", XYZ)


def load_model(path: str | Path, *, merge: bool = False) -> nn.Module:
    """Rebuild the model of a checkpoint on the CPU, in eval mode.

    Args:
        path: a sparse or dense checkpoint.
        merge: merge the experts into dense FFNs; it has no effect on a dense checkpoint.

    Raises:
        InputError: the checkpoint cannot be read, its weights do not match its own description, or `merge` is set and
            its experts have a router.

    Example:
        >>> model = load_model("runs/demo/merged.pt")  # doctest: +SKIP
    """
    return build_model(load_checkpoint(path), where=str(path), merge=merge)


def build_model(payload: dict[str, Any], *, where: str, merge: bool = False) -> nn.Module:
    """Like `load_model`, for a checkpoint that is already loaded; `where` names it in errors."""
    description, experts = payload["model"], payload["s2d"]
    if merge:
        require_mergeable(payload, where)

    def build() -> nn.Module:
        kwargs = check_types(description["kwargs"], keyword_fields(model_kwargs(description["name"])))
        shape = check_types({key: description[key] for key in _SHAPE}, keyword_fields(_SHAPE))
        if "channels" in description and num_channels(description["channels"]) != shape["in_channels"]:
            raise ValueError(f"its {shape['in_channels']} channels are not {description['channels']}")
        model = create_for_classes(description["name"], **shape, **kwargs)
        if experts is not None:
            check_types(experts, keyword_fields({"num_experts": 1, "every": 1, "top_k": 1}))
            router = {key: experts[key] for key in ("kind", "top_k", "capacity_factor") if key in experts}
            targets = None if experts["targets"] is None else tuple(experts["targets"])
            mof = MoFConfig(experts["num_experts"], targets, experts["every"], **router)
            convert_to_mof_(model, mof)
        return model

    try:
        with torch.device("meta"):  # allocate nothing before the sizes are compared
            plan = build()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{where}: the checkpoint's model description is unusable ({first_line(error)})") from error
    check_weights(plan, payload["state_dict"], where=where)
    model = build()
    load_weights_(model, payload["state_dict"], where=where)
    return (merge_experts(model, inplace=True) if merge else model).eval()


def load_weights_(model: nn.Module, state_dict: dict[str, torch.Tensor], *, where: str) -> None:
    """Load weights strictly, in place.

    Raises:
        InputError: keys or shapes differ; the message counts and names them.
    """
    check_weights(model, state_dict, where=where)
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError) as error:  # sparse, quantised or complex tensors
        raise InputError(f"{where}: does not fit the model: {first_line(error)}") from error


def check_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], *, where: str) -> None:
    """Raise InputError unless `state_dict` matches the model's keys and shapes; the model may be on the meta device."""
    own = model.state_dict()
    missing, unexpected = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    common = own.keys() & state_dict.keys()
    shapes = [key for key in common if own[key].shape != state_dict[key].shape]
    kinds = [key for key in common if _kind(own[key]) != _kind(state_dict[key])]
    problems = [
        f"{len(keys)} {what} (such as {quoted(min(keys))})"
        for what, keys in (
            ("weights missing", missing),
            ("unknown weights", unexpected),
            ("weights of another shape", shapes),
            ("weights of another kind of number", kinds),
        )
        if keys
    ]
    if problems:
        raise InputError(f"{where}: does not fit the model: {', '.join(problems)}")


def _kind(weight: torch.Tensor) -> tuple[bool, bool]:
    return weight.dtype.is_floating_point, weight.dtype.is_complex


def require_sparse(payload: dict[str, Any], where: str) -> None:
    """Raise InputError when a checkpoint has no experts."""
    if payload["s2d"] is None:
        raise InputError(f"{where}: is dense, a sparse checkpoint is needed, such as checkpoints/last.pt of an S2D run")


def require_dense(payload: dict[str, Any], where: str | Path) -> None:
    """Raise InputError when a checkpoint has experts."""
    if payload["s2d"] is not None:
        raise InputError(f"{where}: has experts, which only training needs; pass --merge to merge them")


def has_router(payload: dict[str, Any]) -> bool:
    """Tell whether a checkpoint's experts are chosen by a router (`s2d.kind: topk`)."""
    return payload["s2d"] is not None and payload["s2d"].get("kind") == "topk"


def require_mergeable(payload: dict[str, Any], where: str) -> None:
    """Raise InputError when a checkpoint has experts that cannot be merged into a dense FFN."""
    if has_router(payload):
        raise InputError(f"{where}: was trained with s2d.kind=topk, it has no dense form; evaluate it with its experts")


def _check_content(payload: dict[str, Any], path: str | Path) -> None:
    """Raise UnreadableError if a part that `model_payload` makes is missing or has another type."""
    missing = [key for key in MODEL_KEYS if key not in payload]
    if missing:
        raise UnreadableError(f"{path}: checkpoint is incomplete, {', '.join(missing)} missing")
    weights, names, experts = payload["state_dict"], payload["class_names"], payload["s2d"]
    fits = {
        "model": isinstance(payload["model"], dict),
        "s2d": experts is None or isinstance(experts, dict),
        "state_dict": isinstance(weights, dict) and _is_state_dict(weights, MAX_EXPANSION * _size(path)),
        "class_names": isinstance(names, list) and all(isinstance(name, str) for name in names),
        "config": isinstance(payload["config"], dict),
        "trained_files": "trained_files" not in payload or _is_files(payload["trained_files"]),
    }
    if fits["model"] and fits["class_names"]:
        outputs = payload["model"].get("num_classes", len(names))
        fits["model"] = payload["model"].get("up_axis", "z") == "z"
        fits["class_names"] = len(set(names)) == len(names) == outputs
    wrong = [key for key in fits if not fits[key]]
    if wrong:
        raise UnreadableError(f"{path}: checkpoint is damaged, its {', '.join(wrong)} cannot be what s2d3d wrote")


def _is_files(value: object) -> bool:
    return isinstance(value, torch.Tensor) and file_numbers(value) is not None


def _size(path: str | Path) -> int:
    return (Path(path, HUB_WEIGHTS) if Path(path).is_dir() else Path(path)).stat().st_size


def _is_state_dict(weights: dict, max_bytes: int) -> bool:
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()):
        return False
    return sum(value.numel() * value.element_size() for value in weights.values()) <= max_bytes


def _from_version_1(payload: dict[str, Any]) -> dict[str, Any]:
    """Add the keys of version 2: the kind of experts, and the vertical axis."""
    experts = payload["s2d"]
    return payload | {
        "format_version": 2,
        "model": {"up_axis": "z"} | payload["model"],
        "s2d": None if experts is None else {"kind": "rup"} | experts,
    }


_MIGRATIONS = {1: _from_version_1}
"""By version: the function that converts its content to the next version."""


def save_safetensors(path: str | Path, payload: dict[str, Any]) -> Path:
    """Write the weights of a checkpoint atomically; its description is stored as metadata.

    Args:
        path: file to write, with the suffix ".safetensors"; its folder must exist.
        payload: result of `model_payload`.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    write_weights(path, payload["state_dict"], metadata={KEY: json.dumps(description_of(payload))})
    return Path(path)


def write_weights(path: str | Path, state_dict: dict[str, torch.Tensor], *, metadata: Mapping[str, str] = {}) -> None:
    """Write weights as safetensors, atomically.

    Args:
        path: file to write; its folder must exist.
        state_dict: on any device.
        metadata: texts beside them.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    from safetensors.torch import save

    weights = {key: weight.contiguous() for key, weight in state_dict.items()}
    write_bytes(path, save(weights, metadata={"format": "pt", **metadata}))


def description_of(payload: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint without weights and training state as plain types, to be stored beside safetensors."""
    kept = {key: payload[key] for key in KEPT_KEYS if key != "state_dict" and key in payload}
    if "trained_files" in kept:
        kept["trained_files"] = kept["trained_files"].tolist()
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "s2d3d_version": __version__, **kept}


def description_beside(path: str | Path) -> dict[str, Any]:
    """Return what config.json says of the weights of a folder in the hub's layout; of other files nothing."""
    path = Path(path)
    if path.name != HUB_WEIGHTS or not is_hub_folder(path.parent):
        return {}
    description = read_json(path.with_name(HUB_CONFIG), advice="fetch or export the folder again")
    return description if description.get("format") == FORMAT else {}


def read_hub_folder(path: str | Path) -> dict[str, Any]:
    """Return the payload of a folder in the layout of the Hugging Face hub: `config.json` and `model.safetensors`.

    Raises:
        UnreadableError: a file is damaged, or is not of this package.
    """
    description = read_json(Path(path, HUB_CONFIG), advice="fetch or export the folder again")
    return with_weights(description, read_safetensors(Path(path, HUB_WEIGHTS))[1])
