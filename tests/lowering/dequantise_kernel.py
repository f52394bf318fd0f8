"""A kernel that does nothing but dequantise, so that every byte under every scale can be compared bit by bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sm12x_compile.lowering.triton.expert_parts import dequantise


@triton.jit
def dequantise_kernel(packed, codes, out, ROWS: tl.constexpr, WIDE: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    byte, column = tl.arange(0, 64), tl.arange(0, 128)
    code = tl.load(codes + row[:, None] * 4 + tl.arange(0, 4)[None, :]).to(tl.int32)
    tile = dequantise(tl.load(packed + row[:, None] * 64 + byte[None, :]), code, ROWS, 128, WIDE)
    tl.store(out + row[:, None] * 128 + column[None, :], tile)


def dequantised(packed: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, 64]`` bytes with ``[N, 4]`` scales, N a multiple of 32."""
    out = torch.empty(packed.shape[0], 128, dtype=dtype, device=packed.device)
    dequantise_kernel[(packed.shape[0] // 32,)](packed, codes, out, ROWS=32, WIDE=dtype == torch.float32)
    return out
