"""One row through up to four linear layers that read it: every weight is read once, at memory speed.

A decode step of one sequence is mostly this. A library's matrix product splits such a call and adds up the parts in a
second kernel, and starts anew for each of query, key and value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["N0", "N1", "N2", "N3", "end0", "end1", "end2"])
def row_linear_kernel(
    x, w0, b0, y0, N0, w1, b1, y1, N1, w2, b2, y2, N2, w3, b3, y3, N3, end0, end1, end2,
    K: tl.constexpr, LAYERS: tl.constexpr, BIASED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[n] = b[n] + sum_k x[k] * w[n, k] for each layer; programs up to `end0` serve the first, and so on.

    PDL: see `arguments.launches_early`. Weights are no results of the kernel before: they are loaded before the wait.
    """
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    w, b, y, N, block = w0, b0, y0, N0, program
    if LAYERS > 1:  # noqa: SIM102  # one is decided while compiling
        if program >= end0:
            w, b, y, N, block = w1, b1, y1, N1, program - end0
    if LAYERS > 2:  # noqa: SIM102
        if program >= end1:
            w, b, y, N, block = w2, b2, y2, N2, program - end1
    if LAYERS > 3:  # noqa: SIM102
        if program >= end2:
            w, b, y, N, block = w3, b3, y3, N3, program - end2
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < N
    rows = w + n.to(tl.int64)[:, None] * K
    weight = tl.load(rows + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
    if PDL:
        gdc_wait()
    part = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    total = weight.to(tl.float32) * part[None, :]
    for first in tl.range(BLOCK_K, K, BLOCK_K, loop_unroll_factor=4):
        here = first + k
        if K % BLOCK_K == 0:
            weight = tl.load(rows + here[None, :], mask=inside[:, None], other=0.0)
            part = tl.load(x + here).to(tl.float32)
        else:
            weight = tl.load(rows + here[None, :], mask=inside[:, None] & (here < K)[None, :], other=0.0)
            part = tl.load(x + here, mask=here < K, other=0.0).to(tl.float32)
        total += weight.to(tl.float32) * part[None, :]
    result = tl.sum(total, 1)
    if BIASED:
        result += tl.load(b + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + n, result.to(y.dtype.element_ty), mask=inside)
