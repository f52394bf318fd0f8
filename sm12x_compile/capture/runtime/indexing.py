"""Subscripts of rewritten code: ``x[mask]``, ``x[index]``, and assignments to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .memory import stands_for
from .number import Number
from .predicates import Predicate
from .provenance import now
from .refusal import refuse
from .rows import BeforeRows, Rows
from .rowwise import aligned, mixes, over
from .selection import Count, HitRow, Selection
from .writes import in_range, put_masked, put_one, put_rows, under_condition


def _entries(index: Any) -> tuple[Any, ...]:
    entries = []
    for e in index if isinstance(index, tuple) else (index,):
        entries.append(e.position if isinstance(e, HitRow) else e)
    return tuple(entries)


def _is_mask(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8) and entry.ndim > 0


def getitem(x: Any, index: Any) -> Any:
    """``x[index]``."""
    if isinstance(index, int):  # before all else: Dynamo traces each step of this, for each expert
        return x[index]
    if isinstance(x, Tensor) and _has_hit(index):
        return _at_hit(x, index)
    entries = _entries(index)
    if isinstance(x, Tensor):
        rows = slices = numbers = masks = False
        for e in entries:
            if isinstance(e, Rows):
                rows = True
            elif isinstance(e, slice):
                slices = slices or _has_number(e)
            elif isinstance(e, Number):
                numbers = True
            elif isinstance(e, Tensor):
                masks = masks or _is_mask(e)
        if masks and _is_mask(entries[0]):
            return _masked(x, entries[0], entries[1:])
        if rows:
            return _gathered(x, entries)
        if slices:
            return _sliced(x, entries)
        if numbers:
            return _at_number(x, entries)
        if masks:
            refuse("a mask stands behind another index")
    if isinstance(x, Rows):
        for e in entries:
            if isinstance(e, (Tensor, Rows)):
                refuse("rows that a mask selects are indexed by a tensor")
    return x[entries if isinstance(index, tuple) else entries[0]]


def _has_hit(index: Any) -> bool:
    for e in index if isinstance(index, tuple) else (index,):  # noqa: SIM110  (traced step by step)
        if isinstance(e, HitRow):
            return True
    return False


def _at_hit(x: Tensor, index: Any) -> Any:
    """``x[row]``: in the author's code a copy of one entry, which keeps its dimension."""
    entries = index if isinstance(index, tuple) else (index,)
    for e in entries:
        if isinstance(e, (Rows, Tensor, Number)):
            refuse("a hit stands beside another index")
    kept = [slice(e.position, e.position + 1) if isinstance(e, HitRow) else e for e in entries]
    return x[tuple(kept)].clone()


def _has_number(e: slice) -> bool:
    return isinstance(e.start, Number) or isinstance(e.stop, Number)


def _masked(x: Tensor, mask: Tensor, rest: tuple[Any, ...]) -> Rows:
    if mask.dtype == torch.uint8:
        mask = mask.bool()
    if tuple(x.shape[: mask.ndim]) != tuple(mask.shape):
        refuse("a mask's shape is not that of the first dimensions of what it indexes")
    selection = Selection(mask.clone())
    rows = _alias(selection, tuple(range(mask.ndim)), x)
    return rows[(slice(None), *rest)] if rest else rows


def _alias(selection: Selection, axes: tuple[int, ...], dense: Tensor) -> Rows:
    """Rows whose dense form is the author's own tensor, for as long as nobody writes that."""
    if torch.compiler.is_compiling():
        return Rows(selection, axes, dense, gathered=now())
    return Rows(selection, axes, dense.clone())


def _gathered(x: Tensor, entries: tuple[Any, ...]) -> Any:
    """``x[i]``, ``x[i, j]`` and ``x[i, j, None, ...]`` with rows of integers."""
    if entries[0] is None:
        return BeforeRows(_gathered(x, entries[1:]))
    count = 0
    while count < len(entries) and isinstance(entries[count], Rows):
        count += 1
    index, rest = list(entries[:count]), entries[count:]
    if not index:
        refuse("selected rows index another dimension than the first")
    for e in rest:
        if isinstance(e, (Rows, Tensor)):
            refuse("selected rows index another dimension than the first")
    known = []
    for i in index:
        if i.ndim != 1 or i.dtype == torch.bool:
            refuse("an index of several dimensions, or a mask over selected rows")
        known.append(i.component)
    axes, _ = aligned(index, "indexing")
    selection = index[0].selection
    if None not in known and len(set(known)) == count:
        dense = x
        for k in range(count):
            axis = known[k]
            size = selection.mask.shape[axis]
            if x.shape[k] < size:
                refuse("a mask is longer than what its positions index")
            if x.shape[k] > size:
                dense = dense.narrow(k, 0, size)
        if known != sorted(known):
            order = sorted(range(count), key=lambda k: known[k])
            dense = dense.permute(*order, *range(count, x.ndim))
        rows = _alias(selection, axes, dense)
    else:
        mask = selection.mask.any([a for a in range(selection.mask.ndim) if a not in axes]) \
            if len(axes) < selection.mask.ndim else selection.mask  # fmt: skip
        # Where nothing is selected the index may be out of bounds.
        safe = [torch.where(mask, over(i, axes), 0) for i in index]
        rows = Rows(selection, axes, torch.ops.aten.index.Tensor(x, safe))
    return rows[(slice(None), *rest)] if rest else rows


def _at_number(x: Tensor, entries: tuple[Any, ...]) -> Tensor:
    """``x[n]`` with a number that the device knows: a copy, where the author's code has a view."""
    dim = [k for k, e in enumerate(entries) if isinstance(e, Number)]
    if len(dim) != 1 or any(not isinstance(e, (Number, slice)) for e in entries):
        refuse("a number read from a tensor stands beside another index")
    k = dim[0]
    picked = x[(*([slice(None)] * k), entries[k].tensor().reshape(1))].squeeze(k)
    stands_for(picked, x)
    rest = [e for j, e in enumerate(entries) if j != k]
    return picked[tuple(rest)] if rest else picked


def _range_of(x: Tensor, e: slice) -> Tensor:
    """The positions of a slice of the first dimension of `x` whose bounds the device knows."""
    if e.step not in (None, 1):
        refuse("a slice with a step and bounds read from a tensor")
    size = x.shape[0]
    places = torch.arange(size, device=x.device)
    mask = None
    for bound, side in ((e.start, torch.ge), (e.stop, torch.lt)):
        if bound is None:
            continue
        if isinstance(bound, Number):
            value = bound.tensor().to(x.device)
            value = torch.where(value < 0, value + size, value)
        else:
            value = bound + size if bound < 0 else bound
        part = side(places, value)
        mask = part if mask is None else mask & part
    assert mask is not None
    return mask


def _sliced(x: Tensor, entries: tuple[Any, ...]) -> Rows:
    if not isinstance(entries[0], slice) or any(isinstance(e, slice) and _has_number(e) for e in entries[1:]):
        refuse("a slice of another dimension than the first has a bound read from a tensor")
    rows = _masked(x, _range_of(x, entries[0]), entries[1:])
    rows.fresh = False  # in the author's code a view
    return rows


def setitem(x: Any, index: Any, value: Any, under: Predicate | None) -> None:
    """``x[index] = value``, perhaps under a condition."""
    entries = _entries(index)
    if not isinstance(x, Tensor):
        if under is not None:
            refuse("an object is changed under a condition that depends on tensor values")
        if isinstance(value, (Rows, Count)):
            refuse("rows that a mask selects are stored in an object")
        x[index] = value
        return
    if isinstance(entries[0], slice) and _has_number(entries[0]) and len(entries) == 1:
        entries = (_range_of(x, entries[0]),)
    if len(entries) > 1 and _is_basic(entries[1:]) and (_is_mask(entries[0]) or isinstance(entries[0], Rows)):
        # Selected rows of some columns: a view of those columns is written.
        lead = entries[0].ndim if isinstance(entries[0], Tensor) else 1
        x, entries, index = x[(*([slice(None)] * lead), *entries[1:])], entries[:1], entries[0]
    if len(entries) == 1 and _is_mask(entries[0]) and tuple(x.shape[: entries[0].ndim]) == tuple(entries[0].shape):
        mask = entries[0] if entries[0].dtype == torch.bool else entries[0].bool()
        if isinstance(value, Rows):
            if not value.selection.same_as(Selection(mask)):
                mixes("assignment", "rows that different masks select meet")
            put_masked(x, mask, value, under)
            return
        if not isinstance(value, Tensor) or value.ndim == 0 or value.ndim < x.ndim - mask.ndim + 1:
            put_masked(x, mask, value.meeting(x) if isinstance(value, Number) else value, under)
            return
    if len(entries) == 1 and isinstance(entries[0], Rows):
        put_rows(x, entries[0], value, under)
        return
    if isinstance(value, (Rows, Count)) or any(isinstance(e, (Rows, slice)) and _odd(e) for e in entries):
        refuse("rows that a mask selects are assigned to a place of another form")
    number = [k for k, e in enumerate(entries) if isinstance(e, Number)]
    if number:
        entries = tuple([e.tensor() if isinstance(e, Number) else e for e in entries])
    if isinstance(value, Number):
        value = value.meeting(x)
    key = entries if isinstance(index, tuple) else entries[0]
    if under is None:
        x[key] = value
        return
    places = _one_index(entries)
    if places >= 0 and (not isinstance(value, Tensor) or value.ndim <= x.ndim):
        value = value if isinstance(value, Tensor) else x.new_full((), value)
        if entries[places].shape == (1,):
            # One position, negative if it counts from the end.
            index = torch.where(entries[places] < 0, entries[places] + x.shape[places], entries[places])
            under_condition(x, put_one(x, places, index, value, under), under)
            return
        known: list[Tensor | None] = [None] * places
        known.append(in_range(entries[places], x.shape[places], under))
        under_condition(x, torch.ops.aten.index_put.default(x, known, value.to(x.dtype)), under)
        return
    changed = x.clone()
    changed[key] = value
    under_condition(x, changed, under)


def _one_index(entries: tuple[Any, ...]) -> int:
    """The dimension that the only entry that is no ``:`` indexes by positions; -1 if there are others."""
    last = entries[-1]
    if not isinstance(last, Tensor) or last.dtype not in (torch.int64, torch.int32):
        return -1
    for e in entries[:-1]:
        if not isinstance(e, slice) or e != slice(None):
            return -1
    return len(entries) - 1


def _is_basic(entries: tuple[Any, ...]) -> bool:
    return all(isinstance(e, (int, slice)) and not (isinstance(e, slice) and _has_number(e)) for e in entries)


def _odd(e: Any) -> bool:
    return isinstance(e, Rows) or _has_number(e)


def view_item(x: Any, index: Any) -> Any:
    """``x[index]`` of which a method then writes: it must be a view, or a copy as in the author's code."""
    for e in _entries(index):
        if isinstance(e, Number):
            refuse("what a number read from a tensor picks is written in place")
    return getitem(x, index)


def masked_select(func: Any, x: Any, mask: Any = None, **kwargs: Any) -> Any:
    """``torch.masked_select(x, mask)``."""
    if isinstance(x, Tensor) and isinstance(mask, Tensor) and not kwargs and x.shape == mask.shape:
        return _masked(x, mask, ())
    return func(x, mask, **kwargs) if mask is not None else func(x, **kwargs)
