"""`sm12x::mxfp4_linear`: a linear layer whose weight is stored in four bits.

A weight of N rows and K columns is stored as one byte for two neighbours along K (the even column in the low
nibble) and a scale for every block of columns::

    y[..., n] = bias[n] + sum_k x[..., k] * e2m1(nibble[n,k]) * scale[n, k div block] * global_scale

``mxfp4``: blocks of 32, scales are E8M0 bytes s, meaning 2^(s - 127), 255 is NaN. ``nvfp4``: blocks of 16,
scales are E4M3, and one fp32 factor for the whole weight. Sources: OCP Microscaling Formats v1.0 (2023),
sections 5.3.3 (E2M1) and 5.4.1 (E8M0); NVIDIA's NVFP4 description (2025).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import check_one_of, wide_dtype
from ._define import Cost, define_custom_op, semantic_op

FP4_FORMATS = ("mxfp4", "nvfp4")
BLOCK = {"mxfp4": 32, "nvfp4": 16}

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
_E8M0 = [2.0 ** (s - 127) for s in range(255)] + [math.nan]


def dequantize_fp4(
    op: str,
    packed: Tensor,
    scale: Tensor,
    format: str,
    global_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers that packed weights stand for: exact in fp64; in fp32 the largest E8M0 scales overflow.

    Args:
        op: name of the op for messages.
        packed: uint8 (or float4_e2m1fn_x2) ``[..., N, K / 2]``.
        scale: ``[..., N, K / block]``: uint8 or float8_e8m0fnu for ``mxfp4``, float8_e4m3fn for ``nvfp4``.
        format: ``mxfp4`` or ``nvfp4``.
        global_scale: broadcastable to ``[...]``, ``nvfp4`` only; default 1.
        dtype: of the result ``[..., N, K]``.

    Raises:
        ValueError: shapes, dtypes or ``format`` are not as above.
    """
    check_one_of(op, "format", format, FP4_FORMATS)
    columns = 2 * packed.shape[-1]
    if scale.shape != (*packed.shape[:-1], columns // BLOCK[format]) or columns % BLOCK[format]:
        raise ValueError(
            f"sm12x::{op}: packed weight {tuple(packed.shape)} and scale {tuple(scale.shape)} do not fit "
            f"{format}'s blocks of {BLOCK[format]}"
        )
    if packed.element_size() != 1 or packed.dtype == torch.int8:
        raise ValueError(f"sm12x::{op}: packed weight is {packed.dtype}, not uint8 or float4_e2m1fn_x2")
    if format == "mxfp4":
        if scale.dtype not in (torch.uint8, torch.float8_e8m0fnu) or global_scale is not None:
            raise ValueError(f"sm12x::{op}: mxfp4 takes E8M0 scales and no global scale, not {scale.dtype}")
        table = torch.tensor(_E8M0, dtype=dtype, device=scale.device)
        factor = table[scale.view(torch.uint8).long()]
    else:
        if scale.dtype != torch.float8_e4m3fn:
            raise ValueError(f"sm12x::{op}: nvfp4 takes E4M3 scales, not {scale.dtype}")
        factor = scale.to(dtype)
    codes = packed.view(torch.uint8)
    codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    values = torch.tensor(E2M1_VALUES, dtype=dtype, device=packed.device)[codes.long()]
    values = (values.unflatten(-1, (-1, BLOCK[format])) * factor[..., None]).flatten(-2)
    return values if global_scale is None else values * global_scale.to(dtype)[..., None, None]


def mxfp4_linear_fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    format: str = "mxfp4",
    global_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or x.dtype)


def mxfp4_linear_cost(a: dict[str, Any]) -> Cost:
    x, weight, scales = a["x"], a["weight"], a["scales"]
    rows, N = x.numel() // max(1, x.shape[-1]), weight.shape[0]
    moved = weight.numel() + scales.numel() + (x.numel() + rows * N) * x.element_size()
    return Cost(bytes=moved, flops=2.0 * x.numel() * N)


@semantic_op(fake=mxfp4_linear_fake, cost=mxfp4_linear_cost)
def mxfp4_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    format: str = "mxfp4",
    global_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Linear layer on packed four-bit weights, eager reference (fp32 inside; fp64 for fp64 inputs).

    Args:
        x: ``[..., K]``, any strides, floating point.
        weight: uint8 (or float4_e2m1fn_x2) ``[N, K / 2]``, the even column in the low nibble.
        scales: ``[N, K / 32]`` uint8 or float8_e8m0fnu (``mxfp4``); ``[N, K / 16]`` float8_e4m3fn
            (``nvfp4``).
        bias: ``[N]``.
        format: ``mxfp4`` or ``nvfp4``; K is a multiple of its block.
        global_scale: 0-d, ``nvfp4`` only: a factor of the whole weight; default 1.
        out_dtype: dtype of the result; default that of ``x``.

    Returns:
        ``[..., N]``.

    Raises:
        ValueError: shapes, dtypes or ``format`` are not as above.
    """
    if x.shape[-1] != 2 * weight.shape[-1] or weight.ndim != 2:
        raise ValueError(
            f"sm12x::mxfp4_linear: x {tuple(x.shape)} and packed weight {tuple(weight.shape)} do not fit"
        )
    wide = wide_dtype(x)
    full = dequantize_fp4("mxfp4_linear", weight, scales, format, global_scale, wide)
    y = F.linear(x.to(wide), full, None if bias is None else bias.to(wide))
    return y.to(out_dtype or x.dtype).contiguous()


def mxfp4_weight_fake(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((*weight.shape[:-1], 2 * weight.shape[-1]), dtype=dtype)


@semantic_op(fake=mxfp4_weight_fake)
def mxfp4_weight(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that an MXFP4 weight stands for.

    Args:
        weight: uint8 (or float4_e2m1fn_x2) ``[..., N, K / 2]``, the even column in the low nibble.
        scales: ``[..., N, K / 32]`` uint8 or float8_e8m0fnu.
        dtype: of the result; each number is rounded to it once.

    Returns:
        ``[..., N, K]``.

    Raises:
        ValueError: shapes or dtypes are not as above.
    """
    return dequantize_fp4("mxfp4_weight", weight, scales, "mxfp4", dtype=torch.float64).to(dtype)


def _either_fake(dense: Tensor, claim: Tensor) -> Tensor:
    return torch.empty_like(dense)


def _either(dense: Tensor, claim: Tensor) -> Tensor:
    """`dense`, of which `claim` says what it is: readers may take either. It never reaches a compiled graph."""
    return dense.clone()


define_custom_op("sm12x::either", _either, _either_fake)
