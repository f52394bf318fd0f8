"""`sm12x::mxfp4_linear` → a kernel.

    triton.mxfp4_linear   on a GPU: decoded in registers
    cpu.tiled             on the CPU: decoded in pieces that stay in the cache
    aten.decoded          elsewhere: the weight is decoded, then multiplied

`sm12x::mxfp4_weight`, a weight that something else reads, is decoded in plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sm12x_compile.arch import Arch
from sm12x_compile.registry import YES, Call, accepts_unless, register_kernel

from .mxfp4_cpu import decode, tiled_linear


def _not_mxfp4(call: Call, arch: Arch) -> str | None:
    if call.format != "mxfp4" or call.global_scale is not None:
        return f"decodes MXFP4 (E8M0 scales of 32), not {call.format}"
    return None


def _not_tiled(call: Call, arch: Arch) -> str | None:
    return "decodes piece by piece, which is slow on a GPU" if arch.is_cuda else _not_mxfp4(call, arch)


register_kernel("mxfp4_linear", "cpu.tiled", accepts=accepts_unless(_not_tiled), merit=10)(tiled_linear)


@register_kernel("mxfp4_linear", "aten.decoded", accepts=accepts_unless(_not_mxfp4), inline=True, merit=5)
def decoded(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    format: str = "mxfp4",
    global_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight as a whole, for one call."""
    return F.linear(x, decode(weight, scales, x.dtype), None if bias is None else bias.to(x.dtype)).to(
        out_dtype or x.dtype
    )


@register_kernel("mxfp4_weight", "aten", accepts=lambda call, arch: YES, inline=True, merit=5)
def weight_decoded(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """See the op."""
    return decode(weight, scales, dtype)
