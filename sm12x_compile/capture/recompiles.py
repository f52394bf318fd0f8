"""A loud word before Dynamo stops compiling a function and, without an error, runs it in eager from then on.

Dynamo compiles a function anew when a guard fails, up to ``torch._dynamo.config.recompile_limit`` times (8). What it
says when it gives up is one line of its own log.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from sm12x_compile.collect import active_reports

from .scope import options_for

logger = logging.getLogger("sm12x_compile")


class _Recompile(threading.local):
    """The recompile in progress on this thread: the function, and the guards that failed."""

    function: str | None = None
    reasons: list[str] = []


_recompile = _Recompile()
_undo: list[Callable[[], None]] = []


def advice(reason: str) -> str:
    """What a user can do about a guard that keeps failing."""
    if "size mismatch" in reason or ".size()" in reason or "stride" in reason:
        return (
            "A size changes from call to call. Pad it to a few fixed lengths, use a static cache, or mark it with "
            "torch._dynamo.mark_dynamic(tensor, dim)."
        )
    if "___check_obj_id" in reason or "___check_type_id" in reason or "type" in reason:
        return "An object or type changes from call to call. Pass the same object, or compile one function for each."
    if "==" in reason or "___" in reason:
        return (
            "A Python value changes from call to call. Keep it in a tensor, or compute it outside of the compiled "
            "function."
        )
    return "Make that input the same in every call, or compile one function for each of its kinds."


def message(function: str, limit: str, value: int, reason: str) -> str:
    return (
        f"sm12x: {function} has been compiled for {value} different inputs, Dynamo's {limit}. From now on it runs in "
        f"EAGER MODE, without this backend, whenever it gets an input of a new kind. The guard that failed: {reason}. "
        f"{advice(reason)} torch._dynamo.config.{limit} raises the limit."
    )


def install() -> None:
    """Listen to Dynamo's check of the limit; where a torch version has another, its own log must do."""
    if _undo:
        return
    from torch._dynamo import config, convert_frame

    find = getattr(convert_frame, "get_and_maybe_log_recompilation_reasons", None)
    exceeds = getattr(convert_frame, "exceeds_recompile_limit", None)
    if find is None or exceeds is None:
        return

    @wraps(find)
    def finding(entries: Any, frame: Any, backend: Any, *args: Any, **kwargs: Any) -> Any:
        reasons = find(entries, frame, backend, *args, **kwargs)
        ours = options_for(backend) is not None
        code = frame.f_code
        _recompile.function = f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})" if ours else None
        _recompile.reasons = list(reasons or [])
        return reasons

    @wraps(exceeds)
    def checking(*args: Any, **kwargs: Any) -> Any:
        answer = exceeds(*args, **kwargs)
        function, _recompile.function = _recompile.function, None
        if answer[0] and function is not None:
            reason = " ".join((_recompile.reasons or ["unknown"])[0].split(" # ")[0].split())
            _warn(message(function, answer[1], getattr(config, answer[1]), reason))
        return answer

    for name, new, old in (
        ("get_and_maybe_log_recompilation_reasons", finding, find), ("exceeds_recompile_limit", checking, exceeds),
    ):  # fmt: skip
        setattr(convert_frame, name, new)
        _undo.append(lambda name=name, old=old: setattr(convert_frame, name, old))  # type: ignore[misc]


def uninstall() -> None:
    while _undo:
        _undo.pop()()


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
    logger.warning(text)
    for report in active_reports():
        report.warn(text)
