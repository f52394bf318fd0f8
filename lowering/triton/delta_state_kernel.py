"""Second kernel of the chunked gated delta rule: the walk over the chunks, which writes the output as well.

A program of the walk holds ``[K, BLOCK_V]`` of one head's state in registers and takes the chunks of a segment in
order; a segment is a whole sequence, or, for few heads and long sequences, a part of one. Parts are walked twice.
A chunk maps the state S to ``D S + k^T X (v - k S)``, which is affine, and so does a part: the first walk finds every
part's map (`transition_kernel`), and the second starts each part from the maps of those before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_parts import locate


@triton.jit
def _tile(base, rows, cols, WIDTH: tl.constexpr):
    return tl.load(base + rows[:, None] * WIDTH + cols[None, :])


@triton.jit
def _token_tile(
    x, item, t, end, rows, cols, stride_t, stride_d,
    K: tl.constexpr, CHUNK: tl.constexpr, PER_CHANNEL: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """A chunk's k or q, ``[CHUNK, K]``: the caller's own, or what `prepare_channels_kernel` made of it."""
    if PER_CHANNEL:
        x_tile = _tile(x + item * CHUNK * K, rows, cols, K)
    else:
        pointers = x + (t.to(tl.int64) * stride_t)[:, None] + cols[None, :] * stride_d
        x_tile = tl.load(pointers, mask=(t < end)[:, None], other=0.0).to(dtype)
    return x_tile


@triton.jit
def _changes(
    rounded, k_tile, v_tile, item, inverse, row_scales, rows,
    CHUNK: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The chunk's u, ``[CHUNK, BLOCK_V]`` fp32: what the state does not yet say, solved for all tokens at once."""
    X = _tile(inverse + item * CHUNK * CHUNK, rows, rows, CHUNK)
    said = tl.dot(k_tile, rounded, input_precision=PRECISION)
    if not PER_CHANNEL:
        said = said * tl.load(row_scales + item * 3 * CHUNK + rows)[:, None]
    return tl.dot(X, (v_tile.to(tl.float32) - said).to(X.dtype), input_precision=PRECISION)


@triton.jit
def _advance(
    S, change, k_tile, item, k_write, row_scales, chunk_decay, rows, cols,
    K: tl.constexpr, CHUNK: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state behind a chunk whose u are `change`."""
    S = S * tl.load(chunk_decay + item * K + cols)[:, None]
    if PER_CHANNEL:
        k_tile = _tile(k_write + item * CHUNK * K, rows, cols, K)
    else:
        change = change * tl.load(row_scales + (item * 3 + 1) * CHUNK + rows)[:, None]
    return tl.dot(tl.trans(k_tile), change.to(k_tile.dtype), S, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "sequences", "segment_chunks"])
def transition_kernel(
    k, k_write, v, inverse, row_scales, chunk_decay, transition, cu_seqlens,
    stride_kb, stride_kt, stride_kh, stride_kd, stride_vb, stride_vt, stride_vh, stride_vd,
    T, sequences, segment_chunks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    N_PAD: tl.constexpr,
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
    of_value = (rows[:, None] >= 0) & (out_cols < V)[None, :]
    first_item = (before + part * segment_chunks) * HEADS + h
    k += b * stride_kb + (h // GROUP) * stride_kh
    v += b * stride_vb + h * stride_vh
    dtype = inverse.dtype.element_ty
    S = tl.where(cols[:, None] + V == out_cols[None, :], 1.0, 0.0)
    for c in tl.range(0, segment_chunks, num_stages=STAGES):
        item = first_item + c * HEADS
        t = first + c * CHUNK + rows
        k_tile = _token_tile(k, item, t, end, rows, cols, stride_kt, stride_kd, K, CHUNK, PER_CHANNEL, dtype)
        v_pointers = v + (t.to(tl.int64) * stride_vt)[:, None] + out_cols[None, :] * stride_vd
        v_tile = tl.load(v_pointers, mask=of_value, other=0.0)
        change = _changes(S.to(dtype), k_tile, v_tile, item, inverse, row_scales, rows, CHUNK, PER_CHANNEL, PRECISION)
        S = _advance(
            S, change, k_tile, item, k_write, row_scales, chunk_decay, rows, cols, K, CHUNK, PER_CHANNEL, PRECISION
        )  # fmt: skip
    target = transition + (tl.cast(segment, tl.int64) * HEADS + h) * K * (V + K)
    tl.store(target + cols[:, None] * (V + K) + out_cols[None, :], S)


@triton.jit(do_not_specialize=["T", "sequences", "segment_chunks"])
def state_kernel(
    q, k, k_write, v, inverse, scores, row_scales, chunk_decay, transition, initial, final, out, cu_seqlens,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_sn, stride_sh, stride_sk, stride_sv,
    stride_ob, stride_ot, stride_oh, T, sequences, segment_chunks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    N_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (V / BLOCK_V, HEADS, segments). Writes o, and the state behind every sequence to final ``[.., K, V]``."""
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
    first_item = (before + part * segment_chunks) * HEADS + h
    q += b * stride_qb + (h // GROUP) * stride_qh
    k += b * stride_kb + (h // GROUP) * stride_kh
    v += b * stride_vb + h * stride_vh
    dtype = inverse.dtype.element_ty

    S = tl.zeros((K, BLOCK_V), tl.float32)
    if initial is not None:
        from_state = initial + tl.cast(n, tl.int64) * stride_sn + h * stride_sh
        S += tl.load(from_state + cols[:, None] * stride_sk + out_cols[None, :] * stride_sv).to(tl.float32)
    if transition is not None:
        maps = transition + (tl.cast(segment - part, tl.int64) * HEADS + h) * K * (V + K)
        for i in tl.range(0, part, num_stages=1):  # two maps at once would not fit
            own = maps + tl.cast(i, tl.int64) * HEADS * K * (V + K)
            matrix = _tile(own + V, cols, cols, V + K)
            S = tl.dot(matrix, S, _tile(own, cols, out_cols, V + K), input_precision=PRECISION)

    for c in tl.range(0, chunks, num_stages=STAGES):
        item = first_item + c * HEADS
        t = first + c * CHUNK + rows
        valid = (t < end)[:, None]
        k_tile = _token_tile(k, item, t, end, rows, cols, stride_kt, stride_kd, K, CHUNK, PER_CHANNEL, dtype)
        v_pointers = v + (t.to(tl.int64) * stride_vt)[:, None] + out_cols[None, :] * stride_vd
        v_tile = tl.load(v_pointers, mask=valid, other=0.0)
        rounded = S.to(dtype)
        change = _changes(rounded, k_tile, v_tile, item, inverse, row_scales, rows, CHUNK, PER_CHANNEL, PRECISION)
        q_tile = _token_tile(q, item, t, end, rows, cols, stride_qt, stride_qd, K, CHUNK, PER_CHANNEL, dtype)
        o = tl.dot(q_tile, rounded, input_precision=PRECISION)
        if not PER_CHANNEL:
            o = o * tl.load(row_scales + (item * 3 + 2) * CHUNK + rows)[:, None]
        score = _tile(scores + item * CHUNK * CHUNK, rows, rows, CHUNK)
        o = tl.dot(score, change.to(dtype), o, input_precision=PRECISION)
        target = out + b * stride_ob + (t.to(tl.int64) * stride_ot)[:, None] + h * stride_oh + out_cols[None, :]
        tl.store(target, o.to(out.dtype.element_ty), mask=valid)
        S = _advance(
            S, change, k_tile, item, k_write, row_scales, chunk_decay, rows, cols, K, CHUNK, PER_CHANNEL, PRECISION
        )  # fmt: skip
    if first + segment_chunks * CHUNK >= end:
        target = final + (tl.cast(n, tl.int64) * HEADS + h) * K * V
        tl.store(target + cols[:, None] * V + out_cols[None, :], S.to(final.dtype.element_ty))
