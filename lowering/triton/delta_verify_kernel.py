"""A few drafts of the gated delta rule against a pool of states, any of which may be rejected later; in fp32.

The state in the pool is the one before the last drafts; the journal holds what they wrote. First the state takes in
those that were accepted; then each draft reads that state, and of the drafts before it their u alone. So all products
with the state are independent of each other, and what remains in order are sums of short rows.

A draft's vectors are held one by one: rows of a tile would have to be taken out of it again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_parts import LOG2E, unit_scale


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _load(base, s, offsets, stride_t):
    return tl.load(base + s * stride_t + offsets).to(tl.float32)


@triton.jit
def _unit(x, eps, NORM: tl.constexpr):
    return x * unit_scale(tl.sum(x * x, 0), eps, NORM)


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
    channels = tl.arange(0, K if PER_CHANNEL else 1)
    slot = tl.load(slots + b * stride_slot).to(tl.int64)
    known = tl.load(accepted + b * stride_acc)
    half = tl.load(turn + b * stride_turn).to(tl.int64)
    out += b * stride_ob + h * stride_oh + out_cols
    if slot < 0:
        for s in tl.static_range(0, TOKENS):
            tl.store(out + s * stride_ot, tl.zeros((BLOCK_V,), out.dtype.element_ty))
        return
    state = pool + slot * stride_pp + h * stride_ph + cols[:, None] * stride_pk + out_cols[None, :] * stride_pv
    S = tl.load(state).to(tl.float32)
    journal += slot * stride_jp + h * stride_jh

    # While the state is on its way: what the drafts are to each other.
    q += b * stride_qb + (h // GROUP) * stride_qh
    k += b * stride_kb + (h // GROUP) * stride_kh
    v += b * stride_vb + h * stride_vh
    g += b * stride_gb + h * stride_gh
    beta += b * stride_bb + h * stride_bh
    keys = ()
    queries = ()
    reads = ()  # decays from the state to a draft
    near_keys = ()  # [i][j]: k_i . k_j, decayed from j to i, for j < i
    near_queries = ()
    since = ()  # logarithms of the decays from draft j to the one at hand
    whole = tl.zeros((K if PER_CHANNEL else 1,), tl.float32)
    for s in tl.static_range(0, TOKENS):
        key = _unit(_load(k, s, cols * stride_kd, stride_kt), eps, NORM)
        query = _unit(_load(q, s, cols * stride_qd, stride_qt), eps, NORM) * scale
        decay = _load(g, s, channels * stride_gd, stride_gt) * LOG2E
        whole += decay
        keys_row = ()
        queries_row = ()
        passed = ()
        for j in tl.static_range(0, s):
            passed = passed + (since[j] + decay,)
            near = keys[j] * tl.exp2(passed[j])
            keys_row = keys_row + (tl.sum(key * near, 0),)
            queries_row = queries_row + (tl.sum(query * near, 0),)
        since = passed + (decay * 0.0,)
        keys = keys + (key,)
        queries = queries + (query,)
        reads = reads + (tl.exp2(whole),)
        near_keys = near_keys + (keys_row,)
        near_queries = near_queries + (queries_row + (tl.sum(query * key, 0),),)

    # What was accepted, last first: a draft's share decays with those behind it. Rubbish behind them is not read.
    last = journal + half * stride_half
    later = whole * 0.0
    written = tl.zeros((K, BLOCK_V), tl.float32)
    for s in tl.static_range(DEPTH - 1, -1, -1):
        entry = last + s * stride_jt
        key = tl.load(entry + cols * stride_jd, mask=cols * 0 + s < known, other=0.0).to(tl.float32) * tl.exp2(later)
        change = tl.load(entry + (K + out_cols) * stride_jd, mask=out_cols * 0 + s < known, other=0.0).to(tl.float32)
        written += key[:, None] * change[None, :]
        decay = tl.load(entry + (K + V + channels) * stride_jd, mask=channels * 0 + s < known, other=0.0)
        later += decay.to(tl.float32) * LOG2E
    S = S * tl.exp2(later)[:, None] + written
    tl.store(state, S.to(pool.dtype.element_ty))

    new = journal + (1 - half) * stride_half
    changes = ()
    for s in tl.static_range(0, TOKENS):
        key = keys[s] * reads[s]
        query = queries[s] * reads[s]
        said, asked = tl.reduce((S * key[:, None], S * query[:, None]), 0, _add_pairs)
        for j in tl.static_range(0, s):
            said += near_keys[s][j] * changes[j]
            asked += near_queries[s][j] * changes[j]
        value = _load(v, s, out_cols * stride_vd, stride_vt)
        change = tl.load(beta + s * stride_bt).to(tl.float32) * (value - said)
        changes = changes + (change,)
        tl.store(out + s * stride_ot, (asked + near_queries[s][s] * change).to(out.dtype.element_ty))
        tl.store(new + s * stride_jt + (K + out_cols) * stride_jd, change.to(journal.dtype.element_ty))
    if tl.program_id(0) == 0:
        for s in tl.static_range(0, TOKENS):
            tl.store(new + s * stride_jt + cols * stride_jd, keys[s].to(journal.dtype.element_ty))
            decay = _load(g, s, channels * stride_gd, stride_gt)
            tl.store(new + s * stride_jt + (K + V + channels) * stride_jd, decay.to(journal.dtype.element_ty))
