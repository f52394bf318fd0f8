"""`sm12x::mxfp4_linear` in Triton: the kernels of the experts, with a single one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...registry import Call
from .arguments import DTYPES, card_of, device_guard
from .expert_pairs import start_pairs
from .expert_tiles import ExpertTiles, PairTiles, linear_tiles
from .experts import SINGLE, expert_launch, packed_refusal, weight_operands, weight_refusal

PLANES_BLOCK = 512


def linear_refusal(call: Call, arch: Arch) -> str | None:
    """Why `mxfp4_linear` cannot take this call on this card, in one sentence, or None."""
    if call.format != "mxfp4" or call.global_scale is not None:
        return f"dequantises MXFP4 (E8M0 scales of 32), not {call.format}"
    refusal = weight_refusal(arch, call.x, [call.weight], [call.scales], call.out_dtype)
    if refusal:
        return refusal
    if call.bias is not None and call.bias.dtype not in DTYPES:
        return f"adds a bias in fp16, bf16 or fp32, not {str(call.bias.dtype).removeprefix('torch.')}"
    return packed_refusal([call.weight], [call.scales])


def mxfp4_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, format: str = "mxfp4",
    global_scale: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::mxfp4_linear`, see `sm12x_compile.ops.mxfp4` for the arguments.

    Returns:
        ``[..., N]``.

    Raises:
        ValueError: x and the weight do not fit, or the format is not ``mxfp4``.
    """
    rows = x.numel() // max(1, x.shape[-1])
    tiles = linear_tiles(card_of(x), rows, x.dtype)
    return run_linear(tiles, x, weight, scales, bias, format, global_scale, out_dtype)


def run_linear(
    tiles: ExpertTiles | PairTiles, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None,
    format: str = "mxfp4", global_scale: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`mxfp4_linear` with the tiles given."""
    from .expert_kernel import expert_kernel
    from .order_kernel import planes_kernel

    if format != "mxfp4" or global_scale is not None:
        raise ValueError(f"sm12x::mxfp4_linear: this kernel dequantises MXFP4, not {format}")
    if x.shape[-1] != 2 * weight.shape[-1] or scales.shape != (weight.shape[0], weight.shape[1] // 16):
        raise ValueError(
            f"sm12x::mxfp4_linear: x {tuple(x.shape)}, packed weight {tuple(weight.shape)} and scales "
            f"{tuple(scales.shape)} do not fit"
        )
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or x.dtype)
    if not out.numel():
        return out
    flat, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, weight.shape[0])
    operands = weight_operands(weight[None], scales[None], None if bias is None else bias[None])
    with device_guard(x):
        if isinstance(tiles, PairTiles):
            start_pairs(tiles, flat, flat_out, operands)
            return out
        rows = torch.empty_like(flat, memory_format=torch.contiguous_format)
        planes_kernel[(flat.shape[0],)](**planes_arguments(flat, rows), num_warps=4)
        blocks = -(-flat.shape[0] // tiles.block_m)
        a, grid = expert_launch(rows, flat_out, operands, tiles, source=SINGLE, blocks=blocks, rows=flat.shape[0])
        expert_kernel[grid](**a, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    return out


def planes_arguments(x: Tensor, out: Tensor) -> dict[str, Any]:
    """The arguments of `planes_kernel` by name; its grid is (rows,)."""
    return dict(x=x, out=out, stride_xm=x.stride(0), stride_xk=x.stride(1), Q=x.shape[1] // 4, BLOCK=PLANES_BLOCK)
