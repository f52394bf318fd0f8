"""Writes of selected rows, and writes under a condition: fixed-shape, and nothing changes where nothing is hit.

What is not selected may be anything, NaN included, so it never takes part in arithmetic with what is written:
`torch.where` chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .predicates import Predicate, narrowed
from .refusal import refuse
from .rows import Rows
from .rowwise import elementwise, mixes, over
from .trace import needs_gradients

aten = torch.ops.aten


def scatter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], under: Predicate | None) -> Tensor:
    """``index_add_`` and its kin with rows among the operands; returns what the author's call would."""
    out = args[0]
    if not isinstance(out, Tensor):
        mixes(name, "the tensor that is written has no fixed size")
    if name[-1:] != "_":
        out, name = out.clone(), name + "_"
    if name in ("index_add_", "index_copy_", "scatter_add_"):
        dim, index, source = _three(name, args, kwargs)
        if dim % max(out.ndim, 1) != 0:
            mixes(name, "along another dimension than the first")
        if name == "index_add_":
            alpha = kwargs.get("alpha", args[4] if len(args) > 4 else 1)
            if alpha != 1:
                source = source * alpha
        accumulate = name != "index_copy_"
    else:
        indices = args[1] if len(args) > 1 else kwargs["indices"]
        source = args[2] if len(args) > 2 else kwargs["values"]
        accumulate = bool(kwargs.get("accumulate", args[3] if len(args) > 3 else False))
        if len(indices) != 1:
            mixes(name, "several indices")
        index = indices[0]
    if not isinstance(index, Rows):
        mixes(name, "rows that a mask selects are written to places of another number")
    if accumulate:
        return _accumulate(name, out, index, source, under)
    return put_rows(out, index, source, under)


def _three(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    names = ("dim", "index", "src" if name == "scatter_add_" else "source")
    rest = list(args[1:4])
    for key in names[len(rest) :]:
        rest.append(kwargs[key])
    return rest[0], rest[1], rest[2]


def _mask_over(axis: int, index: Rows, under: Predicate | None) -> Tensor:
    """Which positions of one axis are hit at all."""
    mask = index.selection.mask
    others = [a for a in range(mask.ndim) if a != axis]
    narrow = narrowed(mask, under)
    return narrow.any(others) if others else narrow


def _fits(out: Tensor, size: Any, name: str) -> Tensor:
    """The part of `out` that positions of the mask can name."""
    if out.shape[0] == size:
        return out
    if out.shape[0] < size:
        mixes(name, "the tensor that is written is shorter than the mask")
    return out[:size]


def _shaped(mask: Tensor, like: Tensor, lead: int = 1) -> Tensor:
    return mask.reshape(tuple(mask.shape) + (1,) * (like.ndim - lead))


def _accumulate(name: str, out: Tensor, index: Rows, source: Any, under: Predicate | None) -> Tensor:
    """``out[index] += source`` in which a place named twice gets both."""
    if not isinstance(source, Rows) or not source.selection.same_as(index.selection):
        mixes(name, "rows that a mask selects meet a tensor with a length of its own")
    mask = index.selection.mask
    axis = index.component
    if axis is not None and source.unscaled.ndim >= 1 and tuple(source.axes) == (axis,):
        total = _once(source, mask, axis)
        hit = _mask_over(axis, index, under)
        _check_dtypes(name, out, total)
        needs_gradients(out, total)
        target = _fits(out, mask.shape[axis], name)
        aten.add_.Tensor(target, torch.where(_shaped(hit, total), total, 0))
        return out
    axes = tuple(range(mask.ndim))
    values = over(source, axes)
    values = values.expand(*mask.shape, *values.shape[len(axes) :])
    _check_dtypes(name, out, values)
    needs_gradients(out, values)
    places = over(_flat_index(index), axes).expand(mask.shape)
    hit = narrowed(mask, under)
    values = torch.where(_shaped(hit, values, len(axes)), values, 0).flatten(0, len(axes) - 1)
    aten.index_add_.default(out, 0, torch.where(hit, places, 0).flatten(), values)
    return out


def _flat_index(index: Rows) -> Rows:
    """An index ``[R]``; one that was expanded over features for `scatter` has one column of it taken."""
    if index.ndim == 1:
        return index
    if index.component is None:
        mixes("scatter", "each feature has an index of its own")
    dense = index.dense
    for _ in range(index.ndim - 1):
        dense = dense.select(-1, 0)
    return Rows(index.selection, index.axes, dense, index.component)


def _once(source: Rows, mask: Tensor, axis: int) -> Tensor:
    """What one position of `axis` gets in all: its value, times the sum of the numbers of its hits."""
    others = [a for a in range(mask.ndim) if a != axis]
    if not others:
        return source.dense
    dense = source.unscaled
    if source.factor is None:
        # As often as it is hit: once, as a rule, and then the product is exact.
        return dense * _shaped(mask.sum(others), dense).to(dense.dtype)
    factor = source.factor
    axes = tuple(range(mask.ndim))
    weights = over(factor, axes).expand(*mask.shape, *factor.rest)
    weights = torch.where(_shaped(mask, weights, len(axes)), weights, 0).sum(others)
    # Cast where the author casts. One hit, as of a top-k: the very number that he adds.
    return dense * weights if source.rounded is None else (dense * weights).to(source.rounded)


def _check_dtypes(name: str, out: Tensor, values: Tensor) -> None:
    if out.dtype != values.dtype:
        mixes(name, f"it adds {values.dtype} to {out.dtype}, which is an error in eager mode")


def put_rows(out: Tensor, index: Rows, value: Any, under: Predicate | None) -> Tensor:
    """``out[index] = value`` with an index that `where` gave; of places named twice the last one stays."""
    axis = index.component
    if axis is None:
        mixes("assignment", "computed places may coincide")
    mask = index.selection.mask
    target = _fits(out, mask.shape[axis], "assignment")
    others = [a for a in range(mask.ndim) if a != axis]
    if isinstance(value, Rows):
        if not value.selection.same_as(index.selection):
            mixes("assignment", "rows that different masks select meet")
        if value.ndim > out.ndim:
            mixes("assignment", "the value has more dimensions than what is written")
        if others and (value.factor is not None or tuple(value.axes) != (axis,)):
            return _put_last(out, target, index, value, under)
        new = value.dense
    else:
        new = _plain(value, out.ndim)
    hit = _mask_over(axis, index, under)
    return _choose(out, target, hit, new)


def _put_last(out: Tensor, target: Tensor, index: Rows, value: Rows, under: Predicate | None) -> Tensor:
    mask, axis = index.selection.mask, index.component
    assert axis is not None
    if mask.ndim != 2:
        mixes("assignment", "a mask of more than two dimensions")
    hits = narrowed(mask, under)
    axes = (0, 1)
    values = over(value, axes)
    values = values.expand(*mask.shape, *values.shape[2:])
    for k in range(mask.shape[1 - axis]):
        _choose(out, target, hits.select(1 - axis, k), values.select(1 - axis, k))
    return out


def _plain(value: Any, ndim: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and (value.ndim > ndim or (value.ndim == ndim and value.shape[0] != 1)):
        mixes("assignment", "rows that a mask selects get the rows of a tensor with a length of its own")
    return value


def _choose(out: Tensor, target: Tensor, hit: Tensor, new: Any, lead: int = 1) -> Tensor:
    """``target = new`` where `hit`; `hit` has the first `lead` dimensions of `target`."""
    needs_gradients(target, *([new] if isinstance(new, Tensor) else []))
    if isinstance(new, Tensor):
        new = new.to(target.dtype)
    elif isinstance(new, float) and not target.dtype.is_floating_point:
        refuse("a float is assigned to selected elements of an integer tensor")
    elif not isinstance(new, (int, float, bool)):
        refuse("what is assigned to selected rows is neither a tensor nor a number")
    chosen = torch.where(_shaped(hit, target, lead), new, target)
    aten.copy_.default(target, chosen.to(target.dtype))
    return out


def put_masked(out: Tensor, mask: Tensor, value: Any, under: Predicate | None) -> Tensor:
    """``out[mask] = value`` for a bool mask over the first dimensions of `out`."""
    lead = mask.ndim
    if isinstance(value, Rows):
        axes = tuple(range(lead))
        if value.ndim > out.ndim - lead + 1:
            mixes("assignment", "the value has more dimensions than what is written")
        value = over(value, axes)
    else:
        value = _plain(value, out.ndim - lead + 1)
    return _choose(out, out, narrowed(mask, under), value, lead)


def method(x: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], under: Predicate | None) -> Any:
    """``x.name(*args, **kwargs)`` for a method that writes `x`, perhaps under a condition."""
    if not isinstance(x, Tensor):
        if under is not None and not isinstance(x, Rows):
            refuse(f"{name} is called under a condition that depends on tensor values")
        return getattr(x, name)(*args, **kwargs)
    if any(isinstance(a, Rows) for a in args) or any(isinstance(a, Rows) for a in kwargs.values()):
        if name in ("index_add_", "index_copy_", "scatter_add_"):
            return scatter(name, (x, *args), kwargs, under)
        mixes(name, "a tensor is written from rows without saying where they belong")
    if name == "index_put_" and any(isinstance(i, Rows) for i in (args[0] if args else kwargs["indices"])):
        return scatter(name, (x, *args), kwargs, under)
    if under is None:
        return getattr(x, name)(*args, **kwargs)
    if name in ("index_copy_", "index_add_") and len(args) == 3 and not kwargs:
        dim, index, source = args
        if name == "index_copy_" and index.numel() == 1 and source.dtype == x.dtype:
            return under_condition(x, put_one(x, dim, index, source, under), under)
        function = aten.index_copy.default if name == "index_copy_" else aten.index_add.default
        return under_condition(x, function(x, dim, in_range(index, x.shape[dim], under), source), under)
    changed = getattr(x.clone(), name)(*args, **kwargs)
    return under_condition(x, changed, under)


def in_range(index: Tensor, size: int, under: Predicate) -> Tensor:
    """Positions along a dimension: the author's where the condition holds, and one that exists elsewhere."""
    if size == 0:
        refuse("an empty tensor is written under a condition")
    return torch.where(under.tensor(), index, 0)


def put_one(x: Tensor, dim: int, index: Tensor, value: Tensor, under: Predicate) -> Tensor:
    """`x` with the only position in `index` replaced: a choice for each element, which takes no kernel of its own."""
    places = torch.arange(x.shape[dim], device=x.device)
    # Read from the positions, so that one out of range is the error that it is in the author's code.
    place = aten.index_select.default(places, 0, in_range(index.reshape(1), x.shape[dim], under))
    hit = (places == place).reshape([-1] + [1] * (x.ndim - 1 - dim % x.ndim))
    one = [1 if d == dim % x.ndim else n for d, n in enumerate(x.shape)]
    return torch.where(hit, value.to(x.dtype).expand(one), x)


def under_condition(x: Tensor, changed: Tensor, under: Predicate) -> Tensor:
    """Write `changed` to `x` if the condition holds."""
    if x.shape != changed.shape:
        refuse("a write under a condition changes a shape")
    needs_gradients(x, changed)
    aten.copy_.default(x, torch.where(under.tensor(), changed.to(x.dtype), x))
    return x


def augmented(operation: Any, x: Any, y: Any, under: Predicate | None) -> Any:
    """``x += y`` for a name, by the in-place `operation`."""
    if isinstance(x, Tensor) and isinstance(y, Rows):
        refuse("rows that a mask selects meet a tensor with a length of its own")
    if under is None or not isinstance(x, Tensor):
        known = isinstance(x, (int, float, bool, str, tuple, type(None), Rows)) or hasattr(x, "_as_condition")
        if under is not None and not known:
            refuse("an object is changed under a condition that depends on tensor values")
        if isinstance(x, Rows):
            return _augmented_rows(operation, x, y)
        return operation(x, y)
    return under_condition(x, operation(x.clone(), y), under)


def augmented_tensor(operation: Any, x: Any, y: Any, under: Predicate) -> None:
    """``owner.x += y`` under a condition: of a tensor a write of its memory, after which the attribute is as it was."""
    if not isinstance(x, Tensor):
        refuse("an attribute is set under a condition that depends on tensor values")
    augmented(operation, x, y, under)


def _augmented_rows(operation: Any, x: Rows, y: Any) -> Rows:
    if not x.fresh:
        mixes("augmented assignment", "a view of rows is written in place")
    dtype = x.dtype
    new = operation(x, y)  # Rows have no in-place operators: this is a new value
    if new.dtype != dtype:
        mixes("augmented assignment", "it changes the dtype, which is an error in eager mode")
    x.dense  # noqa: B018
    x.axes, x._dense, x.factor, x.component, x.gathered = new.axes, new._dense, new.factor, None, -1
    return x


__all__ = ["augmented", "augmented_tensor", "elementwise", "in_range", "method", "put_masked", "put_one", "put_rows",
           "scatter", "under_condition"]  # fmt: skip
