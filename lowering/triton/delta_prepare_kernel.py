"""First kernel of the chunked gated delta rule, decay per head (GDN): all that a chunk can do without the state.

With G the running sum of g inside the chunk, and k, q of unit length, the u of `sm12x::gated_delta_rule` solve
``(I + A) u = beta (v - e^G k S)`` with ``A_ij = beta_i e^(G_i - G_j) k_i . k_j`` below the diagonal, so that
``u = u0 - w S`` with ``u0 = (I + A)^-1 beta v`` and ``w = (I + A)^-1 beta e^G k`` (the WY form, Yang et al. 2024).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_parts import locate, log2_decay, unit_lower_inverse, unit_scale


@triton.jit(do_not_specialize=["T", "sequences"])
def prepare_kernel(
    q, k, v, g, beta, w, u, scores, row_scales, chunk_decay, cu_seqlens,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_gb, stride_gt, stride_gh, stride_bb, stride_bt, stride_bh,
    T, sequences, scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr, N_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of all sequences, or more; HEADS).

    Writes, for every chunk and value head: w ``[CHUNK, K]``, u0 into u ``[CHUNK, V]``, scores ``[CHUNK, CHUNK]``
    (``scale e^(G_i - G_j) q_i . k_j``, lower triangular), row_scales ``[2, CHUNK]`` (of k when it enters the state at
    the chunk's end; of q when it reads the state of the chunk's start) and chunk_decay, a number. Rows past the end
    of the sequence are zero.
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

    decay = tl.load(g + b * stride_gb + h * stride_gh + t * stride_gt, mask=valid, other=0.0)
    G = tl.cumsum(log2_decay(decay), 0)
    strength = tl.load(beta + b * stride_bb + h * stride_bh + t * stride_bt, mask=valid, other=0.0).to(tl.float32)

    q_rows = q + b * stride_qb + (h // GROUP) * stride_qh + (t * stride_qt)[:, None]
    k_rows = k + b * stride_kb + (h // GROUP) * stride_kh + (t * stride_kt)[:, None]
    dtype = w.dtype.element_ty
    kk = tl.zeros((CHUNK, CHUNK), tl.float32)
    qk = tl.zeros((CHUNK, CHUNK), tl.float32)
    k_squares = tl.zeros((CHUNK,), tl.float32)
    q_squares = tl.zeros((CHUNK,), tl.float32)
    for d in tl.range(0, K, BLOCK_D):
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

    lower = row[:, None] >= row[None, :]
    between = tl.exp2(tl.where(lower, G[:, None] - G[None, :], float("-inf"))) * k_unit[None, :]
    base = (tl.cast(unit, tl.int64) * HEADS + h) * CHUNK
    square = scores + (base + row)[:, None] * CHUNK + row[None, :]
    tl.store(square, (qk * between * q_unit[:, None]).to(dtype))
    last = tl.sum(log2_decay(decay), 0)
    tl.store(row_scales + 2 * base + row, k_unit * tl.exp2(last - G))
    tl.store(row_scales + 2 * base + CHUNK + row, q_unit * tl.exp2(G))
    tl.store(chunk_decay + tl.cast(unit, tl.int64) * HEADS + h, tl.exp2(last))

    A = tl.where(row[:, None] > row[None, :], kk * between * (strength * k_unit)[:, None], 0.0)
    X = unit_lower_inverse(A, CHUNK, PRECISION, FINE)
    for_k = (X * (strength * tl.exp2(G) * k_unit)[None, :]).to(dtype)
    for d in tl.range(0, K, BLOCK_D):
        k_part = tl.load(k_rows + (d + cols)[None, :] * stride_kd, mask=valid[:, None], other=0.0).to(dtype)
        part = tl.dot(for_k, k_part, input_precision=PRECISION)
        tl.store(w + (base + row)[:, None] * K + (d + cols)[None, :], part.to(dtype))
    for_v = (X * strength[None, :]).to(dtype)
    v_rows = v + b * stride_vb + h * stride_vh + (t * stride_vt)[:, None]
    for d in tl.range(0, V, BLOCK_D):
        v_part = tl.load(v_rows + (d + cols)[None, :] * stride_vd, mask=valid[:, None], other=0.0).to(dtype)
        part = tl.dot(for_v, v_part, input_precision=PRECISION)
        tl.store(u + (base + row)[:, None] * V + (d + cols)[None, :], part.to(dtype))
