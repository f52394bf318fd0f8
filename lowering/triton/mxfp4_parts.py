"""Device functions for MXFP4: weights dequantised in registers, exactly, and products of rows with such weights.

MXFP4 (OCP Microscaling Formats v1.0, 2023): a byte holds two E2M1 numbers, the even one in the low nibble, and 32
neighbours share a scale 2^(s - 127). Both factors, and every product of them, are exact in bf16: an E2M1 nibble
``seem`` put where bf16 has its sign and lowest bits of exponent is the number times 2^-126, also where it is
subnormal. So two exact multiplications make the weight, or one if the scale is 2 at most, and no table is read.

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
FINITE: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # all but the sign of an fp32
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)
MOST_ROWS_FAST: tl.constexpr = tl.constexpr(32)  # with more, weights cost little beside products, registers much

# Two words ($1) and the multiplier of both, as a pair ($2; $3 is the same), to a pair of bf16: what is put before the
# rest leaves one nibble of each word in t, at bits 0 to 3. A product with two powers of two is two shifts at once, on
# the multipliers: they have less to do here than the pipe of logical operations. fma, since SM80 has no mul.bf16x2; -0
# leaves signs.
_NIBBLES = (
    "and.b32 t, $1, 0x000F000F; mul.lo.u32 t, t, 0x00001040;",
    "and.b32 t, $1, 0x00F000F0; mul.lo.u32 t, t, 0x00000104;",
    "shr.u32 t, $1, 8; and.b32 t, t, 0x000F000F; mul.lo.u32 t, t, 0x00001040;",
    "shr.u32 t, $1, 8; and.b32 t, t, 0x00F000F0; mul.lo.u32 t, t, 0x00000104;",
)
_HEAD, _PLACE = "{ .reg .b32 t, zero, bias; mov.b32 zero, 0x80008000; ", " and.b32 t, t, 0x81C081C0; "
_BIAS, _TIMES = "mov.b32 bias, 0x7E807E80; fma.rn.bf16x2 t, t, bias, zero; ", "fma.rn.bf16x2 $0, t, $2, zero; }"
FAST_0, FAST_1, FAST_2, FAST_3 = (tl.constexpr(_HEAD + first + _PLACE + _TIMES) for first in _NIBBLES)
UNPACK_0, UNPACK_1, UNPACK_2, UNPACK_3 = (tl.constexpr(_HEAD + first + _PLACE + _BIAS + _TIMES) for first in _NIBBLES)
_BARE = "mov.b32 bias, 0x7E807E80; fma.rn.bf16x2 $0, t, bias, zero; }"
BARE_0, BARE_1, BARE_2, BARE_3 = (tl.constexpr(_HEAD + first + _PLACE + _BARE) for first in _NIBBLES)

# A byte of a word ($1), chosen by a selector 0x4b4b ($2), to a bf16 twice: 2^(byte - 127); 0 becomes a subnormal number
# by the maximum, 255 an infinity and by s * 0 + s a NaN. Or 2^(byte - 1), an infinity from 129 on. And four at once.
_ONE = """{
    .reg .b32 s, least, f, g;
    mov.b32 least, 0x00400040;
    prmt.b32 s, $1, 0, $2;
    shl.b32 s, s, 7;
    max.bf16x2 s, s, least;
    factor
    fma.rn.bf16x2 $0, s, f, g;
}"""
_FOUR = """{
    .reg .b32 s, t, least, f, g;
    mov.b32 least, 0x00400040;
    shl.b32 s, $4, 7;
    and.b32 s, s, 0x7F807F80;
    max.bf16x2 s, s, least;
    factor
    fma.rn.bf16x2 s, s, f, g;
    prmt.b32 $0, s, s, 0x1010;
    prmt.b32 $2, s, s, 0x3232;
    shr.u32 s, $4, 1;
    and.b32 s, s, 0x7F807F80;
    max.bf16x2 s, s, least;
    factor
    fma.rn.bf16x2 s, s, f, g;
    prmt.b32 $1, s, s, 0x1010;
    prmt.b32 $3, s, s, 0x3232;
}"""
_E8M0, _FAST = "mov.b32 f, 0; mov.b32 g, s;", "mov.b32 f, 0x7E807E80; mov.b32 g, 0x80008000;"
ONE_E8M0, ONE_FAST, FOUR_E8M0, FOUR_FAST = (
    tl.constexpr(text.replace("factor", factor)) for text in (_ONE, _FOUR) for factor in (_E8M0, _FAST)
)


@triton.jit
def loaded_selectors(scale, at):
    """For bytes at `at`: which byte of its word each is, as `multipliers` wants it; by a load that loads nothing, since
    Triton turns a tile into a product's layout only where it is loaded.
    """
    pick = at * 0 + 0x4040
    if scale.dtype.element_ty == tl.int32:
        pick = 0x4040 + (at & 3) * 0x0101
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
def loaded_shifts(scale, at):
    """Bits from the beginning of the words that hold the bytes at `at` to those; loaded as `loaded_selectors`."""
    return tl.load(scale + at, mask=at < 0, other=8 * (at & 3))


@triton.jit
def load_split(scale, at, inside, shift, left, EVEN: tl.constexpr):
    """Words ``[rows, 1]`` of the four bytes from `at` on, which are parts of two words; zero beyond `left` bytes."""
    need = (at & 3) + tl.minimum(left, 4) > 4
    low = tl.load(scale + (at >> 2), mask=inside, other=0)
    high = tl.load(scale + (at >> 2) + 1, mask=inside & need, other=0)
    word = tl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip
    if not EVEN:
        word = word & tl.where(left < 4, (1 << (8 * tl.minimum(left, 3))) - 1, -1)
    return word


@triton.jit
def multipliers(word, pick, WIDE: tl.constexpr, FAST: tl.constexpr):
    """2^(byte - 127): fp32 if WIDE, else equal bf16 twice in an int32. If FAST 2^(byte - 1), infinite from 129 on."""
    if WIDE:
        value = power_of_two((word >> ((pick & 3) * 8)) & 255)
    elif FAST:
        value = tl.inline_asm_elementwise(ONE_FAST, "=r,r,r", [word, pick], dtype=tl.int32, is_pure=True, pack=1)
    else:
        value = tl.inline_asm_elementwise(ONE_E8M0, "=r,r,r", [word, pick], dtype=tl.int32, is_pure=True, pack=1)
    return value


@triton.jit
def four_multipliers(words, FAST: tl.constexpr):
    """`multipliers` ``[rows, 4 W]`` in bf16 of whole words ``[rows, W]``."""
    if FAST:
        s0, s1, s2, s3 = tl.inline_asm_elementwise(
            FOUR_FAST, "=r,=r,=r,=r,r", [words], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )  # fmt: skip
    else:
        s0, s1, s2, s3 = tl.inline_asm_elementwise(
            FOUR_E8M0, "=r,=r,=r,=r,r", [words], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )  # fmt: skip
    return tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def weights(words, scales, pick, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr,
            WHOLE: tl.constexpr):  # fmt: skip
    """Four tiles of weights from words of codes and of scales."""
    if WHOLE:
        s = four_multipliers(scales, FAST)
    else:
        s = multipliers(scales, pick, WIDE, FAST)
    return planes(words, s, ROWS, BLOCK_Q, WIDE, FAST)


@triton.jit
def planes(words, scales, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr):
    """``[ROWS, BLOCK_Q]`` words and ``[ROWS, BLOCK_Q / 8]`` multipliers to four tiles of weights, exactly."""
    s = tl.reshape(tl.broadcast_to(scales[:, :, None], (ROWS, BLOCK_Q // 8, 8)), (ROWS, BLOCK_Q))
    if WIDE:
        w0 = _wide(words, 0) * s
        w1 = _wide(words, 4) * s
        w2 = _wide(words, 8) * s
        w3 = _wide(words, 12) * s
    elif FAST:
        w0 = _unpacked(words, s, FAST_0)
        w1 = _unpacked(words, s, FAST_1)
        w2 = _unpacked(words, s, FAST_2)
        w3 = _unpacked(words, s, FAST_3)
    else:
        w0 = _unpacked(words, s, UNPACK_0)
        w1 = _unpacked(words, s, UNPACK_1)
        w2 = _unpacked(words, s, UNPACK_2)
        w3 = _unpacked(words, s, UNPACK_3)
    return w0, w1, w2, w3


@triton.jit
def numbers(words, WIDE: tl.constexpr):
    """Four tiles of E2M1 numbers in fp32, without their scales."""
    if WIDE:
        n0, n1, n2, n3 = _wide(words, 0), _wide(words, 4), _wide(words, 8), _wide(words, 12)
    else:
        n0, n1 = _bare(words, BARE_0).to(tl.float32), _bare(words, BARE_1).to(tl.float32)
        n2, n3 = _bare(words, BARE_2).to(tl.float32), _bare(words, BARE_3).to(tl.float32)
    return n0, n1, n2, n3


@triton.jit
def power_of_two(code):
    """2^(code - 127) in fp32 for E8M0 bytes in int32; 255 is NaN."""
    bits = tl.where(code == 255, 0x7FC00000, tl.maximum(code << 23, 0x00400000))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bare(words, INSTRUCTIONS: tl.constexpr):
    return tl.inline_asm_elementwise(INSTRUCTIONS, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


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
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, EVEN_N: tl.constexpr, EVEN_Q: tl.constexpr, WHOLE: tl.constexpr,
    TOGETHER: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Rows of x times rows of a packed weight (and those of up, if GATED): two tiles, fp32, transposed if SWAP.

    x: pointers ``[BLOCK_M, 1]`` to rows in planes; Q: columns of a plane; offset: bytes from `scale` to the first row.
    WHOLE: scales are read in words of four; SPLIT: which are parts of two words of memory each.
    TOGETHER: the four planes are one product, of BLOCK_Q columns of each.

    The scales are first taken to be 2 at most: one multiplication a weight is enough then. If one was not, no sum of
    its row is finite, and all is computed again, with two multiplications.
    """
    FAST: tl.constexpr = not WIDE and BLOCK_M <= MOST_ROWS_FAST
    acc, acc_up = _product(
        x, live, w, scale, rows, offset, stride_wn, stride_wup, stride_sn, stride_sup, rows_left, Q, FAST,
        GATED, SWAP, WIDE, STAGES, BLOCK_M, BLOCK_N, BLOCK_Q, EVEN_N, EVEN_Q, WHOLE, TOGETHER, SPLIT,
    )  # fmt: skip
    if FAST:
        size = tl.maximum(acc.to(tl.int32, bitcast=True) & FINITE, acc_up.to(tl.int32, bitcast=True) & FINITE)
        size = tl.max(tl.max(size, 1), 0)
        if size >= INFINITE:
            # 0, in a way that keeps the compiler from holding the second loop's addresses while the first runs.
            later = tl.inline_asm_elementwise("shr.u32 $0, $1, 31;", "=r,r", [size], tl.int32, is_pure=True, pack=1)
            later = tl.multiple_of(later, 16)
            acc, acc_up = _product(
                x + later, live, w + later, scale + later, rows + later, offset + later, stride_wn, stride_wup,
                stride_sn, stride_sup, rows_left, Q, False, GATED, SWAP, WIDE, 2, BLOCK_M, BLOCK_N,
                BLOCK_Q, EVEN_N, EVEN_Q, WHOLE, TOGETHER, SPLIT,
            )  # fmt: skip
    return acc, acc_up


@triton.jit
def _multiply_planes(acc, x0, x1, x2, x3, w0, w1, w2, w3, SWAP: tl.constexpr, WIDE: tl.constexpr,
                     TOGETHER: tl.constexpr):  # fmt: skip
    """Four planes; TOGETHER: as one product of their columns side by side, x0 being all of x."""
    if TOGETHER:
        w = tl.permute(tl.join(tl.join(w0, w1), tl.join(w2, w3)), (0, 3, 2, 1))
        acc = multiply(acc, x0, tl.reshape(w, (w0.shape[0], 4 * w0.shape[1])), SWAP, WIDE)
    else:
        acc = multiply(acc, x0, w0, SWAP, WIDE)
        acc = multiply(acc, x1, w1, SWAP, WIDE)
        acc = multiply(acc, x2, w2, SWAP, WIDE)
        acc = multiply(acc, x3, w3, SWAP, WIDE)
    return acc


@triton.jit
def _product(
    x, live, w, scale, rows, offset, stride_wn, stride_wup, stride_sn, stride_sup, rows_left, Q, FAST: tl.constexpr,
    GATED: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, EVEN_N: tl.constexpr, EVEN_Q: tl.constexpr, WHOLE: tl.constexpr,
    TOGETHER: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """`packed_product`; FAST: infinite or NaN if a scale is above 2."""
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    q = tl.arange(0, BLOCK_Q)
    scaled: tl.constexpr = BLOCK_Q // (32 if WHOLE else 8)
    block = tl.arange(0, scaled)
    at = offset + rows[:, None] * stride_sn + block[None, :] * (4 if WHOLE else 1)
    pick, pick_up = at, at
    if not WHOLE:
        pick = loaded_selectors(scale, at)
        if GATED:
            pick_up = loaded_selectors(scale, at + stride_sup)
    elif SPLIT:
        pick = loaded_shifts(scale, at)
        if GATED:
            pick_up = loaded_shifts(scale, at + stride_sup)
    for k in tl.range(0, Q, BLOCK_Q, num_stages=STAGES):
        if TOGETHER:
            column = tl.arange(0, 4 * BLOCK_Q)[None, :]
            if EVEN_Q:
                mask = live[:, None]
            else:
                mask = live[:, None] & (column % BLOCK_Q < Q - k)
            x0 = tl.load(x + (column // BLOCK_Q) * Q + column % BLOCK_Q, mask=mask, other=0.0)
            x1, x2, x3 = x0, x0, x0
        else:
            if EVEN_Q:
                mask = live[:, None]
            else:
                mask = live[:, None] & (q[None, :] < Q - k)
            x0 = tl.load(x + q[None, :], mask=mask, other=0.0)
            x1 = tl.load(x + (Q + q)[None, :], mask=mask, other=0.0)
            x2 = tl.load(x + (2 * Q + q)[None, :], mask=mask, other=0.0)
            x3 = tl.load(x + (3 * Q + q)[None, :], mask=mask, other=0.0)
        inside = (rows[:, None] < rows_left) & (block[None, :] * (BLOCK_Q // scaled) < Q - k)
        words = load_words(w, rows, q, stride_wn, rows_left, Q - k, EVEN_N, EVEN_Q)
        if SPLIT:
            scales = load_split(scale, at + k // 8, inside, pick, (Q - k) // 8, EVEN_Q)
        else:
            scales = load_scales(scale, at + k // 8, inside)
        w0, w1, w2, w3 = weights(words, scales, pick, BLOCK_N, BLOCK_Q, WIDE, FAST, WHOLE)
        acc = _multiply_planes(acc, x0, x1, x2, x3, w0, w1, w2, w3, SWAP, WIDE, TOGETHER)
        if GATED:
            words = load_words(w + stride_wup, rows, q, stride_wn, rows_left, Q - k, EVEN_N, EVEN_Q)
            if SPLIT:
                scales = load_split(scale, at + stride_sup + k // 8, inside, pick_up, (Q - k) // 8, EVEN_Q)
            else:
                scales = load_scales(scale, at + stride_sup + k // 8, inside)
            w0, w1, w2, w3 = weights(words, scales, pick_up, BLOCK_N, BLOCK_Q, WIDE, FAST, WHOLE)
            acc_up = _multiply_planes(acc_up, x0, x1, x2, x3, w0, w1, w2, w3, SWAP, WIDE, TOGETHER)
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
