"""One kernel for every product of routed experts: rows of x, grouped by expert, with that expert's weight.

A *tile* is up to BLOCK_M rows of one expert. Tiles come from a table that `order_kernel` filled on the device, or a
tile is one token-expert pair (few tokens: nothing needs sorting), or there is one expert only (a linear layer).
The grid is fixed by the shapes and has room for the worst routing; programs without a tile leave at once.

The gate's and up's rows of a weight are two tiles multiplied with the same x, so that the activation is applied to
the accumulators and the wide intermediate never exists.

MXFP4 weights want x in planes (`mxfp4_parts`), and what the second product reads is written so by the first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .expert_parts import LINEAR, activate, load_weights, multiply
from .mxfp4_parts import packed_product

SINGLE: tl.constexpr = tl.constexpr(0)
PAIRS: tl.constexpr = tl.constexpr(1)
TABLE: tl.constexpr = tl.constexpr(2)


@triton.jit(do_not_specialize=["M", "tiles_n", "first_expert"])
def expert_kernel(
    x, w, scale, bias, out, ids, order, table, row_weights,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_wup, stride_se, stride_sn, stride_sup,
    stride_be, stride_bn, stride_bup, stride_om, stride_it, stride_ij, stride_rt, stride_rj,
    M, N, K, Q, E, first_expert, tiles_n, alpha, limit,
    SOURCE: tl.constexpr, TOPK: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, JOINED: tl.constexpr, SWAP: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr,
    SPLIT: tl.constexpr, TO_PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * tiles_n,); column blocks of a tile run side by side.

    x: ``[rows, K]``. A tile's rows are numbered by their *position* among all rows, sorted by expert; `order` gives
    the token-expert pair at a position (None: the position itself). x is read at pair div TOPK if GATHER, else at
    the position; out is written at the pair if SCATTER, else at the position.
    row_weights: ``[T, TOPK]``, multiplied to the product before the bias, or None.
    JOINED: gate and up alternate in neighbouring columns in memory, so both are read as one tile.
    TO_PLANES: write columns in planes; a program's rows of the weight are then taken plane by plane.
    first_expert: the number of the first of the E experts that w holds; others' tiles are left out.
    PDL: see `arguments.launches_early`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0) // tiles_n
    first_n = (tl.program_id(0) % tiles_n) * BLOCK_N
    if SOURCE == SINGLE:
        e = 0
        start = tile * BLOCK_M
        count = M - start
    elif SOURCE == PAIRS:
        e = tl.load(ids + (tile // TOPK).to(tl.int64) * stride_it + (tile % TOPK) * stride_ij)
        e = tl.where((e < 0) | (e >= E), -1, e).to(tl.int32)
        start = tile
        count = 1
    else:
        e = tl.load(table + 3 * tile)
        start = tl.load(table + 3 * tile + 1)
        count = tl.load(table + 3 * tile + 2)
    e -= first_expert
    if (e < 0) | (e >= E):
        return
    at = tl.arange(0, BLOCK_M)
    live = at < count
    position = start + at
    pair = position
    if order is not None:
        pair = tl.load(order + position, mask=live, other=0)
    if GATHER:
        x_row = pair // TOPK
    else:
        x_row = position
    expert = tl.cast(e, tl.int64)
    w += expert * stride_we + tl.cast(first_n, tl.int64) * stride_wn
    width: tl.constexpr = 2 * BLOCK_N if JOINED else BLOCK_N
    rows = tl.arange(0, width)
    if TO_PLANES:
        rows = 4 * (rows % (BLOCK_N // 4)) + rows // (BLOCK_N // 4)
    x_at = x + x_row.to(tl.int64)[:, None] * stride_xm
    left = N - first_n
    if scale is not None:
        offset = 0
        first = expert * stride_se + tl.cast(first_n, tl.int64) * stride_sn
        if scale.dtype.element_ty == tl.int32:
            offset = (first & 3).to(tl.int32)
            first = first >> 2
        acc, acc_up = packed_product(
            x_at, live, w, scale + first, rows, offset, stride_wn, stride_wup, stride_sn, stride_sup, left, Q,
            GATED, SWAP, IEEE, STAGES, BLOCK_M, BLOCK_N, BLOCK_K // 4, EVEN_N, EVEN_K, WHOLE, TOGETHER, SPLIT,
        )  # fmt: skip
    else:
        column = tl.arange(0, BLOCK_K)
        x_at += column[None, :] * stride_xk
        if JOINED:
            left = 2 * left
        if SWAP:
            acc = tl.zeros((width, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, width), tl.float32)
        acc_up = acc
        stride_row = stride_wn
        if JOINED:
            stride_row = stride_wup
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                x_tile = tl.load(x_at, mask=live[:, None], other=0.0)
            else:
                x_tile = tl.load(x_at, mask=live[:, None] & (column[None, :] < K - k), other=0.0)
            w_tile = load_weights(w, rows, stride_row, stride_wk, left, K - k, BLOCK_K, EVEN_N, EVEN_K)
            acc = multiply(acc, x_tile, w_tile, SWAP, IEEE)
            if GATED and not JOINED:
                w_tile = load_weights(w + stride_wup, rows, stride_row, stride_wk, left, K - k, BLOCK_K, EVEN_N, EVEN_K)
                acc_up = multiply(acc_up, x_tile, w_tile, SWAP, IEEE)
            x_at += BLOCK_K * stride_xk
            w += BLOCK_K * stride_wk

    if SWAP:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    if JOINED:
        acc, acc_up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
    n = first_n + tl.arange(0, BLOCK_N)
    if TO_PLANES:
        n = first_n + rows
    if row_weights is not None:
        p_at = row_weights + (pair // TOPK).to(tl.int64) * stride_rt + (pair % TOPK) * stride_rj
        p = tl.load(p_at, mask=live, other=0.0).to(tl.float32)[:, None]
        acc = acc * p
        acc_up = acc_up * p
    if bias is not None:
        b_at = bias + (first_expert + expert) * stride_be + n * stride_bn
        acc += tl.load(b_at, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up += tl.load(b_at + stride_bup, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != LINEAR:
        acc = activate(acc, acc_up, alpha, limit, ACTIVATION, GATED)
    out_row = position
    if SCATTER:
        out_row = pair
    column_out = n
    if TO_PLANES:
        column_out = (n % 4) * (N // 4) + n // 4
    o_at = out + out_row.to(tl.int64)[:, None] * stride_om + column_out[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    y, ids, weights, out, stride_it, stride_ij, stride_rt, stride_rj, T, D, E,
    TOPK: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum over a token's choices in their order; grid (T, cdiv(D, BLOCK)). y: ``[T * TOPK, D]``, out: ``[T, D]``."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOPK):
        e = tl.load(ids + t * stride_it + j * stride_ij)
        chosen = d < tl.where((e < 0) | (e >= E), 0, D)  # nobody wrote y for the others
        value = tl.load(y + (t * TOPK + j) * D + d, mask=chosen, other=0.0).to(tl.float32)
        if WEIGHTED:
            p = tl.load(weights + t * stride_rt + j * stride_rj).to(tl.float32)
            value = tl.where(chosen, value * p, 0.0)
        total += value
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=d < D)
