"""Which operations treat each row by itself, and how each is done on the dense form.

What is not listed here is refused: an operation is row-wise because it is known to be, never by default.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .operations import ALONG, CASTS, CASTS_OF_INDEX, DEFAULT_DIM, ELEMENTWISE, NOTHING, PRODUCTS, REDUCTIONS, UNCHANGED
from .refusal import refuse
from .rows import Rows
from .selection import Count
from .trace import needs_gradients


def mixes(name: str, why: str = "it does not treat each row that a mask selects by itself") -> NoReturn:
    refuse(f"{name}: {why}")


def apply(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation with at least one `Rows` among its operands; `func` is None for a method."""
    if name in PRODUCTS and len(args) == 2 and not kwargs:
        scaled = _scaled(args[0], args[1])
        if scaled is not None:
            return scaled
    if name in CASTS and isinstance(args[0], Rows) and args[0].factor is not None:
        return _cast_scaled(args[0], name, args[1:], kwargs)
    if name in ELEMENTWISE:
        return elementwise(func, name, args, kwargs)
    if name in ALONG:
        return along(func, name, args, kwargs)
    if name == "linear":
        return _linear(func, args, kwargs)
    if name in ("matmul", "__matmul__", "mm"):
        return _matmul(func, args, kwargs)
    if name in ("layer_norm", "rms_norm"):
        return _norm(func, name, args, kwargs)
    if name in NOTHING:
        rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        training = args[2] if len(args) > 2 else kwargs.get("training", True)
        return args[0] if not training or rate == 0 else mixes(name, "random numbers would differ in number")
    if name in ("view", "reshape"):
        return _reshape(args[0], args[1:] if len(args) != 2 or isinstance(args[1], int) else args[1])
    if name in ("cat", "concat", "stack"):
        return _joined(func, name, args, kwargs)
    if name == "flatten":
        return _flatten(args[0], *args[1:], **kwargs)
    if name in ("expand", "expand_as"):
        return _expand(args[0], args[1:])
    if name in ("transpose", "swapaxes"):
        return _transpose(func, args, kwargs)
    if name in ("index_add_", "index_add", "index_copy_", "index_copy", "index_put_", "index_put",
                "scatter_add_", "scatter_add"):  # fmt: skip
        from .writes import scatter

        return scatter(name, args, kwargs, None)
    if name in ("index_select", "embedding", "__getitem__", "getitem"):
        return _gather(name, args, kwargs)
    if name[-1:] == "_" and name[:-1] in ELEMENTWISE:
        return in_place(name, args, kwargs)
    mixes(name, "whether it treats each row that a mask selects by itself is not known")


def in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``rows.op_(...)``: the rows get a new dense form; what they were gathered from is never written."""
    rows = args[0]
    if not isinstance(rows, Rows):
        mixes(name, "a tensor is written from rows without saying where they belong")
    dtype = rows.dtype
    new = elementwise(None, name[:-1], args, kwargs)
    if new.dtype != dtype:
        new = elementwise(None, "to", (new, dtype), {})
    if not rows.fresh:
        mixes(name, "a view of rows is written in place")
    rows.axes, rows._dense, rows.factor, rows.component, rows.gathered = new.axes, new._dense, new.factor, None, -1
    return rows


def aligned(operands: list[Rows], name: str) -> tuple[tuple[int, ...], int]:
    """The axes that operands depend on together, and their number of dimensions in the author's code."""
    first = operands[0]
    if len(operands) == 1:
        return first.axes, first.ndim
    axes = set(first.axes)
    for other in operands[1:]:
        if not other.selection.same_as(first.selection):
            mixes(name, "rows that different masks select meet")
        if other.ndim != first.ndim:
            mixes(name, "rows meet rows with another number of dimensions")
        axes |= set(other.axes)
    return tuple(sorted(axes)), first.ndim


def over(rows: Rows, axes: tuple[int, ...]) -> Tensor:
    """The dense form with a dimension for each of `axes`."""
    dense = rows.dense
    if axes == rows.axes:
        return dense
    for position in range(len(axes)):
        if axes[position] not in rows.axes:
            dense = dense.unsqueeze(position)
    return dense


def _operands(args: Any) -> list[Rows]:
    found = []
    for a in args:
        if isinstance(a, Rows):
            found.append(a)
    return found


def call(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return getattr(args[0], name)(*args[1:], **kwargs) if func is None else func(*args, **kwargs)


def elementwise(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    operands = _operands(args) + _operands(kwargs.values())
    for rows in operands:
        rows.dense  # noqa: B018  (takes a product that was put off)
    axes, ndim = aligned(operands, name)
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
        mixes(name, "a function writes its argument in place")
    if "memory_format" in kwargs or "out" in kwargs:
        mixes(name, "a memory format or an output tensor is given")
    dense_args = [_operand(a, axes, ndim, name) for a in args]
    dense_kwargs = {k: _operand(a, axes, ndim, name) for k, a in kwargs.items()}
    if func is None and not isinstance(args[0], Rows):
        func = getattr(torch, name)
    out = call(func, name, dense_args, dense_kwargs)
    first = operands[0]
    if name in UNCHANGED and out.dtype == first.dtype:  # perhaps the very same memory
        first.fresh = False
        return Rows(first.selection, axes, out, first.component, fresh=False, gathered=first.gathered)
    index = first.component if name in CASTS_OF_INDEX and not out.dtype.is_floating_point else None
    return Rows(first.selection, axes, out, index)


def _operand(a: Any, axes: tuple[int, ...], ndim: int, name: str) -> Any:
    if isinstance(a, Rows):
        return over(a, axes)
    if isinstance(a, Count):
        return a.tensor()
    if isinstance(a, Tensor) and a.ndim and (a.ndim > ndim or (a.ndim == ndim and a.shape[0] != 1)):
        mixes(name, "rows that a mask selects meet a tensor with a length of its own")
    return a


def _is_per_row(x: Any) -> bool:
    """One number for each row: ``[R]`` or ``[R, 1, ...]``."""
    for n in x.rest:  # noqa: SIM110  (Dynamo traces a generator step by step)
        if n != 1:
            return False
    return True


def _scaled(a: Any, b: Any) -> Rows | None:
    """A product with a number for each row that depends on more axes is put off."""
    if not isinstance(a, Rows) or not isinstance(b, Rows) or a.factor is not None or b.factor is not None:
        return None
    if _is_per_row(a) and not _is_per_row(b):
        a, b = b, a
    if a.ndim != b.ndim or not _is_per_row(b) or len(a.axes) != 1 or set(b.axes) <= set(a.axes):
        return None
    if not set(a.axes) <= set(b.axes) or not a.selection.same_as(b.selection) or _is_per_row(a):
        return None
    return Rows(a.selection, a.axes, a.unscaled, factor=b, gathered=a.gathered)


def _cast_scaled(rows: Rows, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    dtype = _NAMED.get(name)
    for a in (*args, *kwargs.values()):
        if isinstance(a, torch.dtype):
            dtype = a
        elif isinstance(a, (Tensor, Rows)):
            dtype = a.dtype
    if dtype is not None and dtype == rows.dtype:
        return rows
    floats = dtype is not None and dtype.is_floating_point and rows.dtype.is_floating_point
    if not floats or rows.rounded is not None or kwargs.keys() - {"dtype"}:
        return elementwise(None, name, (product(rows), *args), kwargs)
    return Rows(rows.selection, rows.axes, rows.unscaled, factor=rows.factor, gathered=rows.gathered, rounded=dtype)


_NAMED = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def product(rows: Rows) -> Rows:
    """Take the product that was put off, over all the axes."""
    plain = Rows(rows.selection, rows.axes, rows.unscaled)
    axes, _ = aligned([plain, rows.factor], "mul")
    whole = over(plain, axes) * over(rows.factor, axes)
    return Rows(rows.selection, axes, whole if rows.rounded is None else whole.to(rows.rounded))


def user_dim(rows: Rows, dim: int, name: str, *, new: bool = False) -> int:
    """A dimension of the author's code as one of the dense form; `new` for one that is being inserted."""
    ndim = rows.ndim + (1 if new else 0)
    d = dim + ndim if dim < 0 else dim
    if d == 0:
        mixes(name, "it goes along the rows that a mask selects")
    return d - 1 + len(rows.axes)


def along(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rows = args[0]
    if not isinstance(rows, Rows) or _operands(args[1:]) or _operands(kwargs.values()):
        mixes(name, "rows that a mask selects stand where they can't")
    rows.dense  # noqa: B018
    place = ALONG[name]
    given = list(args)
    dim = given[place] if len(given) > place else kwargs.get("dim")
    if dim is None and name in REDUCTIONS:
        return _over_all_rows(name, rows, None, kwargs)
    if dim is None and name == "squeeze":
        mixes(name, "without a dimension it may squeeze the rows")
    if dim is None:
        dim = DEFAULT_DIM.get(name)
    if dim is None:
        mixes(name, "it goes along the rows that a mask selects")
    if name in REDUCTIONS and isinstance(dim, int) and dim % rows.ndim == 0:
        return _over_all_rows(name, rows, 0, kwargs)
    if isinstance(dim, (tuple, list)):
        dense_dim: Any = [user_dim(rows, d, name) for d in dim]
    else:
        dense_dim = user_dim(rows, dim, name, new=name == "unsqueeze")
    given[0] = rows.dense
    kwargs = {k: v for k, v in kwargs.items() if k != "dim"}
    if len(given) > place:
        given[place] = dense_dim
    else:
        kwargs["dim"] = dense_dim
    out = call(func, name, given, kwargs)
    view = name in ("chunk", "split", "unbind", "narrow", "select", "squeeze", "unsqueeze")
    if view:
        rows.fresh = False  # a write would have to be seen through the view
    if isinstance(out, Tensor):
        keeps = rows.component if name in ("unsqueeze", "squeeze") else None
        return Rows(rows.selection, rows.axes, out, keeps, fresh=not view, gathered=rows.gathered if view else -1)
    origin = rows.gathered if view else -1
    return tuple(Rows(rows.selection, rows.axes, part, fresh=not view, gathered=origin) for part in out)


def _over_all_rows(name: str, rows: Rows, dim: int | None, kwargs: dict[str, Any]) -> Tensor:
    """A reduction over all selected rows is one over all positions, with what is not selected made neutral."""
    if kwargs.keys() - {"dim"}:
        mixes(name, "a reduction over the selected rows with options")
    axes = tuple(range(rows.selection.mask.ndim))
    dense = over(rows, axes)
    mask = rows.selection.mask
    dense = dense.expand(*mask.shape, *dense.shape[len(axes) :])
    inside = mask.reshape(mask.shape + (1,) * (dense.ndim - mask.ndim))
    dims = list(axes) if dim == 0 else list(range(dense.ndim))
    needs_gradients(dense)
    if name == "any":
        return (inside & (dense != 0)).any(dims)
    if name == "all":
        return (~inside | (dense != 0)).all(dims)
    if name == "count_nonzero":
        return torch.count_nonzero(inside & (dense != 0), dims)
    chosen = torch.where(inside, dense, 0)
    if name == "sum":
        return chosen.sum(dims)
    if not dense.dtype.is_floating_point:
        mixes(name, "of integers")
    total = chosen.sum(dims, dtype=torch.promote_types(dense.dtype, torch.float32))
    count = mask.sum()
    if dim is None:
        for n in rows.rest:
            count = count * n
    return (total / count).to(dense.dtype)


def _linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    rows = args[0] if args else kwargs.get("input")
    if not isinstance(rows, Rows) or _operands(args[1:]) or rows.ndim < 2:
        mixes("linear", "the rows that a mask selects are summed over")
    out = func(rows.dense, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
    return Rows(rows.selection, rows.axes, out)


def _matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    rows, other = args[0], args[1]
    if not isinstance(rows, Rows) or isinstance(other, Rows) or other.ndim != 2 or rows.ndim < 2 or kwargs:
        mixes("matmul", "the rows that a mask selects are summed over, or the other operand is not a matrix")
    return Rows(rows.selection, rows.axes, torch.matmul(rows.dense, other))


def _norm(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    rows = args[0]
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    if not isinstance(rows, Rows) or _operands(args[1:]) or len(shape) >= rows.ndim:
        mixes(name, "it goes along the rows that a mask selects")
    return Rows(rows.selection, rows.axes, func(rows.dense, *args[1:], **kwargs))


def _reshape(rows: Rows, shape: Any) -> Rows:
    shape = tuple(shape)
    first, rest = shape[0], shape[1:]
    if not (isinstance(first, Count) or (isinstance(first, int) and first == -1)):
        mixes("reshape", "it changes how many rows there are")
    if isinstance(first, Count) and not first.selection.same_as(rows.selection):
        mixes("reshape", "it changes how many rows there are")
    size = 1
    for n in rows.rest:
        size = size * n
    wanted = 1
    for n in rest:
        if not isinstance(n, int) or n < 0:
            if isinstance(first, Count) and n == -1 and rest.count(-1) == 1:
                continue
            mixes("reshape", "sizes that are not known")
        wanted = wanted * n
    if -1 not in rest and wanted != size:
        mixes("reshape", "it changes how many rows there are")
    dense = rows.dense
    rows.fresh = False
    out = dense.reshape(*dense.shape[: len(rows.axes)], *rest)
    return Rows(rows.selection, rows.axes, out, fresh=False, gathered=rows.gathered)


def _flatten(rows: Rows, start_dim: int = 0, end_dim: int = -1) -> Rows:
    if rows.ndim == 1:
        return rows
    if start_dim % rows.ndim == 0:
        mixes("flatten", "it flattens the rows that a mask selects")
    dense = rows.dense
    rows.fresh = False
    out = dense.flatten(user_dim(rows, start_dim, "flatten"), user_dim(rows, end_dim, "flatten"))
    return Rows(rows.selection, rows.axes, out, fresh=False, gathered=rows.gathered)


def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    rows, first, second = args[0], args[1], args[2]
    dense = rows.dense
    rows.fresh = False
    out = dense.transpose(user_dim(rows, first, "transpose"), user_dim(rows, second, "transpose"))
    return Rows(rows.selection, rows.axes, out, fresh=False, gathered=rows.gathered)


def _expand(rows: Rows, shape: Any) -> Rows:
    """``rows.expand(-1, n)`` and ``expand_as(other rows)``."""
    if len(shape) == 1 and isinstance(shape[0], Rows):
        shape = shape[0].shape
    elif len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = shape[0]
    if len(shape) != rows.ndim or not (isinstance(shape[0], Count) or shape[0] == -1):
        mixes("expand", "it changes how many rows there are")
    dense = rows.dense
    rows.fresh = False
    out = dense.expand(*([-1] * len(rows.axes)), *shape[1:])
    return Rows(rows.selection, rows.axes, out, rows.component, fresh=False, gathered=rows.gathered)


def _joined(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    parts = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not all(isinstance(p, Rows) for p in parts):
        mixes(name, "rows that a mask selects are joined with a tensor")
    for p in parts:
        p.dense  # noqa: B018
    axes, _ = aligned(list(parts), name)
    dense_dim = user_dim(parts[0], dim, name, new=name == "stack") - len(parts[0].axes) + len(axes)
    mask = parts[0].selection.mask
    lead = [mask.shape[a] for a in axes]
    dense = []
    for p in parts:
        d = over(p, axes)
        dense.append(d.expand(*lead, *d.shape[len(axes) :]))
    return Rows(parts[0].selection, axes, func(dense, dense_dim))


def _gather(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from .indexing import getitem

    if name == "index_select" and len(args) == 3 and isinstance(args[1], int):
        d = args[1] % args[0].ndim
        return getitem(args[0], (*([slice(None)] * d), args[2])) if d else getitem(args[0], args[2])
    if name == "embedding" and len(args) >= 2 and isinstance(args[0], Rows) and not isinstance(args[1], Rows):
        return getitem(args[1], args[0])
    if name in ("__getitem__", "getitem") and not isinstance(args[0], Rows):
        return getitem(args[0], args[1])
    mixes(name)


def item_of(rows: Rows, index: Any) -> Rows:
    """``rows[:, ...]``: any basic index that keeps all the rows."""
    entries = index if isinstance(index, tuple) else (index,)
    if not entries or (entries[0] != slice(None) and entries[0] is not Ellipsis):
        mixes("indexing", "it picks among the rows that a mask selects")
    named = len([e for e in entries if e is not None and e is not Ellipsis])
    if entries[0] is Ellipsis and named >= rows.ndim:
        mixes("indexing", "it picks among the rows that a mask selects")
    for e in entries:
        if not (e is None or e is Ellipsis or isinstance(e, (int, slice))):
            mixes("indexing", "rows are indexed by a tensor")
    dense = rows.dense
    rows.fresh = False
    if entries[0] is Ellipsis:
        out = dense[entries]
    else:
        out = dense[(*([slice(None)] * len(rows.axes)), *entries[1:])]
    return Rows(rows.selection, rows.axes, out, rows.component, fresh=False, gathered=rows.gathered)
