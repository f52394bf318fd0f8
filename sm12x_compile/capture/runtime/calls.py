"""Methods and conditions whose meaning depends on whether they get a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .control import tolist
from .indexing import getitem, masked_select
from .number import Number, item
from .predicates import any_of, not_, test
from .provenance import index_bound
from .refusal import refuse
from .rows import Rows, nonzero
from .rowwise import apply
from .selection import HitRow, unique


def call_method(x: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """``x.name(...)`` for the methods of a tensor whose result has a size or a value that the data decide."""
    if isinstance(x, Tensor):
        if name == "item":
            return item(x)
        if name == "tolist":
            return tolist(x.tolist, x)
        if name == "nonzero":
            return nonzero(torch.nonzero, x, *args, **kwargs)
        if name == "argwhere":
            return nonzero(torch.argwhere, x)
        if name == "bincount":
            return bincount(torch.bincount, x, *args, **kwargs)
        if name == "unique":
            return unique(torch.unique, x, *args, **kwargs)
        if name == "masked_select":
            return masked_select(torch.masked_select, x, *args, **kwargs)
    if name == "item" and isinstance(x, (int, Number, HitRow)):
        return item(x)
    if name == "tolist" and isinstance(x, int):
        return x
    if name == "tolist" and isinstance(x, Rows):
        return tolist(None, x)
    return getattr(x, name)(*args, **kwargs)


def any_test(x: Any) -> Any:
    """The condition ``x.any()``."""
    return any_of(x) if isinstance(x, Tensor) else test(x.any())


def sum_test(x: Any, comparison: str) -> Any:
    """The condition ``x.sum() > 0`` (or ``!=``, ``==``)."""
    if isinstance(x, Tensor) and x.dtype == torch.bool:
        return not_(any_of(x)) if comparison == "==" else any_of(x)
    total = x.sum()
    if comparison == ">":
        return test(total > 0)
    return test(total != 0) if comparison == "!=" else test(total == 0)


def changed_item(in_place: Any, operation: Any, x: Any, index: Any, value: Any) -> Any:
    """What ``x[index] op= value`` assigns."""
    old = getitem(x, index)
    return operation(old, value) if isinstance(old, (Tensor, Rows, Number, int, float)) else in_place(old, value)


def matmul(a: Any, b: Any) -> Any:
    """``a @ b``."""
    return apply(torch.matmul, "matmul", (a, b), {}) if isinstance(a, Rows) or isinstance(b, Rows) else a @ b


def bincount(func: Any, x: Any, weights: Any = None, minlength: Any = 0) -> Any:
    """``torch.bincount``: of fixed size if the integers are known to be less than `minlength`."""
    if isinstance(x, Tensor) and weights is None and isinstance(minlength, int) and 0 <= index_bound(x) <= minlength:
        return (x.unsqueeze(-1) == torch.arange(minlength, device=x.device)).sum(0)
    if isinstance(x, Tensor):
        refuse("bincount of integers that are not known to be less than minlength")
    return func(x, weights, minlength)
