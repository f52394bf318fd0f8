"""Routed experts on the CPU: rows sorted by expert, one matmul an expert, in the dtype of the operands.

An opaque op, so that the number of rows an expert gets may be read: on a CPU that is no synchronisation. It touches the
matrices of the chosen experts alone and copies none; MXFP4 is decoded in pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sm12x_compile.ops._common import wide_dtype
from sm12x_compile.ops.moe import activate

from .mxfp4_cpu import tiled_linear


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
    """`sm12x::moe` of plain or MXFP4 weights; see the op for the arguments. Of packed experts those hit are decoded."""
    (T, _), K, E, wide = x.shape, topk_ids.shape[1], w2.shape[0], wide_dtype(x)
    ids = topk_ids.reshape(-1).long()
    experts, order = torch.where((ids < 0) | (ids >= E), E, ids).sort(stable=True)
    ends = torch.bincount(experts, minlength=E + 1).cumsum(0).tolist()
    used = ends[E - 1]
    last = experts.clamp(max=E - 1)
    weights = topk_weights.reshape(-1, 1).to(wide)[order]
    rows = x[order // K]
    if weight_on == "input":
        rows = (rows * weights).to(x.dtype)

    def linear(rows: Tensor, w: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
        out = rows.new_empty(T * K, w.shape[2 if layout == "ekn" else 1])
        start = 0
        for e, end in enumerate(ends[:E]):
            if start < end:
                if scale is not None:
                    out[start:end] = tiled_linear(rows[start:end], w[e], scale[e])
                else:
                    matrix = w[e] if layout == "ekn" else w[e].mT
                    torch.mm(rows[start:end], matrix.to(rows.dtype), out=out[start:end])
                start = end
        out[used:] = 0
        return out.to(wide) if bias is None else out.to(wide) + bias[last].to(wide)

    h = linear(rows, w13, w13_bias, w13_scale)
    if w3 is not None:
        h = torch.cat([h, linear(rows, w3, w3_bias)], dim=-1)
    y = linear(activate(h, activation, gated, interleaved, alpha, limit).to(x.dtype), w2, w2_bias, w2_scale)
    if weight_on == "output":
        y = y * weights
    y[used:] = 0
    placed = torch.empty_like(y).index_copy_(0, order, y)
    return placed.view(T, K, -1).sum(1).to(out_dtype or x.dtype)
