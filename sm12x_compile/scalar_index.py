"""Indexing with a 0-d tensor (`cache[:, :, position]`) without reading its value.

PyTorch turns a 0-d integer tensor in an index into a Python int, which no graph can hold. Selecting along the
dimension gives the same and stays a tensor.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def is_scalar_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    scalars = [p for p in parts if _is_scalar(p)]
    return len(scalars) == 1 and all(_is_plain(p) or _is_scalar(p) for p in parts)


def _is_plain(part: Any) -> bool:
    # A bool is an int to Python and a mask to PyTorch.
    return isinstance(part, (slice, int, type(None), type(Ellipsis))) and not isinstance(part, bool)


def _is_scalar(part: Any) -> bool:
    integers = (torch.int64, torch.int32, torch.int16, torch.int8)
    return isinstance(part, Tensor) and part.dim() == 0 and part.dtype in integers


def _split(x: Tensor, index: Any) -> tuple[tuple[Any, ...], int, Tensor]:
    """The index with the scalar taken out, the dimension it selects along afterwards, and the scalar."""
    parts = list(index if isinstance(index, tuple) else (index,))
    used = sum(p is not None and p is not Ellipsis for p in parts)
    if Ellipsis in [p for p in parts if not isinstance(p, Tensor)]:
        at = next(k for k, p in enumerate(parts) if p is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (x.dim() - used)
    place = next(k for k, p in enumerate(parts) if _is_scalar(p))
    scalar = parts[place]
    dim = sum(not isinstance(p, int) for p in parts[:place])
    parts[place] = slice(None)
    return tuple(parts), dim, scalar


def _position(scalar: Tensor, size: Any) -> Tensor:
    scalar = scalar.to(torch.int64)
    return torch.where(scalar < 0, scalar + size, scalar).reshape(1)


def getitem(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` where one part of the index is a 0-d integer tensor."""
    rest, dim, scalar = _split(x, index)
    view = operator.getitem(x, rest)
    return view.index_select(dim, _position(scalar, view.shape[dim]).to(view.device)).squeeze(dim)


def setitem(x: Tensor, index: Any, value: Any) -> None:
    """``x[index] = value`` where one part of the index is a 0-d integer tensor."""
    rest, dim, scalar = _split(x, index)
    view = operator.getitem(x, rest)
    shape = (*view.shape[:dim], *view.shape[dim + 1 :])
    source = torch.as_tensor(value, dtype=view.dtype, device=view.device) if not isinstance(value, Tensor) else value
    while source.dim() > len(shape) and source.shape[0] == 1:
        source = source.squeeze(0)
    source = source.to(view.dtype).expand(shape).unsqueeze(dim)
    view.index_copy_(dim, _position(scalar, view.shape[dim]).to(view.device), source)
