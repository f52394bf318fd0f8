"""Whether two results are the same numbers, but for rounding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Relative error that rounding explains, as the root of the mean square: of operands in this dtype, sums in fp32.
# For fp32 it leaves room for TF32. A result that lost a key, a head or a scale is off by far more.
ALLOWED = {
    torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-3, torch.float64: 1e-7,
}  # fmt: skip
WORST = 10.0  # the worst element may be off by this many times as much, relative to itself and its row


def allowed_error(tensors: Iterable[Tensor]) -> float:
    """What the coarsest of these floating-point tensors allows."""
    found = [ALLOWED.get(t.dtype, 0.0) for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    return max(found, default=ALLOWED[torch.float32])


def disagreement(found: Any, truth: Any, allowed: float) -> tuple[float, str | None]:
    """The largest relative error of results (a tensor, or several), and what is wrong, in a sentence, or None."""
    results, truths = _tensors(found), _tensors(truth)
    if len(results) != len(truths):
        return float("inf"), f"gave {len(results)} results, not {len(truths)}"
    worst = 0.0
    for result, expected in zip(results, truths, strict=True):
        error, wrong = _compare(result, expected, allowed)
        worst = max(worst, error)
        if wrong:
            return worst, wrong
    return worst, None


def _tensors(value: Any) -> Sequence[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _compare(found: Tensor, truth: Tensor, allowed: float) -> tuple[float, str | None]:
    if found.shape != truth.shape or found.dtype != truth.dtype:
        what = f"{tuple(found.shape)} {found.dtype}"
        return float("inf"), f"gave {what} where {tuple(truth.shape)} {truth.dtype} was due"
    if found.numel() == 0:
        return 0.0, None
    if not truth.is_floating_point():
        different = int((found != truth).sum())
        return float(different > 0), f"{different} of {truth.numel()} numbers differ" if different else None
    a, b = found.double(), truth.double()
    regular = b.isfinite()
    if not bool(torch.where(regular, a.isfinite(), _same(a, b)).all()):
        bad = int((regular & ~a.isfinite()).sum())
        return float("inf"), f"gave {bad} NaN or infinities where there are none" if bad else "lost a NaN or infinity"
    a, b = a.masked_fill(~regular, 0.0), b.masked_fill(~regular, 0.0)
    difference = (a - b).abs()
    size = float(b.square().mean().sqrt())
    if size == 0.0:
        largest = float(difference.max())
        return largest, f"gave up to {largest:.1e} where zero was due" if largest > allowed else None
    error = float(difference.square().mean().sqrt()) / size
    rows = b.square().mean(-1, keepdim=True).sqrt() if b.ndim else b.abs()
    worst = float((difference / (b.abs() + rows + 0.1 * size)).max())
    if error > allowed:
        return error, f"is off by {error:.1e} of the result's size, where rounding explains {allowed:.0e}"
    if worst > WORST * allowed:
        return error, f"has elements that are off by {worst:.1e} of their size, where rounding explains {allowed:.0e}"
    return error, None


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def routed(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """A choice of experts as one table ``[T, E]`` of weights: equal choices may come in any order."""
    table = torch.zeros(ids.shape[0], experts, dtype=weights.dtype, device=ids.device)
    return table.scatter_(1, ids.long(), weights)
