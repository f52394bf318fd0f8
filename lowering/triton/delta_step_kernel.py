"""One or a few tokens of the gated delta rule against a pool of states, in one launch, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_parts import unit_scale

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _unit_row(base, cols, stride, eps, NORM: tl.constexpr):
    x = tl.load(base + cols * stride).to(tl.float32)
    return x * unit_scale(tl.sum(x * x, 0), eps, NORM)


@triton.jit
def _read_decay(g, cols, stride_gd, PER_CHANNEL: tl.constexpr):
    """Natural logarithm of the decay, ``[K]``."""
    if PER_CHANNEL:
        return tl.load(g + cols * stride_gd).to(tl.float32)
    return tl.load(g).to(tl.float32) + cols * 0.0


@triton.jit
def _token(S, q, k, v, decay, beta):
    """The state behind a token, its u and its o. Both products read the state before k is written."""
    S = S * tl.exp2(decay * LOG2E)[:, None]
    said, asked = tl.reduce((S * k[:, None], S * q[:, None]), 0, _add_pairs)
    u = beta * (v - said)
    return S + k[:, None] * u[None, :], u, asked + tl.sum(k * q, 0) * u


@triton.jit
def update_kernel(
    q, k, v, g, beta, pool, slots, out,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_gb, stride_gt, stride_gh, stride_gd,
    stride_bb, stride_bt, stride_bh, stride_pp, stride_ph, stride_pk, stride_pv, stride_slot,
    stride_ob, stride_ot, stride_oh, scale, eps,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    NORM: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Grid (V / BLOCK_V, value heads, B): `sm12x::gated_delta_rule_update`."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    cols = tl.arange(0, K)
    out_cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = tl.load(slots + b * stride_slot).to(tl.int64)
    out += b * stride_ob + h * stride_oh + out_cols
    if slot < 0:
        for s in tl.static_range(0, TOKENS):
            tl.store(out + s * stride_ot, tl.zeros((BLOCK_V,), out.dtype.element_ty))
        return
    state = pool + slot * stride_pp + h * stride_ph + cols[:, None] * stride_pk + out_cols[None, :] * stride_pv
    S = tl.load(state).to(tl.float32)
    q += b * stride_qb + (h // GROUP) * stride_qh
    k += b * stride_kb + (h // GROUP) * stride_kh
    v += b * stride_vb + h * stride_vh + out_cols * stride_vd
    g += b * stride_gb + h * stride_gh
    beta += b * stride_bb + h * stride_bh
    for s in tl.static_range(0, TOKENS):
        q_row = _unit_row(q + s * stride_qt, cols, stride_qd, eps, NORM) * scale
        k_row = _unit_row(k + s * stride_kt, cols, stride_kd, eps, NORM)
        decay = _read_decay(g + s * stride_gt, cols, stride_gd, PER_CHANNEL)
        value = tl.load(v + s * stride_vt).to(tl.float32)
        strength = tl.load(beta + s * stride_bt).to(tl.float32)
        S, _, o = _token(S, q_row, k_row, value, decay, strength)
        tl.store(out + s * stride_ot, o.to(out.dtype.element_ty))
    tl.store(state, S.to(pool.dtype.element_ty))


@triton.jit
def verify_kernel(
    q, k, v, g, beta, pool, journal, slots, accepted, turn, out,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_gb, stride_gt, stride_gh, stride_gd,
    stride_bb, stride_bt, stride_bh, stride_pp, stride_ph, stride_pk, stride_pv,
    stride_jp, stride_half, stride_jt, stride_jh, stride_jd, stride_slot, stride_acc, stride_turn,
    stride_ob, stride_ot, stride_oh, scale, eps,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, NORM: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Grid (V / BLOCK_V, value heads, B): `sm12x::gated_delta_rule_verify`."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    cols = tl.arange(0, K)
    out_cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = tl.load(slots + b * stride_slot).to(tl.int64)
    out += b * stride_ob + h * stride_oh + out_cols
    if slot < 0:
        for s in tl.static_range(0, TOKENS):
            tl.store(out + s * stride_ot, tl.zeros((BLOCK_V,), out.dtype.element_ty))
        return
    state = pool + slot * stride_pp + h * stride_ph + cols[:, None] * stride_pk + out_cols[None, :] * stride_pv
    S = tl.load(state).to(tl.float32)
    known = tl.load(accepted + b * stride_acc)
    half = tl.load(turn + b * stride_turn).to(tl.int64)
    journal += slot * stride_jp + h * stride_jh
    # A loop of fixed length: all entries are on their way before the state has come.
    for s in tl.static_range(0, DEPTH):
        entry = journal + half * stride_half + s * stride_jt
        use = cols < tl.where(known > s, K, 0)
        used = out_cols < tl.where(known > s, V, 0)
        k_row = tl.load(entry + cols * stride_jd, mask=use, other=0.0).to(tl.float32)
        u_row = tl.load(entry + (K + out_cols) * stride_jd, mask=used, other=0.0).to(tl.float32)
        channel = cols if PER_CHANNEL else cols * 0
        decay = tl.load(entry + (K + V + channel) * stride_jd, mask=use, other=0.0).to(tl.float32)
        S = S * tl.exp2(decay * LOG2E)[:, None] + k_row[:, None] * u_row[None, :]
    tl.store(state, S.to(pool.dtype.element_ty))

    q += b * stride_qb + (h // GROUP) * stride_qh
    k += b * stride_kb + (h // GROUP) * stride_kh
    v += b * stride_vb + h * stride_vh + out_cols * stride_vd
    g += b * stride_gb + h * stride_gh
    beta += b * stride_bb + h * stride_bh
    for s in tl.static_range(0, TOKENS):
        q_row = _unit_row(q + s * stride_qt, cols, stride_qd, eps, NORM) * scale
        k_row = _unit_row(k + s * stride_kt, cols, stride_kd, eps, NORM)
        decay = _read_decay(g + s * stride_gt, cols, stride_gd, PER_CHANNEL)
        value = tl.load(v + s * stride_vt).to(tl.float32)
        strength = tl.load(beta + s * stride_bt).to(tl.float32)
        S, u_row, o = _token(S, q_row, k_row, value, decay, strength)
        tl.store(out + s * stride_ot, o.to(out.dtype.element_ty))
        entry = journal + (1 - half) * stride_half + s * stride_jt
        tl.store(entry + (K + out_cols) * stride_jd, u_row.to(journal.dtype.element_ty))
        if tl.program_id(0) == 0:
            tl.store(entry + cols * stride_jd, k_row.to(journal.dtype.element_ty))
            if PER_CHANNEL:
                tl.store(entry + (K + V + cols) * stride_jd, decay.to(journal.dtype.element_ty))
            else:
                tl.store(entry + (K + V) * stride_jd, tl.load(g + s * stride_gt).to(journal.dtype.element_ty))
