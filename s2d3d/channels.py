"""The numbers of a point, and their columns in a cloud (..., C): coordinates, then its normal, then its colour.

This file alone decides the layout. Readers make clouds in it, transforms, caches and models ask it for their columns.
"""

from typing import Any, Literal, get_args

from .errors import InputError, did_you_mean

Channels = Literal["xyz", "xyz+normal", "xyz+rgb", "xyz+normal+rgb"]
CHANNELS: tuple[str, ...] = get_args(Channels)
"""Every layout. `normal` is a unit vector, or zeros where it is unknown; `rgb` is in [0, 1]."""
XYZ: Channels = "xyz"
"""The layout of clouds, checkpoints and files that name none."""
WIDTH = 3
"""Columns of each group."""
NOUNS = {"xyz": "coordinates", "normal": "normals", "rgb": "colours"}


def check_channels(channels: str, where: str = "channels") -> None:
    """Raise InputError unless `channels` is one of `CHANNELS`."""
    if channels not in CHANNELS:
        known = ", ".join(CHANNELS)
        raise InputError(f"{where} is {channels!r}{did_you_mean(str(channels), CHANNELS)} (known: {known})")


def groups(channels: str) -> tuple[str, ...]:
    """Return the groups of a layout in the order of their columns.

    Raises:
        InputError: an unknown layout.

    Example:
        >>> groups("xyz+rgb")
        ('xyz', 'rgb')
    """
    check_channels(channels)
    return tuple(channels.split("+"))


def num_channels(channels: str) -> int:
    """Return C, the numbers of a point.

    Example:
        >>> [num_channels(channels) for channels in CHANNELS]
        [3, 6, 6, 9]
    """
    return WIDTH * len(groups(channels))


def columns(channels: str, group: str) -> slice | None:
    """Return the columns of a group, None where the layout has it not.

    Example:
        >>> columns("xyz+normal+rgb", "rgb"), columns("xyz+rgb", "normal")
        (slice(6, 9, None), None)
    """
    own = groups(channels)
    if group not in own:
        return None
    start = WIDTH * own.index(group)
    return slice(start, start + WIDTH)


def by_group(points: Any, channels: str) -> dict[str, Any]:
    """Return the columns of a tensor or array (..., C) by group, as views.

    Raises:
        InputError: it has another number of columns.
    """
    if points.shape[-1] != num_channels(channels):
        raise InputError(
            f"clouds have {points.shape[-1]} channels, {channels} are {num_channels(channels)}; name their channels"
        )
    return {group: points[..., columns(channels, group)] for group in groups(channels)}


def missing(where: object, group: str, channels: str, *, stored: str = "", advice: str = "") -> InputError:
    """Return the error for clouds without a group that is asked for.

    Args:
        where: the file or data set.
        group: "normal" or "rgb".
        channels: the layout that is asked for.
        stored: the name under which the group was looked for.
        advice: how it can be added.
    """
    rest = [name for name in groups(channels) if name != group]
    also = f", {advice}" if advice else ""
    looked_for = f" ({stored})" if stored else ""
    return InputError(
        f"{where}: holds no {NOUNS[group]}{looked_for}, which data.channels={channels} needs; "
        f"set data.channels={'+'.join(rest)} for a training{also}, or use other files"
    )
