"""The facts that travel with an exported model: in the metadata of its file, and in the model.json of its web page."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..channels import CHANNELS, XYZ, num_channels
from ..errors import InputError
from ..unpickle import file_numbers

MAX_POINTS = 2**20
"""Most points of a cloud that a file may ask for."""
NORMALIZE = {True: "unit_sphere", False: "none"}


def model_facts(
    *,
    model: str,
    class_names: Sequence[str],
    up_axis: str,
    normalize: bool,
    files_up_axis: str = "z",
    channels: str = XYZ,
    config: Mapping[str, Any] | None = None,
    trained_files: Tensor | None = None,
) -> dict[str, Any]:
    """Return what the user of an exported model must know beyond its shapes, which `export_model` adds.

    Args:
        model: name of the model.
        class_names: in the order of the logits.
        up_axis: vertical axis of the clouds, "y" or "z".
        normalize: whether the clouds are centred and scaled into the unit sphere.
        files_up_axis: vertical axis of files, unless their user says another.
        channels: the numbers of a point, one of `s2d3d.channels.CHANNELS`.
        config: sections of the run's config by which `evaluate` scores the file, without places on this machine.
        trained_files: of the checkpoint, by which `evaluate` refuses to score files of the training.

    Example:
        >>> facts = model_facts(model="m", class_names=["box", "mug"], up_axis="z", normalize=True)
        >>> facts["channels"], facts["normalize"]
        ('xyz', 'unit_sphere')
    """
    return {
        "model": model,
        "class_names": list(class_names),
        "up_axis": up_axis,
        "normalize": NORMALIZE[normalize],
        "files_up_axis": files_up_axis,
        "channels": channels,
        "config": dict(config or {}),
        **({} if trained_files is None else {"trained_files": trained_files.tolist()}),
    }


def check_facts(facts: Mapping[str, Any], where: str) -> None:
    """Refuse a file whose metadata do not say what its user must know. It may be anybody's file.

    Args:
        facts: the metadata.
        where: the file, for the message.

    Raises:
        InputError: a fact is missing or wrong.

    Example:
        >>> check_facts({"num_points": 64}, "a.onnx")
        Traceback (most recent call last):
        s2d3d.errors.InputError: a.onnx: its metadata lack class_names, ...; write it with tools/export.py
    """
    needed = ("class_names", "num_points", "min_points", "in_channels", "free_dimensions", "up_axis", "normalize")
    advice = "write it with tools/export.py"
    missing = [key for key in needed if key not in facts]
    if missing:
        raise InputError(f"{where}: its metadata lack {', '.join(missing)}; {advice}")
    names, free, channels = facts["class_names"], facts["free_dimensions"], facts.get("channels", XYZ)
    right = {
        "class_names": isinstance(names, list) and names and all(isinstance(name, str) for name in names),
        "num_points": type(facts["num_points"]) is int and 1 <= facts["num_points"] <= MAX_POINTS,
        "min_points": type(facts["min_points"]) is int and 1 <= facts["min_points"] <= MAX_POINTS,
        "channels": channels in CHANNELS,
        "in_channels": channels in CHANNELS and facts["in_channels"] == num_channels(channels),
        "free_dimensions": isinstance(free, list) and "batch" in free,
        "up_axis": facts["up_axis"] == "z",
        "normalize": facts["normalize"] in NORMALIZE.values(),
        "config": isinstance(facts.get("config", {}), dict),
        "trained_files": file_numbers(facts.get("trained_files", [])) is not None,
    }
    for key, holds in right.items():
        if not holds:
            raise InputError(f"{where}: its {key} is not one that can be used here; {advice}")
