"""Statements that only tell someone something: prints, loggers, warnings and timers."""

from __future__ import annotations

import ast
import builtins
import datetime
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

_UNKNOWN = object()
_CLOCKS = (
    time.time, time.time_ns, time.perf_counter, time.perf_counter_ns, time.monotonic, time.monotonic_ns,
    time.process_time, time.process_time_ns, time.thread_time,
)  # fmt: skip


def resolve(node: ast.AST, names: Mapping[str, Any], local: frozenset[str]) -> Any:
    """The object that a dotted name stands for while the module is loaded; `_UNKNOWN` if that can't be said."""
    if isinstance(node, ast.Name):
        if node.id in local:
            return _UNKNOWN
        return names.get(node.id, getattr(builtins, node.id, _UNKNOWN))
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, names, local)
        if isinstance(owner, (ModuleType, logging.Logger, type)) or owner in (sys.stdout, sys.stderr):
            return getattr(owner, node.attr, _UNKNOWN)
    return _UNKNOWN


def is_known(x: Any) -> bool:
    return x is not _UNKNOWN


def tells(call: ast.expr, names: Mapping[str, Any], local: frozenset[str]) -> str | None:
    """What a call does if all it does is to tell: then its arguments and its result don't matter."""
    if not isinstance(call, ast.Call):
        return None
    function = resolve(call.func, names, local)
    if function is print:
        return "print" if not any(k.arg == "file" for k in call.keywords) else None
    if function is warnings.warn:
        return "warning"
    owner = getattr(function, "__self__", None)
    if isinstance(owner, logging.Logger) or (
        getattr(function, "__module__", None) == "logging"
        and getattr(function, "__name__", "") in ("debug", "info", "warning", "error", "critical", "exception", "log")
    ):
        return "log message"
    if owner in (sys.stdout, sys.stderr) and owner is not None:
        return "print"
    return None


def is_clock(node: ast.expr, names: Mapping[str, Any], local: frozenset[str]) -> bool:
    if not isinstance(node, ast.Call) or node.args or node.keywords:
        return False
    function = resolve(node.func, names, local)
    return function in _CLOCKS or function == datetime.datetime.now


def has_effect(node: ast.AST) -> bool:
    """Whether evaluating an expression might do more than compute: a call that is not a well-known reading."""
    readings = ("item", "tolist", "mean", "sum", "max", "min", "any", "all", "norm", "abs", "float", "size", "dim",
                "numel", "format", "detach", "cpu", "shape", "std", "var", "unique", "nonzero", "isnan", "isinf",
                "isfinite", "count_nonzero")  # fmt: skip
    for n in ast.walk(node):
        if isinstance(n, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)):
            return True
        if isinstance(n, ast.Call):
            name = n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "")
            if name not in readings and name not in ("len", "str", "int", "float", "bool", "repr", "round", "list",
                                                     "tuple", "type", "range"):  # fmt: skip
                return True
    return False


class Noise:
    """The statements of a function that are noise, and names that only noise reads."""

    def __init__(self, body: list[ast.stmt], names: Mapping[str, Any], local: frozenset[str]) -> None:
        self.names, self.globals = local, names
        self.dropped: dict[ast.stmt, str] = {}
        self._find(body)

    def _find(self, body: list[ast.stmt]) -> None:
        statements = [n for s in body for n in ast.walk(s) if isinstance(n, ast.stmt)]
        for s in statements:
            if isinstance(s, ast.Expr):
                what = tells(s.value, self.globals, self.names)
                if what and isinstance(s.value, ast.Call):
                    values = [*s.value.args, *(k.value for k in s.value.keywords)]
                    inner = [v for v in values if not self._is_quiet(v)]
                    if not inner:
                        self.dropped[s] = what
        self._find_clocks(body, statements)

    def _is_quiet(self, value: ast.expr) -> bool:
        clocks = [n for n in ast.walk(value) if isinstance(n, ast.expr) and is_clock(n, self.globals, self.names)]
        calls = {n for n in ast.walk(value) if isinstance(n, ast.Call)} - set(clocks)
        return not any(has_effect_of_call(c) for c in calls) and not any(
            isinstance(n, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)) for n in ast.walk(value)
        )

    def _find_clocks(self, body: list[ast.stmt], statements: list[ast.stmt]) -> None:
        """``t = time.time()`` and what is computed from it alone, if only dropped statements read it."""
        timed: set[str] = set()
        assigns = [s for s in statements if isinstance(s, ast.Assign) and len(s.targets) == 1
                   and isinstance(s.targets[0], ast.Name)]  # fmt: skip
        writers: dict[str, list[ast.stmt]] = {}
        for n in (n for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)):
            writers.setdefault(n.id, [])
        for s in statements:
            if isinstance(s, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.With)):
                for name in {m.id for m in ast.walk(s) if isinstance(m, ast.Name) and isinstance(m.ctx, ast.Store)}:
                    writers[name].append(s)
        candidates: dict[ast.stmt, str] = {}
        changed = True
        while changed:
            changed = False
            for s in assigns:
                if s in candidates or not self._is_quiet(s.value):
                    continue
                reads = {n.id for n in ast.walk(s.value) if isinstance(n, ast.Name) and n.id in self.names}
                clock = any(isinstance(n, ast.expr) and is_clock(n, self.globals, self.names)
                            for n in ast.walk(s.value))  # fmt: skip
                if (clock or reads & timed) and reads <= timed:
                    target = s.targets[0]
                    assert isinstance(target, ast.Name)
                    candidates[s] = target.id
                    timed.add(target.id)
                    changed = True
        # Every reader must itself be dropped, and every writer be a reading of a clock.
        while True:
            gone = set(self.dropped) | set(candidates)
            read_elsewhere = {
                n.id
                for s in statements
                if s not in gone
                for n in _own(s)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
            }
            bad = {s for s, name in candidates.items() if name in read_elsewhere
                   or any(w not in candidates for w in writers.get(name, []))}  # fmt: skip
            if not bad:
                break
            for s in bad:
                del candidates[s]
        self.dropped.update(dict.fromkeys(candidates, "timer"))


def _own(s: ast.stmt) -> list[ast.AST]:
    """The parts of a statement that are not statements themselves."""
    found: list[ast.AST] = []
    stack: list[ast.AST] = [n for n in ast.iter_child_nodes(s) if not isinstance(n, ast.stmt)]
    if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return list(ast.walk(s))
    while stack:
        node = stack.pop()
        found.append(node)
        stack += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.stmt)]
    return found


def has_effect_of_call(call: ast.Call) -> bool:
    alone = ast.Call(func=call.func, args=[], keywords=[])
    return has_effect(alone)
