"""Published checkpoint -> our state dict, with a report of what matched."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from ..channels import CHANNELS, WIDTH, XYZ, columns, groups, num_channels
from ..errors import InputError, first_difference
from ..unpickle import file_numbers, load_data, with_weights

WRAPPINGS = ("base_model", "state_dict", "model_state_dict", "model", "net")
"""Keys under which a file holds its weights: of the published checkpoints, our own, and those of other trainers."""

WRAPPERS = ("module.", "model.", "net.")
"""What the wrappers of a whole model put in front of its keys: several processes, Lightning."""

PRETRAINING_PREFIXES = ("transformer_q.", "MAE_encoder.")
"""What precedes the classifier's keys in pretraining checkpoints of Point-BERT and Point-MAE."""

UP_AXES = ("y", "z")


@dataclass(frozen=True)
class PretrainedReport:
    """Which tensors of a file were loaded into a model, and which were not.

    Attributes:
        path: the file.
        matched: keys of the model that now have the values of the file.
        missing: keys of the model that the file lacks; their values are unchanged.
        unexpected: keys of the file, as written there, that the model has no place for.
        mismatched: keys of the model's last layer, which has other classes; their values are unchanged.
        turned: whether the file's weights were turned from y up to z up.
        published: whether the file has the layout of the published checkpoints, which were trained y up.
        classes: how the classes that the file names differ from those of the model; empty if they do not.
        channels: which channels of the first layers are of the file and which are not; empty if all are.
        sizes: sizes without a tensor, such as the number of heads, that the model has otherwise than the file.
        origin: what a file of this package says of its training: `class_names`, `config`, `trained_files`.
    """

    path: Path
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    turned: bool = False
    published: bool = False
    classes: str = ""
    channels: str = ""
    sizes: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """Return one line: how many tensors matched, and what did not, counted by the first part of the key."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        parts = [f"{self.path}: {len(self.matched)} of the model's {total} tensors loaded"]
        if self.turned:
            parts.append("turned from y up to z up")
        parts += [text for text in (self.channels, self.sizes) if text]
        for text, keys in (
            (f"left fresh, {self.classes or 'another number of classes'}", self.mismatched),
            ("left fresh, not in the file", self.missing),
            ("in the file, not used", self.unexpected),
        ):
            if keys:
                parts.append(f"{text}: {_count(keys)}")
        if self.classes and not self.mismatched:
            parts.append(self.classes)
        if self.published and not self.turned:
            parts.append("taken as trained z up, published files were trained y up: model.pretrained_up_axis=y")
        return "; ".join(parts)


def load_pretrained_(
    model: nn.Module,
    path: str | Path,
    *,
    up_axis: str = "z",
    class_names: Sequence[str] | None = None,
    channels: str = XYZ,
    description: Mapping[str, Any] | None = None,
) -> PretrainedReport:
    """Load a published checkpoint, or one of ours, into a dense model, in place.

    It reads files of Point-BERT and Point-MAE, fine-tuned (`{"base_model": {"module.<key>": ...}, ...}`, with or
    without `module.`) and pretrained (keys behind `transformer_q.` or `MAE_encoder.`), checkpoints of this package,
    and plain state dicts, also under the keys of `WRAPPINGS`, behind the prefixes of `WRAPPERS` or of torch.compile,
    and in half precision. Code in a file is never run.

    The layers that read points may have other channels than those of the file. The columns of x, y, z, and of what else
    both have, are the file's. Those of further channels of the model start at zero, so that at its first update the
    model does what the file's did, and they learn from there.

    Args:
        model: from `create_model`, not converted yet; it is unchanged when an error is raised.
        path: the file.
        up_axis: the axis that pointed up in the clouds of the file's training. Data sets of this package are turned z
            up; with "y", as in the published checkpoints, the weights that see coordinates are turned alike, so that
            the model does with a cloud z up what the file's did with the same cloud y up.
        class_names: of the model's outputs. A checkpoint of this package names its classes: where they are the same in
            another order, the rows of the last layer are put in this order; where they are others, it stays fresh.
        channels: of a point, as the model takes them.
        description: of plain weights: what a checkpoint of this package says of them, such as the config.json beside.

    Returns:
        What matched. The last layer stays fresh where it has another number of classes, or other ones.

    Raises:
        InputError: the file cannot be read, belongs to another model or to none of the kinds above, holds experts or
            weights that are not finite, or says that it is z up where `up_axis` is "y".

    Example:
        >>> from s2d3d import create_model
        >>> model = create_model("point_mae", num_classes=40)
        >>> print(load_pretrained_(model, "modelnet_1k.pth", up_axis="y").summary())  # doctest: +SKIP
        modelnet_1k.pth: 174 of the model's 174 tensors loaded; turned from y up to z up
    """
    if up_axis not in UP_AXES:
        raise InputError(f"up_axis is {up_axis!r}, must be 'y' or 'z'")
    content = load_data(path, allow=numpy_scalars())
    if description:
        content = with_weights(description, content)
    if up_axis == "y" and _description(content).get("up_axis") == "z":
        raise InputError(f"{path}: was trained on clouds z up; model.pretrained_up_axis=y is for published files")
    file, origin = _unwrap(content, path), _origin(content, path)
    own, last = model.state_dict(), _last_layer(model)
    prefix = next((p for p in PRETRAINING_PREFIXES if _begins(p, file) and not _begins(p, own)), "")
    names = {key.removeprefix(prefix): key for key in file if key.startswith(prefix)}
    found = {key: file[names[key]] for key in own if key in names}
    theirs = _channels_of(content, model, found, channels)
    if theirs != channels:
        found = _fit_channels(model, found, theirs, channels)
    _check_belongs(own, found, file, last.partition(".")[0], path)
    head = [key for key in found if last and key.startswith(f"{last}.")]
    classes, rows = _compare_classes(content, class_names if head else None)
    mismatched = [key for key in head if _rows_differ(own[key], found[key]) or (classes and rows is None)]
    matched = {key: tensor for key, tensor in found.items() if key not in mismatched}
    tensors = _check_tensors(own, matched, path)
    if rows is not None:
        tensors |= {key: tensors[key][rows] for key in head if key in tensors}
    model.load_state_dict(_turn_z_up(model, tensors, channels) if up_axis == "y" else tensors, strict=False)
    used = {names[key] for key in found}
    return PretrainedReport(
        path=Path(path),
        matched=tuple(matched),
        missing=tuple(key for key in own if key not in found),
        unexpected=tuple(key for key in file if key not in used),
        mismatched=tuple(mismatched),
        turned=up_axis == "y",
        published="format" not in content and (bool(prefix) or "base_model" in content),
        classes=classes,
        channels=_compare_channels(theirs, channels),
        sizes=_compare_sizes(content, model),
        origin=origin,
    )


def numpy_scalars() -> list[Callable | tuple[Callable, str]]:
    """Return what a pickle calls to make a numpy number, under the names of numpy 1 and 2, and nothing else.

    The metrics in published checkpoints are such numbers.
    """
    scalar: Any = np.float64().__reduce__()[0]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def _unwrap(content: object, path: str | Path) -> dict[str, object]:
    """Return the mapping from keys to weights in a file, without what wrappers put before the keys."""
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, a checkpoint is a mapping from names to weights")
    if isinstance(content.get("s2d"), Mapping):
        merge = f"python tools/merge.py --checkpoint {path} --output FILE"
        raise InputError(f"{path}: has experts, pretrained weights must be dense; merge it first: {merge}")
    inner = next((content[key] for key in WRAPPINGS if _holds_weights(content.get(key))), content)
    # torch.compile names the model, or a part of it, anew; "module." may stand before some of the keys only.
    weights = {str(key).replace("_orig_mod.", "").removeprefix("module."): value for key, value in inner.items()}
    while wrapper := next((p for p in WRAPPERS if weights and all(key.startswith(p) for key in weights)), ""):
        weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    if not any(isinstance(value, Tensor) for value in weights.values()):
        known = ", ".join(f"'{key}'" for key in WRAPPINGS)
        raise InputError(f"{path}: no weights found, neither under {known} nor at the top: {_some(weights)}")
    return weights


def _holds_weights(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _compare_classes(content: object, class_names: Sequence[str] | None) -> tuple[str, list[int] | None]:
    """Compare the classes that a file names with those of the model.

    Returns:
        How they differ, empty if they do not or are unknown; the row of the file for each class of the model where only
        the order differs.
    """
    theirs = content.get("class_names") if isinstance(content, Mapping) else None
    if class_names is None or not isinstance(theirs, list) or theirs == list(class_names):
        return "", None
    if len(theirs) != len(class_names):
        return "another number of classes", None
    if sorted(map(str, theirs)) == sorted(class_names):
        rows = [theirs.index(name) for name in class_names]
        return "its classes have another order, the rows of the last layer were reordered", rows
    return f"other classes ({first_difference(theirs, class_names)})", None


def _check_belongs(
    own: Mapping[str, Tensor], found: Mapping[str, object], file: Mapping[str, object], head: str, path: str | Path
) -> None:
    """Refuse a file with less than half of the tensors before the head: that would be a fresh start."""
    backbone = [key for key in own if not head or not key.startswith(f"{head}.")]
    shared = [key for key in backbone if key in found]
    if 2 * len(shared) < len(backbone):
        if not head and any(key.startswith("blocks.blocks.") for key in file):
            raise InputError(
                f"{path}: holds a classifier, and a pre-training can only start from a pre-training; leave "
                "model.pretrained out, or train the classifier with task: classify"
            )
        raise InputError(
            f"{path}: belongs to another model: it has {len(shared)} of the {len(backbone)} tensors before the head; "
            f"the model's keys: {_some(own)}; the file's: {_some(file)}"
        )


def _check_tensors(own: Mapping[str, Tensor], values: Mapping[str, object], path: str | Path) -> dict[str, Tensor]:
    """Return the values; refuse such as are no ordinary tensors of the model's shapes, or hold non-finite numbers."""
    theirs: dict[str, Tensor] = {}
    for key, value in values.items():
        if not _is_ordinary(value):
            raise InputError(f"{path}: '{key}' is not an ordinary tensor")
        theirs[key] = value
    other = [key for key, tensor in theirs.items() if tensor.shape != own[key].shape]
    if other:
        key = other[0]
        shapes = f"{tuple(theirs[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        raise InputError(
            f"{path}: tensors of another shape ({len(other)}), such as '{key}': {shapes}; "
            "choose the model, and the options, that the file was trained with"
        )
    for key, tensor in theirs.items():  # all tensors of a file may have been halved, counters too
        if tensor.is_floating_point() and own[key].dtype == torch.int64 and torch.equal(tensor, tensor.round()):
            theirs[key] = tensor.long()
    kinds = [key for key, tensor in theirs.items() if tensor.is_floating_point() != own[key].is_floating_point()]
    if kinds:
        raise InputError(f"{path}: '{kinds[0]}' is {theirs[kinds[0]].dtype}, the model has {own[kinds[0]].dtype}")
    bad = [key for key, tensor in theirs.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise InputError(f"{path}: tensors with values that are not finite ({len(bad)}), such as '{bad[0]}'")
    return theirs


def _is_ordinary(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_meta)


def _begins(prefix: str, keys: Iterable[str]) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _last_layer(model: nn.Module) -> str:
    """Return the name of the layer that has an output for each class; empty for a pre-training model."""
    if getattr(model, "task", "classify") != "classify":
        return ""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def _rows_differ(own: Tensor, theirs: object) -> bool:
    """Return whether two tensors differ only in their number of rows."""
    return isinstance(theirs, Tensor) and own.shape != theirs.shape and own.shape[1:] == theirs.shape[1:]


def _input_layers(model: nn.Module, num_columns: int) -> dict[str, int]:
    """Return the weights that read whole points, whose columns stand last, and where these columns begin.

    Other layers read coordinates too, as differences between points; of these x, y, z are all.

    Args:
        model: names its layers by `coordinate_weights`.
        num_columns: channels of a point, C.
    """
    own = model.state_dict()
    named: dict[str, Sequence[int]] = getattr(model, "coordinate_weights", dict)()
    return {key: starts[-1] for key, starts in named.items() if own[key].shape[1] == starts[-1] + num_columns}


def _description(content: object) -> Mapping[str, object]:
    """Return what a file of this package says of its model; of other files nothing."""
    described = content.get("model") if isinstance(content, Mapping) else None
    return described if isinstance(described, Mapping) else {}


def _origin(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return what a file of this package says of its training; of other files nothing."""
    origin = {key: content[key] for key in ("class_names", "config", "trained_files") if key in content}
    if "format" not in content or not isinstance(origin.get("config"), Mapping):
        return {}
    if (files := file_numbers(origin.get("trained_files", []))) is None:
        raise InputError(f"{path}: its trained_files cannot be what s2d3d wrote")
    return origin | ({"trained_files": files} if "trained_files" in origin else {})


def _compare_sizes(content: object, model: nn.Module) -> str:
    """Return the sizes that no tensor tells and that a file of this package has otherwise than the model, or ""."""
    kwargs = _description(content).get("kwargs")
    if not isinstance(kwargs, Mapping):
        return ""
    own = {key: getattr(model, key) for key in ("num_group", "group_size", "fps_skip_origin") if hasattr(model, key)}
    heads = [module.num_heads for name, module in model.named_modules() if name.endswith("blocks.0.attn")]
    own |= {"num_heads": heads[0]} if heads else {}
    other = [f"{key} is {value}, not {kwargs[key]}" for key, value in own.items() if kwargs.get(key, value) != value]
    return f"other sizes than the file's: {', '.join(other)}" if other else ""


def _channels_of(content: object, model: nn.Module, found: Mapping[str, object], channels: str) -> str:
    """Return the channels of a file: what it says, or else those that the width of its first layers tells.

    Six channels without a name are taken for those of the model, if it has six, else for x, y, z and normals.
    """
    named = _description(content).get("channels")
    if isinstance(named, str) and named in CHANNELS:
        return named
    told = []
    for key, start in _input_layers(model, num_channels(channels)).items():
        width = getattr(found.get(key), "shape", ())[1:2]
        told += [known for known in (channels, *CHANNELS) if width == (start + num_channels(known),)][:1]
    # A layer of coordinates alone looks like one that reads points of x, y, z.
    return next((known for known in told if known != XYZ), told[0] if told else channels)


def _fit_channels(model: nn.Module, found: Mapping[str, object], theirs: str, ours: str) -> dict[str, object]:
    """Give the weights that read points the columns of our channels: those of the file, zeros where it has none."""
    result, own = dict(found), model.state_dict()
    for key, start in _input_layers(model, num_channels(ours)).items():
        weight = found.get(key)
        if not _is_ordinary(weight) or weight.shape[1:2] != (start + num_channels(theirs),):
            continue
        fitted = torch.zeros((len(weight), *own[key].shape[1:]), dtype=weight.dtype)
        fitted[:, :start] = weight[:, :start]
        for group in groups(ours):
            source, target = columns(theirs, group), columns(ours, group)
            if source and target:
                first = slice(start + source.start, start + source.stop)
                fitted[:, start + target.start : start + target.stop] = weight[:, first]
        result[key] = fitted
    return result


def _compare_channels(theirs: str, ours: str) -> str:
    """Return which channels of a file are used and which of the model are new; empty where they are the same."""
    if theirs == ours:
        return ""
    shared = "+".join(group for group in groups(ours) if group in groups(theirs))
    new = " and ".join(group for group in groups(ours) if group not in groups(theirs))
    unused = " and ".join(group for group in groups(theirs) if group not in groups(ours))
    text = f"first layers: columns of {shared} loaded" + (f", those of {new} start at zero" if new else "")
    return text + (f"; the file's columns of {unused} are not used" if unused else "")


def _turn_z_up(model: nn.Module, weights: dict[str, Tensor], channels: str = XYZ) -> dict[str, Tensor]:
    """Turn the weights that multiply x, y, z as the data sets turn clouds from y up to z up: to x, -z, y.

    Weights of normals are turned alike.
    """
    coordinate_weights = getattr(model, "coordinate_weights", None)
    if coordinate_weights is None:
        raise InputError(f"weights of {type(model).__name__} cannot be turned from y up to z up")
    result, normal = dict(weights), columns(channels, "normal")
    of_points = _input_layers(model, num_channels(channels)) if normal else {}
    for key, starts in coordinate_weights().items():
        if key in result:
            result[key] = result[key].clone()
            for first in (*starts, *([of_points[key] + WIDTH] if key in of_points else [])):
                x, y, z = result[key][:, first : first + 3].clone().unbind(1)
                result[key][:, first : first + 3] = torch.stack([x, -z, y], dim=1)
    return result


def _count(keys: Iterable[str]) -> str:
    counts = Counter(key.partition(".")[0] for key in keys)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def _some(mapping: Mapping[str, object]) -> str:
    shown = ", ".join(f"'{key}'" for key in list(mapping)[:3])
    return (shown + (", ..." if len(mapping) > 3 else "")) or "it is empty"
