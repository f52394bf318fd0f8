"""MXFP4 weights written out in bf16 or fp32: for so many tokens that the time of the products outweighs the bytes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .mxfp4_parts import load_words, multipliers, planes

ROWS, WORDS = 8, 256


@triton.jit(do_not_specialize=["first"])
def unpack_kernel(
    w, scale, out, stride_we, stride_wn, stride_se, stride_sn, first, N, Q, blocks,
    ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Experts from `first` on; grid (experts * cdiv(N, ROWS) * blocks,). w: words of two bytes; scale: bytes.

    out: contiguous ``[experts, N, 4 Q]``; blocks: of BLOCK_Q words in a row.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tiles = tl.cdiv(N, ROWS) * blocks
    e = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = (tile // blocks) * ROWS
    k = (tile % blocks) * BLOCK_Q
    n, q, block = tl.arange(0, ROWS), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_Q // 8)
    w += (first + e) * stride_we + row.to(tl.int64) * stride_wn + k
    words = load_words(w, n, q, stride_wn, N - row, Q - k, False, False)
    at = scale + (first + e) * stride_se + (row + n[:, None]).to(tl.int64) * stride_sn + k // 8 + block[None, :]
    inside = (n[:, None] < N - row) & (8 * block[None, :] < Q - k)
    codes = tl.load(at, mask=inside, other=0).to(tl.int32)
    scales = multipliers(codes, tl.zeros_like(codes) + 0x4040, WIDE, False)
    w0, w1, w2, w3 = planes(words, scales, ROWS, BLOCK_Q, WIDE, False)
    side_by_side = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, 4 * BLOCK_Q))
    column = 4 * k + tl.arange(0, 4 * BLOCK_Q)
    out += (e * N + row) * 4 * Q + n[:, None] * 4 * Q + column[None, :]
    tl.store(out, side_by_side, mask=(n[:, None] < N - row) & (column[None, :] < 4 * Q))


def unpack_launch(w: Tensor, scale: Tensor, out: Tensor, first: int, pdl: bool) -> tuple[dict[str, Any], tuple[int]]:
    """The kernel's arguments by name, and its grid. w: ``[E, N, K / 2]`` bytes; out: ``[experts, N, K]``."""
    words, codes = w.view(torch.uint8).view(torch.int16), scale.view(torch.uint8)
    experts, N, K = out.shape
    blocks = -(-K // (4 * WORDS))
    a: dict[str, Any] = dict(w=words, scale=codes, out=out, first=first, N=N, Q=K // 4, blocks=blocks, ROWS=ROWS)
    a["stride_we"], a["stride_wn"], _ = words.stride()
    a["stride_se"], a["stride_sn"], _ = codes.stride()
    a |= dict(BLOCK_Q=WORDS, WIDE=out.dtype == torch.float32, PDL=pdl)
    return a, (experts * -(-N // ROWS) * blocks,)
