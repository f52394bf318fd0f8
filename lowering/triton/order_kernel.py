"""Token-expert pairs sorted by expert on the device, in one launch, with neither atomics nor a host synchronisation."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .mxfp4_parts import to_planes


@triton.jit(do_not_specialize=["pairs"])
def order_kernel(
    ids, order, table, x, x_planes, stride_it, stride_ij, stride_xm, stride_xk, pairs, Q,
    E: tl.constexpr, TOPK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (E,), or (E + T,) if there is x: every program reads all ids and places the pairs of its own expert.

    x: None, or ``[T, 4 Q]``; programs from E on write its rows in planes, for MXFP4 weights.

    order: int32 ``[pairs]``: the pairs, sorted by expert and then by number; pairs without an expert are left out.
    table: int32 ``[pairs // BLOCK_M + E, 3]``: expert (-1: no tile), first position and number of rows of each tile.

    With `first` pairs on smaller experts, expert e's tiles begin at first // BLOCK_M + e. That leaves room enough,
    since rounding up over several experts adds at most one tile each, and needs no other expert's count.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.program_id(0)
    if x is not None:  # noqa: SIM102 (decided while compiling)
        if e >= E:
            t = (e - E).to(tl.int64)
            to_planes(x + t * stride_xm, x_planes + t * 4 * Q, stride_xk, Q, 512)
            return
    at = tl.arange(0, BLOCK)
    smaller = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    for i in tl.range(0, pairs, BLOCK):
        pair = i + at
        mine = tl.load(ids + (pair // TOPK).to(tl.int64) * stride_it + (pair % TOPK) * stride_ij,
                       mask=pair < pairs, other=-1)  # fmt: skip
        smaller += ((mine >= 0) & (mine < e)).to(tl.int32)
        equal += (mine == e).to(tl.int32)
    first = tl.sum(smaller, 0)
    count = tl.sum(equal, 0)

    slot = first // BLOCK_M + e
    end = (first + count) // BLOCK_M + e + 1
    if e == E - 1:
        end = pairs // BLOCK_M + E
    for s in tl.range(slot, end, BLOCK):
        row = (s - slot + at) * BLOCK_M
        inside = s + at < end
        entry = table + 3 * (s + at)
        tl.store(entry, tl.where(row < count, e, -1), mask=inside)
        tl.store(entry + 1, first + row, mask=inside)
        tl.store(entry + 2, tl.minimum(count - row, BLOCK_M), mask=inside)

    if count > 0:
        position = first
        for i in tl.range(0, pairs, BLOCK):
            pair = i + at
            mine = tl.load(ids + (pair // TOPK).to(tl.int64) * stride_it + (pair % TOPK) * stride_ij,
                           mask=pair < pairs, other=-1)  # fmt: skip
            here = (mine == e).to(tl.int32)
            tl.store(order + position + tl.cumsum(here, 0) - 1, pair, mask=here != 0)
            position += tl.sum(here, 0)


@triton.jit
def planes_kernel(x, out, stride_xm, stride_xk, Q, BLOCK: tl.constexpr):
    """Grid (rows,): x ``[rows, 4 Q]`` in planes, out contiguous."""
    row = tl.program_id(0).to(tl.int64)
    to_planes(x + row * stride_xm, out + row * 4 * Q, stride_xk, Q, BLOCK)
