"""How rewritten code says, while Dynamo traces it, that it can't stand for the user's code after all."""

from __future__ import annotations

import logging
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

logger = logging.getLogger("sm12x_compile")


class CannotRewrite(Exception):
    """Outside of tracing: what `refuse` raises."""


# Rewritten code object -> the original that it stands for.
originals: dict[types.CodeType, types.CodeType] = {}
# Originals that are rewritten for nothing but their branches on a count.
for_counts: set[types.CodeType] = set()


class _Frame(threading.local):
    """The frame that Dynamo is at work on.

    Attributes:
        refused: functions that are traced as they are in this frame, with line and reason. Another frame, with
            other inputs, may well take the rewritten form.
        counted: rewritten functions in which a condition on a count was left to the data.
        plain: functions in which it is not, because that had to be given up.
        silent: functions that were rewritten for nothing else, and are traced as they are.
    """

    def __init__(self) -> None:
        self.begin({})

    def begin(self, memory: dict[str, Any]) -> None:
        """Go on with a frame; `memory` is what is kept for all attempts at it."""
        self.refused: dict[types.CodeType, tuple[int, str]] = memory.setdefault("refused", {})
        self.counted: set[types.CodeType] = memory.setdefault("counted", set())
        self.plain: set[types.CodeType] = memory.setdefault("plain", set())
        self.silent: set[types.CodeType] = memory.setdefault("silent", set())

    def give_up(self, original: types.CodeType, line: int, reason: str) -> None:
        """Trace a function in a simpler form from now on: without choices by count, or as its author wrote it."""
        if original in self.counted and original not in self.plain:
            logger.debug("a branch on a count is decided while tracing: %s", reason)
            self.plain.add(original)
            if original in for_counts:
                self.silent.add(original)
        else:
            self.refused[original] = (line, reason)


frame = _Frame()


def tracers() -> Iterator[Any]:
    """Dynamo's tracers on this thread's stack, the innermost frame first."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslatorBase
    except ImportError:
        return
    run = getattr(InstructionTranslatorBase.run, "__code__", None)
    python: types.FrameType | None = sys._getframe(1)
    while python is not None:
        if python.f_code is run:
            yield python.f_locals["self"]
        python = python.f_back


@torch._dynamo.assume_constant_result
def _refuse(reason: str) -> None:
    restart_without(reason)


def restart_without(reason: str) -> None:
    """Trace the frame again, with the innermost rewritten function as its author wrote it.

    Raises:
        RestartAnalysis: Dynamo's own way to begin afresh; nothing of this trace remains.
        CannotRewrite: no rewritten function is being traced.
    """
    for tracer in tracers():
        original = originals.get(tracer.f_code)
        if original is not None:
            frame.give_up(original, int(tracer.lineno or original.co_firstlineno), reason)
            # This kind of restart also forgets where graph breaks were expected.
            raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason=f"sm12x: {reason}")
    raise CannotRewrite(reason)


def refuse(reason: str) -> NoReturn:
    """Give the rewritten form up: the function is traced as its author wrote it, and the report says why."""
    _refuse(reason)
    raise CannotRewrite(reason)  # in eager mode `_refuse` has raised
