"""How rewritten code says, while Dynamo traces it, that it can't stand for the user's code after all."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, NoReturn

import torch


class CannotRewrite(Exception):
    """Outside of tracing: what `refuse` raises."""


# Rewritten code object -> the original that it stands for.
originals: dict[types.CodeType, types.CodeType] = {}
# Original code object -> (line, reason): from now on it is traced as it is.
refused: dict[types.CodeType, tuple[int, str]] = {}


def tracers() -> Iterator[Any]:
    """Dynamo's tracers on this thread's stack, the innermost frame first."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslatorBase
    except ImportError:
        return
    run = getattr(InstructionTranslatorBase.run, "__code__", None)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is run:
            yield frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]


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
            refused[original] = (int(tracer.lineno or original.co_firstlineno), reason)
            # This kind of restart also forgets where graph breaks were expected.
            raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason=f"sm12x: {reason}")
    raise CannotRewrite(reason)


def refuse(reason: str) -> NoReturn:
    """Give the rewritten form up: the function is traced as its author wrote it, and the report says why."""
    _refuse(reason)
    raise CannotRewrite(reason)  # in eager mode `_refuse` has raised
