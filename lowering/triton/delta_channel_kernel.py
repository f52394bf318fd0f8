"""First kernel of the chunked gated delta rule, decay per channel of K (KDA); see `delta_prepare_kernel` for the rest.

``sum_c k_ic k_jc e^(G_ic - G_jc)`` is a product of matrices only once the exponential is split, and ``e^(-G_jc)``
alone overflows. So the pairs i > j are taken in groups: at level s the chunk is cut into runs of 2 s tokens, i lies in
the second half of a run and j in the first half of the same run. With R the running sum at the end of the first half,
``e^(G_i - R)`` and ``e^(R - G_j)`` are both at most 1. Levels 32 and 16 leave pairs inside 16 tokens. If none of their
decays is stronger than 2^-60 to the middle, these are one product more; else they take levels 8 to 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_parts import BLOCK, locate, log2_decay, unit_lower_inverse, unit_scale

STRONGEST: tl.constexpr = tl.constexpr(60.0)  # logarithm to the base 2


@triton.jit
def _running_sum(g, t, cols, valid, stride_gt, stride_gd):
    pointers = g + (t * stride_gt)[:, None] + cols[None, :] * stride_gd
    decay = log2_decay(tl.load(pointers, mask=valid[:, None], other=0.0))
    return tl.cumsum(decay, 0), tl.sum(decay, 0)


@triton.jit
def _at(G, place, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of G."""
    return tl.gather(G, tl.broadcast_to(place[:, None], (CHUNK, BLOCK_D)), 0)


@triton.jit
def _level(
    kk, qk, k, q, G, row, half, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Adds the pairs of one level."""
    second = ((row // half) % 2 == 1)[:, None]
    run = row // (2 * half)
    R = _at(G, run * (2 * half) + half - 1, CHUNK, BLOCK_D)
    share = tl.exp2(tl.where(second, G - R, R - G))
    first_k = tl.trans(tl.where(second, 0.0, k * share).to(dtype))
    second_k = tl.where(second, k * share, 0.0).to(dtype)
    second_q = tl.where(second, q * share, 0.0).to(dtype)
    same_run = run[:, None] == run[None, :]
    kk += tl.where(same_run, tl.dot(second_k, first_k, input_precision=PRECISION), 0.0)
    qk += tl.where(same_run, tl.dot(second_q, first_k, input_precision=PRECISION), 0.0)
    return kk, qk


@triton.jit
def _all_pairs(
    kk, qk, k, q, G, row, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Adds what these channels say about all pairs i > j."""
    block = row // BLOCK
    middle = block * BLOCK + BLOCK // 2 - 1
    ahead = tl.abs(G - _at(G, middle, CHUNK, BLOCK_D))
    mild = (dtype != tl.float16) & (tl.max(tl.max(ahead, 1), 0) <= STRONGEST)  # fp16 has too few exponents
    half = CHUNK // 2
    last = tl.where(mild, BLOCK // 2, 0)
    while half > last:
        kk, qk = _level(kk, qk, k, q, G, row, half, CHUNK, BLOCK_D, PRECISION, dtype)
        half = half // 2
    if mild:
        share = tl.exp2(G - _at(G, middle, CHUNK, BLOCK_D))
        from_k = tl.trans((k / share).to(dtype))
        near = (block[:, None] == block[None, :]) & (row[:, None] > row[None, :])
        kk += tl.where(near, tl.dot((k * share).to(dtype), from_k, input_precision=PRECISION), 0.0)
        qk += tl.where(near, tl.dot((q * share).to(dtype), from_k, input_precision=PRECISION), 0.0)
    return kk, qk


@triton.jit(do_not_specialize=["T", "sequences"])
def prepare_channels_kernel(
    q, k, g, beta, inverse, scores, q_read, k_read, k_write, chunk_decay, cu_seqlens,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_gb, stride_gt, stride_gh, stride_gd, stride_bb, stride_bt, stride_bh, T, sequences, scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr, N_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, or more; HEADS).

    Writes, for every chunk and value head: inverse and scores ``[CHUNK, CHUNK]`` as `prepare_kernel` does; what q
    and k are when they read the state of the chunk's start (``scale e^G q``, ``e^G k``) and k when it enters that of
    its end (``e^(G_last - G) k``), ``[CHUNK, K]``; chunk_decay ``[K]``.
    """
    unit = tl.program_id(0)
    n, chunk, b, start, end, _ = locate(unit, cu_seqlens, sequences, T, CHUNK, 0, CHUNK, N_PAD)
    if n >= sequences:
        return
    h = tl.program_id(1)
    row = tl.arange(0, CHUNK)
    t = start + chunk * CHUNK + row
    valid = t < end
    t = t.to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    dtype = inverse.dtype.element_ty
    strength = tl.load(beta + b * stride_bb + h * stride_bh + t * stride_bt, mask=valid, other=0.0).to(tl.float32)
    g += b * stride_gb + h * stride_gh
    q_rows = q + b * stride_qb + (h // GROUP) * stride_qh + (t * stride_qt)[:, None]
    k_rows = k + b * stride_kb + (h // GROUP) * stride_kh + (t * stride_kt)[:, None]

    kk = tl.zeros((CHUNK, CHUNK), tl.float32)
    qk = tl.zeros((CHUNK, CHUNK), tl.float32)
    same = tl.zeros((CHUNK,), tl.float32)
    k_squares = tl.zeros((CHUNK,), tl.float32)
    q_squares = tl.zeros((CHUNK,), tl.float32)
    for d in tl.range(0, K, BLOCK_D):
        q_part = tl.load(q_rows + (d + cols)[None, :] * stride_qd, mask=valid[:, None], other=0.0).to(tl.float32)
        k_part = tl.load(k_rows + (d + cols)[None, :] * stride_kd, mask=valid[:, None], other=0.0).to(tl.float32)
        same += tl.sum(q_part * k_part, 1)
        k_squares += tl.sum(k_part * k_part, 1)
        q_squares += tl.sum(q_part * q_part, 1)
        G, last = _running_sum(g, t, d + cols, valid, stride_gt, stride_gd)
        kk, qk = _all_pairs(kk, qk, k_part, q_part, G, row, CHUNK, BLOCK_D, PRECISION, dtype)
    k_unit = unit_scale(k_squares, eps, NORM)
    q_unit = unit_scale(q_squares, eps, NORM) * scale

    item = tl.cast(unit, tl.int64) * HEADS + h
    square = item * CHUNK * CHUNK + row[:, None] * CHUNK + row[None, :]
    qk += tl.where(row[:, None] == row[None, :], same[:, None], 0.0)
    tl.store(scores + square, (qk * q_unit[:, None] * k_unit[None, :]).to(dtype))
    X = unit_lower_inverse(kk * (strength * k_unit)[:, None] * k_unit[None, :], CHUNK, PRECISION)
    tl.store(inverse + square, (X * strength[None, :]).to(dtype))
    for d in tl.range(0, K, BLOCK_D):
        q_part = tl.load(q_rows + (d + cols)[None, :] * stride_qd, mask=valid[:, None], other=0.0).to(tl.float32)
        k_part = tl.load(k_rows + (d + cols)[None, :] * stride_kd, mask=valid[:, None], other=0.0).to(tl.float32)
        G, last = _running_sum(g, t, d + cols, valid, stride_gt, stride_gd)
        own = item * CHUNK * K + row[:, None] * K + (d + cols)[None, :]
        k_part = k_part * k_unit[:, None]
        tl.store(q_read + own, (q_part * tl.exp2(G) * q_unit[:, None]).to(dtype))
        tl.store(k_read + own, (k_part * tl.exp2(G)).to(dtype))
        tl.store(k_write + own, (k_part * tl.exp2(last[None, :] - G)).to(dtype))
        tl.store(chunk_decay + item * K + d + cols, tl.exp2(last))
