"""Routed experts on the CPU: rows sorted by expert, one matmul an expert, in the dtype of the operands.

An opaque op, so that the number of rows an expert gets may be read: on a CPU that is no synchronisation. It touches the
matrices of the chosen experts alone and copies none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sm12x_compile.ops._common import wide_dtype
from sm12x_compile.ops.moe import activate


def sorted_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    format: str = "bf16",
    layout: str = "enk",
    interleaved: bool = False,
    activation: str = "silu",
    gated: bool = True,
    alpha: float = 1.702,
    limit: float | None = None,
    weight_on: str = "output",
    w13_global_scale: Tensor | None = None,
    w2_global_scale: Tensor | None = None,
    fp8_block: int = 128,
    out_dtype: torch.dtype | None = None,
    w3: Tensor | None = None,
    w3_bias: Tensor | None = None,
    stacked: bool = False,
) -> Tensor:
    """`sm12x::moe` of plain weights; see the op for the arguments."""
    K, E, wide = topk_ids.shape[1], w2.shape[0], wide_dtype(x)
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids < 0) | (ids >= E), E, ids)
    order = ids.argsort(stable=True)
    tokens, weights = order // K, topk_weights.reshape(-1, 1).to(wide)[order]
    rows = x[tokens]
    if weight_on == "input":
        rows = (rows * weights).to(x.dtype)
    out = torch.zeros(x.shape, dtype=wide)

    def linear(rows: Tensor, w: Tensor, bias: Tensor | None, e: int) -> Tensor:
        matrix = w[e] if layout == "enk" else w[e].mT
        return F.linear(rows, matrix.to(rows.dtype), None if bias is None else bias[e].to(rows.dtype))

    start = 0
    for e, count in enumerate(torch.bincount(ids, minlength=E + 1)[:E].tolist()):
        if not count:
            continue
        here = slice(start, start + count)
        start += count
        h = linear(rows[here], w13, w13_bias, e)
        if w3 is not None:
            h = torch.cat([h, linear(rows[here], w3, w3_bias, e)], dim=-1)
        h = activate(h.to(wide), activation, gated, interleaved, alpha, limit).to(x.dtype)
        y = linear(h, w2, w2_bias, e).to(wide)
        out.index_add_(0, tokens[here], y if weight_on == "input" else y * weights[here])
    return out.to(out_dtype or x.dtype)
