"""What several references share: the dtype they compute in, attribute checks, rows of a state pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype a reference computes in: fp32, or fp64 when the operand is fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_one_of(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless a string attribute has one of its values."""
    if value not in allowed:
        raise ValueError(f"sm12x::{op}: {name}={value!r}, not one of {tuple(allowed)}")


def read_slots(pool: Tensor, slots: Tensor) -> Tensor:
    """``pool[slots]`` as a copy; rows of negative slots hold some other slot's state, to be ignored."""
    return pool.index_select(0, slots.clamp(min=0))


def write_slots(pool: Tensor, slots: Tensor, rows: Tensor) -> None:
    """``pool[slots[b]] = rows[b]`` in place for every b whose slot is not negative, without a host sync."""
    if slots.numel() == 0:
        return
    used = slots >= 0
    # A skipped row must write something: it repeats the write of the first row that is not skipped. If all
    # rows are skipped, slot 0 is written with what it holds.
    first = used.to(torch.int32).argmax().reshape(1)
    target = torch.where(used, slots, slots.index_select(0, first)).clamp(min=0)
    mine = used.reshape(-1, *[1] * (rows.ndim - 1))
    rows = torch.where(mine, rows, rows.index_select(0, first)).to(pool.dtype)
    pool.index_copy_(0, target, torch.where(used.any(), rows, read_slots(pool, target)))
