"""A value for each selected position, kept dense: computed for all positions, meaningful where the mask is True.

In the author's code it is a tensor ``[R, *rest]`` whose length R the data decide. Here it is a tensor over the axes
of the mask that it depends on, and every operation on it is looked up in `rowwise.py`: what treats each row by
itself is done for all of them, what mixes rows is refused. R itself is never known, so nothing can depend on it
unseen.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .provenance import unwritten_since
from .refusal import refuse
from .selection import Count, Selection, positions


class Rows:
    """Dense form of a tensor ``[R, *rest]``.

    Attributes:
        selection: which positions there are.
        axes: axes of the mask that the value depends on, ascending.
        dense: ``[*(mask.shape[a] for a in axes), *rest]``; arbitrary where the mask is False.
        component: the value is the position along this axis of the mask (an index that `where` gave), if any.
        factor: the value is ``dense * factor`` with `factor` one number for each row, over more axes than
            `dense`. Kept apart so that the product is taken once for each element of `dense`.
        rounded: the dtype to which that product is cast, if it is.
        fresh: in the author's code no other value shares its memory, so that it may be written in place (which
            gives it a new `dense` here).
        gathered: where in the trace `dense`, still the memory of the author's tensor, was read; -1 if it is not.
            The author's code made a copy there, so a write since then must not be seen.
    """

    def __init__(
        self,
        selection: Selection,
        axes: tuple[int, ...],
        dense: Tensor,
        component: int | None = None,
        factor: Any = None,
        fresh: bool = True,
        gathered: int = -1,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.selection = selection
        self.axes = axes
        self._dense = dense
        self.ndim = dense.ndim - len(axes) + 1
        self.component = component
        self.factor = factor
        self.rounded = rounded
        self.fresh = fresh
        self.gathered = gathered

    @property
    def dense(self) -> Tensor:
        if self.factor is not None:
            from .rowwise import product

            whole = product(self)
            self.axes, self._dense, self.factor, self.rounded = whole.axes, whole._dense, None, None
        return self.unscaled

    @property
    def unscaled(self) -> Tensor:
        if self.gathered >= 0 and not unwritten_since(self._dense, self.gathered):
            refuse("a tensor is written between the reading of its selected rows and their use")
        return self._dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .rowwise import apply

        return apply(func, func.__name__, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        return functools.partial(_method, self, name)

    # Shape. R is a `Count`.

    @property
    def rest(self) -> tuple[int, ...]:
        return tuple(self._dense.shape[len(self.axes) :])

    @property
    def shape(self) -> tuple[Any, ...]:
        return (Count(self.selection), *self.rest)

    @property
    def dtype(self) -> torch.dtype:
        own = self._dense.dtype
        if self.rounded is not None:
            return self.rounded
        return own if self.factor is None else torch.promote_types(own, self.factor._dense.dtype)

    @property
    def device(self) -> torch.device:
        return self._dense.device

    @property
    def is_cuda(self) -> bool:
        return self._dense.is_cuda

    @property
    def requires_grad(self) -> bool:
        return self._dense.requires_grad

    @property
    def T(self) -> Any:
        refuse("rows that a mask selects are transposed")

    @property
    def mT(self) -> Any:
        refuse("rows that a mask selects are transposed")

    def dim(self) -> int:
        return self.ndim

    def ndimension(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> Any:
        count: Any = Count(self.selection)
        for n in self.rest:
            count = count if n == 1 else count * n
        return count

    nelement = numel

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def _length(self) -> Count:
        return Count(self.selection)

    def __bool__(self) -> bool:
        refuse("rows that a mask selects are used as a condition")

    def __iter__(self) -> Any:
        refuse("a loop over rows that a mask selects")

    # Python's operators.

    def __add__(self, o: Any) -> Any:
        return _operator(torch.add, "add", self, o)

    def __radd__(self, o: Any) -> Any:
        return _operator(torch.add, "add", o, self)

    def __sub__(self, o: Any) -> Any:
        return _operator(torch.sub, "sub", self, o)

    def __rsub__(self, o: Any) -> Any:
        return _operator(torch.sub, "sub", o, self)

    def __mul__(self, o: Any) -> Any:
        return _operator(torch.mul, "mul", self, o)

    def __rmul__(self, o: Any) -> Any:
        return _operator(torch.mul, "mul", o, self)

    def __truediv__(self, o: Any) -> Any:
        return _operator(torch.div, "div", self, o)

    def __rtruediv__(self, o: Any) -> Any:
        return _operator(torch.div, "div", o, self)

    def __floordiv__(self, o: Any) -> Any:
        return _operator(torch.floor_divide, "floor_divide", self, o)

    def __mod__(self, o: Any) -> Any:
        return _operator(torch.remainder, "remainder", self, o)

    def __pow__(self, o: Any) -> Any:
        return _operator(torch.pow, "pow", self, o)

    def __matmul__(self, o: Any) -> Any:
        return _operator(torch.matmul, "matmul", self, o)

    def __rmatmul__(self, o: Any) -> Any:
        return _operator(torch.matmul, "matmul", o, self)

    def __and__(self, o: Any) -> Any:
        return _operator(torch.bitwise_and, "bitwise_and", self, o)

    def __or__(self, o: Any) -> Any:
        return _operator(torch.bitwise_or, "bitwise_or", self, o)

    def __eq__(self, o: Any) -> Any:
        return _operator(torch.eq, "eq", self, o)

    def __ne__(self, o: Any) -> Any:
        return _operator(torch.ne, "ne", self, o)

    def __lt__(self, o: Any) -> Any:
        return _operator(torch.lt, "lt", self, o)

    def __le__(self, o: Any) -> Any:
        return _operator(torch.le, "le", self, o)

    def __gt__(self, o: Any) -> Any:
        return _operator(torch.gt, "gt", self, o)

    def __ge__(self, o: Any) -> Any:
        return _operator(torch.ge, "ge", self, o)

    def __neg__(self) -> Any:
        return _operator(torch.neg, "neg", self)

    def __abs__(self) -> Any:
        return _operator(torch.abs, "abs", self)

    def __invert__(self) -> Any:
        return _operator(torch.bitwise_not, "bitwise_not", self)

    __hash__ = None  # type: ignore[assignment]

    # Dynamo of torch 2.11 does not fall back to them by itself.
    __iadd__, __isub__, __imul__, __itruediv__ = __add__, __sub__, __mul__, __truediv__
    __ifloordiv__, __imod__, __ipow__ = __floordiv__, __mod__, __pow__

    def __getitem__(self, index: Any) -> Any:
        from .rowwise import item_of

        return item_of(self, index)


class BeforeRows:
    """Rows behind a dimension of one, ``x[None, rows]``, until that is taken away again."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def shape(self) -> tuple[Any, ...]:
        return (1, *self.rows.shape)

    def reshape(self, *shape: Any) -> Rows:
        given = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if len(given) != self.rows.ndim:
            refuse("rows that a mask selects, behind another dimension, are given another shape")
        found: Rows = self.rows.reshape(*given)
        return found

    view = reshape

    def squeeze(self, dim: int) -> Rows:
        if dim != 0:
            refuse("rows that a mask selects, behind another dimension, are squeezed along another")
        return self.rows

    def __getitem__(self, index: Any) -> Rows:
        if index != 0:
            refuse("rows that a mask selects, behind another dimension, are indexed")
        return self.rows

    def __getattr__(self, name: str) -> Any:
        refuse(f"rows that a mask selects, behind another dimension, are used by {name}")


def _method(rows: Rows, name: str, *args: Any, **kwargs: Any) -> Any:
    from .rowwise import apply

    return apply(None, name, (rows, *args), kwargs)


def _operator(func: Any, name: str, *args: Any) -> Any:
    from .rowwise import apply

    return apply(func, name, args, {})


def component(selection: Selection, axis: int) -> Rows:
    """The positions along one axis: what one-argument `torch.where` gives for it."""
    return Rows(selection, (axis,), positions(selection.mask, axis), component=axis)


def coordinates(selection: Selection) -> tuple[Rows, ...]:
    return tuple(component(selection, axis) for axis in range(selection.mask.ndim))


class Nonzero:
    """``mask.nonzero()``, int64 ``[R, mask.ndim]`` in the author's code."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    @property
    def ndim(self) -> int:
        return 2

    @property
    def shape(self) -> tuple[Any, ...]:
        return (Count(self.selection), self.selection.mask.ndim)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> Any:
        n = self.selection.mask.ndim
        return Count(self.selection) if n == 1 else Count(self.selection) * n

    def _length(self) -> Count:
        return Count(self.selection)

    def _only(self) -> Rows:
        if self.selection.mask.ndim != 1:
            refuse("nonzero() of several dimensions is flattened")
        return component(self.selection, 0)

    def flatten(self) -> Rows:
        return self._only()

    def squeeze(self, *dim: int) -> Rows:
        if dim not in ((), (1,), (-1,)):
            refuse("nonzero() is squeezed along its rows")
        # Without a dimension a single hit would lose its row dimension too; as an index it means the same.
        return self._only()

    def view(self, *shape: Any) -> Rows:
        if shape not in ((-1,), ((-1,),)):
            refuse("nonzero() is given another shape")
        return self._only()

    reshape = view

    def tolist(self) -> Nonzero:
        return self

    def unbind(self, dim: int = 0) -> tuple[Rows, ...]:
        if dim not in (1, -1):
            refuse("nonzero() is taken apart along its rows")
        return coordinates(self.selection)

    def t(self) -> tuple[Rows, ...]:
        return coordinates(self.selection)

    @property
    def T(self) -> tuple[Rows, ...]:
        return coordinates(self.selection)

    def __getitem__(self, index: Any) -> Rows:
        if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], int):
            return component(self.selection, index[1] % self.selection.mask.ndim)
        refuse("nonzero() is indexed in another way than by column")

    def __getattr__(self, name: str) -> Any:
        refuse(f"the result of nonzero() is used by {name}")


def nonzero(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.nonzero(x)``, ``x.nonzero()``, ``torch.argwhere(x)``, ``torch.where(x)``.

    `func` is what the author calls; it is called if `x` is something else than a tensor.
    """
    name = getattr(func, "__name__", "")
    plain = not args and kwargs.keys() <= {"as_tuple"}
    if isinstance(x, Tensor) and plain and name in ("nonzero", "argwhere", "where") and x.ndim:
        selection = Selection(x.clone() if x.dtype == torch.bool else x != 0)
        if name == "where" or kwargs.get("as_tuple"):
            return coordinates(selection)
        return Nonzero(selection)
    return func(x, *args, **kwargs)
