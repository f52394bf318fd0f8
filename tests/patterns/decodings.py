"""How people decode packed four-bit weights: functions ``(packed, scales) -> [.., N, K]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Decode = Callable[[Tensor, Tensor], Tensor]
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
ACCEPTED: dict[str, Decode] = {}
REFUSED: dict[str, tuple[Decode, str]] = {}


def accepted(function: Decode) -> Decode:
    ACCEPTED[function.__name__] = function
    return function


def refused(reason: str) -> Callable[[Decode], Decode]:
    def register(function: Decode) -> Decode:
        REFUSED[function.__name__] = (function, reason)
        return function

    return register


def table(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(VALUES, dtype=dtype)


def joined(low: Tensor, high: Tensor) -> Tensor:
    return torch.stack([low, high], dim=-1).flatten(-2)


def scaled(values: Tensor, factor: Tensor, block: int = 32) -> Tensor:
    return (values.unflatten(-1, (-1, block)) * factor.unsqueeze(-1)).flatten(-2)


@accepted
def table_stack_and_ldexp(packed, scales):
    low, high = table()[(packed & 0xF).long()], table()[(packed >> 4).long()]
    values = joined(low, high).unflatten(-1, (-1, 32))
    return torch.ldexp(values, (scales.int() - 127).unsqueeze(-1)).flatten(-2)


@accepted
def written_into_even_and_odd_columns(packed, scales):
    """As transformers converts gpt-oss, blocks and rows flattened."""
    *lead, half = packed.shape
    blocks, exponents = packed.reshape(-1, 16), scales.reshape(-1, 1).to(torch.int32) - 127
    lut = table(torch.bfloat16)
    out = torch.empty(blocks.shape[0], 32, dtype=torch.bfloat16)
    out[:, 0::2] = lut[(blocks & 0x0F).to(torch.int)]
    out[:, 1::2] = lut[(blocks >> 4).to(torch.int)]
    torch.ldexp(out, exponents, out=out)
    return out.reshape(*lead, half * 2)


@accepted
def chunks_of_rows(packed, scales):
    """As transformers converts large weights: rows in chunks, each written into its part of the result."""
    blocks, exponents = packed.reshape(-1, 16), scales.reshape(-1, 1).int() - 127
    out = torch.empty(blocks.shape[0], 32)
    rows = 1 + blocks.shape[0] // 3
    for start in range(0, blocks.shape[0], rows):
        part, chunk = out[start : start + rows], blocks[start : start + rows]
        part[:, 0::2] = table()[(chunk & 15).int()]
        part[:, 1::2] = table()[(chunk >> 4).int()]
        torch.ldexp(part, exponents[start : start + rows], out=part)
    return out.view(*packed.shape[:-1], -1)


@accepted
def typed_storage(packed, scales):
    codes, factors = packed.view(torch.float4_e2m1fn_x2), scales.view(torch.float8_e8m0fnu)
    return e8m0_dtype(codes.view(torch.uint8), factors.view(torch.uint8))


@accepted
def shifts_along_a_new_axis(packed, scales):
    codes = (packed.unsqueeze(-1) >> torch.tensor([0, 4], dtype=torch.uint8)) & 15
    values = table(torch.bfloat16)[codes.flatten(-2).to(torch.int64)]
    return scaled(values, torch.exp2(scales.float() - 127).to(torch.bfloat16))


@accepted
def exponent_by_a_shift_into_bits(packed, scales):
    factor = (scales.to(torch.int32) << 23).view(torch.float32)
    low, high = torch.nn.functional.embedding(packed.int() & 15, table()[:, None]), table()[:, None][packed.int() // 16]
    values = torch.cat([low, high], dim=-1).flatten(-2)
    return values.mul(factor.repeat_interleave(32, dim=-1))


@accepted
def bfloat16_bits(packed, scales):
    factor = (scales.to(torch.int16) << 7).view(torch.bfloat16)
    values = joined(packed % 16, torch.div(packed, 16, rounding_mode="floor"))
    return scaled(table(torch.bfloat16).take(values.long()), factor)


@accepted
def arithmetic_on_sign_exponent_and_mantissa(packed, scales):
    codes = joined(packed & 15, packed >> 4).int()
    sign, exponent, mantissa = codes >> 3, (codes >> 1) & 3, codes & 1
    normal = torch.pow(2.0, (exponent - 1).float()) * (1 + mantissa / 2)
    magnitude = torch.where(exponent == 0, mantissa / 2, normal)
    return scaled(magnitude * (1 - 2 * sign), 2.0 ** (scales.float() - 127.0))


@accepted
def bits_of_a_float(packed, scales):
    """e2m1 moved into the bits of a bfloat16, whose exponent bias is then multiplied away."""
    codes = joined(packed & 15, packed >> 4).to(torch.int16)
    bits = ((codes & 8) << 12) | ((codes & 7) << 6)
    values = bits.view(torch.bfloat16).float() * 2.0**126
    return scaled(values, torch.ldexp(torch.ones(()), scales.int() - 127)).bfloat16()


@accepted
def e8m0_dtype(packed, scales):
    values = joined(table()[(packed & 15).long()], table()[(packed >> 4).long()])
    return scaled(values, scales.view(torch.float8_e8m0fnu).float())


@accepted
def a_table_of_bytes(packed, scales):
    pairs = torch.cartesian_prod(table(), table()).flip(-1)
    return scaled(pairs[packed.long()].flatten(-2), torch.exp2(scales.float() - 127))


@accepted
def doubled_table_and_another_bias(packed, scales):
    lut = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
    values = lut[joined(packed & 15, packed >> 4).long()].float()
    return scaled(values, torch.exp2(scales.float() - 128))


@accepted
def magnitude_and_sign(packed, scales):
    codes = joined(packed.bitwise_and(15), packed.bitwise_right_shift(4))
    magnitude = table()[:8][(codes & 7).long()]
    values = torch.where(codes > 7, -magnitude, magnitude)
    return scaled(values, torch.pow(2, scales.to(torch.float32).sub(127)))


@accepted
def scale_before_the_halves_are_joined(packed, scales):
    factor = torch.exp2(scales.double() - 127).float().repeat_interleave(16, dim=-1)
    halves = [table()[c.long()] * factor for c in (packed & 15, packed >> 4)]
    return joined(*halves)


@accepted
def gathered_from_an_expanded_table(packed, scales):
    codes = joined(packed & 15, packed >> 4).long()
    values = table().expand(*codes.shape[:-1], 16).gather(-1, codes)
    return scaled(values, torch.exp2(scales.float() - 127))


@accepted
def signed_bytes(packed, scales):
    """int8 storage: the shift is arithmetic, so the high nibble is masked again."""
    signed = packed.view(torch.int8)
    values = joined(signed & 15, (signed >> 4) & 15)
    return scaled(table()[values.long()], torch.exp2(scales.float() - 127))


@refused("high nibble")
def high_nibble_first(packed, scales):
    values = joined(packed >> 4, packed & 15)
    return scaled(table()[values.long()], torch.exp2(scales.float() - 127))


@refused("not neighbours")
def halves_of_a_row(packed, scales):
    values = torch.cat([packed & 15, packed >> 4], dim=-1)
    return scaled(table()[values.long()], torch.exp2(scales.float() - 127))


@refused("not neighbours")
def halves_of_a_block(packed, scales):
    blocks = packed.unflatten(-1, (-1, 16))
    values = torch.cat([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    return scaled(table()[values.long()], torch.exp2(scales.float() - 127))


@refused("code 7")
def another_table(packed, scales):
    lut = torch.tensor([*VALUES[:7], 5.0, *VALUES[8:]])
    return scaled(lut[joined(packed & 15, packed >> 4).long()], torch.exp2(scales.float() - 127))


@refused("scale byte 127|stands for")
def another_bias(packed, scales):
    return scaled(table()[joined(packed & 15, packed >> 4).long()], torch.exp2(scales.float() - 128))


@refused("neighbours")
def blocks_of_sixteen(packed, scales):
    scales = scales.repeat_interleave(2, dim=-1)
    values = table()[joined(packed & 15, packed >> 4).long()].unflatten(-1, (-1, 32))
    shifted = torch.roll(scales.float(), 1, dims=-1).unflatten(-1, (-1, 2))
    return (values.unflatten(-1, (2, 16)) * torch.exp2(shifted - 127).unsqueeze(-1)).flatten(-3)


@refused("NVFP4")
def nvfp4(packed, scales):
    values = table()[joined(packed & 15, packed >> 4).long()]
    return scaled(values, scales.view(torch.float8_e4m3fn).float())


@refused("scale byte 1 ")
def clamped_scales(packed, scales):
    factor = torch.exp2(scales.float().clamp(min=64) - 127)
    return scaled(table()[joined(packed & 15, packed >> 4).long()], factor)


@refused("where they stand|written|neighbours|rows")
def a_chunk_that_is_scaled_twice(packed, scales):
    out = table()[joined(packed & 15, packed >> 4).long()] * torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    out[4:8] *= 2
    return out


@refused("where they stand|written|neighbours|rows")
def one_row_of_another(packed, scales):
    out = table()[joined(packed & 15, packed >> 4).long()] * torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    out[3] = out[4]
    return out


@refused("rows")
def scales_of_the_next_row(packed, scales):
    values = table()[joined(packed & 15, packed >> 4).long()]
    return scaled(values, torch.exp2(scales.float().flip(-2) - 127))


@refused("E8M0|not MXFP4")
def integers(packed, scales):
    return joined(packed & 15, packed >> 4).float() - 8
