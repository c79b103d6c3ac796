"""Pictures of pre-trainings: loss curves, and clouds that a masked autoencoder completes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..errors import InputError
from .figure import Log, draw_column, finish, make_panels, run_style
from .sheet import pack


@dataclass(frozen=True)
class Reconstructions:
    """What the model of a pre-training makes of a few clouds.

    Attributes:
        points: (n, N, 3), z up.
        visible: (n, V, 3), the points of the visible groups.
        rebuilt: (n, M, 3), the predicted points of the masked groups.
        hidden: (n, M, 3), their true points.
        names: of the clouds, n.
    """

    points: Tensor
    visible: Tensor
    rebuilt: Tensor
    hidden: Tensor
    names: Sequence[str]


def reconstruction_curves(logs: Mapping[str, Log]) -> Figure:
    """Plot reconstruction loss and learning rate of pre-trainings over the epochs.

    Args:
        logs: by the name of the run. Used columns, if present: `epoch`, `train_loss`, `val_loss`, `test_loss`, `lr`.

    Raises:
        InputError: there is no run with a row.

    Example:
        >>> figure = reconstruction_curves({"a": [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}]})
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [2.0, 1.0]
    """
    if not any(logs.values()):
        raise InputError("no run with an epoch to plot")
    figure, (loss, rate) = make_panels(1, 2, 10.5, 3.6)
    for index, (name, log) in enumerate(logs.items()):
        style = run_style(index)
        draw_column(loss, log, "train_loss", 1, label=name, **style)
        for column, title, marker in (("val_loss", "validation", "x"), ("test_loss", "test", "o")):
            draw_column(loss, log, column, 1, label=f"{name}, {title}", marker=marker, markersize=4, alpha=0.6, **style)
        draw_column(rate, log, "lr", 1, label=name, **style)
    loss.set(title="Reconstruction loss", xlabel="epoch", ylabel="Chamfer distance", yscale="log")
    rate.set(title="Learning rate", xlabel="epoch", ylabel="learning rate")
    return finish(figure)


def pictures(run: str, made: Reconstructions, points: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the four views of each cloud for the page; their points are added to `points`.

    The views of a cloud have one centre. In the last two, the first points are visible ones, drawn in grey.
    """
    clouds = []
    for index, name in enumerate(made.names):
        seen = made.visible[index]
        views = {
            "input": made.points[index], "masked": seen, "reconstructed": torch.cat([seen, made.rebuilt[index]]),
            "original": torch.cat([seen, made.hidden[index]]),
        }  # fmt: skip
        center = (made.points[index].amax(0) + made.points[index].amin(0)) / 2
        for step, cloud in views.items():
            points[f"{run}:{index}:{step}"] = quantise(cloud.double() - center)
        clouds.append({"name": name, "views": [[f"{run}:{index}:{step}", step] for step in views], "grey": len(seen)})
    return clouds


def quantise(cloud: Tensor) -> dict[str, Any]:
    """Return a cloud (N, 3) as 16-bit integers, and their unit."""
    unit = max(float(cloud.abs().max()), 1e-9) / 32767
    return {"unit": unit, "data": pack((cloud / unit).round().numpy(), "<i2")}
