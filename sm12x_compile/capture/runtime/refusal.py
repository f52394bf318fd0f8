"""How rewritten code says, while Dynamo traces it, that it can't stand for the user's code after all."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterator
from typing import Any, NoReturn

import torch


class CannotRewrite(Exception):
    """Outside of tracing: what `refuse` raises."""


# Rewritten code object -> the original that it stands for.
originals: dict[types.CodeType, types.CodeType] = {}


class _Frame(threading.local):
    """The frame that Dynamo is at work on.

    Attributes:
        refused: functions that are traced as they are in this frame, with line and reason. Another frame, with
            other inputs, may well take the rewritten form.
    """

    def __init__(self) -> None:
        self.refused: dict[types.CodeType, tuple[int, str]] = {}


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
            frame.refused[original] = (int(tracer.lineno or original.co_firstlineno), reason)
            # This kind of restart also forgets where graph breaks were expected.
            raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason=f"sm12x: {reason}")
    raise CannotRewrite(reason)


def refuse(reason: str) -> NoReturn:
    """Give the rewritten form up: the function is traced as its author wrote it, and the report says why."""
    _refuse(reason)
    raise CannotRewrite(reason)  # in eager mode `_refuse` has raised
