"""Checkpoints as safetensors: weights that any program reads without this package, and the description beside them."""

import json
from pathlib import Path
from typing import Any

from ..atomic import replacing
from ..errors import UnreadableError, printable
from ..version import __version__

SUFFIX = ".safetensors"
KEY = "s2d3d"
"""Where the metadata of the file hold the description, as JSON."""


def save_safetensors(path: str | Path, payload: dict[str, Any], *, format_version: int) -> Path:
    """Write the weights of a checkpoint, atomically; its description becomes metadata.

    Args:
        path: ends in ".safetensors"; its folder exists.
        payload: as `model_payload` makes it.
        format_version: of the description.

    Raises:
        OSError: the file cannot be written; what was there is unchanged.
    """
    from safetensors.torch import save

    weights = {key: weight.contiguous() for key, weight in payload["state_dict"].items()}
    kept = {key: payload[key] for key in ("model", "s2d", "class_names", "config")}
    description = {"format": "s2d3d", "format_version": format_version, "s2d3d_version": __version__, **kept}
    content = save(weights, metadata={"format": "pt", KEY: json.dumps(description)})
    with replacing(path) as file:
        file.write(content)
    return Path(path)


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """Return what `save_safetensors` was given, with `state_dict` on the CPU; nothing in such a file can be run.

    Raises:
        UnreadableError: the file is damaged, or has no description of this package.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
        description = json.loads(metadata[KEY])
        return {**description, "state_dict": weights}
    except KeyError as error:
        raise UnreadableError(f"{path}: holds weights but no description by s2d3d; it needs one of merge.py") from error
    except (SafetensorError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        reason = printable(" ".join(str(error).split()))[:200]
        raise UnreadableError(
            f"{path}: cannot be read as safetensors (truncated, damaged or something else: {reason})"
        ) from error
