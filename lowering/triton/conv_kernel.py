"""Short causal depthwise convolutions, of whole sequences and of single tokens, in fp32; any strides.

The last inputs of a sequence, its state, lie before position 0: position -1 is the state's last element.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activate(y, SILU: tl.constexpr):
    return y / (1.0 + tl.exp(-y)) if SILU else y


@triton.jit
def _history(x, state, at, T, c, inside, stride_xc, stride_xt, stride_sc, stride_sl, LENGTH: tl.constexpr):
    """The input at position `at`, from x or from the state, zero before that."""
    value = tl.load(x + c * stride_xc + at * stride_xt, mask=inside & (at >= 0) & (at < T), other=0.0).to(tl.float32)
    if state is not None:
        before = inside & (at < 0) & (at >= -LENGTH)
        value += tl.load(state + c * stride_sc + (LENGTH + at) * stride_sl, mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["T"])
def conv_kernel(
    x, w, bias, state, y, final,
    stride_xb, stride_xc, stride_xt, stride_wc, stride_wi, stride_bias, stride_sb, stride_sc, stride_sl,
    stride_yb, stride_yc, stride_yt, T,
    C: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr, FINAL: tl.constexpr, SILU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(T, BLOCK_T), at least 1; cdiv(C, BLOCK_C); B): `sm12x::causal_conv1d`.

    state: ``[B, C, LENGTH]`` or None. final: ``[B, C, FINAL]``, contiguous.
    """
    b = tl.program_id(2).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    first = tl.program_id(0) * BLOCK_T
    t = (first + tl.arange(0, BLOCK_T))[None, :].to(tl.int64)
    inside = c < C
    x += b * stride_xb
    if state is not None:
        state += b * stride_sb
    acc = tl.zeros((BLOCK_C, BLOCK_T), tl.float32)
    if bias is not None:
        acc += tl.load(bias + c * stride_bias, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(0, WIDTH):
        at = t - (WIDTH - 1 - i)
        if first == 0:
            value = _history(x, state, at, T, c, inside, stride_xc, stride_xt, stride_sc, stride_sl, LENGTH)
        else:
            value = tl.load(x + c * stride_xc + at * stride_xt, mask=inside & (at < T), other=0.0).to(tl.float32)
        acc += tl.load(w + c * stride_wc + i * stride_wi, mask=inside, other=0.0).to(tl.float32) * value
    out = y + b * stride_yb + c * stride_yc + t * stride_yt
    tl.store(out, _activate(acc, SILU).to(y.dtype.element_ty), mask=inside & (t < T))
    if first + BLOCK_T >= T:
        for j in tl.static_range(0, FINAL):
            before = T - FINAL + j + c * 0
            kept = _history(x, state, before, T, c, inside, stride_xc, stride_xt, stride_sc, stride_sl, LENGTH)
            tl.store(final + (b * C + c) * FINAL + j, kept.to(final.dtype.element_ty), mask=inside)


@triton.jit
def conv_update_kernel(
    x, w, bias, pool, slots, y,
    stride_xb, stride_xc, stride_xt, stride_wc, stride_wi, stride_bias, stride_pp, stride_pc, stride_pl, stride_slot,
    stride_yb, stride_yc, stride_yt,
    C: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr, SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(C, BLOCK_C), B): `sm12x::causal_conv1d_update`.

    BLOCK_C is at least the number of threads: the thread that moves a channel's state on is the only one to read it.
    """
    b = tl.program_id(1).to(tl.int64)
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    inside = c < C
    slot = tl.load(slots + b * stride_slot).to(tl.int64)
    out = y + b * stride_yb + c * stride_yc
    if slot < 0:
        for s in tl.static_range(0, TOKENS):
            tl.store(out + s * stride_yt, tl.zeros((BLOCK_C,), y.dtype.element_ty), mask=inside)
        return
    x += b * stride_xb + c * stride_xc
    pool += slot * stride_pp + c * stride_pc
    for s in tl.static_range(0, TOKENS):
        acc = tl.zeros((BLOCK_C,), tl.float32)
        if bias is not None:
            acc += tl.load(bias + c * stride_bias, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(0, WIDTH):
            if s + i >= WIDTH - 1:
                value = tl.load(x + (s + i - (WIDTH - 1)) * stride_xt, mask=inside, other=0.0)
            else:
                value = tl.load(pool + (LENGTH + s + i - (WIDTH - 1)) * stride_pl, mask=inside, other=0.0)
            weight = tl.load(w + c * stride_wc + i * stride_wi, mask=inside, other=0.0).to(tl.float32)
            acc += weight * value.to(tl.float32)
        tl.store(out + s * stride_yt, _activate(acc, SILU).to(y.dtype.element_ty), mask=inside)
    for j in tl.static_range(0, LENGTH):
        if j + TOKENS < LENGTH:
            moved = tl.load(pool + (j + TOKENS) * stride_pl, mask=inside, other=0.0)
        else:
            moved = tl.load(x + (j + TOKENS - LENGTH) * stride_xt, mask=inside, other=0.0)
        tl.store(pool + j * stride_pl, moved.to(pool.dtype.element_ty), mask=inside)
