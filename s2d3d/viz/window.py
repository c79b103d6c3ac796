"""Open3D windows, with or without a screen. Open3D is imported when it is first used."""

import contextlib
import ctypes
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import InputError, first_line
from ..optional import raise_if_interrupted

BACKGROUND = (0.965, 0.970, 0.975)
SYSTEM_PACKAGES = "libusb-1.0-0 libegl1 libgl1 libgl1-mesa-dri"


def import_open3d() -> ModuleType:
    try:
        import open3d
    except ModuleNotFoundError as error:
        raise InputError(f"pictures need open3d ({first_line(error)}); install it: pip install open3d") from error
    except (ImportError, OSError) as error:
        raise_if_interrupted(error)
        raise InputError(
            f"open3d cannot be loaded ({first_line(error)}); "
            f"install its system libraries: sudo apt-get install {SYSTEM_PACKAGES}"
        ) from error
    return open3d


@contextlib.contextmanager
def open_window(width: int, height: int, *, visible: bool, title: str = "s2d3d") -> Iterator[Any]:
    """Open an Open3D window inside the context; without `visible` it needs no screen.

    Yields:
        The visualizer, or None if `visible` is set and there is no screen.

    Raises:
        InputError: Open3D or a renderer is missing.
    """
    o3d = import_open3d()
    visualizer = o3d.visualization.Visualizer()
    with _captured_output() as output, o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Info):
        opened = visualizer.create_window(window_name=title, width=width, height=height, visible=visible)
    try:
        if not opened and not visible:
            reasons = [line for line in output.getvalue().splitlines() if "EGL" in line and "WARNING" in line]
            reason = reasons[0].split("WARNING] ")[-1].split("\x1b")[0].rstrip(".") if reasons else "no OpenGL"
            raise InputError(
                f"open3d finds nothing to draw with ({reason}); install a software renderer: "
                f"sudo apt-get install {SYSTEM_PACKAGES}"
            )
        if not opened or (visible and "falling back to EGL" in output.getvalue()):
            yield None
            return
        options = visualizer.get_render_option()
        options.background_color = np.array(BACKGROUND)
        options.light_on = False
        options.mesh_show_back_face = True
        with _captured_output(), o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error):
            yield visualizer
    finally:
        with _captured_output():
            visualizer.destroy_window()


@contextlib.contextmanager
def _captured_output() -> Iterator[io.StringIO]:
    """Suppress the output of Open3D and its libraries on stdout and stderr; yield Open3D's own lines.

    Drivers write to the file descriptors; Open3D's log goes to `sys.stdout`.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with tempfile.TemporaryFile() as sink, contextlib.ExitStack() as restore:
        for descriptor in (1, 2):
            saved = os.dup(descriptor)
            restore.callback(os.close, saved)
            restore.callback(os.dup2, saved, descriptor)
            os.dup2(sink.fileno(), descriptor)
        if os.name == "posix":
            restore.callback(ctypes.CDLL(None).fflush, None)  # flush C's buffers into the sink
        yield restore.enter_context(contextlib.redirect_stdout(io.StringIO()))
