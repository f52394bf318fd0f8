"""Undo what importing the package changed in the process."""

from __future__ import annotations

from importlib.metadata import entry_points

import torch


def uninstall() -> None:
    """Forget compiled code, captured functions and the backend's name, until it is used again.

    Models compiled with the backend run in eager or compile anew; other backends are not touched.
    """
    from torch._dynamo.backends import registry

    from .capture import install as capture
    from .capture import wrap

    torch._dynamo.reset()
    wrap.uninstall()
    capture.uninstall()
    names = getattr(registry, "_BACKENDS", {})
    for table in (names, getattr(registry, "_COMPILER_FNS", {})):
        table.pop("sm12x", None)
    # Dynamo looks for entry points once in a process: leave it ours, or the name would be gone for good.
    for entry in entry_points(group="torch_dynamo_backends", name="sm12x"):
        names["sm12x"] = entry
