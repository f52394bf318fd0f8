"""Code that writes what it has selected, read or branched on, and names that may stand for one of two tensors.

What is read is read when the author reads it; a copy that stands for a view is right only while nobody writes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .snippets import D, Inputs, Snippet, T, numbers, tokens_and_mask


def token_ids(hits: str, g: torch.Generator) -> Inputs:
    """Tokens ``[T, D]`` and an id below 6 for each: drawn, all 0 or all 5."""
    ids = torch.randint(0, 6, (T,), generator=g) if hits == "some" else torch.full((T,), 5 * (hits == "all"))
    return torch.randn(T, D, generator=g), ids


def flag_is_cleared(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    flags = mask.clone()
    if flags[0]:
        flags[0] = False
        x = x + 1
    return x, flags


def flag_by_name(x: Tensor, mask: Tensor) -> Tensor:
    flags = mask.clone()
    first = bool(flags[1])
    flags[1] = True
    if first:
        x = x * 2
    return x


def exit_by_a_flag_that_is_cleared(x: Tensor, mask: Tensor) -> Tensor:
    flags = mask.clone()
    if flags[3]:
        flags[3] = False
        return x * 3
    return x - 1


def number_is_overwritten(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    counts = ids.clone()
    n = counts[0].item()
    counts[0] = 7
    return x + n, counts


def double_is_overwritten(x: Tensor) -> Tensor:
    d = x.double()
    first = d[0, 0].item()
    d.zero_()
    return x * first


def list_is_overwritten(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    counts = ids.clone()
    listed = counts.tolist()
    counts += 1
    return x * listed[2] + listed[0], counts


def bound_is_counted_on(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    n = mask.sum()
    y = x.clone()
    k = n.item()
    n += 1
    y[:k] = 0
    return y, n


def mask_is_overwritten(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    left = mask.clone()
    rows = x[left]
    left[0] = ~left[0]
    return rows.sum(0), left


def positions_then_zeros(x: Tensor, mask: Tensor) -> Tensor:
    left = mask.clone()
    index = torch.where(left)[0]
    left.zero_()
    out = torch.zeros_like(x)
    out.index_add_(0, index, x[index])
    return out


def count_then_filled(x: Tensor, mask: Tensor) -> Tensor:
    left = mask.clone()
    index, rows = left.nonzero(), x[left]
    left.fill_(True)
    return x * len(index) + rows.shape[0]


def loop_clears_its_mask(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    left = mask.clone()
    out = x.clone()
    for i in left.nonzero().flatten():
        left[(i + 1) % T] = False
        out[i] += 1
    return out, left


def rest_under_two_conditions(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    if mask[0]:  # noqa: SIM102  (what is tested)
        if mask[1]:
            return y
    y.mul_(2)
    y[0] = 5
    return y


def a_name_of_its_own(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    if mask[2]:
        y = y + 1
    y[mask] = 0
    y.mul_(2)
    return y


COMPILED: list[Snippet] = [
    *(Snippet(f.__name__, lambda f=f: f, tokens_and_mask, "sums") for f in (
        flag_is_cleared, flag_by_name, exit_by_a_flag_that_is_cleared, bound_is_counted_on, mask_is_overwritten,
        positions_then_zeros, count_then_filled, loop_clears_its_mask, rest_under_two_conditions, a_name_of_its_own)),
    *(Snippet(f.__name__, lambda f=f: f, token_ids) for f in (number_is_overwritten, list_is_overwritten)),
    Snippet("double_is_overwritten", lambda: double_is_overwritten, numbers),
]  # fmt: skip


def other_name(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    a = x.clone()
    b = a
    if mask[2]:  # refused
        b = a * 2
    b.add_(1)
    return a, b


def other_name_of_an_input(x: Tensor, mask: Tensor) -> Tensor:
    y = x
    if mask[1]:  # refused
        y = x * 2
    y.add_(1)
    return y


def other_name_is_overwritten(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    a = x.clone()
    b = a
    if mask[2]:  # refused
        b = a * 2
    a.fill_(3)
    return a, b


def name_of_a_view(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    a = x.clone()
    b = a
    if mask[2]:  # refused
        b = a * 2
    b.view(-1)[3] = 7
    return a, b


def carried_name(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    a = x.clone()
    last = a
    for i in mask.nonzero().flatten():  # refused
        last = a * 0 + i
    last.add_(1)
    return a, last


def rows_of_two_names(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows = x[mask]
    other = rows
    if x.sum() > 0:
        other = rows * 2
    other.add_(1)  # refused
    return rows.sum(0), other.sum(0)


def list_of_two_names(x: Tensor, mask: Tensor) -> int:
    parts = [x, x + 1]
    other = parts
    if mask[1]:  # refused
        other = [x * 2, x * 3]
    other.append(x)
    return len(parts)


def row_is_a_view(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    n = mask.sum().item()
    row = y[n - 1]  # refused
    y.zero_()
    return row


def row_is_written(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    n = int(mask.sum())
    row = y[n - 1]  # refused
    row += 1
    return y


def slice_is_written(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    n = int(mask.sum())
    part = y[:n]
    part.add_(1)  # refused
    return y


def in_place_by_an_argument(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    y = x.clone()
    z = y
    if mask.any():  # refused
        z = F.relu(y, inplace=True)
    return y, z


def into_another_tensor(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    y = x.clone()
    z = x
    if mask[0]:  # refused
        z = torch.add(x, 1, out=y)
    return y, z


def _keep(kept: dict[str, Tensor], x: Tensor) -> Tensor:
    kept["last"] = x
    return x + 1


def nested_and_remembered(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    kept = {"last": x}
    first, second = bool(mask[0]), bool(mask[1])
    y = x
    if first:  # refused
        if second:
            y = y + 1
        z = _keep(kept, y * 3)
        y = z
    return kept["last"], y


def guarded_gather(x: Tensor, ids: Tensor) -> Tensor:
    table = torch.arange(4.0)
    out = x.sum()
    if (ids < 4).all():  # refused
        out = out + table[ids].sum()
    return out


def guarded_row(x: Tensor, mask: Tensor) -> Tensor:
    n = int(mask.sum())
    y = x.sum(0)
    if n < T:  # refused
        y = y + x[n]
    return y


def guarded_division(x: Tensor, ids: Tensor) -> Tensor:
    y = torch.ones_like(ids)
    if (ids != 0).all():  # refused
        y = 100 // ids
    return y


REFUSED: list[Snippet] = [
    *(Snippet(f.__name__, lambda f=f: f, tokens_and_mask) for f in (
        other_name, other_name_of_an_input, other_name_is_overwritten, name_of_a_view, carried_name,
        rows_of_two_names, list_of_two_names, row_is_a_view, row_is_written, slice_is_written,
        in_place_by_an_argument, into_another_tensor, nested_and_remembered, guarded_row)),
    *(Snippet(f.__name__, lambda f=f: f, token_ids) for f in (guarded_gather, guarded_division)),
]  # fmt: skip
