"""MXFP4 on the CPU: decoding is exact for all bytes and scales, products agree with fp64."""

from __future__ import annotations

import pytest
import torch

from sm12x_compile.lowering.mxfp4_cpu import decode, tiled_linear
from sm12x_compile.ops import mxfp4_linear
from sm12x_compile.ops.mxfp4 import dequantize_fp4

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_with_every_scale(dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    exact = dequantize_fp4("moe", packed, scales, "mxfp4", dtype=torch.float64)
    assert exact[0, 2] == 2.0**-128 and exact[255].isnan().all() and exact[254].abs().max() == 6 * 2.0**127
    found = decode(packed, scales, dtype)
    wanted = exact.to(dtype)
    assert found.dtype == dtype
    assert ((found == wanted) | (found.isnan() & wanted.isnan())).all()
    assert torch.equal(found.signbit()[:255], wanted.signbit()[:255]), "minus zero stays"


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 96), (1, 32), (0, 64), (5, 2048)])
def test_products(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    N, K = 301, shape[-1]  # several pieces of rows at the largest K
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (N, K // 32), dtype=torch.uint8, generator=generator)
    bias = torch.randn(N, generator=generator, dtype=torch.float64).to(dtype)
    exact = mxfp4_linear.reference(x.double(), packed, scales, bias.double())
    found = tiled_linear(x, packed, scales, bias)
    assert found.dtype == dtype and found.shape == exact.shape and found.is_contiguous()
    # Rounded to dtype before the bias and behind it; the sum over K is accumulated in fp32 or wider.
    product = mxfp4_linear.reference(x.double(), packed, scales)
    magnitude = mxfp4_linear.reference(x.double().abs(), packed & 0x77, scales)
    bound = torch.finfo(dtype).eps * (exact.abs() + product.abs()) + K * torch.finfo(torch.float32).eps * magnitude
    assert ((found.double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()


def test_views_of_other_dtypes() -> None:
    packed = torch.randint(0, 256, (4, 32), dtype=torch.uint8)
    scales = torch.randint(120, 130, (4, 2), dtype=torch.uint8)
    wanted = decode(packed, scales, torch.float32)
    typed = decode(packed.view(torch.float4_e2m1fn_x2), scales.view(torch.float8_e8m0fnu), torch.float32)
    assert torch.equal(typed, wanted)
    assert torch.equal(decode(packed[::2], scales[::2], torch.float32), wanted[::2])
