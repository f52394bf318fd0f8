"""Loops over hits, and the values that names have after code that may not have run."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .memory import stands_for
from .number import Number, number_of
from .predicates import Condition, Predicate
from .provenance import index_bound
from .refusal import refuse
from .rows import BeforeRows, Nonzero, Rows
from .selection import Count, HitRow, Unique
from .trace import needs_gradients


class _Unbound:
    """The value of a name that nothing has been assigned to."""


UNBOUND = _Unbound()


def loop(x: Any, indexed: tuple[Any, ...] = ()) -> list[tuple[Predicate | None, Any]]:
    """What a ``for`` walks over: for each item, under which condition it is there.

    Args:
        x: the iterable of the author's loop.
        indexed: containers that the body indexes with the loop's variable.
    """
    if isinstance(x, Nonzero):
        hits = _one_dimension(x.selection.mask)
        return [(_hit(hits, e), HitRow(e)) for e in range(hits.shape[0])]
    if isinstance(x, Rows):
        if x.component is None or x.ndim != 1:
            refuse("a loop over rows that a mask selects")
        hits = _one_dimension(x.selection.mask)
        return [(_hit(hits, e), e) for e in range(hits.shape[0])]
    if isinstance(x, Unique):
        return _distinct(x.values, indexed)
    return [(None, item) for item in x]


def _one_dimension(hits: Tensor) -> Tensor:
    if hits.ndim != 1:
        refuse("a loop over the hits of a mask of several dimensions")
    return hits


def _hit(hits: Tensor, e: int) -> Predicate:
    return Predicate((Condition(hits[e], hits=hits, index=e),))


def _distinct(values: Tensor, indexed: tuple[Any, ...]) -> list[tuple[Predicate | None, Any]]:
    bounds = [len(c) for c in indexed if not isinstance(c, (dict, str)) and (not isinstance(c, Tensor) or c.ndim)]
    if not bounds:
        refuse("a loop over the distinct values of a tensor, and nothing says how large they can be")
    if index_bound(values) < 0:
        refuse("a loop over the distinct values of a tensor, which may be negative and so index from the end")
    items: list[tuple[Predicate | None, Any]] = []
    for e in range(min(bounds)):
        mask = values == e
        items.append((Predicate((Condition(mask.any(), nonempty=mask),)), e))
    return items


def mark_loop(items: list[tuple[Predicate | None, Any]]) -> int:
    from .trace import mark

    return mark(items[0][0]) if items else -1


def select(t: Any, taken: Any, otherwise: Any) -> Any:
    """The value of a name after a branch: `taken` if the condition `t` held.

    `t` is None (certain), True, False or a `Predicate`.
    """
    if not isinstance(t, Predicate):
        return otherwise if t is False else taken
    return _select(t, taken, otherwise)


def _select(t: Predicate, a: Any, b: Any) -> Any:
    if isinstance(b, _Unbound):
        return a
    if isinstance(a, _Unbound):
        return b
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a is b:
            return a
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            refuse("a name gets tensors of different shape or dtype, depending on tensor values")
        needs_gradients(a, b)
        chosen = torch.where(t.tensor(), a, b)
        stands_for(chosen, a, b)
        return chosen
    if isinstance(a, Predicate) or isinstance(b, Predicate):
        refuse("a truth value depends on a condition that depends on tensor values")
    if isinstance(a, Rows) and isinstance(b, Rows):
        if a.selection.same_as(b.selection) and a.axes == b.axes and a.rest == b.rest and a.dtype == b.dtype:
            a.fresh = b.fresh = False
            return Rows(a.selection, a.axes, torch.where(t.tensor(), a.dense, b.dense), fresh=False)
        refuse("a name gets selected rows that depend on a condition")
    if isinstance(a, tuple) and isinstance(b, tuple) and type(a) is type(b) is tuple and len(a) == len(b):
        return tuple([_select(t, x, y) for x, y in zip(a, b, strict=True)])
    if _is_number(a) and _is_number(b):
        return _select_number(t, a, b)
    if (a is None and b is None) or (isinstance(a, str) and isinstance(b, str) and a == b):
        return a
    if isinstance(a, bool) and isinstance(b, bool) and a == b:
        return a
    if not isinstance(a, (Tensor, tuple, int, float, str, Number, Rows)) and a is b:
        return a
    refuse("a name gets different kinds of values, depending on tensor values")


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, Number)) and not isinstance(x, bool)


def _select_number(t: Predicate, a: Any, b: Any) -> Any:
    if not isinstance(a, Number) and not isinstance(b, Number) and type(a) is type(b) and a == b:
        return a
    floats = [isinstance(x, float) or (isinstance(x, Number) and x.tensor().dtype == torch.float64) for x in (a, b)]
    if floats[0] != floats[1]:
        refuse("a name gets an int or a float, depending on tensor values")
    device = t.tensor().device
    dtype = torch.float64 if floats[0] else torch.int64
    values = [x.tensor() if isinstance(x, Number) else torch.tensor(x, dtype=dtype, device=device) for x in (a, b)]
    return Number(torch.where(t.tensor(), values[0], values[1]))


def certain(under: Predicate | None, what: str) -> None:
    """Refuse if the data decide whether the next statement runs."""
    if under is not None:
        refuse(f"{what} under a condition that depends on tensor values")


def uncertain(*tests: Any) -> bool:
    return any(isinstance(t, Predicate) for t in tests)


def tolist(func: Any, x: Any) -> Any:
    """``x.tolist()``: a list of numbers that the device knows; `func` is the author's call."""
    if isinstance(x, Tensor):
        if x.ndim > 1:
            refuse("tolist() of several dimensions")
        return [number_of(v) for v in x.unbind(0)] if x.ndim else number_of(x)
    if isinstance(x, Rows):
        return x if x.component is not None else refuse("tolist() of rows that a mask selects")
    return func()


def length(x: Any) -> Any:
    """``len(x)``."""
    return x._length() if isinstance(x, (Rows, Nonzero)) else len(x)


def escaping(value: Any, how: str) -> Any:
    """A value that leaves the function, which must be what it is in the author's code."""
    if isinstance(value, (Rows, BeforeRows, Nonzero, Unique, HitRow, Predicate)):
        refuse(f"a tensor whose size the data decide {how}")
    if isinstance(value, Number):
        refuse(f"a Python number read from a tensor {how}")
    if isinstance(value, (tuple, list)):
        for part in value:
            escaping(part, how)
    elif type(value) is dict:
        for part in value.values():
            escaping(part, how)
    return value


def no(what: str) -> NoReturn:
    refuse(what)


__all__ = ["UNBOUND", "Count", "certain", "escaping", "length", "loop", "mark_loop", "no", "select", "tolist"]
