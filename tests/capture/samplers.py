"""Samplers, thresholds, histograms and iterations whose course the data decide, as people write them."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import token_ids
from .snippets import D, Inputs, Snippet, T, numbers, tokens_and_mask


def scores(hits: str, g: torch.Generator) -> Inputs:
    """Logits ``[T, 32]``, from flat to peaked."""
    return (torch.randn(T, 32, generator=g) * {"some": 2.0, "none": 0.0, "all": 20.0}[hits],)


def normalise_outliers(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    large = (y.abs().amax(-1) > 1.5) & mask
    y[large] = y[large] / y[large].abs().amax(-1, keepdim=True)
    return y


def mean_of_groups(x: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros(6, D)
    for group in range(6):
        mine = ids == group
        if mine.sum() == 0:
            continue
        out[group] = x[mine].mean(0)
    return out


def sum_of_segments(x: Tensor, ids: Tensor) -> Tensor:
    rows = (ids > 2).nonzero(as_tuple=True)[0]
    out = torch.zeros(6, D)
    out.index_add_(0, ids[rows], x[rows])
    return out


def mean_or_zero(x: Tensor, mask: Tensor) -> Tensor:
    chosen = x.masked_select(mask.unsqueeze(1).expand(-1, D))
    if chosen.numel() > 0:
        return chosen.mean()
    return x.new_zeros(())


def head_and_tail(x: Tensor, ids: Tensor) -> Tensor:
    n = ids.max().item()
    return x[:n].sum(0) - x[n:].sum(0)


def crowded_bins(x: Tensor, ids: Tensor) -> Tensor:
    counts = torch.histc(ids.float(), bins=6, min=0, max=5)
    out = x.clone()
    for e in (counts > 2).nonzero().flatten().tolist():
        out[ids == e] = 0
    return out


def four_ways(x: Tensor, mask: Tensor) -> Tensor:
    y = x * 1
    if mask.any():
        if mask.all():
            y += 1
        elif mask[:4].any():
            y[mask] = -y[mask]
        else:
            y[:, 0] = 7
    elif x.mean() > 0:
        y = y.flip(0)
    return y


def rows_between(x: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.copy_(x)
    if mask[0] and not mask[-1]:
        out[1:3].fill_(9)
        out.t().mul_(2)
    return out


def two_kinds_of_rows(x: Tensor) -> Tensor:
    hot, cold = (x > 1).any(dim=1), (x < -1).any(dim=1)
    y = x.clone()
    y[hot & ~cold] *= 0.5
    y[cold] -= y[cold].mean(dim=1, keepdim=True)
    both = hot & cold
    if both.any() and not both.all():
        y[both] = 0
    return y


def table_of_the_known(x: Tensor, ids: Tensor) -> Tensor:
    table = torch.arange(5.0) * 2
    known = ids < 5
    y = x.clone()
    y[known] = x[known] * table[ids[known]][:, None]
    return y


def whole_numbers(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ids[0].item(), ids[1].item()
    c = a * 3 - b
    if c > 4:
        x = x + c
    elif -3 <= c < 0:
        x = x - abs(c)
    return x, x.sum() * (a - b)


COMPILED: list[Snippet] = [
    *(Snippet(f.__name__, lambda f=f: f, tokens_and_mask, "sums") for f in (
        normalise_outliers, mean_or_zero, four_ways, rows_between)),
    *(Snippet(f.__name__, lambda f=f: f, token_ids, "sums") for f in (
        mean_of_groups, sum_of_segments, head_and_tail, crowded_bins, table_of_the_known, whole_numbers)),
    Snippet("two_kinds_of_rows", lambda: two_kinds_of_rows, numbers, "last bit"),
]  # fmt: skip


def nucleus_by_rows(x: Tensor) -> Tensor:
    kept = torch.full_like(x, float("-inf"))
    for row in range(x.shape[0]):
        mass, order = torch.sort(x[row].softmax(-1), descending=True)
        n = int((mass.cumsum(0) < 0.9).sum().item()) + 1
        top = order[:n]
        kept[row, top] = x[row, top]  # refused
    return kept


def root(x: Tensor) -> Tensor:
    y = x.abs() + 1
    g = y.clone()
    while (g * g - y).abs().max() > 1e-4:  # refused
        g = 0.5 * (g + y / g)
    return g


def exit_when_settled(x: Tensor) -> Tensor:
    for _ in range(5):
        new = torch.tanh(x * 1.3)
        if (new - x).abs().max() < 0.3:
            break  # refused
        x = new
    return x


def inverse_of_classes(x: Tensor, ids: Tensor) -> Tensor:
    _, inverse = torch.unique(ids, return_inverse=True)  # refused
    return x + inverse[:, None]


def comprehension(x: Tensor, mask: Tensor) -> Tensor:
    kept = [i for i in range(T) if mask[i]]  # refused
    return x + len(kept)


REFUSED: list[Snippet] = [
    Snippet("nucleus_by_rows", lambda: nucleus_by_rows, scores),
    *(Snippet(f.__name__, lambda f=f: f, numbers) for f in (root, exit_when_settled)),
    Snippet("inverse_of_classes", lambda: inverse_of_classes, token_ids),
    Snippet("comprehension", lambda: comprehension, tokens_and_mask),
]  # fmt: skip
