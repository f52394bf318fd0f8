"""Hand-written code with data-dependent control flow, as people write it.

Each snippet is a function or module, and a function that draws its inputs: ``draw(hits, generator)`` with `hits`
``"some"``, ``"none"`` or ``"all"``. What no graph of fixed shapes can compute stands in `REFUSED`, with the line that
the refusal must name and words of the reason.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger("snippets")
T, D, E, K = 9, 8, 4, 2

Inputs = tuple[Tensor, ...]
Draw = Callable[[str, torch.Generator], Inputs]


# How far from eager: the same bits; the last bit of exp and its kin, whose vectorised loops round differently from
# their scalar tails; or another order of summation.
Rounding = Literal["none", "last bit", "sums"]


@dataclass
class Snippet:
    name: str
    make: Callable[[], Callable[..., Any]]
    draw: Draw
    rounding: Rounding = "none"


def _mask(hits: str, g: torch.Generator, *shape: int) -> Tensor:
    if hits == "some":
        return torch.rand(shape, generator=g) > 0.5
    return torch.full(shape, hits == "all")


def tokens_and_mask(hits: str, g: torch.Generator) -> Inputs:
    return torch.randn(T, D, generator=g), _mask(hits, g, T)


def matrix_and_mask(hits: str, g: torch.Generator) -> Inputs:
    return torch.randn(3, T, D, generator=g), _mask(hits, g, 3, T)


def same_shape_mask(hits: str, g: torch.Generator) -> Inputs:
    return torch.randn(T, D, generator=g), _mask(hits, g, T, D)


def routing(hits: str, g: torch.Generator) -> Inputs:
    """Tokens ``[T, D]``, expert ids ``[T, K]`` and weights ``[T, K]``; "none" sends all tokens to two experts."""
    logits = torch.randn(T, E, generator=g)
    if hits == "none":
        logits[:, K:] = -100.0
    if hits == "all":
        logits = torch.eye(E).repeat(T, 1)[:T] + 0.1 * torch.rand(T, E, generator=g)
    weights, ids = logits.softmax(-1).topk(K, dim=-1)
    return torch.randn(T, D, generator=g), ids, weights


def top_one(hits: str, g: torch.Generator) -> Inputs:
    x, ids, weights = routing(hits, g)
    return x, ids[:, 0], weights[:, 0]


def numbers(hits: str, g: torch.Generator) -> Inputs:
    return (torch.randn(T, D, generator=g) + {"some": 0.0, "none": -5.0, "all": 5.0}[hits],)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, 12), nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class NormedExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lin, self.scale = nn.LayerNorm(D), nn.Linear(D, D), nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.lin(h).softmax(dim=-1)


class LoopOverHits(nn.Module):
    """Stacked weights, a one-hot mask, and a loop over the experts that it hits."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = nn.Parameter(torch.randn(E, 2 * 12, D)), nn.Parameter(torch.randn(E, D, 12))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        hit = (chosen.sum(dim=(-1, -2)) > 0).nonzero()
        for row in hit:
            e = row[0]
            slot, token = torch.where(chosen[e])
            gate, up = F.linear(x[token], self.w13[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.w2[e]) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class LoopOverRows(LoopOverHits):
    """One choice a token; a hit is used as the tensor of one element that it is, and a dimension comes and goes."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = F.one_hot(ids[:, None], num_classes=E).permute(2, 1, 0)
        for row in (chosen.sum(dim=(-1, -2)) > 0).nonzero():
            slot, token = torch.where(chosen[row].squeeze(0))
            h = x[None, token].reshape(-1, x.shape[-1])
            h = torch.relu(F.linear(h, self.w13[row][0]))
            bias = self.w2[row, :, 0]
            y = (h[:, :D] + bias[0]) * weights[:, None][token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class LoopOverItems(LoopOverHits):
    """The same, with `.item()`, squeezed indices and a check that there is something to do."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if ids.numel() == 0:
            return out
        chosen = F.one_hot(ids, num_classes=E).permute(2, 0, 1)
        for row in torch.greater(chosen.sum(dim=(1, 2)), 0).nonzero(as_tuple=False):
            e = int(row.item())
            token, slot = torch.where(chosen[e].squeeze(0))
            if token.numel() == 0:
                continue
            h = x[token]
            if e >= E - 1:
                y = h
            else:
                gate, up = F.linear(h, self.w13[e]).chunk(2, dim=-1)
                y = F.linear(torch.relu(gate) * up, self.w2[e])
            y = y * weights[token, slot, None]
            out.index_add_(0, token, y)
        return out


class ModuleListLoop(nn.Module):
    """A module for each expert; every expert is visited, and skipped if it has no token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.shape[0] == 0:
                continue
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


class UniqueLoop(ModuleListLoop):
    """Ids come from the router inside, and the loop is over those that occur."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        scores = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        _, picked = torch.topk(scores, K, dim=-1)
        out = torch.zeros_like(x)
        for e in picked.unique().tolist():
            where = picked == e
            token, _ = torch.where(where)
            out = out.index_add(0, token, self.experts[e](x[token]) * scores[token, e].unsqueeze(-1))
        return out


class TopOne(nn.Module):
    """A switch layer: a mask for each expert, assigned to the rows that it selects."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(NormedExpert() for _ in range(E))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        result = x.clone()
        for n, module in enumerate(self.experts):
            mine = ids == n
            if not mine.any():
                continue
            result[mine] = module(x[mine]) * weights[mine].unsqueeze(-1)
        return result


class FlatSlots(ModuleListLoop):
    """Token copies for each slot; the index of the token is computed from that of the slot."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, scale = ids.flatten(), weights.flatten()
        out = torch.zeros_like(x)
        for e in range(E):
            slots = (flat == e).nonzero().squeeze(-1)
            if len(slots) > 0:
                token = slots // K
                out.index_add_(0, token, self.experts[e](x[token]) * scale[slots][:, None])
        return out


class SortedSlices(ModuleListLoop):
    """Tokens sorted by expert; each expert gets a slice, whose length only the device knows."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        scores = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        weights, ids = torch.topk(scores, K, dim=-1)
        order = ids.flatten().argsort(stable=True)
        tokens = x[order // K]
        counts = torch.bincount(ids.flatten(), minlength=E)
        done = torch.zeros_like(tokens)
        start = 0
        for e, count in enumerate(counts.tolist()):
            end = start + count
            if count == 0:
                continue
            done[start:end] = self.experts[e](tokens[start:end])
            start = end
        back = torch.empty_like(done)
        back[order] = done
        return (back.view(x.shape[0], K, -1) * weights.unsqueeze(-1)).sum(1)


class Counting(nn.Module):
    """Counters, clocks, prints and log messages around the work."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        began = time.perf_counter()
        y = self.lin(x)
        y[mask] = F.gelu(y[mask])
        took = time.perf_counter() - began
        logger.info("took %.3f s", took)
        if mask.any():
            print("hit", mask.sum().item())
        return y


def clamp_rows(x: Tensor, mask: Tensor) -> Tensor:
    out = x.clone()
    out[mask] = out[mask].clamp(min=0.0, max=1.0)
    return out


def scaled_in_place(x: Tensor, mask: Tensor) -> Tensor:
    y = x * 2
    y[mask] *= 3.0
    y[~mask] -= 1
    return y


def masked_elements(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    y[mask] = torch.sigmoid(x[mask]) + 1
    return y


def masked_constant(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    picked = torch.nonzero(mask, as_tuple=True)[0]
    y[picked] = 0.5
    return y


def two_dimensional(x: Tensor, mask: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[mask] = F.layer_norm(x[mask], (x.shape[-1],))
    return y


def positions_of_two(x: Tensor, mask: Tensor) -> Tensor:
    b, t = torch.where(mask)
    total = torch.zeros(x.shape[0], x.shape[-1])
    total.index_add_(0, b, torch.tanh(x[b, t]))
    return total


def sum_of_selected(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].sum(0) + torch.masked_select(x[:, 0], mask).sum()


def mean_loss(x: Tensor, mask: Tensor) -> Tensor:
    return (x[mask] ** 2).mean()


def guard_any(x: Tensor, mask: Tensor) -> Tensor:
    if mask.any():
        x = x.masked_fill(mask.unsqueeze(-1), 0.0)
    return x + 1


def guard_sum(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    if mask.sum() > 0:
        y[mask] = y[mask] * 2
        y = y + 0
    return y


def fix_infinities(x: Tensor) -> Tensor:
    h = torch.exp(x * 20)
    if torch.isinf(h).any() or torch.isnan(h).any():
        bound = torch.finfo(h.dtype).max - 1000
        h = torch.clamp(h, min=-bound, max=bound)
    return h


def either_way(x: Tensor) -> Tensor:
    if x.mean() > 0:
        y = x * 2
    else:
        y = -x
        y += 1
    return y


def three_ways(x: Tensor) -> Tensor:
    level = x.mean().item()
    if level > 1:
        return x - level
    elif level < -1:
        return x + level
    return x * 0.5


def early_exit(x: Tensor, mask: Tensor) -> Tensor:
    if not mask.any():
        return x
    y = torch.zeros_like(x)
    y[mask] = x[mask] + 1
    return y


def scale_by_number(x: Tensor) -> Tensor:
    peak = x.abs().max().item()
    half = peak * 0.5 + 1
    return x / x.new_tensor(2.0) * half - int(peak)


def index_by_number(x: Tensor) -> Tensor:
    best = int(x.sum(-1).argmax())
    return x[best] * 2 + best


def accumulate_in_loop(x: Tensor, mask: Tensor) -> Tensor:
    total = x.new_zeros(x.shape[-1])
    for i in mask.nonzero().flatten():
        total = total * 0.5 + x[i]
    return total


def loop_writes_rows(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    for i in torch.where(mask)[0]:
        y[i] = y[i - 1] + 1
    return y


def nested_conditions(x: Tensor, mask: Tensor) -> Tensor:
    y = x
    if mask.any():
        y = y + 1
        if (y > 2).any():
            y = y - (y > 2).to(y.dtype)
        else:
            y = y * 3
    return y


def conditional_expression(x: Tensor) -> Tensor:
    scale = x.amax() if x.sum() > 0 else x.amin()
    return x * scale


def write_under_condition(x: Tensor) -> Tensor:
    y = x.clone()
    if (x > 0).all():
        y.mul_(2)
        y[0] = 0
        y[:, 1] += 5
    return y


def not_a_number_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Rows that are not selected are NaN and infinite, and must not show."""
    bad = torch.where(mask.unsqueeze(-1), x, torch.tensor(float("nan")))
    out = torch.zeros_like(x)
    picked = mask.nonzero().squeeze(1)
    out.index_add_(0, picked, 1 / bad[picked] + bad[picked].softmax(-1))
    out[picked] += bad[picked] * 2
    return out


def old_value_is_kept(x: Tensor, mask: Tensor) -> Tensor:
    """The selected rows are read, overwritten, and used afterwards."""
    y = x.clone()
    kept = torch.tanh(y[mask])
    y[mask] = 0
    y[mask] += kept
    return y


def top_k_per_group(x: Tensor) -> Tensor:
    scores, picked = x.softmax(-1).topk(3, dim=-1)
    out = torch.zeros_like(x)
    for column in range(x.shape[-1]):
        row, place = torch.where(picked == column)
        out.index_add_(0, row, scores[row, place, None] * x[row])
    return out


def warn_and_go_on(x: Tensor, mask: Tensor) -> Tensor:
    if mask.all():
        warnings.warn("everything is masked", stacklevel=1)
    return x * mask.unsqueeze(-1)


def _plain(f: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    return lambda: f


COMPILED: list[Snippet] = [
    *(Snippet(m.__name__, m, routing, "sums") for m in (
        LoopOverHits, LoopOverItems, ModuleListLoop, UniqueLoop, FlatSlots, SortedSlices)),
    *(Snippet(m.__name__, m, top_one, "sums") for m in (TopOne, LoopOverRows)),
    Snippet("Counting", Counting, tokens_and_mask, "last bit"),
    *(Snippet(f.__name__, _plain(f), draw, rounding) for f, draw, rounding in (
        (clamp_rows, tokens_and_mask, "none"),
        (scaled_in_place, tokens_and_mask, "none"),
        (masked_elements, same_shape_mask, "last bit"),
        (masked_constant, tokens_and_mask, "none"),
        (two_dimensional, matrix_and_mask, "last bit"),
        (positions_of_two, matrix_and_mask, "sums"),
        (sum_of_selected, tokens_and_mask, "sums"),
        (mean_loss, tokens_and_mask, "sums"),
        (guard_any, tokens_and_mask, "none"),
        (guard_sum, tokens_and_mask, "none"),
        (fix_infinities, numbers, "none"),
        (either_way, numbers, "none"),
        (three_ways, numbers, "none"),
        (early_exit, tokens_and_mask, "none"),
        (scale_by_number, numbers, "none"),
        (index_by_number, numbers, "none"),
        (accumulate_in_loop, tokens_and_mask, "none"),
        (loop_writes_rows, tokens_and_mask, "none"),
        (nested_conditions, tokens_and_mask, "none"),
        (conditional_expression, numbers, "none"),
        (write_under_condition, numbers, "none"),
        (not_a_number_outside, tokens_and_mask, "last bit"),
        (old_value_is_kept, tokens_and_mask, "last bit"),
        (warn_and_go_on, tokens_and_mask, "none"),
    )),
]  # fmt: skip


# What must be refused. The marked line is the one that the reason must name.


def returns_rows(x: Tensor, mask: Tensor) -> Tensor:
    picked = x[mask]
    return picked * 2  # refused


def returns_unique(x: Tensor, mask: Tensor) -> Tensor:
    return torch.unique(mask)  # refused


def softmax_over_rows(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    y[mask] = x[mask].softmax(0)  # refused
    return y


def running_sum(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    rows = y[mask]
    y[mask] = torch.cumsum(rows, dim=0)  # refused
    return y


def gram_matrix(x: Tensor, mask: Tensor) -> Tensor:
    rows = x[mask]
    return torch.matmul(rows.transpose(0, 1), rows)  # refused


def two_masks(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    y[mask] = x[mask] + x[x[:, 0] > 0][:1]  # refused
    return y


def other_places(x: Tensor, mask: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[: mask.sum().item()] = 1.0
    rows = x[mask]
    y[~mask] = rows  # refused
    return y


def size_from_number(x: Tensor, mask: Tensor) -> Tensor:
    n = mask.sum().item()
    return torch.zeros(int(n), 2)  # refused


def range_of_number(x: Tensor, mask: Tensor) -> Tensor:
    for _ in range(mask.sum().item()):  # refused
        x = x + 1
    return x


def raises(x: Tensor, mask: Tensor) -> Tensor:
    if mask.any():
        raise ValueError("masked")  # refused
    return x


def appends(x: Tensor, mask: Tensor) -> Tensor:
    parts = [x]
    for i in mask.nonzero().flatten():
        parts.append(x[i : i + 1])  # refused
    return torch.cat(parts)


def loops_until(x: Tensor) -> Tensor:
    while x.abs().sum() > 1:  # refused
        x = x / 2
    return x


def breaks_off(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    for i in mask.nonzero().flatten():
        if i > 2:
            break  # refused
        y[i] = 0
    return y


def changes_dtype(x: Tensor) -> Tensor:
    if x.sum() > 0:  # refused
        x = x.double()
    return x + 1


def divides_by_number(x: Tensor, mask: Tensor) -> Tensor:
    return x / mask.sum().item() + 10 / mask.sum().item()  # refused


def _zero_(x: Tensor) -> None:
    x.zero_()


def helper_writes(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    if mask.any():  # refused
        z = _zero_(y)  # noqa: F841
    return y


def random_numbers(x: Tensor, mask: Tensor) -> Tensor:
    if mask.any():  # refused
        x = x + torch.rand_like(x)
    return x


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.last = x[mask]  # refused
        return x + 1


class CountsHits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hits = 0

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.any():
            self.hits += 1  # refused
        return x + 1


def negative_ids(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    table = [1.0, 2.0, 3.0, 4.0]
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():  # refused
        token, _ = torch.where(ids == e)
        out[token] += x[token] * table[e]
    return out


REFUSED: list[Snippet] = [
    *(Snippet(f.__name__, _plain(f), tokens_and_mask) for f in (
        returns_rows, returns_unique, softmax_over_rows, running_sum, gram_matrix, two_masks, other_places,
        size_from_number, range_of_number, raises, appends, breaks_off, divides_by_number, helper_writes,
        random_numbers,
    )),
    *(Snippet(f.__name__, _plain(f), numbers) for f in (loops_until, changes_dtype)),
    Snippet("Remembers", Remembers, tokens_and_mask),
    Snippet("CountsHits", CountsHits, tokens_and_mask),
    Snippet("negative_ids", _plain(negative_ids), routing),
]  # fmt: skip
