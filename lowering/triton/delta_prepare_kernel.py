"""First kernel of the chunked gated delta rule, decay per head (GDN): all that a chunk can do without the state.

With G the running sum of g inside the chunk, and k, q of unit length, the u of `sm12x::gated_delta_rule` solve
``(I + A) u = beta (v - e^G k S)`` with ``A_ij = beta_i e^(G_i - G_j) k_i . k_j`` below the diagonal (the UT transform,
Yang et al. 2024), and ``o = scale (e^G q S + scores u)``. The inverse and the scores don't need the state; they are
64 by 64, so that storing them costs half of what the products with k and v would.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_parts import locate, log2_decay, unit_lower_inverse, unit_scale


@triton.jit(do_not_specialize=["T", "sequences"])
def prepare_kernel(
    q, k, g, beta, inverse, scores, row_scales, chunk_decay, cu_seqlens,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_gb, stride_gt, stride_gh, stride_bb, stride_bt, stride_bh, T, sequences, scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr, N_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, or more; HEADS).

    Writes, for every chunk and value head: inverse ``(I + A)^-1 diag(beta)`` and scores
    (``scale e^(G_i - G_j) q_i . k_j``, lower triangular), ``[CHUNK, CHUNK]``; row_scales ``[3, CHUNK]`` of k when it
    reads the state of the chunk's start, of k when it enters that of its end, of q when it reads; chunk_decay ``[K]``.
    Columns of tokens past the end of the sequence are zero.
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

    q_rows = q + b * stride_qb + (h // GROUP) * stride_qh + (t * stride_qt)[:, None]
    k_rows = k + b * stride_kb + (h // GROUP) * stride_kh + (t * stride_kt)[:, None]
    dtype = inverse.dtype.element_ty
    kk = tl.zeros((CHUNK, CHUNK), tl.float32)
    qk = tl.zeros((CHUNK, CHUNK), tl.float32)
    k_squares = tl.zeros((CHUNK,), tl.float32)
    q_squares = tl.zeros((CHUNK,), tl.float32)
    for d in tl.static_range(0, K, BLOCK_D):
        q_part = tl.load(q_rows + (d + cols)[None, :] * stride_qd, mask=valid[:, None], other=0.0).to(dtype)
        k_part = tl.load(k_rows + (d + cols)[None, :] * stride_kd, mask=valid[:, None], other=0.0).to(dtype)
        kk = tl.dot(k_part, tl.trans(k_part), kk, input_precision=PRECISION)
        qk = tl.dot(q_part, tl.trans(k_part), qk, input_precision=PRECISION)
        if NORM:
            k_wide = k_part.to(tl.float32)
            q_wide = q_part.to(tl.float32)
            k_squares += tl.sum(k_wide * k_wide, 1)
            q_squares += tl.sum(q_wide * q_wide, 1)
    k_unit = unit_scale(k_squares, eps, NORM)
    q_unit = unit_scale(q_squares, eps, NORM) * scale

    decay = tl.load(g + b * stride_gb + h * stride_gh + t * stride_gt, mask=valid, other=0.0)
    decay = log2_decay(decay)
    G = tl.cumsum(decay, 0)
    last = tl.sum(decay, 0)
    strength = tl.load(beta + b * stride_bb + h * stride_bh + t * stride_bt, mask=valid, other=0.0).to(tl.float32)
    lower = row[:, None] >= row[None, :]
    between = tl.exp2(tl.where(lower, G[:, None] - G[None, :], float("-inf"))) * k_unit[None, :]
    item = tl.cast(unit, tl.int64) * HEADS + h
    square = item * CHUNK * CHUNK + row[:, None] * CHUNK + row[None, :]
    tl.store(scores + square, (qk * between * q_unit[:, None]).to(dtype))
    scales = row_scales + item * 3 * CHUNK + row
    tl.store(scales, k_unit * tl.exp2(G))
    tl.store(scales + CHUNK, k_unit * tl.exp2(last - G))
    tl.store(scales + 2 * CHUNK, q_unit * tl.exp2(G))
    channels = tl.arange(0, K)
    tl.store(chunk_decay + item * K + channels, tl.exp2(last + channels * 0.0))

    A = tl.where(row[:, None] > row[None, :], kk * between * (strength * k_unit)[:, None], 0.0)
    X = unit_lower_inverse(A, CHUNK, PRECISION)
    tl.store(inverse + square, (X * strength[None, :]).to(dtype))
