"""Pieces that the gated delta rule's Triton kernels share: where a chunk lies, decays, a triangular inverse."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# exp() of this is zero in fp32. Lower logarithms change nothing, and their running sums would lose the digits of
# what comes behind them.
LOWEST_LOG_DECAY: tl.constexpr = tl.constexpr(-110.0)
BLOCK: tl.constexpr = tl.constexpr(16)


@triton.jit
def locate(
    unit, cu_seqlens, sequences, T, UNIT, LEAST: tl.constexpr, CHUNK: tl.constexpr, N_PAD: tl.constexpr
):  # fmt: skip
    """The unit-th run of `UNIT` tokens, where every sequence is cut into runs, at least `LEAST` of them.

    Returns:
        sequence (`sequences` or more if there is no such run), the run's number in its sequence, the sequence's row of
        the batch, its first and last token (exclusive) in that row, and the chunks of all sequences before it.
    """
    if cu_seqlens is None:
        each = tl.cdiv(T, UNIT)
        if LEAST > 0:
            each = tl.maximum(each, LEAST)
        n = unit // each
        number = unit - n * each
        b = n
        start = n * 0
        end = start + T
        before = n * tl.cdiv(T, CHUNK)
    else:
        every = tl.arange(0, N_PAD)
        known = every < sequences
        starts = tl.load(cu_seqlens + every, mask=known, other=0).to(tl.int32)
        ends = tl.load(cu_seqlens + every + 1, mask=known, other=0).to(tl.int32)
        units = tl.where(known, tl.maximum(tl.cdiv(ends - starts, UNIT), LEAST), 0)
        n = tl.sum(((tl.cumsum(units, 0) <= unit) & known).to(tl.int32), 0)
        number = unit - tl.sum(tl.where(every < n, units, 0), 0)
        b = n * 0
        start = tl.sum(tl.where(every == n, starts, 0), 0)
        end = tl.sum(tl.where(every == n, ends, 0), 0)
        before = tl.sum(tl.where(every < n, tl.cdiv(ends - starts, CHUNK), 0), 0)
    return n, number, b.to(tl.int64), start, end, before.to(tl.int64)


@triton.jit
def log2_decay(g):
    """Logarithms to the base 2 from natural ones; -inf becomes finite."""
    return tl.maximum(g.to(tl.float32), LOWEST_LOG_DECAY) * LOG2E


@triton.jit
def unit_scale(squares, eps, NORM: tl.constexpr):
    """What brings rows of these sums of squares to unit length, or ones."""
    return tl.rsqrt(squares + eps) if NORM else squares * 0.0 + 1.0


@triton.jit
def unit_lower_inverse(A, C: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + A)^-1`` for a strictly lower triangular A, fp32 ``[C, C]``; C is 64.

    A matrix of four by four blocks whose strictly lower part is N obeys ``N^4 = 0``, so that
    ``(I + N)^-1 = (I - N) (I + N^2)``. This is used three times, for blocks of 1, 4 and 16: powers beyond the third,
    whose binomial growth would cancel all digits, never appear.
    """
    PARTS: tl.constexpr = C // BLOCK
    part = tl.arange(0, PARTS)
    same_part = part[:, None, None, None] == part[None, None, :, None]
    # The diagonal blocks side by side, [PARTS, 16, 16].
    diagonal = tl.sum(tl.where(same_part, tl.reshape(A, (PARTS, BLOCK, PARTS, BLOCK)), 0.0), 2)
    i = tl.arange(0, BLOCK)
    eye = tl.where(i[:, None] == i[None, :], 1.0, 0.0)[None]
    near = (i[:, None] // 4 == i[None, :] // 4)[None]
    inner = tl.where(near, diagonal, 0.0)
    X = _fourth_power_vanishes(inner, eye, PRECISION)
    N = tl.dot(X, tl.where(near, 0.0, diagonal), input_precision=PRECISION)
    X = tl.dot(_fourth_power_vanishes(N, eye, PRECISION), X, input_precision=PRECISION)
    # Back to [C, C].
    X = tl.where(same_part, X[:, :, None, :], 0.0)
    X = tl.reshape(X, (C, C))
    r = tl.arange(0, C)
    outside = r[:, None] // BLOCK != r[None, :] // BLOCK
    N = tl.dot(X, tl.where(outside, A, 0.0), input_precision=PRECISION)
    whole_eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    return tl.dot(_fourth_power_vanishes(N, whole_eye, PRECISION), X, input_precision=PRECISION)


@triton.jit
def _fourth_power_vanishes(N, eye, PRECISION: tl.constexpr):
    """``(I + N)^-1`` for ``N^4 = 0``."""
    square = tl.dot(N, N, input_precision=PRECISION)
    return eye - N + square - tl.dot(N, square, input_precision=PRECISION)
