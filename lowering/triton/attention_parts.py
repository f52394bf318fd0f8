"""Device functions that the prefill and the decode kernel share: key ranges, tile loads, scores, the last division.

Every position-dependent mask (causal, windows, chunk, length) allows a query at position p one *range* of keys,
and both ends of the range grow with p. So a block of queries knows from its first and last position which key
blocks to skip, which need no mask at all, and which lie on an edge.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Positions are held in int32. Offsets beyond this many keys are clamped, which no mask can tell apart.
FAR: tl.constexpr = tl.constexpr(1 << 29)

EMPTY_ZERO: tl.constexpr = tl.constexpr(0)
EMPTY_NAN: tl.constexpr = tl.constexpr(1)
EMPTY_MEAN: tl.constexpr = tl.constexpr(2)


@triton.jit
def first_position(q_offset, stride_offset, q_shift, b):
    """Position of query 0 among the keys."""
    position = q_shift
    if q_offset is not None:
        position = tl.load(q_offset + b * stride_offset).to(tl.int64) + q_shift
        position = tl.minimum(tl.maximum(position, -FAR), FAR).to(tl.int32)
    return position


@triton.jit
def key_count(kv_len, stride_len, T, b):
    """Keys of batch b that exist: T, or the run-time length if that is less."""
    keys = T
    if kv_len is not None:
        length = tl.load(kv_len + b * stride_len).to(tl.int64)
        keys = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    return keys


@triton.jit
def key_range(p, keys, window_left, window_right, chunk, CAUSAL: tl.constexpr):
    """The half-open range of keys that position p (scalar or vector) may attend; lo >= 0, hi <= keys."""
    lo = p * 0
    hi = p * 0 + keys
    if CAUSAL:
        hi = tl.minimum(hi, p + 1)
    if window_right is not None:
        hi = tl.minimum(hi, p + window_right + 1)
    if window_left is not None:
        lo = tl.maximum(lo, p - window_left)
    if chunk is not None:
        # Triton's // rounds towards zero and p may be negative; the contract rounds down.
        index = tl.where(p >= 0, p // chunk, -1 - (-1 - p) // chunk)
        lo = tl.maximum(lo, index * chunk)
        hi = tl.minimum(hi, index * chunk + chunk)
    return lo, hi


@triton.jit
def load_tile(base, rows, stride_row, stride_col, limit,
              FIRST: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr, CHECK_ROWS: tl.constexpr):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of some rows; zero past column USED and, if checked, in rows past limit."""
    cols = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride_row + cols[None, :] * stride_col
    if FIRST + WIDTH > USED:
        inside = cols[None, :] < USED
        if CHECK_ROWS:
            inside = inside & (rows[:, None] < limit)
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def cap_scores(x, softcap, IEEE: tl.constexpr):
    """softcap * tanh(x / softcap), by exp2: the interpreter has no libdevice, and tanh.approx errs by 5e-4.

    1 - 2 / (1 + e) errs by 1e-7 of the softcap, which products of 16-bit numbers never notice. In fp32 it would near
    zero, so there the first terms of tanh's series take over.
    """
    z = x * (1.0 / softcap)
    far = softcap - 2.0 * softcap / (1.0 + tl.exp2(z * (2.0 * LOG2E)))
    if IEEE:
        zz = z * z
        near = x * (1.0 + zz * (-1.0 / 3.0 + zz * (2.0 / 15.0 + zz * (-17.0 / 315.0 + zz * (62.0 / 2835.0)))))
        far = tl.where(zz < 0.0625, near, far)
    return far


@triton.jit
def accumulate(acc, p, v, IEEE: tl.constexpr):
    """acc + p @ v, with fp32 operands kept whole (never tf32)."""
    if IEEE:
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    else:
        acc = tl.dot(p.to(v.dtype), v, acc)
    return acc


@triton.jit
def product(a, b, IEEE: tl.constexpr):
    """a @ b^T in fp32."""
    if IEEE:
        c = tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        c = tl.dot(a, tl.trans(b))
    return c


@triton.jit
def divisor(m, l, sink, UNIT: tl.constexpr, HAS_SINK: tl.constexpr, EMPTY: tl.constexpr):
    """What to multiply the accumulated values with, and which rows no key may serve.

    m, l: running maximum and sum; sink: extra logit; all in units of which UNIT make a power of two.
    """
    top = m
    if HAS_SINK:
        top = tl.maximum(m, sink)
    empty = top == float("-inf")
    total = l
    weight = 1.0
    if HAS_SINK:
        finite_top = tl.where(empty, 0.0, top)
        weight = tl.exp2((m - finite_top) * UNIT)
        total = l * weight + tl.exp2((sink - finite_top) * UNIT)
    ratio = weight / tl.where(empty, 1.0, total)
    if EMPTY == EMPTY_NAN:
        ratio = tl.where(empty, float("nan"), ratio)
    else:
        ratio = tl.where(empty, 0.0, ratio)
    return ratio, empty


@triton.jit
def mean_of_values(base, stride_vt, stride_vd, T,
                   FIRST: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr, BLOCK_N: tl.constexpr,
                   WIDE: tl.constexpr):  # fmt: skip
    """Mean of the columns FIRST to FIRST + WIDTH over all T keys: softmax over equal scores."""
    rows = tl.arange(0, BLOCK_N)
    if WIDE:
        rows = rows.to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    for n in tl.range(0, T, BLOCK_N, num_stages=1):
        tile = load_tile(base + tl.cast(n, tl.int64) * stride_vt, rows, stride_vt, stride_vd, T - n,
                         FIRST, WIDTH, USED, True)  # fmt: skip
        total += tl.sum(tile.to(tl.float32), 0)
    return total / T
