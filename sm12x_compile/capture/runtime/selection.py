"""The rows that a mask selects, with the mask instead of the rows: nothing here has a size that depends on data.

A `Selection` stands for the True positions of a mask, in row-major order, as ``nonzero`` lists them. A value with
one entry for each of them, which is a tensor of unknown length in the author's code, is a `Rows` here (`rows.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .number import Number
from .predicates import Condition, Predicate, not_
from .provenance import now, same_value
from .refusal import refuse


class Selection:
    """The True positions of `mask`, bool of any shape, which nobody else may write."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.start = now()

    def same_as(self, other: Selection) -> bool:
        return self is other or same_value(self.mask, other.mask, min(self.start, other.start))


class Count(Number):
    """How many positions a selection has."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    def tensor(self) -> Tensor:
        return self.selection.mask.sum()

    def nonempty(self) -> Predicate:
        mask = self.selection.mask
        return Predicate((Condition(mask.any(), nonempty=mask),))

    def empty(self) -> Predicate:
        negated: Predicate = not_(self.nonempty())
        return negated

    def _as_condition(self) -> Predicate:
        return self.nonempty()

    def __eq__(self, o: Any) -> Any:
        return self.empty() if isinstance(o, int) and o == 0 else super().__eq__(o)

    def __ne__(self, o: Any) -> Any:
        return self.nonempty() if isinstance(o, int) and o == 0 else super().__ne__(o)

    def __gt__(self, o: Any) -> Any:
        return self.nonempty() if isinstance(o, int) and o == 0 else super().__gt__(o)

    def __ge__(self, o: Any) -> Any:
        return self.nonempty() if isinstance(o, int) and o == 1 else super().__ge__(o)

    def __lt__(self, o: Any) -> Any:
        return self.empty() if isinstance(o, int) and o == 1 else super().__lt__(o)

    def __le__(self, o: Any) -> Any:
        return self.empty() if isinstance(o, int) and o == 0 else super().__le__(o)

    __hash__ = None  # type: ignore[assignment]


class HitRow:
    """One row of ``nonzero()`` while a loop walks over all that there could be: its coordinates are known ints."""

    def __init__(self, position: int) -> None:
        self.position = position

    def __getitem__(self, k: Any) -> int:
        if k == 0 or k == -1:
            return self.position
        refuse("more than the one coordinate of a hit is read")

    def __iter__(self) -> Any:
        return iter((self.position,))

    def __len__(self) -> int:
        return 1

    def item(self) -> int:
        return self.position

    def tolist(self) -> list[int]:
        return [self.position]

    def squeeze(self, *dim: int) -> int:
        return self.position

    def _as_int(self) -> int:
        return self.position

    def __index__(self) -> int:
        return self.position

    def __eq__(self, other: Any) -> Any:
        return self.position == other

    def __ne__(self, other: Any) -> Any:
        return self.position != other

    __hash__ = None  # type: ignore[assignment]


class Unique:
    """``torch.unique(values)``, to be walked over."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def tolist(self) -> Unique:
        return self

    def long(self) -> Unique:
        return self

    def cpu(self) -> Unique:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Unique:
        return self

    def __getattr__(self, name: str) -> Any:
        refuse(f"the distinct values of a tensor are used in another way than by a loop over them ({name})")


def unique(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.unique(x)`` or ``x.unique()``; `func` is what the author calls."""
    if isinstance(x, Tensor) and not args and not kwargs and not x.dtype.is_floating_point:
        return Unique(x)
    if isinstance(x, Tensor):
        refuse("the distinct values of a tensor, with options or of floats")
    return func(x, *args, **kwargs)


def positions(mask: Tensor, axis: int) -> Tensor:
    return torch.arange(mask.shape[axis], device=mask.device)
