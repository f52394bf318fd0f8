"""One or a few tokens of the gated delta rule against a pool of states, in one launch, in fp32.

Loops over tokens keep the code short: a program has one or two warps and runs each instruction a few times. A token's
rows are loaded one token ahead, and each on its own: a tile of several tokens would give the state its own layout and
cost two conversions of it. No load that can do without the slot waits for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_parts import LOG2E


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _decayed(S, g, PER_CHANNEL: tl.constexpr):
    share = tl.exp2(g * LOG2E)
    return S * share[:, None] if PER_CHANNEL else S * share


@triton.jit
def _token(
    q, k, v, g, beta, s, cols, out_cols, stride_qt, stride_qd, stride_kt, stride_kd, stride_vt, stride_vd, stride_gt,
    stride_gd, stride_bt, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """q, k, v, the decay's logarithm and beta of token s."""
    return (
        tl.load(q + s * stride_qt + cols * stride_qd).to(tl.float32),
        tl.load(k + s * stride_kt + cols * stride_kd).to(tl.float32),
        tl.load(v + s * stride_vt + out_cols * stride_vd).to(tl.float32),
        tl.load(g + s * stride_gt + (cols * stride_gd if PER_CHANNEL else 0)).to(tl.float32),
        tl.load(beta + s * stride_bt).to(tl.float32),
    )


@triton.jit
def _entry(entry, cols, out_cols, channels, stride_jd, K: tl.constexpr, V: tl.constexpr):
    """What a draft wrote, from the journal: its k, its u and its decay's logarithm."""
    return (
        tl.load(entry + cols * stride_jd).to(tl.float32),
        tl.load(entry + (K + out_cols) * stride_jd).to(tl.float32),
        tl.load(entry + (K + V) * stride_jd + channels).to(tl.float32),
    )


@triton.jit
def step_kernel(
    q, k, v, g, beta, pool, journal, slots, accepted, turn, out,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_gb, stride_gt, stride_gh, stride_gd,
    stride_bb, stride_bt, stride_bh, stride_pp, stride_ph, stride_pk: tl.constexpr, stride_pv: tl.constexpr,
    stride_jp, stride_half, stride_jt, stride_jh, stride_jd, stride_slot, stride_acc, stride_turn,
    stride_ob, stride_ot, stride_oh, scale, eps,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, NORM: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Grid (V / BLOCK_V, value heads, B).

    DEPTH 0: `sm12x::gated_delta_rule_update`; else `sm12x::gated_delta_rule_verify` with so many entries in each half
    of the journal.
    """
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    cols = tl.arange(0, K)
    out_cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = tl.load(slots + b * stride_slot).to(tl.int64)
    if DEPTH > 0:
        known = tl.load(accepted + b * stride_acc)
        half = tl.load(turn + b * stride_turn).to(tl.int64)
    q += b * stride_qb + (h // GROUP) * stride_qh
    k += b * stride_kb + (h // GROUP) * stride_kh
    v += b * stride_vb + h * stride_vh
    g += b * stride_gb + h * stride_gh
    beta += b * stride_bb + h * stride_bh
    out += b * stride_ob + h * stride_oh + out_cols
    query, key, value, decay, strength = _token(
        q, k, v, g, beta, 0, cols, out_cols, stride_qt, stride_qd, stride_kt, stride_kd, stride_vt, stride_vd,
        stride_gt, stride_gd, stride_bt, PER_CHANNEL,
    )  # fmt: skip
    if slot < 0:
        for _ in tl.range(0, TOKENS):
            tl.store(out, tl.zeros((BLOCK_V,), out.dtype.element_ty))
            out += stride_ot
        return
    state = pool + slot * stride_pp + h * stride_ph + cols[:, None] * stride_pk + out_cols[None, :] * stride_pv
    S = tl.load(state).to(tl.float32)
    if DEPTH > 0:
        channels = cols * stride_jd if PER_CHANNEL else 0
        journal += slot * stride_jp + h * stride_jh
        entry = journal + half * stride_half
        old_key, change, old_decay = _entry(entry, cols, out_cols, channels, stride_jd, K, V)
        for s in tl.range(0, tl.minimum(known, DEPTH).to(tl.int32)):
            ahead = entry + tl.minimum(s + 1, DEPTH - 1) * stride_jt
            next_key, next_change, next_decay = _entry(ahead, cols, out_cols, channels, stride_jd, K, V)
            S = _decayed(S, old_decay, PER_CHANNEL) + old_key[:, None] * change[None, :]
            old_key, change, old_decay = next_key, next_change, next_decay
        tl.store(state, S.to(pool.dtype.element_ty))
        entry = journal + (1 - half) * stride_half
    for s in tl.range(0, TOKENS):
        next_query, next_key, next_value, next_decay, next_strength = _token(
            q, k, v, g, beta, tl.minimum(s + 1, TOKENS - 1), cols, out_cols, stride_qt, stride_qd, stride_kt,
            stride_kd, stride_vt, stride_vd, stride_gt, stride_gd, stride_bt, PER_CHANNEL,
        )  # fmt: skip
        q_squares, k_squares, alike = tl.reduce((query * query, key * key, query * key), 0, _add_triples)
        q_unit = scale
        k_unit = 1.0
        if NORM:
            q_unit = tl.rsqrt(q_squares + eps) * scale
            k_unit = tl.rsqrt(k_squares + eps)
        # Both products read the state before k is written.
        S = _decayed(S, decay, PER_CHANNEL)
        said, asked = tl.reduce((S * key[:, None], S * query[:, None]), 0, _add_pairs)
        u = strength * (value - k_unit * said)
        S += key[:, None] * (k_unit * u)[None, :]
        o = q_unit * (asked + alike * k_unit * u)
        tl.store(out, o.to(out.dtype.element_ty))
        out += stride_ot
        if DEPTH > 0:
            tl.store(entry + (K + out_cols) * stride_jd, u.to(journal.dtype.element_ty))
            if tl.program_id(0) == 0:
                tl.store(entry + cols * stride_jd, (key * k_unit).to(journal.dtype.element_ty))
                tl.store(entry + (K + V) * stride_jd + channels, decay.to(journal.dtype.element_ty))
            entry += stride_jt
        query, key, value, decay, strength = next_query, next_key, next_value, next_decay, next_strength
    if DEPTH == 0:
        tl.store(state, S.to(pool.dtype.element_ty))
