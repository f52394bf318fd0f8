"""Split-KV attention for few queries (Flash-Decoding, Dao et al. 2023), against a cache read in place.

A program takes one KV head, the BLOCK_R query rows that share it (query s and head g of the group make row
s * GROUP + g), and one split of the keys. The grid is fixed by the cache's size, but each split's range is worked
out from what is filled *at run time*, so a cache of 32,768 slots with 2,048 filled costs what 2,048 cost.
A second kernel combines the splits in a fixed order: results don't change from run to run.

Latent attention is the same with one KV head: the latents are keys and, the same tile once more, values
(SHARED), and a rotary part in a tensor of its own is added to the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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


@triton.jit(do_not_specialize=["S", "T", "q_shift", "splits"])
def decode_kernel(
    q, k, v, out, partial,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_ob, stride_os, stride_oh,
    S, T, splits, scale, softcap, window_left, window_right, chunk,
    q_offset, stride_offset, q_shift, kv_len, stride_len,
    key_padding, stride_pb, stride_pt,
    q_segments, stride_qsb, stride_qss, k_segments, stride_ksb, stride_kst,
    bias, stride_bb, stride_bh, stride_bs, stride_bt,
    sinks, stride_sink,
    q_rope, stride_qrb, stride_qrh, stride_qrs, stride_qrd, k_rope, stride_krb, stride_krt, stride_krd,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr, SHARED: tl.constexpr,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    DV: tl.constexpr, DV_MAIN: tl.constexpr, DV_REST: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, NATURAL: tl.constexpr, EMPTY: tl.constexpr,
    IEEE: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * KV_HEADS, splits, cdiv(S * GROUP, BLOCK_R)).

    PREFETCH: how many blocks of keys are called into the L2 ahead of their loads (contiguous rows only); 0 for none.
    PDL: see `arguments.launches_early`.

    partial: fp32 ``[B, Hq, S, splits, DV]``, values not yet divided, and behind it ``[B, Hq, S, splits, 2]``, their
    running maximum and sum. None if there is one split, and `out` is written at once.
    """
    UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    bh = tl.program_id(0)
    b = (bh // KV_HEADS).to(tl.int64)
    hk = (bh % KV_HEADS).to(tl.int64)
    split = tl.program_id(1)
    first_row = tl.program_id(2) * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    valid = row < S * GROUP
    s = row // GROUP
    h = hk * GROUP + row % GROUP

    offset = first_position(q_offset, stride_offset, q_shift, b)
    keys = key_count(kv_len, stride_len, T, b)
    row_lo, row_hi = key_range(s + offset, keys, window_left, window_right, chunk, CAUSAL)
    last = (tl.minimum(first_row + BLOCK_R, S * GROUP) - 1) // GROUP
    lo, _ = key_range(first_row // GROUP + offset, keys, window_left, window_right, chunk, CAUSAL)
    _, hi = key_range(last + offset, keys, window_left, window_right, chunk, CAUSAL)
    blocks = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N)
    # At least two blocks a split: a nearly empty cache is then combined from few splits.
    share = tl.maximum(tl.cdiv(blocks, splits), 2) * BLOCK_N
    start = lo + share * split
    end = tl.minimum(start + share, hi)

    q_rows = q + b * stride_qb + (h * stride_qh + s.to(tl.int64) * stride_qs)[:, None]
    q_main = _load_columns(q_rows, valid, stride_qd, 0, D_MAIN, D)
    q_rest = q_main
    if D_REST > 0:
        q_rest = _load_columns(q_rows, valid, stride_qd, D_MAIN, D_REST, D)
    q_turned = q_main
    if ROPE > 0:
        q_turned_rows = q_rope + b * stride_qrb + (h * stride_qrh + s.to(tl.int64) * stride_qrs)[:, None]
        q_turned = _load_columns(q_turned_rows, valid, stride_qrd, 0, ROPE_PAD, ROPE)
    k_base = k + b * stride_kb + hk * stride_kh
    v_base = v + b * stride_vb + hk * stride_vh
    if k_segments is not None:
        q_seg = tl.load(q_segments + b * stride_qsb + s.to(tl.int64) * stride_qss, mask=valid, other=0)

    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, DV_MAIN), tl.float32)
    acc_rest = acc
    if DV_REST > 0:
        acc_rest = tl.zeros((BLOCK_R, DV_REST), tl.float32)
    cols = tl.arange(0, BLOCK_N)
    key_rows = cols.to(tl.int64) if WIDE else cols
    for n in tl.range(start, end, BLOCK_N):
        t = n + cols
        limit = end - n
        if PREFETCH > 0:
            later = tl.minimum(n + PREFETCH * BLOCK_N + cols, end - 1).to(tl.int64)
            _prefetch_rows(k_base + later * stride_kt, D * k.dtype.element_ty.primitive_bitwidth // 8)
            if ROPE > 0:
                turned_rows = k_rope + b * stride_krb + later * stride_krt
                _prefetch_rows(turned_rows, ROPE * k.dtype.element_ty.primitive_bitwidth // 8)
        k_block = k_base + tl.cast(n, tl.int64) * stride_kt
        k_main = load_tile(k_block, key_rows, stride_kt, stride_kd, limit, 0, D_MAIN, D, True)
        x = product(q_main, k_main, IEEE)
        if D_REST > 0:
            k_rest = load_tile(k_block, key_rows, stride_kt, stride_kd, limit, D_MAIN, D_REST, D, True)
            x += product(q_rest, k_rest, IEEE)
        if ROPE > 0:
            turned = k_rope + b * stride_krb + tl.cast(n, tl.int64) * stride_krt
            k_turned = load_tile(turned, key_rows, stride_krt, stride_krd, limit, 0, ROPE_PAD, ROPE, True)
            x += product(q_turned, k_turned, IEEE)
        x = x * scale
        if softcap is not None:
            x = cap_scores(x, softcap, IEEE)
        keep = (t[None, :] >= row_lo[:, None]) & (t[None, :] < tl.minimum(row_hi, end)[:, None])
        if BIAS != 0:
            columns = bias + b * stride_bb + t.to(tl.int64)[None, :] * stride_bt
            pointers = columns + (h * stride_bh + s.to(tl.int64) * stride_bs)[:, None]
            score = tl.load(pointers, mask=valid[:, None] & (t < end)[None, :], other=0)
            if BIAS == 1:
                x += score.to(tl.float32)
            else:
                keep = keep & (score != 0)
        if key_padding is not None:
            kept = tl.load(key_padding + b * stride_pb + t.to(tl.int64) * stride_pt, mask=t < end, other=0)
            keep = keep & (kept != 0)[None, :]
        if k_segments is not None:
            k_seg = tl.load(k_segments + b * stride_ksb + t.to(tl.int64) * stride_kst, mask=t < end, other=0)
            keep = keep & (q_seg[:, None] == k_seg[None, :])
        x = tl.where(keep, x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        alpha = tl.exp2((m - base) * UNIT)
        p = tl.exp2((x - base[:, None]) * UNIT)
        l = l * alpha + tl.sum(p, 1)
        m = top
        v_block = v_base + tl.cast(n, tl.int64) * stride_vt
        values = k_main
        if not SHARED:
            values = load_tile(v_block, key_rows, stride_vt, stride_vd, limit, 0, DV_MAIN, DV, True)
        acc = accumulate(acc * alpha[:, None], p, values, IEEE)
        if DV_REST > 0:
            v_rest = load_tile(v_block, key_rows, stride_vt, stride_vd, limit, DV_MAIN, DV_REST, DV, True)
            acc_rest = accumulate(acc_rest * alpha[:, None], p, v_rest, IEEE)

    if partial is not None:
        state = partial + tl.num_programs(0).to(tl.int64) * GROUP * S * splits * DV
        slot = ((b * KV_HEADS * GROUP + h) * S + s) * splits + split
        tl.store(state + 2 * slot, m, mask=valid)
        tl.store(state + 2 * slot + 1, l, mask=valid)
        filled = valid & (m > float("-inf"))  # the combining kernel reads no others
        _store_columns(partial + slot[:, None] * DV, acc, filled, 0, DV_MAIN, DV)
        if DV_REST > 0:
            _store_columns(partial + slot[:, None] * DV, acc_rest, filled, DV_MAIN, DV_REST, DV)
    else:
        sink = m
        if sinks is not None:
            sink = tl.load(sinks + h * stride_sink, mask=valid, other=0.0).to(tl.float32) * (LOG2E / UNIT)
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
        out_rows = out + b * stride_ob + (h * stride_oh + s.to(tl.int64) * stride_os)[:, None]
        _store_columns(out_rows, acc, valid, 0, DV_MAIN, DV)
        if DV_REST > 0:
            _store_columns(out_rows, acc_rest, valid, DV_MAIN, DV_REST, DV)


@triton.jit(do_not_specialize=["S", "T", "splits"])
def combine_kernel(
    partial, out, v, stride_ob, stride_os, stride_oh, stride_vb, stride_vh, stride_vt, stride_vd,
    S, T, splits, sinks, stride_sink,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr,
    NATURAL: tl.constexpr, EMPTY: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one output row; grid (B * HEADS * S, cdiv(DV, DV_PAD))."""
    UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    STEP: tl.constexpr = 16 if SPLITS_PAD > 16 else SPLITS_PAD
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    s = row % S
    h = row // S % HEADS
    b = row // S // HEADS
    state = partial + tl.num_programs(0).to(tl.int64) * splits * DV + row * splits * 2
    partial += row * splits * DV
    every = tl.arange(0, SPLITS_PAD)
    m = tl.max(tl.load(state + 2 * every, mask=every < splits, other=float("-inf")), 0)
    base = tl.where(m == float("-inf"), 0.0, m)
    cols = tl.program_id(1) * DV_PAD + tl.arange(0, DV_PAD)
    total = tl.zeros((STEP,), tl.float32)
    acc = tl.zeros((STEP, DV_PAD), tl.float32)
    for i in tl.static_range(0, SPLITS_PAD, STEP):  # unrolled, so that all loads are in flight at once
        index = i + tl.arange(0, STEP)
        top = tl.load(state + 2 * index, mask=index < splits, other=float("-inf"))
        filled = top > float("-inf")
        weight = tl.exp2((top - base) * UNIT)
        total += weight * tl.load(state + 2 * index + 1, mask=filled, other=0.0)
        inside = filled[:, None] & (cols < DV)[None, :]
        acc += weight[:, None] * tl.load(partial + index[:, None] * DV + cols[None, :], mask=inside, other=0.0)
    sink = m
    if sinks is not None:
        sink = tl.load(sinks + h * stride_sink).to(tl.float32) * (LOG2E / UNIT)
    ratio, empty = divisor(m, tl.sum(total, 0), sink, UNIT, sinks is not None, EMPTY)
    value = tl.sum(acc, 0) * ratio
    if EMPTY == EMPTY_MEAN:  # noqa: SIM102 (known while compiling, then known at run time)
        if empty:
            v_base = v + b * stride_vb + (h // GROUP) * stride_vh
            v_base += tl.program_id(1) * DV_PAD * stride_vd
            value = mean_of_values(v_base, stride_vt, stride_vd, T, 0, DV_PAD, DV, BLOCK_N, WIDE)
    out += b * stride_ob + s * stride_os + h * stride_oh
    tl.store(out + cols, value.to(out.dtype.element_ty), mask=cols < DV)


@triton.jit
def _load_columns(row_pointers, valid, stride_col, FIRST: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    inside = valid[:, None]
    if FIRST + WIDTH > USED:
        inside = inside & (cols[None, :] < USED)
    return tl.load(row_pointers + cols[None, :] * stride_col, mask=inside, other=0.0)


@triton.jit
def _store_columns(row_pointers, tile, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    inside = valid[:, None]
    if FIRST + WIDTH > USED:
        inside = inside & (cols[None, :] < USED)
    tl.store(row_pointers + cols[None, :], tile.to(row_pointers.dtype.element_ty), mask=inside)


@triton.jit
def _prefetch_rows(rows, BYTES: tl.constexpr):
    """Call rows of BYTES each, which start at these pointers, into the L2; 128 bytes a line."""
    LINES: tl.constexpr = (BYTES + 127) // 128
    LINES_PAD: tl.constexpr = triton.next_power_of_2(LINES)
    line = tl.arange(0, LINES_PAD)
    address = rows.to(tl.int64, bitcast=True)[:, None] + tl.minimum(line * 128, BYTES - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
