"""A contiguous cache seen as the pages that FlashInfer's kernels walk over: no copy, only other strides.

A cache ``[B, H, T, D]`` with strides ``(sb, sh, st, 1)`` is made of pages of P tokens. Page n of row b begins at
``b sb + n P st``, so with pages ``P st`` apart its number is ``b sb / (P st) + n``. Pages of different heads overlap in
that numbering, which does no harm: a kernel adds ``h sh`` for the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PAGES = (64, 128, 32, 16)  # sizes that xqa is built for, the one FlashInfer's own tests use most first


def page_size(keys: int) -> int | None:
    """The size of the pages that a cache of so many tokens is cut into, or None."""
    return next((size for size in PAGES if keys % size == 0), None)


def pages_apart(strides: tuple[int, ...], batches: Any, page: int) -> int | None:
    """How many pages lie between the rows of a cache ``[B, H, T, D]``, or None if it is not a whole number."""
    step = page * strides[2]
    if isinstance(batches, int) and batches == 1:
        return 0
    return strides[0] // step if step and strides[0] % step == 0 else None


def page_table(batches: Any, keys: int, page: int, apart: int, device: torch.device) -> Tensor:
    """int32 ``[B, T / P]``: the pages of every row, in order."""
    if isinstance(batches, int) and (batches == 1 or apart == keys // page):
        return torch.arange(batches * (keys // page), dtype=torch.int32, device=device).view(batches, -1)
    rows = torch.arange(batches, dtype=torch.int32, device=device)[:, None] * apart
    return rows + torch.arange(keys // page, dtype=torch.int32, device=device)


def paged(cache: Tensor, page: int, apart: int) -> Tensor:
    """The cache as ``[pages, H, P, D]`` (FlashInfer's HND), a view."""
    B, H, T, D = cache.shape
    _, sh, st, sd = cache.stride()
    count = (B - 1) * apart + T // page
    return cache.as_strided((count, H, page, D), (page * st, sh, st, sd))
