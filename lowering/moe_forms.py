"""Routed experts in plain PyTorch: three forms of the same sum that need no kernel of ours.

    gathered   the chosen experts' matrices are copied row by row: a few rows
    grouped    rows sorted by expert, PyTorch's grouped matmul: bf16
    unrolled   every expert on every token, weighted by zero where it was not chosen: few experts, any dtype

All have static shapes, no host synchronisation and no atomics. Matrices multiply in the dtype of the operands; the
activation, the weighting and the sum over a token's choices are computed in fp32 (fp64 for fp64 operands).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sm12x_compile.ops._common import wide_dtype
from sm12x_compile.ops.moe import activate


def experts_of(call: Any) -> tuple[int, int, int]:
    """Sizes of a call's experts: how many, and the width and inner size of one."""
    w2 = call.w2
    columns = w2.shape[2] if call.layout == "enk" else w2.shape[1]
    return int(w2.shape[0]), int(call.x.shape[1]), int(columns)


def _choices(ids: Tensor, weights: Tensor, experts: int, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Expert numbers, weights and validity of all T * K rows."""
    flat = ids.reshape(-1).long()
    return flat, weights.reshape(-1, 1).to(wide), (flat >= 0) & (flat < experts)


def _between(h: Tensor, up: Tensor | None, attributes: dict[str, Any], wide: torch.dtype) -> Tensor:
    if up is not None:
        h = torch.cat([h, up], dim=-1)
    names = ("activation", "gated", "interleaved", "alpha", "limit")
    return activate(h.to(wide), **{n: attributes[n] for n in names})


def _total(rows: Tensor, valid: Tensor, T: int, K: int, dtype: torch.dtype) -> Tensor:
    """The sum over a token's choices; rows without an expert may hold anything."""
    return torch.where(valid[:, None], rows, 0).view(T, K, -1).sum(1).to(dtype)


def gathered(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor, *, w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None, w3: Tensor | None = None, w3_bias: Tensor | None = None, layout: str = "enk",
    weight_on: str = "output", out_dtype: torch.dtype | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    """Each row with its own copy of its expert's matrices."""
    (T, _), K, wide = x.shape, topk_ids.shape[1], wide_dtype(x)
    flat, weights, valid = _choices(topk_ids, topk_weights, w2.shape[0], wide)
    safe = torch.where(valid, flat, 0)
    rows = x.repeat_interleave(K, 0)
    if weight_on == "input":
        rows = (rows * weights).to(x.dtype)

    def linear(rows: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        picked = w[safe].to(rows.dtype)
        out = torch.bmm(rows[:, None], picked.mT if layout == "enk" else picked).squeeze(1).to(wide)
        return out if bias is None else out + bias[safe].to(wide)

    up = None if w3 is None else linear(rows, w3, w3_bias)
    h = _between(linear(rows, w13, w13_bias), up, attributes, wide)
    y = linear(h.to(x.dtype), w2, w2_bias)
    return _total(y if weight_on == "input" else y * weights, valid, T, K, out_dtype or x.dtype)


def grouped(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor, *, w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None, w3: Tensor | None = None, w3_bias: Tensor | None = None, layout: str = "enk",
    weight_on: str = "output", out_dtype: torch.dtype | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    """Rows sorted by expert; those without one go to the end, where no group reaches."""
    (T, _), K, E, wide = x.shape, topk_ids.shape[1], w2.shape[0], wide_dtype(x)
    flat, weights, valid = _choices(topk_ids, topk_weights, E, wide)
    experts, order = torch.where(valid, flat, E).sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(E, device=x.device), right=True).to(torch.int32)
    last = experts.clamp(max=E - 1)
    rows = x[order // K]
    if weight_on == "input":
        rows = (rows * weights[order]).to(x.dtype)

    def linear(rows: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        out = torch._grouped_mm(rows, w.mT if layout == "enk" else w, offs=ends).to(wide)
        return out if bias is None else out + bias[last].to(wide)

    up = None if w3 is None else linear(rows, w3, w3_bias)
    h = _between(linear(rows, w13, w13_bias), up, attributes, wide)
    y = linear(h.to(x.dtype), w2, w2_bias)
    place = torch.empty_like(order).scatter(0, order, torch.arange(T * K, device=x.device))
    y = y[place]
    return _total(y if weight_on == "input" else y * weights, valid, T, K, out_dtype or x.dtype)


def unrolled(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor, *, w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None, w3: Tensor | None = None, w3_bias: Tensor | None = None, layout: str = "enk",
    out_dtype: torch.dtype | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    """Every expert on every token. Its matrices are read one by one, so weights that were stacked are not copied."""
    wide = wide_dtype(x)

    def linear(rows: Tensor, w: Tensor, bias: Tensor | None, e: int) -> Tensor:
        matrix = w[e] if layout == "enk" else w[e].mT
        return F.linear(rows, matrix.to(rows.dtype), None if bias is None else bias[e].to(rows.dtype))

    total = torch.zeros(x.shape, dtype=wide, device=x.device)
    for e in range(w2.shape[0]):
        share = torch.where(topk_ids == e, topk_weights.to(wide), 0).sum(1, keepdim=True)
        up = None if w3 is None else linear(x, w3, w3_bias, e)
        h = _between(linear(x, w13, w13_bias, e), up, attributes, wide)
        y = linear(h.to(x.dtype), w2, w2_bias, e).to(wide)
        total = total + torch.where((topk_ids == e).any(1, keepdim=True), y * share, 0)
    return total.to(out_dtype or x.dtype)
