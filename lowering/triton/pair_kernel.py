"""A few tokens and experts with MXFP4 weights: every token-expert pair reads its expert by itself, row times matrix.

One row has nothing to fill a tensor core with, and at this size the launches cost as much as the bytes. So there are
two kernels and no third: gate, up and activation; down with the weighted sum over a token's experts. Sums are in
fp32, in the same order every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .expert_parts import LINEAR, activate
from .mxfp4_parts import load_scales, load_words, multipliers, planes, selectors

UNROLLED: tl.constexpr = tl.constexpr(16)  # blocks written out, so that all their loads are in flight at once


@triton.jit
def _chosen(ids, t, j, stride_it, stride_ij, E):
    """The expert of a token's choice, -1 if there is none."""
    e = tl.load(ids + t * stride_it + j * stride_ij)
    return tl.where((e < 0) | (e >= E), -1, e).to(tl.int64)


@triton.jit
def _row(x, q, Q, WIDE: tl.constexpr):
    """Columns 4 q + i of a row as four vectors in fp32. x: fp32, or int64, words of four bf16."""
    inside = q < Q
    if WIDE:
        x0 = tl.load(x + 4 * q, mask=inside, other=0.0)
        x1 = tl.load(x + 4 * q + 1, mask=inside, other=0.0)
        x2 = tl.load(x + 4 * q + 2, mask=inside, other=0.0)
        x3 = tl.load(x + 4 * q + 3, mask=inside, other=0.0)
    else:
        four = tl.load(x + q, mask=inside, other=0)
        low, high = four.to(tl.int32), (four >> 32).to(tl.int32)
        x0 = (low << 16).to(tl.float32, bitcast=True)
        x1 = (low & -65536).to(tl.float32, bitcast=True)
        x2 = (high << 16).to(tl.float32, bitcast=True)
        x3 = (high & -65536).to(tl.float32, bitcast=True)
    return x0, x1, x2, x3


@triton.jit
def _add(part, x0, x1, x2, x3, w, scale, rows, at, k, stride_n, rows_left, Q,
         BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """part ``[BLOCK_N, BLOCK_Q]``, with what each word of the block at k adds to its row's product; x as in `_row`."""
    q, block = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_Q // 8)
    words = load_words(w + k, rows, q, stride_n, rows_left, Q - k, False, False)
    inside = (rows[:, None] < rows_left) & (block[None, :] < (Q - k) // 8)
    scales = multipliers(load_scales(scale, at + k // 8, inside), selectors(scale, at), WIDE)
    w0, w1, w2, w3 = planes(words, scales, BLOCK_N, BLOCK_Q, WIDE)
    part += w0.to(tl.float32) * x0[None, :]
    part += w1.to(tl.float32) * x1[None, :]
    part += w2.to(tl.float32) * x2[None, :]
    part += w3.to(tl.float32) * x3[None, :]
    return part


@triton.jit
def _add_both(part, part_up, x, w, scale, rows, at, k, stride_n, stride_wup, stride_sup, rows_left, Q,
              GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """`_add` for a weight, and for up's rows if GATED."""
    x0, x1, x2, x3 = _row(x, k + tl.arange(0, BLOCK_Q), Q, WIDE)
    part = _add(part, x0, x1, x2, x3, w, scale, rows, at, k, stride_n, rows_left, Q, BLOCK_N, BLOCK_Q, WIDE)
    if GATED:
        part_up = _add(part_up, x0, x1, x2, x3, w + stride_wup, scale, rows, at + stride_sup, k, stride_n, rows_left, Q,
                       BLOCK_N, BLOCK_Q, WIDE)  # fmt: skip
    return part, part_up


@triton.jit
def _scale_rows(scale, expert, first_n, rows, stride_e, stride_n, BLOCK_Q: tl.constexpr):
    """Where the scales of an expert's rows begin, as a pointer and the distances of a block's bytes from it."""
    first = expert * stride_e + first_n * stride_n
    offset = 0
    if scale.dtype.element_ty == tl.int32:
        offset = (first & 3).to(tl.int32)
        first = first >> 2
    return scale + first, offset + rows[:, None] * stride_n + tl.arange(0, BLOCK_Q // 8)[None, :]


@triton.jit(do_not_specialize=["tiles_n"])
def pair_kernel(
    x, w, scale, bias, out, ids, row_weights,
    stride_xm, stride_we, stride_wn, stride_wup, stride_se, stride_sn, stride_sup, stride_be, stride_bn, stride_bup,
    stride_om, stride_it, stride_ij, stride_rt, stride_rj,
    N, Q, E, tiles_n, alpha, limit,
    TOPK: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[pair] = activate(w[e] @ x[pair div TOPK]); grid (pairs * tiles_n,).

    ids: ``[T, TOPK]``, or None: the only expert. Arguments as in `expert_kernel`, x as in `_row`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pair = (tl.program_id(0) // tiles_n).to(tl.int64)
    first_n = ((tl.program_id(0) % tiles_n) * BLOCK_N).to(tl.int64)
    expert = tl.cast(0, tl.int64)
    if ids is not None:
        expert = _chosen(ids, pair // TOPK, pair % TOPK, stride_it, stride_ij, E)
    if expert < 0:
        return
    rows = tl.arange(0, BLOCK_N)
    w += expert * stride_we + first_n * stride_wn
    scale, at = _scale_rows(scale, expert, first_n, rows, stride_se, stride_sn, BLOCK_Q)
    x += (pair // TOPK) * stride_xm
    left = (N - first_n).to(tl.int32)
    part = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    part_up = part
    if STEPS <= UNROLLED:
        for step in tl.static_range(STEPS):
            part, part_up = _add_both(part, part_up, x, w, scale, rows, at, step * BLOCK_Q, stride_wn, stride_wup,
                                      stride_sup, left, Q, GATED, BLOCK_N, BLOCK_Q, WIDE)  # fmt: skip
    else:
        for k in tl.range(0, Q, BLOCK_Q, num_stages=STAGES):
            part, part_up = _add_both(part, part_up, x, w, scale, rows, at, k, stride_wn, stride_wup,
                                      stride_sup, left, Q, GATED, BLOCK_N, BLOCK_Q, WIDE)  # fmt: skip
    y, up = tl.sum(part, 1), tl.sum(part_up, 1)
    n = first_n + rows
    if row_weights is not None:
        p = tl.load(row_weights + (pair // TOPK) * stride_rt + (pair % TOPK) * stride_rj).to(tl.float32)
        y = y * p
        up = up * p
    if bias is not None:
        b_at = bias + expert * stride_be + n * stride_bn
        y += tl.load(b_at, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(b_at + stride_bup, mask=n < N, other=0.0).to(tl.float32)
    if ACTIVATION != LINEAR:
        y = activate(y, up, alpha, limit, ACTIVATION, GATED)
    tl.store(out + pair * stride_om + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["tiles_n"])
def pair_sum_kernel(
    h, w, scale, bias, out, ids, weights,
    stride_hm, stride_we, stride_wn, stride_se, stride_sn, stride_be, stride_bn, stride_it, stride_ij,
    stride_rt, stride_rj, N, Q, E, tiles_n,
    TOPK: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j p[t, j] * (w[e] @ h[t * TOPK + j] + bias[e]); grid (T * tiles_n,); out is contiguous.

    STEPS: blocks of Q.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = (tl.program_id(0) // tiles_n).to(tl.int64)
    first_n = ((tl.program_id(0) % tiles_n) * BLOCK_N).to(tl.int64)
    rows = tl.arange(0, BLOCK_N)
    n = first_n + rows
    part = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    y = tl.zeros((BLOCK_N,), tl.float32)
    most: tl.constexpr = UNROLLED // 4 if WIDE else UNROLLED  # fp32 takes more registers
    if most >= TOPK * STEPS:
        for step in tl.static_range(TOPK * STEPS):
            part, y = _add_choice(
                part, y, step // STEPS, (step % STEPS) * BLOCK_Q, h, w, scale, bias, ids, weights, t, first_n, rows,
                stride_hm, stride_we, stride_wn, stride_se, stride_sn, stride_be, stride_bn, stride_it, stride_ij,
                stride_rt, stride_rj, N, Q, E, TOPK, WEIGHTED, WIDE, BLOCK_N, BLOCK_Q,
            )  # fmt: skip
    else:
        for step in tl.range(0, TOPK * STEPS, num_stages=STAGES):
            part, y = _add_choice(
                part, y, step // STEPS, (step % STEPS) * BLOCK_Q, h, w, scale, bias, ids, weights, t, first_n, rows,
                stride_hm, stride_we, stride_wn, stride_se, stride_sn, stride_be, stride_bn, stride_it, stride_ij,
                stride_rt, stride_rj, N, Q, E, TOPK, WEIGHTED, WIDE, BLOCK_N, BLOCK_Q,
            )  # fmt: skip
    y += tl.sum(part, 1)
    tl.store(out + t * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _add_choice(
    part, y, j, k, h, w, scale, bias, ids, weights, t, first_n, rows, stride_hm, stride_we, stride_wn, stride_se,
    stride_sn, stride_be, stride_bn, stride_it, stride_ij, stride_rt, stride_rj, N, Q, E,
    TOPK: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """A block of a token's choice j: `_add` with its weight, and the bias at the first block."""
    expert = _chosen(ids, t, j, stride_it, stride_ij, E)
    some = tl.where(expert < 0, 0, 1)
    expert = tl.maximum(expert, 0)
    p = some.to(tl.float32)
    if WEIGHTED:
        p = tl.where(some != 0, tl.load(weights + t * stride_rt + j * stride_rj).to(tl.float32), 0.0)
    scale, at = _scale_rows(scale, expert, first_n, rows, stride_se, stride_sn, BLOCK_Q)
    columns, left = some * Q, (N - first_n).to(tl.int32)
    x0, x1, x2, x3 = _row(h + (t * TOPK + j) * stride_hm, k + tl.arange(0, BLOCK_Q), columns, WIDE)
    part = _add(part, p * x0, p * x1, p * x2, p * x3, w + expert * stride_we + first_n * stride_wn, scale, rows, at, k,
                stride_wn, left, columns, BLOCK_N, BLOCK_Q, WIDE)  # fmt: skip
    if bias is not None:
        n = first_n + rows
        b = tl.load(bias + expert * stride_be + n * stride_bn, mask=n < tl.where(k == 0, some * N, 0), other=0.0)
        y += p * b.to(tl.float32)
    return part, y
