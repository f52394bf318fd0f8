"""Device functions of the expert kernels: MXFP4 turned into bf16 or fp32, activations, tiles of weights.

MXFP4 (OCP Microscaling Formats v1.0, 2023): a byte holds two E2M1 numbers, the even one in the low nibble, and 32
neighbours share a scale 2^(s - 127). Both factors, and every product of them, are exact in bf16: an E2M1 nibble
``seem`` put where bf16 has its sign and lowest bits of exponent is the number times 2^-126, also where it is
subnormal. So two exact multiplications make the weight, and no table is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

LINEAR: tl.constexpr = tl.constexpr(0)
SILU: tl.constexpr = tl.constexpr(1)
GELU: tl.constexpr = tl.constexpr(2)
GELU_TANH: tl.constexpr = tl.constexpr(3)
SWIGLU_OAI: tl.constexpr = tl.constexpr(4)
RELU2: tl.constexpr = tl.constexpr(5)

TWO_126: tl.constexpr = tl.constexpr(2.0**126)

# Four bytes in one register to four registers, each with the low nibble's bf16 in its low half and the high nibble's
# in its high half, times 2^-126. A product with two powers of two is two shifts at once, on the multipliers, which
# have less to do here than the pipe of the logical operations.
UNPACK_E2M1: tl.constexpr = tl.constexpr("""
{
    .reg .b32 b, m, s;
    and.b32 b, $4, 0x000000FF;
    mul.lo.u32 m, b, 0x00040040;
    mul.lo.u32 s, b, 0x01001000;
    and.b32 m, m, 0x01C001C0;
    and.b32 s, s, 0x80008000;
    or.b32 $0, m, s;
    prmt.b32 b, $4, 0, 0x4441;
    mul.lo.u32 m, b, 0x00040040;
    mul.lo.u32 s, b, 0x01001000;
    and.b32 m, m, 0x01C001C0;
    and.b32 s, s, 0x80008000;
    or.b32 $1, m, s;
    prmt.b32 b, $4, 0, 0x4442;
    mul.lo.u32 m, b, 0x00040040;
    mul.lo.u32 s, b, 0x01001000;
    and.b32 m, m, 0x01C001C0;
    and.b32 s, s, 0x80008000;
    or.b32 $2, m, s;
    shr.u32 b, $4, 24;
    mul.lo.u32 m, b, 0x00040040;
    mul.lo.u32 s, b, 0x01001000;
    and.b32 m, m, 0x01C001C0;
    and.b32 s, s, 0x80008000;
    or.b32 $3, m, s;
}
""")


@triton.jit
def e2m1(packed, WIDE: tl.constexpr):
    """The low and the high nibbles of bytes as numbers: bf16, or fp32 if WIDE; side by side, low ones first."""
    if WIDE:
        codes = packed.to(tl.uint32)
        low = (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True)
        high = (((codes & 128) << 24) | ((codes & 112) << 18)).to(tl.float32, bitcast=True)
    else:
        both = tl.inline_asm_elementwise(UNPACK_E2M1, "=r,=r,=r,=r,r", [packed], dtype=tl.uint32, is_pure=True, pack=4)
        low = both.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (both >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.interleave(low, high) * TWO_126


@triton.jit
def e8m0(code, WIDE: tl.constexpr):
    """2^(code - 127) in bf16, or in fp32 if WIDE. Code 255 is NaN; code 0 is a subnormal number, not zero."""
    bits = tl.where(code == 255, 0x7FC0, tl.maximum(code << 7, 0x40))
    if WIDE:
        value = (bits << 16).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value


@triton.jit
def dequantise(packed, codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """``[ROWS, COLUMNS / 2]`` bytes and ``[ROWS, COLUMNS / 32]`` codes to ``[ROWS, COLUMNS]`` numbers, exactly."""
    blocks = tl.reshape(e2m1(packed, WIDE), (ROWS, COLUMNS // 32, 32))
    return tl.reshape(blocks * e8m0(codes, WIDE)[:, :, None], (ROWS, COLUMNS))


@triton.jit
def load_scales(scale, rows, stride_n, offset, rows_left, columns_left, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr):
    """Codes of the scales of some rows and of the next BLOCK_K columns, int32.

    scale: bytes, or words of four. Asynchronous copies need four bytes, so that a word is read for each byte: a row
    need not begin at a word, though if it does (ALIGNED) the shifts are known while compiling.
    offset: bytes from `scale` to the first code; stride_n: bytes, or words if ALIGNED.
    """
    block = tl.arange(0, BLOCK_K // 32)
    if ALIGNED:
        at = block[None, :] + rows[:, None] * stride_n * 4
    else:
        at = block[None, :] + (rows[:, None] * stride_n + offset)
    inside = (block[None, :] < columns_left // 32) & (rows[:, None] < rows_left)
    if scale.dtype.element_ty == tl.int32:
        word = tl.load(scale + (at >> 2), mask=inside, other=0)
        code = (word >> ((at & 3) * 8)) & 255
    else:
        code = tl.load(scale + at, mask=inside, other=0).to(tl.int32)
    return code


@triton.jit
def load_weights(w, codes, rows, stride_n, stride_k, rows_left, columns_left,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
                 PACKED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The next BLOCK_K columns of some rows of a weight, zero where there are none; dequantised if PACKED."""
    used: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    if PACKED:
        columns_left = columns_left // 2
    column = tl.arange(0, used)
    at = w + rows[:, None] * stride_n + column[None, :] * stride_k
    if EVEN_N and EVEN_K:
        tile = tl.load(at)
    elif EVEN_K:
        tile = tl.load(at, mask=rows[:, None] < rows_left, other=0)
    else:
        tile = tl.load(at, mask=(rows[:, None] < rows_left) & (column[None, :] < columns_left), other=0)
    if PACKED:
        tile = dequantise(tile, codes, BLOCK_N, BLOCK_K, WIDE)
    return tile


@triton.jit
def multiply(acc, x, w, SWAP: tl.constexpr, IEEE: tl.constexpr):
    """acc + x @ w^T, or its transpose if SWAP; fp32 operands are kept whole (never tf32)."""
    if SWAP:
        if IEEE:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(w, tl.trans(x), acc)
    else:
        if IEEE:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc)
    return acc


@triton.jit
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """The activation of `sm12x::moe` in fp32; a NaN stays one."""
    if limit is not None:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == SWIGLU_OAI:
        y = gate * tl.sigmoid(gate * alpha)
        up = up + 1.0
    elif ACTIVATION == SILU:
        y = gate * tl.sigmoid(gate)
    elif ACTIVATION == GELU:
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u)
        y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        positive = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = positive * positive
    if GATED:
        y = y * up
    return y
