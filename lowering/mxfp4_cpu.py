"""MXFP4 weights on the CPU, and as plain PyTorch: decoded in pieces that stay in the cache, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from sm12x_compile.ops._common import wide_dtype
from sm12x_compile.ops.mxfp4 import E2M1_VALUES

_PIECE = 1 << 18  # elements that are decoded at a time


def decode(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., N, K]`` from bytes ``[..., N, K / 2]`` and E8M0 scales ``[..., N, K / 32]``; exact in bf16, fp32, fp64.

    A number is a code's value times a power of two. Scale 0 means 2^-127, below the normal numbers of fp32; 255 is NaN.
    """
    wide = torch.float64 if dtype in (torch.float64, torch.float16) else torch.float32
    codes, exponents = packed.view(torch.uint8), scales.view(torch.uint8).int()
    values = torch.tensor(E2M1_VALUES, dtype=wide, device=packed.device)
    low, high = values[(codes & 15).int()], values[(codes >> 4).int()]
    # 2^(s - 127) from its bits: of a normal number, of the one number below, of NaN.
    bits = torch.where(exponents == 0, 1 << 22, torch.where(exponents == 255, 0x7FC00000, exponents << 23))
    factor = bits.view(torch.float32).to(wide)
    blocks = torch.stack([low, high], dim=-1).flatten(-2).unflatten(-1, (-1, 32))
    return (blocks * factor.unsqueeze(-1)).flatten(-2).to(dtype)


def tiled_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    format: str = "mxfp4",
    global_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`sm12x::mxfp4_linear`; see the op for the arguments. The dense weight never exists as a whole."""
    N, K = weight.shape[0], x.shape[-1]
    rows = x.reshape(-1, K)
    out = x.new_empty((rows.shape[0], N), dtype=out_dtype or x.dtype)
    step = max(1, _PIECE // max(1, K))
    wide = wide_dtype(x)
    for start in range(0, N, step):
        piece = decode(weight[start : start + step], scales[start : start + step], rows.dtype)
        y = torch.mm(rows, piece.t())
        out[:, start : start + step] = y if bias is None else y.to(wide) + bias[start : start + step].to(wide)
    return out.view(*x.shape[:-1], N)
