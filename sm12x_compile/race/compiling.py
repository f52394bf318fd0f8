"""Whether this process is waiting for a compiler that it has started: a kernel that is built at its first call."""

from __future__ import annotations

import os
from pathlib import Path

COMPILERS = frozenset({"ninja", "nvcc", "cicc", "ptxas", "cudafe++", "fatbinary", "nvlink", "cc1plus", "g++", "c++"})


def compiler_at_work(root: int | None = None, proc: Path = Path("/proc")) -> str | None:
    """The name of a compiler among the processes below `root` (this one by default); None without a /proc."""
    waiting = [os.getpid() if root is None else root]
    while waiting:
        process = proc / str(waiting.pop())
        for children in process.glob("task/*/children"):
            for child in _read(children).split():
                name = _read(proc / child / "comm").strip()
                if name in COMPILERS:
                    return name
                waiting.append(int(child))
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""
