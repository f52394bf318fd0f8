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
def _rows(base, rows, cols, stride_t, stride_d, TOKENS: tl.constexpr):
    """``[tokens, columns]`` fp32; zero behind the last token."""
    pointers = base + rows[:, None] * stride_t + cols[None, :] * stride_d
    return tl.load(pointers, mask=(rows < TOKENS)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _unit_rows(base, rows, cols, stride_t, stride_d, eps, TOKENS: tl.constexpr, NORM: tl.constexpr):
    x = _rows(base, rows, cols, stride_t, stride_d, TOKENS)
    return x * unit_scale(tl.sum(x * x, 1), eps, NORM)[:, None]


@triton.jit
def _row(x, rows, s):
    """Row s of a small tile in registers."""
    return tl.sum(tl.where(rows[:, None] == s, x, 0.0), 0)


@triton.jit
def _decays(base, rows, cols, stride_t, stride_d, TOKENS: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """Natural logarithms of the decays, ``[tokens, K]``."""
    return _rows(base, rows, cols if PER_CHANNEL else cols * 0, stride_t, stride_d, TOKENS)


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
    TOKENS: tl.constexpr, TOKENS_PAD: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, NORM: tl.constexpr, PER_CHANNEL: tl.constexpr,
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
    # All tokens at once: a load waits for every store before it.
    rows = tl.arange(0, TOKENS_PAD)
    all_q = _unit_rows(
        q + b * stride_qb + (h // GROUP) * stride_qh, rows, cols, stride_qt, stride_qd, eps, TOKENS, NORM
    )  # fmt: skip
    all_k = _unit_rows(
        k + b * stride_kb + (h // GROUP) * stride_kh, rows, cols, stride_kt, stride_kd, eps, TOKENS, NORM
    )  # fmt: skip
    all_v = _rows(v + b * stride_vb + h * stride_vh, rows, out_cols, stride_vt, stride_vd, TOKENS)
    all_g = _decays(g + b * stride_gb + h * stride_gh, rows, cols, stride_gt, stride_gd, TOKENS, PER_CHANNEL)
    all_beta = _rows(beta + b * stride_bb + h * stride_bh, rows, out_cols * 0, stride_bt, 0, TOKENS)
    for s in tl.static_range(0, TOKENS):
        S, _, o = _token(
            S, _row(all_q, rows, s) * scale, _row(all_k, rows, s), _row(all_v, rows, s), _row(all_g, rows, s),
            _row(all_beta, rows, s),
        )  # fmt: skip
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
    TOKENS: tl.constexpr, TOKENS_PAD: tl.constexpr, DEPTH: tl.constexpr, DEPTH_PAD: tl.constexpr,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, NORM: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
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
    # All tokens at once: a load waits for every store before it.
    rows = tl.arange(0, TOKENS_PAD)
    all_q = _unit_rows(
        q + b * stride_qb + (h // GROUP) * stride_qh, rows, cols, stride_qt, stride_qd, eps, TOKENS, NORM
    )  # fmt: skip
    all_k = _unit_rows(
        k + b * stride_kb + (h // GROUP) * stride_kh, rows, cols, stride_kt, stride_kd, eps, TOKENS, NORM
    )  # fmt: skip
    all_v = _rows(v + b * stride_vb + h * stride_vh, rows, out_cols, stride_vt, stride_vd, TOKENS)
    all_g = _decays(g + b * stride_gb + h * stride_gh, rows, cols, stride_gt, stride_gd, TOKENS, PER_CHANNEL)
    all_beta = _rows(beta + b * stride_bb + h * stride_bh, rows, out_cols * 0, stride_bt, 0, TOKENS)
    journal += slot * stride_jp + h * stride_jh
    entries = tl.arange(0, DEPTH_PAD)
    last = journal + half * stride_half
    last_k = _rows(last, entries, cols, stride_jt, stride_jd, DEPTH)
    last_u = _rows(last + K * stride_jd, entries, out_cols, stride_jt, stride_jd, DEPTH)
    last_g = _decays(last + (K + V) * stride_jd, entries, cols, stride_jt, stride_jd, DEPTH, PER_CHANNEL)
    # Loops, not copies: code that runs once takes longer to fetch than to run.
    for s in tl.range(0, tl.minimum(known, DEPTH).to(tl.int32)):
        S = S * tl.exp2(_row(last_g, entries, s) * LOG2E)[:, None]
        S += _row(last_k, entries, s)[:, None] * _row(last_u, entries, s)[None, :]
    tl.store(state, S.to(pool.dtype.element_ty))

    new = journal + (1 - half) * stride_half
    if tl.program_id(0) == 0:
        inside = (rows < TOKENS)[:, None]
        entry = new + rows[:, None] * stride_jt + cols[None, :] * stride_jd
        tl.store(entry, all_k.to(journal.dtype.element_ty), mask=inside)
        channels = cols < (K if PER_CHANNEL else 1)
        tl.store(entry + (K + V) * stride_jd, all_g.to(journal.dtype.element_ty), mask=inside & channels[None, :])
    for s in tl.range(0, TOKENS):
        S, u, o = _token(
            S, _row(all_q, rows, s) * scale, _row(all_k, rows, s), _row(all_v, rows, s), _row(all_g, rows, s),
            _row(all_beta, rows, s),
        )  # fmt: skip
        tl.store(out + s * stride_ot, o.to(out.dtype.element_ty))
        tl.store(new + s * stride_jt + (K + out_cols) * stride_jd, u.to(journal.dtype.element_ty))
