"""Device functions of the expert kernels: tiles of plain weights, products, activations."""

from __future__ import annotations

import triton
import triton.language as tl

LINEAR: tl.constexpr = tl.constexpr(0)
SILU: tl.constexpr = tl.constexpr(1)
GELU: tl.constexpr = tl.constexpr(2)
GELU_TANH: tl.constexpr = tl.constexpr(3)
SWIGLU_OAI: tl.constexpr = tl.constexpr(4)
RELU2: tl.constexpr = tl.constexpr(5)
RELU: tl.constexpr = tl.constexpr(6)


@triton.jit
def load_weights(w, rows, stride_n, stride_k, rows_left, columns_left,
                 BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """The next BLOCK_K columns of some rows of a weight, zero where there are none."""
    column = tl.arange(0, BLOCK_K)
    at = w + rows[:, None] * stride_n + column[None, :] * stride_k
    if EVEN_N and EVEN_K:
        tile = tl.load(at)
    elif EVEN_K:
        tile = tl.load(at, mask=rows[:, None] < rows_left, other=0.0)
    else:
        tile = tl.load(at, mask=(rows[:, None] < rows_left) & (column[None, :] < columns_left), other=0.0)
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
        y = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == RELU2:
            y = y * y
    if GATED:
        y = y * up
    return y
