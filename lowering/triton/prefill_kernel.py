"""Flash attention forward (FlashAttention-2, Dao 2023): one program computes BLOCK_M queries of one head.

The key blocks of a program fall into three runs: a masked one at the left edge (windows, chunks), an unmasked
one, and a masked one at the right edge (causal, lengths, the ragged end). Blocks outside are never read.

A head dim that is no power of two is computed as two tiles (80 = 64 + 16, 96 = 64 + 32, 192 = 128 + 64), which
costs less than padding it to the next power.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_parts import (
    EMPTY_MEAN,
    LOG2E,
    accumulate,
    cap_scores,
    divisor,
    first_position,
    key_count,
    key_range,
    load_tile,
    mean_of_values,
    product,
)

INNER: tl.constexpr = tl.constexpr(0)
LEFT: tl.constexpr = tl.constexpr(1)
RIGHT: tl.constexpr = tl.constexpr(2)


@triton.jit
def _attend(acc, acc_rest, m, l, q, q_rest, start, end, stop, row_lo, row_hi, q_seg, rows, S,
            k_base, stride_kt, stride_kd, rest_base, stride_rt, stride_rd,
            v_base, stride_vt, stride_vd, scale, softcap, pad_base, stride_pad, seg_base, stride_seg,
            bias_base, stride_bs, stride_bt,
            D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
            REST_FIRST: tl.constexpr, REST_END: tl.constexpr,
            DV: tl.constexpr, DV_MAIN: tl.constexpr, DV_REST: tl.constexpr,
            BLOCK_N: tl.constexpr, EDGE: tl.constexpr, NATURAL: tl.constexpr, BIAS: tl.constexpr,
            IEEE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Take the key blocks from start to end into (acc, m, l); they lie on no, the LEFT or the RIGHT edge."""
    UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    MAY_EMPTY: tl.constexpr = EDGE != INNER or BIAS != 0 or pad_base is not None or seg_base is not None
    cols = tl.arange(0, BLOCK_N)
    key_rows = cols.to(tl.int64) if WIDE else cols
    for n in tl.range(start, end, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        limit = stop - n
        k_block = k_base + tl.cast(n, tl.int64) * stride_kt
        k = load_tile(k_block, key_rows, stride_kt, stride_kd, limit, 0, D_MAIN, D, EDGE != INNER)
        x = product(q, k, IEEE)
        if D_REST > 0:
            rest = rest_base + tl.cast(n, tl.int64) * stride_rt
            k_rest = load_tile(
                rest, key_rows, stride_rt, stride_rd, limit, REST_FIRST, D_REST, REST_END, EDGE != INNER
            )
            x += product(q_rest, k_rest, IEEE)
        if NATURAL:
            x = x * scale
        if softcap is not None:
            x = cap_scores(x, softcap, IEEE)
        if BIAS != 0:
            pointers = bias_base + rows.to(tl.int64)[:, None] * stride_bs + (n + cols).to(tl.int64)[None, :] * stride_bt
            there = (rows < S)[:, None] & (cols < limit)[None, :]
            b = tl.load(pointers, mask=there, other=0)
            if BIAS == 1:
                x += b.to(tl.float32)
            else:
                x = tl.where(b != 0, x, float("-inf"))
        if EDGE != INNER:
            t = (n + cols)[None, :]
            inside = t < row_hi[:, None]
            if EDGE == LEFT:
                inside = inside & (t >= row_lo[:, None])
            x = tl.where(inside, x, float("-inf"))
        if pad_base is not None:
            kept = tl.load(pad_base + (n + cols).to(tl.int64) * stride_pad, mask=cols < limit, other=0)
            x = tl.where((kept != 0)[None, :], x, float("-inf"))
        if seg_base is not None:
            k_seg = tl.load(seg_base + (n + cols).to(tl.int64) * stride_seg, mask=cols < limit, other=0)
            x = tl.where(q_seg[:, None] == k_seg[None, :], x, float("-inf"))
        if NATURAL:
            top = tl.maximum(m, tl.max(x, 1))
        else:
            top = tl.maximum(m, tl.max(x, 1) * scale)
        base = top
        if MAY_EMPTY:
            base = tl.where(top == float("-inf"), 0.0, top)
        alpha = tl.exp2((m - base) * UNIT)
        if NATURAL:
            p = tl.exp2((x - base[:, None]) * UNIT)
        else:
            p = tl.exp2(x * scale - base[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = top
        v_block = v_base + tl.cast(n, tl.int64) * stride_vt
        v = load_tile(v_block, key_rows, stride_vt, stride_vd, limit, 0, DV_MAIN, DV, EDGE != INNER)
        acc = accumulate(acc * alpha[:, None], p, v, IEEE)
        if DV_REST > 0:
            v_rest = load_tile(v_block, key_rows, stride_vt, stride_vd, limit, DV_MAIN, DV_REST, DV, EDGE != INNER)
            acc_rest = accumulate(acc_rest * alpha[:, None], p, v_rest, IEEE)
    return acc, acc_rest, m, l


@triton.jit(do_not_specialize=["S", "T", "q_shift"])
def prefill_kernel(
    q, k, v, out,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_ob, stride_os, stride_oh,
    S, T, scale, softcap, window_left, window_right, chunk,
    q_offset, stride_offset, q_shift, kv_len, stride_len,
    key_padding, stride_pb, stride_pt,
    q_segments, stride_qsb, stride_qss, k_segments, stride_ksb, stride_kst,
    bias, stride_bb, stride_bh, stride_bs, stride_bt,
    sinks, stride_sink,
    q_rope, stride_qrb, stride_qrh, stride_qrs, stride_qrd, k_rope, stride_krb, stride_krt, stride_krd,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROPE: tl.constexpr,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    DV: tl.constexpr, DV_MAIN: tl.constexpr, DV_REST: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, NATURAL: tl.constexpr, EMPTY: tl.constexpr,
    IEEE: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[b, s, h] = softmax over the allowed keys; grid (B * HEADS, cdiv(S, BLOCK_M)).

    NATURAL: scores are kept in natural units, because a bias near finfo.min would overflow in units of log 2;
    otherwise `scale` already holds log2(e) and scores become powers of two in one multiply-add.
    NARROW: the window spans so few blocks that one masked run is faster than starting up three.
    ROPE: width of a second part of q and k, in tensors of their own; all heads share that of k. Takes the place of the
    second tile of a head dim.
    """
    LEFT_EDGE: tl.constexpr = window_left is not None or chunk is not None
    UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    bh = tl.program_id(0)
    b = (bh // HEADS).to(tl.int64)
    h = (bh % HEADS).to(tl.int64)
    # Under a causal mask the last rows have the most keys: start them first.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    tile_rows = tl.arange(0, BLOCK_M)
    rows = first + tile_rows

    offset = first_position(q_offset, stride_offset, q_shift, b)
    keys = key_count(kv_len, stride_len, T, b)
    row_lo, row_hi = key_range(rows + offset, keys, window_left, window_right, chunk, CAUSAL)
    last = tl.minimum(first + BLOCK_M, S) - 1
    lo, inner_hi = key_range(first + offset, keys, window_left, window_right, chunk, CAUSAL)
    inner_lo, hi = key_range(last + offset, keys, window_left, window_right, chunk, CAUSAL)
    hi = tl.maximum(hi, 0)
    left = lo // BLOCK_N * BLOCK_N
    left_end = left
    if LEFT_EDGE:
        left_end = tl.maximum(left, tl.cdiv(hi if NARROW else inner_lo, BLOCK_N) * BLOCK_N)
    middle_end = tl.maximum(left_end, tl.maximum(inner_hi, 0) // BLOCK_N * BLOCK_N)

    io_rows = tile_rows.to(tl.int64) if WIDE else tile_rows
    q_base = q + b * stride_qb + h * stride_qh + first.to(tl.int64) * stride_qs
    q_main = load_tile(q_base, io_rows, stride_qs, stride_qd, S - first, 0, D_MAIN, D, True)
    q_rest = q_main
    k_base = k + b * stride_kb + (h // GROUP) * stride_kh
    rest_base = k_base
    stride_rt = stride_kt
    stride_rd = stride_kd
    REST_FIRST: tl.constexpr = 0 if ROPE > 0 else D_MAIN
    REST_END: tl.constexpr = ROPE if ROPE > 0 else D
    if ROPE > 0:
        rest_base = k_rope + b * stride_krb
        stride_rt = stride_krt
        stride_rd = stride_krd
        turned = q_rope + b * stride_qrb + h * stride_qrh + first.to(tl.int64) * stride_qrs
        q_rest = load_tile(turned, io_rows, stride_qrs, stride_qrd, S - first, 0, D_REST, ROPE, True)
    elif D_REST > 0:
        q_rest = load_tile(q_base, io_rows, stride_qs, stride_qd, S - first, D_MAIN, D_REST, D, True)
    v_base = v + b * stride_vb + (h // GROUP) * stride_vh
    pad_base = None
    if key_padding is not None:
        pad_base = key_padding + b * stride_pb
    q_seg = rows
    seg_base = None
    if k_segments is not None:
        seg_base = k_segments + b * stride_ksb
        q_seg = tl.load(q_segments + b * stride_qsb + rows.to(tl.int64) * stride_qss, mask=rows < S, other=0)
    bias_base = None
    if BIAS != 0:
        bias_base = bias + b * stride_bb + h * stride_bh

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DV_MAIN), tl.float32)
    acc_rest = acc
    if DV_REST > 0:
        acc_rest = tl.zeros((BLOCK_M, DV_REST), tl.float32)
    if LEFT_EDGE:
        acc, acc_rest, m, l = _attend(
            acc, acc_rest, m, l, q_main, q_rest, left, tl.minimum(left_end, hi), hi, row_lo, row_hi, q_seg, rows, S,
            k_base, stride_kt, stride_kd, rest_base, stride_rt, stride_rd,
            v_base, stride_vt, stride_vd, scale, softcap, pad_base, stride_pt, seg_base, stride_kst,
            bias_base, stride_bs, stride_bt,
            D, D_MAIN, D_REST, REST_FIRST, REST_END, DV, DV_MAIN, DV_REST, BLOCK_N, LEFT, NATURAL, BIAS, IEEE, WIDE,
        )  # fmt: skip
    if not NARROW:
        acc, acc_rest, m, l = _attend(
            acc, acc_rest, m, l, q_main, q_rest, left_end, middle_end, hi, row_lo, row_hi, q_seg, rows, S,
            k_base, stride_kt, stride_kd, rest_base, stride_rt, stride_rd,
            v_base, stride_vt, stride_vd, scale, softcap, pad_base, stride_pt, seg_base, stride_kst,
            bias_base, stride_bs, stride_bt,
            D, D_MAIN, D_REST, REST_FIRST, REST_END, DV, DV_MAIN, DV_REST, BLOCK_N, INNER, NATURAL, BIAS, IEEE, WIDE,
        )  # fmt: skip
        acc, acc_rest, m, l = _attend(
            acc, acc_rest, m, l, q_main, q_rest, middle_end, hi, hi, row_lo, row_hi, q_seg, rows, S,
            k_base, stride_kt, stride_kd, rest_base, stride_rt, stride_rd,
            v_base, stride_vt, stride_vd, scale, softcap, pad_base, stride_pt, seg_base, stride_kst,
            bias_base, stride_bs, stride_bt,
            D, D_MAIN, D_REST, REST_FIRST, REST_END, DV, DV_MAIN, DV_REST, BLOCK_N, RIGHT, NATURAL, BIAS, IEEE, WIDE,
        )  # fmt: skip

    sink = 0.0
    if sinks is not None:
        sink = tl.load(sinks + h * stride_sink).to(tl.float32) * (LOG2E / UNIT)
    ratio, empty = divisor(m, l, sink, UNIT, sinks is not None, EMPTY)
    acc = acc * ratio[:, None]
    if DV_REST > 0:
        acc_rest = acc_rest * ratio[:, None]
    if EMPTY == EMPTY_MEAN:  # noqa: SIM102 (known while compiling, then known at run time)
        if tl.max(empty.to(tl.int32), 0) > 0:
            mean = mean_of_values(v_base, stride_vt, stride_vd, T, 0, DV_MAIN, DV, BLOCK_N, WIDE)
            acc = tl.where(empty[:, None], mean[None, :], acc)
            if DV_REST > 0:
                mean = mean_of_values(v_base, stride_vt, stride_vd, T, DV_MAIN, DV_REST, DV, BLOCK_N, WIDE)
                acc_rest = tl.where(empty[:, None], mean[None, :], acc_rest)
    out_base = out + b * stride_ob + h * stride_oh + first.to(tl.int64) * stride_os
    _store_rows(out_base, acc, io_rows, stride_os, S - first, 0, DV_MAIN, DV)
    if DV_REST > 0:
        _store_rows(out_base, acc_rest, io_rows, stride_os, S - first, DV_MAIN, DV_REST, DV)


@triton.jit
def _store_rows(base, tile, rows, stride_row, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    inside = rows[:, None] < limit
    if FIRST + WIDTH > USED:
        inside = inside & (cols[None, :] < USED)
    tl.store(base + rows[:, None] * stride_row + cols[None, :], tile.to(base.dtype.element_ty), mask=inside)
