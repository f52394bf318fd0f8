"""Packed four-bit weights against the OCP definition, byte by byte, and against Hugging Face's unpacking."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.ops import mxfp4_linear

dequantize_fp4 = sys.modules["sm12x_compile.ops.mxfp4"].dequantize_fp4

# OCP Microscaling Formats v1.0, table 5: sign, two exponent bits (bias 1), one mantissa bit.
NIBBLE = {
    0b0000: 0.0, 0b0001: 0.5, 0b0010: 1.0, 0b0011: 1.5, 0b0100: 2.0, 0b0101: 3.0, 0b0110: 4.0, 0b0111: 6.0,
}  # fmt: skip
NIBBLE |= {0b1000 | code: -value for code, value in NIBBLE.items()}


def e8m0(byte: int) -> float:
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def random_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


def every_byte_and_scale() -> tuple[Tensor, Tensor]:
    """[256 scales, 256 bytes in 16 blocks of 16]: every byte under every scale."""
    packed = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    return packed, scale


def test_every_byte_under_every_scale() -> None:
    packed, scale = every_byte_and_scale()
    got = dequantize_fp4("test", packed, scale, "mxfp4", dtype=torch.float64)
    want = torch.tensor(
        [[NIBBLE[n] * e8m0(s) for byte in range(256) for n in (byte & 15, byte >> 4)] for s in range(256)],
        dtype=torch.float64,
    )
    assert want[255].isnan().all() and got[255].isnan().all()
    assert torch.equal(
        got[:255].view(torch.int64), want[:255].view(torch.int64)
    )  # bits: the sign of zero too
    narrow = dequantize_fp4("test", packed, scale, "mxfp4")
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, want.float(), rtol=0, atol=0, equal_nan=True)


def test_torchs_own_dtypes() -> None:
    packed, scale = every_byte_and_scale()
    want = dequantize_fp4("test", packed, scale, "mxfp4")
    typed = dequantize_fp4(
        "test", packed.view(torch.float4_e2m1fn_x2), scale.view(torch.float8_e8m0fnu), "mxfp4"
    )
    torch.testing.assert_close(typed, want, rtol=0, atol=0, equal_nan=True)


def test_against_hugging_face() -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random_bytes(3, 8, 2, 16), random_bytes(3, 8, 2, low=110, high=140, seed=1)
    want = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [E, K, N]
    got = dequantize_fp4("test", blocks.flatten(-2), scales, "mxfp4")
    torch.testing.assert_close(got.mT, want, rtol=0, atol=0)


def test_nvfp4_blocks_of_16_and_two_scales() -> None:
    packed = random_bytes(3, 16)
    scale = (torch.rand(3, 2, generator=torch.Generator().manual_seed(1)) * 4).to(torch.float8_e4m3fn)
    got = dequantize_fp4("test", packed, scale, "nvfp4", torch.tensor(0.25), torch.float64)
    for n in range(3):
        for column in range(32):
            byte = int(packed[n, column // 2])
            code = byte & 15 if column % 2 == 0 else byte >> 4
            assert got[n, column] == NIBBLE[code] * float(scale[n, column // 16]) * 0.25


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear(format: str, dtype: torch.dtype) -> None:
    weight = random_bytes(5, 32)
    if format == "mxfp4":
        scales, factor = random_bytes(5, 2, low=122, high=132, seed=1), None
        values = [e8m0(int(s)) for s in scales.flatten()]
    else:
        scales = torch.linspace(0.25, 5, 20).reshape(5, 4).to(torch.float8_e4m3fn)
        factor = torch.tensor(0.5)
        values = [float(s) * 0.5 for s in scales.flatten()]
    block = 64 * 5 // len(values)
    full = torch.tensor(
        [NIBBLE[int(b) >> shift & 15] for b in weight.flatten() for shift in (0, 4)], dtype=torch.float64
    )
    full = full * torch.tensor(values, dtype=torch.float64).repeat_interleave(block)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.linspace(-1, 1, 5).to(dtype)
    got = mxfp4_linear.overload(x, weight, scales, bias, format, factor)
    assert got.dtype == dtype
    want = x.double() @ full.reshape(5, 64).T + bias.double()
    torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=2 * torch.finfo(dtype).eps)
    wide = mxfp4_linear.overload(x, weight, scales, None, format, factor, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), want - bias.double(), atol=1e-3, rtol=1e-5)


def test_a_nan_scale_poisons_its_row_only() -> None:
    weight, scales = random_bytes(4, 16), random_bytes(4, 1, low=120, high=130)
    scales[2] = 255
    y = mxfp4_linear.reference(torch.ones(3, 32), weight, scales)
    assert y[:, 2].isnan().all() and y[:, [0, 1, 3]].isfinite().all()


def test_bad_operands() -> None:
    x, weight, scales = torch.zeros(2, 64), random_bytes(5, 32), random_bytes(5, 2)
    fp8 = torch.ones(5, 4).to(torch.float8_e4m3fn)
    run = mxfp4_linear.overload
    for bad, message in (
        (lambda: run(x, weight, scales, format="mxfp8"), "format='mxfp8', not one of"),
        (lambda: run(x[:, 1:], weight, scales), "do not fit"),
        (lambda: run(x, weight, scales[:, :1]), "blocks of 32"),
        (lambda: run(x, weight, scales, format="nvfp4"), "blocks of 16"),
        (lambda: run(x[:, :40], weight[:, :20], scales[:, :1]), "blocks of 32"),
        (lambda: run(x, weight, fp8[:, :2]), "E8M0"),  # NVFP4's scales are told apart
        (lambda: run(x, weight, random_bytes(5, 4), format="nvfp4"), "E4M3"),
        (lambda: run(x, weight, scales, global_scale=torch.tensor(1.0)), "no global scale"),
        (lambda: run(x, weight.float(), scales), "torch.float32, not uint8"),
        (lambda: run(x, weight.to(torch.int8), scales), "torch.int8, not uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_schema_and_fake(check_op: Any) -> None:
    x, weight, scales = torch.ones(2, 3, 64).bfloat16(), random_bytes(5, 32), random_bytes(5, 2, high=130)
    check_op(mxfp4_linear, x, weight, scales)
    check_op(mxfp4_linear, x.mT.contiguous().mT, weight, scales, torch.ones(5), out_dtype=torch.float32)
    check_op(
        mxfp4_linear, x[0], weight, torch.ones(5, 4).to(torch.float8_e4m3fn), None, "nvfp4", torch.tensor(2.0)
    )


def test_cost() -> None:
    x, weight, scales = torch.empty(1, 4, 4096).bfloat16(), random_bytes(512, 2048), random_bytes(512, 128)
    assert mxfp4_linear.cost is not None
    cost = mxfp4_linear.cost(dict(x=x, weight=weight, scales=scales))
    assert cost.bytes == 512 * 2048 + 512 * 128 + 2 * (4 * 4096 + 4 * 512)
    assert cost.flops == 2 * 4 * 4096 * 512
