"""Device functions for MXFP4: weights dequantised in registers, exactly, and products of rows with such weights.

MXFP4 (OCP Microscaling Formats v1.0, 2023): a byte holds two E2M1 numbers, the even one in the low nibble, and 32
neighbours share a scale 2^(s - 127). Both factors, and every product of them, are exact in bf16: an E2M1 nibble
``seem`` put where bf16 has its sign and lowest bits of exponent is the number times 2^-126, also where it is
subnormal. So two exact multiplications make the weight, and no table is read.

*Planes.* Weights are read as words of two bytes. Nibble i of word q belongs to column 4 q + i, so a tile of words
gives four tiles of weights. Two neighbouring words fill a register, and the same bits of both halves make a pair of
bf16: nothing is shuffled, and the tile of words is read from shared memory in the layout of the product's operand.
x comes the same way (`to_planes`): ``[4, K / 4]`` a row, column 4 q + i at [i, q].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expert_parts import multiply

TWO_126: tl.constexpr = tl.constexpr(2.0**126)

# Two words ($1) and the multipliers of each, twice ($2, $3; the same register as a rule, and the permutation then
# costs nothing), to a pair of bf16: `first` leaves one nibble of each word in t, at bits 0 to 3. A product with two
# powers of two is two shifts at once, on the multipliers: they have less to do here than the pipe of logical
# operations. fma, since SM80 has no mul.bf16x2; -0 leaves signs.
_UNPACK = """
{
    .reg .b32 s, t, zero, bias;
    prmt.b32 s, $2, $3, 0x7610;
    mov.b32 zero, 0x80008000;
    mov.b32 bias, 0x7E807E80;
    first
    and.b32 t, t, 0x81C081C0;
    fma.rn.bf16x2 t, t, bias, zero;
    fma.rn.bf16x2 $0, t, s, zero;
}
"""
UNPACK_0 = tl.constexpr(_UNPACK.replace("first", "and.b32 t, $1, 0x000F000F; mul.lo.u32 t, t, 0x00001040;"))
UNPACK_1 = tl.constexpr(_UNPACK.replace("first", "and.b32 t, $1, 0x00F000F0; mul.lo.u32 t, t, 0x00000104;"))
UNPACK_2 = tl.constexpr(
    _UNPACK.replace("first", "shr.u32 t, $1, 8; and.b32 t, t, 0x000F000F; mul.lo.u32 t, t, 0x00001040;")
)
UNPACK_3 = tl.constexpr(
    _UNPACK.replace("first", "shr.u32 t, $1, 8; and.b32 t, t, 0x00F000F0; mul.lo.u32 t, t, 0x00000104;")
)

# A byte of a word ($1), chosen by a selector 0x4b4b ($2), to 2^(byte - 127) in bf16, twice. 0 becomes a subnormal
# number by the maximum, 255 an infinity and by s * 0 + s a NaN.
EXPAND_E8M0: tl.constexpr = tl.constexpr("""
{
    .reg .b32 s, zero, least;
    mov.b32 zero, 0;
    mov.b32 least, 0x00400040;
    prmt.b32 s, $1, 0, $2;
    shl.b32 s, s, 7;
    max.bf16x2 s, s, least;
    fma.rn.bf16x2 $0, s, zero, s;
}
""")


@triton.jit
def selectors(scale, at):
    """For bytes at `at`: which byte of its word each is, as `multipliers` wants it."""
    if scale.dtype.element_ty == tl.int32:
        pick = 0x4040 + (at & 3) * 0x0101
    else:
        pick = at * 0 + 0x4040
    return pick


@triton.jit
def loaded_selectors(scale, at):
    """`selectors` by a load that loads nothing: Triton turns a tile into a product's layout only where it is loaded."""
    pick = selectors(scale, at)
    if scale.dtype.element_ty == tl.int32:
        pick = tl.load(scale + at, mask=at < 0, other=pick)
    return pick


@triton.jit
def load_scales(scale, at, inside):
    """The words that hold the bytes at `at`, or where the scales cannot be read in words those bytes.

    Asynchronous copies need four bytes, so a word is read for each byte, and a row need not begin at a word.
    """
    if scale.dtype.element_ty == tl.int32:
        word = tl.load(scale + (at >> 2), mask=inside, other=0)
    else:
        word = tl.load(scale + at, mask=inside, other=0).to(tl.int32)
    return word


@triton.jit
def multipliers(word, pick, WIDE: tl.constexpr):
    """2^(byte - 127): fp32 if WIDE, else a pair of equal bf16 in an int32."""
    if WIDE:
        code = (word >> ((pick & 3) * 8)) & 255
        bits = tl.where(code == 255, 0x7FC0, tl.maximum(code << 7, 0x40))
        value = (bits << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.inline_asm_elementwise(
            EXPAND_E8M0, "=r,r,r", [word, pick], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    return value


@triton.jit
def planes(words, scales, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr):
    """``[ROWS, BLOCK_Q]`` words and ``[ROWS, BLOCK_Q / 8]`` multipliers to four tiles of weights, exactly."""
    s = tl.reshape(tl.broadcast_to(scales[:, :, None], (ROWS, BLOCK_Q // 8, 8)), (ROWS, BLOCK_Q))
    if WIDE:
        w0 = _wide(words, 0) * s
        w1 = _wide(words, 4) * s
        w2 = _wide(words, 8) * s
        w3 = _wide(words, 12) * s
    else:
        w0 = _unpacked(words, s, UNPACK_0)
        w1 = _unpacked(words, s, UNPACK_1)
        w2 = _unpacked(words, s, UNPACK_2)
        w3 = _unpacked(words, s, UNPACK_3)
    return w0, w1, w2, w3


@triton.jit
def _unpacked(words, s, INSTRUCTIONS: tl.constexpr):
    return tl.inline_asm_elementwise(
        INSTRUCTIONS, "=r,r,r,r", [words, s], dtype=tl.bfloat16, is_pure=True, pack=2
    )  # fmt: skip


@triton.jit
def _wide(words, SHIFT: tl.constexpr):
    code = words.to(tl.int32) >> SHIFT
    return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * TWO_126


@triton.jit
def load_words(w, rows, q, stride_n, rows_left, columns_left, EVEN_N: tl.constexpr, EVEN_Q: tl.constexpr):
    """Some words of some rows of a packed weight, zero where there are none."""
    at = w + rows[:, None] * stride_n + q[None, :]
    if EVEN_N and EVEN_Q:
        words = tl.load(at)
    elif EVEN_Q:
        words = tl.load(at, mask=rows[:, None] < rows_left, other=0)
    else:
        words = tl.load(at, mask=(rows[:, None] < rows_left) & (q[None, :] < columns_left), other=0)
    return words


@triton.jit
def packed_product(
    x, live, w, scale, rows, offset, stride_wn, stride_wup, stride_sn, stride_sup, rows_left, Q,
    GATED: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, EVEN_N: tl.constexpr, EVEN_Q: tl.constexpr,
):  # fmt: skip
    """Rows of x times rows of a packed weight (and those of up, if GATED): two tiles, fp32, transposed if SWAP.

    x: pointers ``[BLOCK_M, 1]`` to rows in planes; Q: columns of a plane; offset: bytes from `scale` to the first row.
    """
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    q = tl.arange(0, BLOCK_Q)
    block = tl.arange(0, BLOCK_Q // 8)
    at = offset + rows[:, None] * stride_sn + block[None, :]
    pick = loaded_selectors(scale, at)
    pick_up = pick
    if GATED:
        pick_up = loaded_selectors(scale, at + stride_sup)
    for k in tl.range(0, Q, BLOCK_Q, num_stages=STAGES):
        if EVEN_Q:
            mask = live[:, None]
        else:
            mask = live[:, None] & (q[None, :] < Q - k)
        x0 = tl.load(x + q[None, :], mask=mask, other=0.0)
        x1 = tl.load(x + (Q + q)[None, :], mask=mask, other=0.0)
        x2 = tl.load(x + (2 * Q + q)[None, :], mask=mask, other=0.0)
        x3 = tl.load(x + (3 * Q + q)[None, :], mask=mask, other=0.0)
        inside = (rows[:, None] < rows_left) & (block[None, :] < (Q - k) // 8)
        words = load_words(w, rows, q, stride_wn, rows_left, Q - k, EVEN_N, EVEN_Q)
        scales = multipliers(load_scales(scale, at + k // 8, inside), pick, WIDE)
        w0, w1, w2, w3 = planes(words, scales, BLOCK_N, BLOCK_Q, WIDE)
        acc = multiply(acc, x0, w0, SWAP, WIDE)
        acc = multiply(acc, x1, w1, SWAP, WIDE)
        acc = multiply(acc, x2, w2, SWAP, WIDE)
        acc = multiply(acc, x3, w3, SWAP, WIDE)
        if GATED:
            words = load_words(w + stride_wup, rows, q, stride_wn, rows_left, Q - k, EVEN_N, EVEN_Q)
            scales = multipliers(load_scales(scale, at + stride_sup + k // 8, inside), pick_up, WIDE)
            w0, w1, w2, w3 = planes(words, scales, BLOCK_N, BLOCK_Q, WIDE)
            acc_up = multiply(acc_up, x0, w0, SWAP, WIDE)
            acc_up = multiply(acc_up, x1, w1, SWAP, WIDE)
            acc_up = multiply(acc_up, x2, w2, SWAP, WIDE)
            acc_up = multiply(acc_up, x3, w3, SWAP, WIDE)
        x += BLOCK_Q
        w += BLOCK_Q
    return acc, acc_up


@triton.jit
def to_planes(x, out, stride_k, Q, BLOCK: tl.constexpr):
    """One row of x, column 4 q + i to [i, q]."""
    i = tl.arange(0, 4)
    for k in tl.range(0, Q, BLOCK):
        q = k + tl.arange(0, BLOCK)
        row = tl.load(x + (4 * q[:, None] + i[None, :]) * stride_k, mask=q[:, None] < Q, other=0.0)
        tl.store(out + i[None, :] * Q + q[:, None], row, mask=q[:, None] < Q)
