"""Second and third kernel of the chunked gated delta rule: the walk over the chunks, and the output.

A program of the walk holds ``[K, BLOCK_V]`` of one head's state in registers and takes the chunks of a segment in
order; a segment is a whole sequence, or, for few heads and long sequences, a part of one. Parts are walked twice.
A chunk maps the state to ``D S + k^T (u0 - w S)``, which is affine, and so does a part: the first walk finds every
part's map (`transition_kernel`), and the second starts each part from the maps of those before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_parts import locate


@triton.jit
def _operand(base, rows, cols, WIDTH: tl.constexpr):
    return tl.load(base + rows[:, None] * WIDTH + cols[None, :])


@triton.jit
def _keys(
    k, item, t, valid, rows, cols, stride_kt, stride_kd, K: tl.constexpr, CHUNK: tl.constexpr,
    PER_CHANNEL: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Keys (or queries) of a chunk, ``[CHUNK, K]``: as `prepare_channels_kernel` scaled them, or the caller's own."""
    if PER_CHANNEL:
        return _operand(k + item * CHUNK * K, rows, cols, K)
    pointers = k + (t.to(tl.int64) * stride_kt)[:, None] + cols[None, :] * stride_kd
    return tl.load(pointers, mask=valid[:, None], other=0.0).to(dtype)


@triton.jit
def _advance(
    S, change, k_tile, item, row_scales, chunk_decay, rows, cols,
    K: tl.constexpr, CHUNK: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state behind a chunk whose u are `change`."""
    if PER_CHANNEL:
        S = S * tl.load(chunk_decay + item * K + cols)[:, None]
    else:
        S = S * tl.load(chunk_decay + item)
        change = change * tl.load(row_scales + 2 * item * CHUNK + rows)[:, None]
    return tl.dot(tl.trans(k_tile), change.to(k_tile.dtype), S, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "sequences", "segment_chunks"])
def transition_kernel(
    k, w, u, row_scales, chunk_decay, transition, cu_seqlens, stride_kb, stride_kt, stride_kh, stride_kd,
    T, sequences, segment_chunks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr, N_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (segments, HEADS, (V + K) / BLOCK_V): what a segment maps zero (V columns) and the identity (K columns) to.

    transition: fp32 ``[segments, HEADS, K, V + K]``. A sequence's last segment is left out: nobody follows it.
    """
    segment = tl.program_id(0)
    n, part, b, start, end, before = locate(
        segment, cu_seqlens, sequences, T, segment_chunks * CHUNK, 1, CHUNK, N_PAD
    )  # fmt: skip
    first = start + part * segment_chunks * CHUNK
    if (n >= sequences) | (first + segment_chunks * CHUNK >= end):
        return
    h = tl.program_id(1)
    rows = tl.arange(0, CHUNK)
    cols = tl.arange(0, K)
    out_cols = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    of_value = out_cols < V
    item = (before + part * segment_chunks) * HEADS + h
    k += b * stride_kb + (h // GROUP) * stride_kh
    S = tl.where(cols[:, None] + V == out_cols[None, :], 1.0, 0.0)
    for c in tl.range(0, segment_chunks):
        w_tile = _operand(w + item * CHUNK * K, rows, cols, K)
        u_pointers = u + item * CHUNK * V + rows[:, None] * V + out_cols[None, :]
        u_tile = tl.load(u_pointers, mask=of_value[None, :], other=0.0)
        change = u_tile.to(tl.float32) - tl.dot(w_tile, S.to(w_tile.dtype), input_precision=PRECISION)
        t = first + c * CHUNK + rows
        k_tile = _keys(k, item, t, t < end, rows, cols, stride_kt, stride_kd, K, CHUNK, PER_CHANNEL, w_tile.dtype)
        S = _advance(S, change, k_tile, item, row_scales, chunk_decay, rows, cols, K, CHUNK, PER_CHANNEL, PRECISION)
        item += HEADS
    target = transition + (tl.cast(segment, tl.int64) * HEADS + h) * K * (V + K)
    tl.store(target + cols[:, None] * (V + K) + out_cols[None, :], S)


@triton.jit(do_not_specialize=["T", "sequences", "segment_chunks"])
def state_kernel(
    q, k, w, u, scores, row_scales, chunk_decay, transition, initial, final, states, out, cu_seqlens,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_sn, stride_sh, stride_sk, stride_sv, stride_ob, stride_ot, stride_oh,
    T, sequences, segment_chunks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr, N_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (V / BLOCK_V, HEADS, segments).

    Writes the state behind every sequence to final ``[sequences, HEADS, K, V]``, and either `out` (if there is one),
    or what `output_kernel` makes it of: every chunk's start to states ``[CHUNK, K, V]``, its u over u0.
    """
    segment = tl.program_id(2)
    n, part, b, start, end, before = locate(
        segment, cu_seqlens, sequences, T, segment_chunks * CHUNK, 1, CHUNK, N_PAD
    )  # fmt: skip
    if n >= sequences:
        return
    h = tl.program_id(1)
    rows = tl.arange(0, CHUNK)
    cols = tl.arange(0, K)
    out_cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    first = start + part * segment_chunks * CHUNK
    chunks = tl.minimum(tl.cdiv(end - first, CHUNK), segment_chunks)
    item = (before + part * segment_chunks) * HEADS + h
    q += b * stride_qb + (h // GROUP) * stride_qh
    k += b * stride_kb + (h // GROUP) * stride_kh

    S = tl.zeros((K, BLOCK_V), tl.float32)
    if initial is not None:
        from_state = initial + tl.cast(n, tl.int64) * stride_sn + h * stride_sh
        S += tl.load(from_state + cols[:, None] * stride_sk + out_cols[None, :] * stride_sv).to(tl.float32)
    if transition is not None:
        maps = transition + (tl.cast(segment - part, tl.int64) * HEADS + h) * K * (V + K)
        for _ in tl.range(0, part):
            matrix = tl.load(maps + cols[:, None] * (V + K) + V + cols[None, :])
            offset = tl.load(maps + cols[:, None] * (V + K) + out_cols[None, :])
            S = tl.dot(matrix, S, offset, input_precision=PRECISION)
            maps += HEADS * K * (V + K)

    for c in tl.range(0, chunks):
        w_tile = _operand(w + item * CHUNK * K, rows, cols, K)
        u_tile = _operand(u + item * CHUNK * V, rows, out_cols, V)
        rounded = S.to(w_tile.dtype)
        change = u_tile.to(tl.float32) - tl.dot(w_tile, rounded, input_precision=PRECISION)
        t = first + c * CHUNK + rows
        k_tile = _keys(k, item, t, t < end, rows, cols, stride_kt, stride_kd, K, CHUNK, PER_CHANNEL, w_tile.dtype)
        if out is None:
            tl.store(states + item * K * V + cols[:, None] * V + out_cols[None, :], rounded)
            tl.store(u + item * CHUNK * V + rows[:, None] * V + out_cols[None, :], change.to(u_tile.dtype))
        else:
            q_tile = _keys(q, item, t, t < end, rows, cols, stride_qt, stride_qd, K, CHUNK, PER_CHANNEL, w_tile.dtype)
            o = tl.dot(q_tile, rounded, input_precision=PRECISION)
            if not PER_CHANNEL:
                o = o * tl.load(row_scales + (2 * item + 1) * CHUNK + rows)[:, None]
            score = _operand(scores + item * CHUNK * CHUNK, rows, rows, CHUNK)
            o = tl.dot(score, change.to(score.dtype), o, input_precision=PRECISION)
            target = out + b * stride_ob + (t.to(tl.int64) * stride_ot)[:, None] + h * stride_oh + out_cols[None, :]
            tl.store(target, o.to(out.dtype.element_ty), mask=(t < end)[:, None])
        S = _advance(S, change, k_tile, item, row_scales, chunk_decay, rows, cols, K, CHUNK, PER_CHANNEL, PRECISION)
        item += HEADS
    if first + segment_chunks * CHUNK >= end:
        target = final + (tl.cast(n, tl.int64) * HEADS + h) * K * V
        tl.store(target + cols[:, None] * V + out_cols[None, :], S.to(final.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "sequences"])
def output_kernel(
    q, u, scores, row_scales, states, out, cu_seqlens,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_ob, stride_ot, stride_oh, T, sequences,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
    N_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (V / BLOCK_V, chunks of all sequences or more, HEADS): what q reads of the state, and of its own chunk."""
    unit = tl.program_id(1)
    n, chunk, b, start, end, _ = locate(unit, cu_seqlens, sequences, T, CHUNK, 0, CHUNK, N_PAD)
    if n >= sequences:
        return
    h = tl.program_id(2)
    rows = tl.arange(0, CHUNK)
    cols = tl.arange(0, BLOCK_K)
    out_cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    item = tl.cast(unit, tl.int64) * HEADS + h
    t = start + chunk * CHUNK + rows
    valid = t < end
    dtype = u.dtype.element_ty
    o = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    for d in tl.range(0, K, BLOCK_K):
        if PER_CHANNEL:
            q_tile = _operand(q + item * CHUNK * K + d, rows, cols, K)
        else:
            pointers = q + b * stride_qb + (h // GROUP) * stride_qh + (t.to(tl.int64) * stride_qt)[:, None]
            q_tile = tl.load(pointers + (d + cols)[None, :] * stride_qd, mask=valid[:, None], other=0.0).to(dtype)
        state = _operand(states + item * K * V + d * V, cols, out_cols, V)
        o = tl.dot(q_tile, state, o, input_precision=PRECISION)
    if not PER_CHANNEL:
        o = o * tl.load(row_scales + (2 * item + 1) * CHUNK + rows)[:, None]
    score = _operand(scores + item * CHUNK * CHUNK, rows, rows, CHUNK)
    change = _operand(u + item * CHUNK * V, rows, out_cols, V)
    o = tl.dot(score, change, o, input_precision=PRECISION)
    target = out + b * stride_ob + (t.to(tl.int64) * stride_ot)[:, None] + h * stride_oh + out_cols[None, :]
    tl.store(target, o.to(out.dtype.element_ty), mask=valid[:, None])
