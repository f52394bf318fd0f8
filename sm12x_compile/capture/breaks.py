"""What the report says about code that was rewritten before tracing, and about code that could not be."""

from __future__ import annotations

import logging
import os
from types import CodeType

from sm12x_compile.collect import active_reports

from .python_rewrite import Rewritten

logger = logging.getLogger("sm12x_compile")


def place(code: CodeType, line: int) -> str:
    return f"{os.path.basename(code.co_filename)}:{line}"


def describe(code: CodeType, rewritten: Rewritten, *, by_count: bool = False) -> str:
    """One line for a rewritten function: where it is, and what was done in which line.

    `by_count`: it was rewritten for its branches on a Python int that is counted up.
    """
    by_what: dict[str, list[int]] = {}
    for line, _, what in rewritten.changes:
        what = "branch on a count" if by_count and what == "branch on a tensor" else what
        by_what.setdefault(what, []).append(line)
    parts = [f"{what} ({'lines' if len(at) > 1 else 'line'} {', '.join(map(str, at))})" for what, at in by_what.items()]
    return f"{place(code, code.co_firstlineno)} {_name(code)}: {'; '.join(parts)}"


def say_rewritten(code: CodeType, rewritten: Rewritten, *, by_count: bool) -> None:
    _say(describe(code, rewritten, by_count=by_count))


def take_back(code: CodeType, rewritten: Rewritten) -> None:
    """Say no longer that a function was rewritten for its branches on a count."""
    line = describe(code, rewritten, by_count=True)
    for report in active_reports():
        if line in report.code_rewrites:
            report.code_rewrites.remove(line)


def say_refused(code: CodeType, line: int, reason: str) -> None:
    _say(f"{place(code, line)} {_name(code)}: left as it is: {reason}")


def _name(code: CodeType) -> str:
    return str(getattr(code, "co_qualname", code.co_name)).rpartition("<locals>.")[2]


def _say(line: str) -> None:
    logger.debug("code rewriting: %s", line)
    for report in active_reports():
        if line not in report.code_rewrites:
            report.code_rewrites.append(line)
