"""Undo what importing the package changed in the process."""

from __future__ import annotations

import torch._dynamo


def uninstall() -> None:
    """Forget compiled code and the backend's name, until it is looked up again.

    Models compiled with the backend run in eager or compile anew; other backends are not touched.
    """
    from torch._dynamo.backends import registry

    torch._dynamo.reset()
    getattr(registry, "_COMPILER_FNS", {}).pop("sm12x", None)
    names = getattr(registry, "_BACKENDS", {})
    if names.get("sm12x") is None:  # an entry point stays: it is found once in a process
        names.pop("sm12x", None)
