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
from .mxfp4_parts import numbers, power_of_two

UNROLLED: tl.constexpr = tl.constexpr(4)  # steps written out, so that all their loads are in flight at once


@triton.jit
def _chosen(ids, t, j, stride_it, stride_ij, E):
    """The expert of a token's choice, -1 if there is none."""
    e = tl.load(ids + t * stride_it + j * stride_ij)
    return tl.where((e < 0) | (e >= E), -1, e).to(tl.int64)


@triton.jit
def _row(x, q, inside, EVEN: tl.constexpr, WIDE: tl.constexpr):
    """Columns 4 q + i of a row as four vectors in fp32. x: fp32, or int64, words of four bf16."""
    if WIDE:
        x0 = tl.load(x + 4 * q, mask=inside, other=0.0)
        x1 = tl.load(x + 4 * q + 1, mask=inside, other=0.0)
        x2 = tl.load(x + 4 * q + 2, mask=inside, other=0.0)
        x3 = tl.load(x + 4 * q + 3, mask=inside, other=0.0)
    else:
        if EVEN:
            four = tl.load(x + q)
        else:
            four = tl.load(x + q, mask=inside, other=0)
        low, high = four.to(tl.int32), (four >> 32).to(tl.int32)
        x0 = (low << 16).to(tl.float32, bitcast=True)
        x1 = (low & -65536).to(tl.float32, bitcast=True)
        x2 = (high << 16).to(tl.float32, bitcast=True)
        x3 = (high & -65536).to(tl.float32, bitcast=True)
    return x0, x1, x2, x3


@triton.jit
def _products(words, codes, x0, x1, x2, x3, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr):
    """``[BLOCK_N, BLOCK_Q / 8]``: what each scaled block adds to its row's product; x as `_row` gives it."""
    n0, n1, n2, n3 = numbers(words, WIDE)
    sums = n0 * x0[None, :] + n1 * x1[None, :] + n2 * x2[None, :] + n3 * x3[None, :]
    return tl.sum(tl.reshape(sums, (BLOCK_N, BLOCK_Q // 8, 8)), 2) * power_of_two(codes.to(tl.int32))


@triton.jit
def _add_step(part, part_up, k, x, w, scale, n, stride_wn, stride_wup, stride_sn, stride_sup, Q,
              GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, EVEN: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """The words from k on, for a weight and for up's rows if GATED."""
    q, block = k + tl.arange(0, BLOCK_Q), k // 8 + tl.arange(0, BLOCK_Q // 8)
    w += n[:, None] * stride_wn + q[None, :]
    scale += n[:, None] * stride_sn + block[None, :]
    if EVEN:
        words, codes = tl.load(w), tl.load(scale)
    else:
        words = tl.load(w, mask=q[None, :] < Q, other=0)
        codes = tl.load(scale, mask=block[None, :] < Q // 8, other=0)
    words_up, codes_up = words, codes
    if GATED:
        if EVEN:
            words_up, codes_up = tl.load(w + stride_wup), tl.load(scale + stride_sup)
        else:
            words_up = tl.load(w + stride_wup, mask=q[None, :] < Q, other=0)
            codes_up = tl.load(scale + stride_sup, mask=block[None, :] < Q // 8, other=0)
    x0, x1, x2, x3 = _row(x, q, q < Q, EVEN, WIDE)
    part += _products(words, codes, x0, x1, x2, x3, BLOCK_N, BLOCK_Q, WIDE)
    if GATED:
        part_up += _products(words_up, codes_up, x0, x1, x2, x3, BLOCK_N, BLOCK_Q, WIDE)
    return part, part_up


@triton.jit(do_not_specialize=["tiles_n"])
def pair_kernel(
    x, w, scale, bias, out, ids, row_weights,
    stride_xm, stride_we, stride_wn, stride_wup, stride_se, stride_sn, stride_sup, stride_be, stride_bn, stride_bup,
    stride_om, stride_it, stride_ij, stride_rt, stride_rj,
    N, Q, E, tiles_n, alpha, limit,
    TOPK: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[pair] = activate(w[e] @ x[pair div TOPK]); grid (pairs * tiles_n,).

    ids: ``[T, TOPK]``, or None: the only expert. Arguments as in `expert_kernel`, x as in `_row`.
    PLANES: write what `pair_sum_kernel` reads, fp32 numbers that are rounded to x's dtype.
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
    n = first_n + rows
    inner = tl.minimum(n, N - 1)  # rows beyond the last are computed, and not written
    x += (pair // TOPK) * stride_xm
    w += expert * stride_we
    scale += expert * stride_se
    part = tl.zeros((BLOCK_N, BLOCK_Q // 8), tl.float32)
    part_up = part
    if STEPS <= UNROLLED:
        for step in tl.static_range(STEPS):
            part, part_up = _add_step(part, part_up, step * BLOCK_Q, x, w, scale, inner, stride_wn, stride_wup,
                                      stride_sn, stride_sup, Q, GATED, BLOCK_N, BLOCK_Q, EVEN, WIDE)  # fmt: skip
    else:
        for step in tl.range(STEPS):
            part, part_up = _add_step(part, part_up, step * BLOCK_Q, x, w, scale, inner, stride_wn, stride_wup,
                                      stride_sn, stride_sup, Q, GATED, BLOCK_N, BLOCK_Q, EVEN, WIDE)  # fmt: skip
    y, up = tl.sum(part, 1), tl.sum(part_up, 1)
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
    column = n
    if PLANES:
        y = y.to(tl.float32 if WIDE else tl.bfloat16)
        column = (n % 4) * (N // 4) + n // 4
    tl.store(out + pair * stride_om + column, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["tiles_n"])
def pair_sum_kernel(
    h, w, scale, bias, out, ids, weights,
    stride_we, stride_wn, stride_se, stride_sn, stride_be, stride_bn, stride_it, stride_ij, stride_rt, stride_rj,
    N, Q, E, tiles_n,
    TOPK: tl.constexpr, CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j p[t, j] * (w[e] @ h[t * TOPK + j] + bias[e]); grid (T * tiles_n,); out is contiguous.

    h: fp32 ``[T * TOPK, 4, Q]``, rows in planes (`mxfp4_parts`). CHOICES: the power of two from TOPK on.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = (tl.program_id(0) // tiles_n).to(tl.int64)
    n = ((tl.program_id(0) % tiles_n) * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    inner = tl.minimum(n, N - 1)  # rows beyond the last are computed, and not written
    ids += t * stride_it
    h += t * TOPK * 4 * Q
    j = tl.arange(0, CHOICES)
    e = tl.load(ids + j * stride_ij, mask=j < TOPK, other=-1)
    none = (e < 0) | (e >= E)
    expert = tl.where(none, 0, e).to(tl.int64)
    last = tl.where(none, 0, Q)
    p = tl.where(none, 0.0, 1.0)
    if WEIGHTED:
        p = tl.load(weights + t * stride_rt + j * stride_rj, mask=last > 0, other=0.0).to(tl.float32)
    w += expert[None, :, None] * stride_we + inner[:, None, None] * stride_wn
    scale += expert[None, :, None] * stride_se + inner[:, None, None] * stride_sn
    part = tl.zeros((BLOCK_N, CHOICES, BLOCK_Q // 8), tl.float32)
    for k in tl.range(0, Q, BLOCK_Q):
        q, block = k + tl.arange(0, BLOCK_Q), k // 8 + tl.arange(0, BLOCK_Q // 8)
        if EVEN:
            words = tl.load(w + q[None, None, :])
        else:
            words = tl.load(w + q[None, None, :], mask=q[None, None, :] < Q, other=0)
        codes = tl.load(scale + block[None, None, :], mask=8 * block[None, None, :] < last[None, :, None], other=0)
        at, inside = h + j[:, None] * 4 * Q + q[None, :], q[None, :] < last[:, None]
        x0, x1 = tl.load(at, mask=inside, other=0.0), tl.load(at + Q, mask=inside, other=0.0)
        x2, x3 = tl.load(at + 2 * Q, mask=inside, other=0.0), tl.load(at + 3 * Q, mask=inside, other=0.0)
        n0, n1, n2, n3 = numbers(words, WIDE)
        sums = n0 * x0[None] + n1 * x1[None] + n2 * x2[None] + n3 * x3[None]
        sums = tl.sum(tl.reshape(sums, (BLOCK_N, CHOICES, BLOCK_Q // 8, 8)), 3)
        part += sums * power_of_two(codes.to(tl.int32))
    parts = tl.sum(part, 2)
    if bias is not None:
        b = tl.load(bias + expert[None, :] * stride_be + inner[:, None] * stride_bn, mask=last[None, :] > 0, other=0.0)
        parts += b.to(tl.float32)
    y = tl.sum(parts * p[None, :], 1)
    tl.store(out + t * N + n, y.to(out.dtype.element_ty), mask=n < N)
