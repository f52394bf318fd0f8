"""One row times a matrix for every head: each head's weight is read once, at memory speed.

Absorbed latent attention takes a query into latent space and the result out of it this way. A library's batched
product does well from a few rows on, and badly with one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def project_kernel(
    x, w, out, stride_xh, stride_xi, stride_wh, stride_wi, stride_wj,
    I: tl.constexpr, I_PAD: tl.constexpr, J: tl.constexpr, BLOCK_J: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[h, j] = sum_i x[h, i] * w[h, i, j]; grid (heads, cdiv(J, BLOCK_J)); out is contiguous.

    PDL: see `arguments.launches_early`. The weight is no result of the kernel before, so it is loaded before the wait.
    """
    if PDL:
        gdc_launch_dependents()
    h = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    i = tl.arange(0, I_PAD)
    pointers = w + h * stride_wh + i[:, None] * stride_wi + j[None, :] * stride_wj
    weight = tl.load(pointers, mask=(i < I)[:, None] & (j < J)[None, :], other=0.0)
    if PDL:
        gdc_wait()
    row = tl.load(x + h * stride_xh + i * stride_xi, mask=i < I, other=0.0)
    y = tl.sum(row.to(tl.float32)[:, None] * weight.to(tl.float32), 0)
    tl.store(out + h * J + j, y.to(out.dtype.element_ty), mask=j < J)
