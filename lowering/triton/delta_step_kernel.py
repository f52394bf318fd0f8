"""One or a few tokens of the gated delta rule against a pool of states, in one launch, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_parts import LOG2E, token_rows, unit_rows


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _row(x, rows, s):
    """Row s of a small tile in registers."""
    return tl.sum(tl.where(rows[:, None] == s, x, 0.0), 0)


@triton.jit
def _token(S, q, k, v, decay, beta):
    """The state behind a token, and its o. Both products read the state before k is written."""
    S = S * tl.exp2(decay * LOG2E)[:, None]
    said, asked = tl.reduce((S * k[:, None], S * q[:, None]), 0, _add_pairs)
    u = beta * (v - said)
    return S + k[:, None] * u[None, :], asked + tl.sum(k * q, 0) * u


@triton.jit
def update_kernel(
    q, k, v, g, beta, pool, slots, out,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_gb, stride_gt, stride_gh, stride_gd,
    stride_bb, stride_bt, stride_bh, stride_pp, stride_ph, stride_pk, stride_pv, stride_slot,
    stride_ob, stride_ot, stride_oh, scale, eps,
    TOKENS: tl.constexpr, TOKENS_PAD: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, NORM: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Grid (V / BLOCK_V, value heads, B): `sm12x::gated_delta_rule_update`."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    cols = tl.arange(0, K)
    out_cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = tl.load(slots + b * stride_slot).to(tl.int64)
    # The tokens don't wait for the slot, and no load for a store.
    rows = tl.arange(0, TOKENS_PAD)
    channels = tl.arange(0, K if PER_CHANNEL else 1)
    q_tile = unit_rows(
        q + b * stride_qb + (h // GROUP) * stride_qh, rows, cols, stride_qt, stride_qd, eps, TOKENS, NORM
    )  # fmt: skip
    k_tile = unit_rows(
        k + b * stride_kb + (h // GROUP) * stride_kh, rows, cols, stride_kt, stride_kd, eps, TOKENS, NORM
    )  # fmt: skip
    v_tile = token_rows(v + b * stride_vb + h * stride_vh, rows, out_cols, stride_vt, stride_vd, TOKENS)
    g_tile = token_rows(g + b * stride_gb + h * stride_gh, rows, channels, stride_gt, stride_gd, TOKENS)
    beta_tile = token_rows(beta + b * stride_bb + h * stride_bh, rows, tl.arange(0, 1), stride_bt, 0, TOKENS)
    out += b * stride_ob + h * stride_oh + out_cols
    if slot < 0:
        for s in tl.static_range(0, TOKENS):
            tl.store(out + s * stride_ot, tl.zeros((BLOCK_V,), out.dtype.element_ty))
        return
    state = pool + slot * stride_pp + h * stride_ph + cols[:, None] * stride_pk + out_cols[None, :] * stride_pv
    S = tl.load(state).to(tl.float32)
    for s in tl.static_range(0, TOKENS):
        S, o = _token(
            S, _row(q_tile, rows, s) * scale, _row(k_tile, rows, s), _row(v_tile, rows, s), _row(g_tile, rows, s),
            _row(beta_tile, rows, s),
        )  # fmt: skip
        tl.store(out + s * stride_ot, o.to(out.dtype.element_ty))
    tl.store(state, S.to(pool.dtype.element_ty))
