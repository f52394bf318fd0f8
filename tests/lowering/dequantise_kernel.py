"""A kernel that does nothing but dequantise, so that every byte under every scale can be compared bit by bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sm12x_compile.lowering.triton.mxfp4_parts import load_scales, loaded_selectors, multipliers, planes


@triton.jit
def dequantise_kernel(packed, scale, out, first, ROWS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q, block = tl.arange(0, 32), tl.arange(0, 4)
    at = first + row[:, None] * 4 + block[None, :]
    words = tl.load(packed + row[:, None] * 32 + q[None, :])
    scales = multipliers(load_scales(scale, at, at >= 0), loaded_selectors(scale, at), WIDE, False)
    w0, w1, w2, w3 = planes(words, scales, ROWS, 32, WIDE, False)
    at = out + row[:, None] * 128 + 4 * q[None, :]
    tl.store(at, w0)
    tl.store(at + 1, w1)
    tl.store(at + 2, w2)
    tl.store(at + 3, w3)


def dequantised(packed: Tensor, codes: Tensor, dtype: torch.dtype, first: int | None) -> Tensor:
    """``[N, 64]`` bytes with ``[N, 4]`` scales, N a multiple of 32.

    first: the scales begin so many bytes after a word does; None: they are read byte by byte.
    """
    out = torch.empty(packed.shape[0], 128, dtype=dtype, device=packed.device)
    if first is not None:
        room = torch.zeros(4, dtype=torch.uint8, device=packed.device)
        codes = torch.cat([room[:first], codes.flatten(), room[first:]]).view(torch.int32)
    grid = (packed.shape[0] // 32,)
    dequantise_kernel[grid](packed.view(torch.int16), codes, out, first or 0, ROWS=32, WIDE=dtype == torch.float32)
    return out
