"""`sm12x::gated_delta_rule` and its steps, `.._update` and `.._verify`: linear attention with an erasing memory.

For every batch b and value head h (it reads key head ``h div (Hv div Hk)``), token by token, with the state
S ``[K, V]``::

    S = diag(exp(g_t)) S            decay: one g a head (GDN) or one a channel of K (KDA)
    u = beta_t (v_t - S^T k_t)      what the memory does not yet say about k_t
    S = S + k_t u^T
    o_t = S^T (scale q_t)

q and k are first brought to unit length where ``qk_l2norm`` asks for it. Sources: Gated Delta Networks
(Yang et al., 2024), Kimi Linear (2025) for the decay per channel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._common import check_one_of, read_slots, wide_dtype, write_slots
from ._define import Cost, semantic_op

QK_L2NORM = ("none", "rsqrt", "sqrt")
CHUNK = 64
# exp() of this is zero in every dtype: clamping g there changes nothing and keeps -inf - -inf out.
_LOWEST_LOG_DECAY = -1e4


def _prepare(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    qk_l2norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Check, widen, normalise and bring to heads first: q, k ``[B,Hv,T,K]``, v ``[B,Hv,T,V]``,
    g ``[B,Hv,T,K or 1]`` (fp64), beta ``[B,Hv,T,1]``."""
    check_one_of(op, "qk_l2norm", qk_l2norm, QK_L2NORM)
    B, T, Hv, _ = v.shape
    Hk, K = k.shape[2:]
    if q.shape != k.shape or k.shape[:2] != (B, T) or Hv % Hk or beta.shape != (B, T, Hv):
        raise ValueError(
            f"sm12x::{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
            f"beta {tuple(beta.shape)} do not fit"
        )
    if g.shape != (B, T, Hv) and g.shape != (B, T, Hv, K):
        raise ValueError(f"sm12x::{op}: g {tuple(g.shape)}, not {(B, T, Hv)} (GDN) or {(B, T, Hv, K)} (KDA)")
    wide = wide_dtype(q)
    q, k = (_unit_length(x.to(wide), qk_l2norm, eps).repeat_interleave(Hv // Hk, dim=2) for x in (q, k))
    g = g.double().clamp(min=_LOWEST_LOG_DECAY)
    g = g if g.ndim == 4 else g[..., None]
    q, k, v, g, beta = (x.transpose(1, 2) for x in (q * scale, k, v.to(wide), g, beta.to(wide)[..., None]))
    return q, k, v, g, beta


def _unit_length(x: Tensor, mode: str, eps: float) -> Tensor:
    if mode == "none":
        return x
    squares = (x * x).sum(-1, keepdim=True) + eps
    return x * torch.rsqrt(squares) if mode == "rsqrt" else x / torch.sqrt(squares)


def _token(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token of the recurrence: the new state, u and o ``[B,Hv,V]``."""
    S = S * torch.exp(g).to(S.dtype)[..., None]
    u = beta * (v - torch.einsum("bhkv,bhk->bhv", S, k))
    S = S + k[..., :, None] * u[..., None, :]
    return S, u, torch.einsum("bhkv,bhk->bhv", S, q)


def _check_pool(op: str, state_pool: Tensor, slots: Tensor, B: int, shape: tuple[int, ...]) -> None:
    if state_pool.shape[1:] != shape or slots.shape != (B,):
        raise ValueError(
            f"sm12x::{op}: state_pool {tuple(state_pool.shape)} and slots {tuple(slots.shape)}, "
            f"not {('P', *shape)} and {(B,)}"
        )


def _chunk(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over one chunk of C tokens at once: the new state and o ``[B,Hv,C,V]``.

    With G the running sum of g, unrolling gives ``S_i = e^(G_i) S + sum_(j<=i) e^(G_i - G_j) k_j u_j^T``, so
    the u are the solution of a unit lower triangular system:
    ``u_i + beta_i sum_(j<i) (k_i . e^(G_i - G_j) k_j) u_j = beta_i (v_i - (e^(G_i) k_i)^T S)``.
    """
    wide, C = S.dtype, q.shape[2]
    # In fp64: behind a strong decay, G has lost the digits of a small g in fp32.
    G = g.cumsum(2)
    later = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    gap = (G[..., :, None, :] - G[..., None, :, :]).masked_fill(later[..., None], -torch.inf)
    gap = gap.to(wide).exp()  # [B, Hv, C, C, K or 1]
    decay, rest = torch.exp(G).to(wide), torch.exp(G[..., -1:, :] - G).to(wide)

    def products(a: Tensor) -> Tensor:
        """``[i, j] = a_i . e^(G_i - G_j) k_j`` for j <= i, else 0."""
        if gap.shape[-1] == 1:
            return (a @ k.mT) * gap[..., 0]
        return torch.einsum("bhijk,bhjk->bhij", a[..., :, None, :] * gap, k)

    u = torch.linalg.solve_triangular(beta * products(k), beta * (v - (decay * k) @ S), upper=False, unitriangular=True)
    o = (decay * q) @ S + products(q) @ u
    return decay[..., -1, :, None] * S + (rest * k).mT @ u, o


def gated_delta_rule_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None = None,
    qk_l2norm: str = "none",
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    sequences: Any = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = v.new_empty((sequences, v.shape[2], k.shape[3], v.shape[3]), dtype=wide_dtype(q))
    return v.new_empty(v.shape, dtype=out_dtype or v.dtype), state


def gated_delta_rule_cost(a: dict[str, Any]) -> Cost:
    q, v, g, cu = a["q"], a["v"], a["g"], a["cu_seqlens"]
    B, T, Hv, V = v.shape
    K = q.shape[3]
    states = (B if cu is None else cu.shape[0] - 1) * Hv * K * V * (1 if a["initial_state"] is None else 2)
    tokens = 2 * q.numel() + 2 * v.numel() + a["beta"].numel()
    moved = tokens * v.element_size() + g.numel() * g.element_size() + 4 * states
    return Cost(bytes=moved, flops=6.0 * B * T * Hv * K * V)


@semantic_op(fake=gated_delta_rule_fake, cost=gated_delta_rule_cost)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None = None,
    qk_l2norm: str = "none",
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule over whole sequences, eager reference (chunked; fp32 inside, fp64 for fp64 inputs).

    Args:
        q, k: ``[B, T, Hk, K]``, any strides, floating point; ``Hk`` divides ``Hv``.
        v: ``[B, T, Hv, V]``.
        g: logarithm of the decay, at most 0: ``[B, T, Hv]`` (GDN) or ``[B, T, Hv, K]`` (KDA).
        beta: ``[B, T, Hv]``: how much of the difference is written.
        scale: multiplies q, after the norm.
        initial_state: ``[N, Hv, K, V]``; default zeros. N is B, or the number of packed sequences.
        qk_l2norm: how q and k are normalised: ``none``; ``rsqrt``: ``x * rsqrt(sum(x^2) + eps)``;
            ``sqrt``: ``x / sqrt(sum(x^2) + eps)`` (the same number, rounded in another place).
        eps: of the norm.
        cu_seqlens: integers ``[N + 1]``, from 0 to T: bounds of the sequences packed into one row (B is 1).
        out_dtype: dtype of o; default that of ``v``.

    Returns:
        o ``[B, T, Hv, V]`` and the final state ``[N, Hv, K, V]`` in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes or ``qk_l2norm`` are not as above.
    """
    q, k, v_wide, g, beta = _prepare("gated_delta_rule", q, k, v, g, beta, scale, qk_l2norm, eps)
    B, Hv, T, V = v_wide.shape
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"sm12x::gated_delta_rule: cu_seqlens needs a batch of 1, not {B}")
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    N = B if cu_seqlens is None else len(bounds) - 1
    shape = (N, Hv, q.shape[3], V)
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"sm12x::gated_delta_rule: state {tuple(initial_state.shape)}, not {shape}")
    start = q.new_zeros(shape) if initial_state is None else initial_state.to(q.dtype)
    out = torch.zeros_like(v_wide, memory_format=torch.contiguous_format)
    finals = []
    for i, (first, last) in enumerate(pairwise(bounds)):
        state = start if cu_seqlens is None else start[i : i + 1]
        for begin in range(first, last, CHUNK):
            part = slice(begin, min(begin + CHUNK, last))
            operands = (x[:, :, part] for x in (q, k, v_wide, g, beta))
            state, out[:, :, part] = _chunk(state, *operands)
        finals.append(state)
    o = out.transpose(1, 2).to(out_dtype or v.dtype).contiguous()
    return o, torch.cat(finals)


def gated_delta_rule_update_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    slots: Tensor,
    scale: float,
    qk_l2norm: str = "none",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return v.new_empty(v.shape, dtype=out_dtype or v.dtype)


def gated_delta_rule_update_cost(a: dict[str, Any]) -> Cost:
    q, v, g, state_pool = a["q"], a["v"], a["g"], a["state_pool"]
    B, S, Hv, V = v.shape
    K = q.shape[3]
    states = 2 * B * Hv * K * V * state_pool.element_size()
    tokens = 2 * q.numel() + 2 * v.numel() + a["beta"].numel()
    moved = tokens * v.element_size() + g.numel() * g.element_size() + states
    return Cost(bytes=moved, flops=6.0 * B * S * Hv * K * V)


@semantic_op(fake=gated_delta_rule_update_fake, cost=gated_delta_rule_update_cost, mutates=("state_pool",))
def gated_delta_rule_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    slots: Tensor,
    scale: float,
    qk_l2norm: str = "none",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One or a few tokens against a pool of states, which is updated in place; eager reference.

    Args:
        q, k: ``[B, S, Hk, K]``, any strides, floating point; ``Hk`` divides ``Hv``.
        v: ``[B, S, Hv, V]``.
        g: logarithm of the decay, at most 0: ``[B, S, Hv]`` (GDN) or ``[B, S, Hv, K]`` (KDA).
        beta: ``[B, S, Hv]``.
        state_pool: ``[P, Hv, K, V]``, floating point: the states of all sequences. **Mutated**; computed in
            fp32, and rounded to the pool's dtype once, after the last token.
        slots: int64 ``[B]``: where row b's state lies in the pool; no slot twice. Rows with a negative slot
            are skipped: their output is zero, no state changes.
        scale: multiplies q, after the norm.
        qk_l2norm, eps: as in `sm12x::gated_delta_rule`.
        out_dtype: dtype of o; default that of ``v``.

    Returns:
        o ``[B, S, Hv, V]``.

    Raises:
        ValueError: the shapes or ``qk_l2norm`` are not as above.
    """
    q, k, v_wide, g, beta = _prepare("gated_delta_rule_update", q, k, v, g, beta, scale, qk_l2norm, eps)
    B, Hv, S, V = v_wide.shape
    _check_pool("gated_delta_rule_update", state_pool, slots, B, (Hv, q.shape[3], V))
    state = read_slots(state_pool, slots).to(q.dtype)
    out = torch.zeros_like(v_wide, memory_format=torch.contiguous_format)
    for s in range(S):
        state, _, out[:, :, s] = _token(state, *(x[:, :, s] for x in (q, k, v_wide, g, beta)))
    write_slots(state_pool, slots, state)
    return _output(out, slots, out_dtype or v.dtype)


def _output(out: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B,Hv,S,V]`` as ``[B,S,Hv,V]``, zero in the rows that are skipped."""
    return out.masked_fill((slots < 0)[:, None, None, None], 0.0).transpose(1, 2).to(dtype).contiguous()


def gated_delta_rule_verify_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    journal: Tensor,
    slots: Tensor,
    accepted: Tensor,
    turn: Tensor,
    scale: float,
    qk_l2norm: str = "none",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return v.new_empty(v.shape, dtype=out_dtype or v.dtype)


def gated_delta_rule_verify_cost(a: dict[str, Any]) -> Cost:
    step = gated_delta_rule_update_cost(a)
    B, S, Hv, _ = a["v"].shape
    journal = 2 * B * S * Hv * a["journal"].shape[4] * a["journal"].element_size()
    return Cost(bytes=step.bytes + journal, flops=step.flops * 4 / 3)


@semantic_op(fake=gated_delta_rule_verify_fake, cost=gated_delta_rule_verify_cost, mutates=("state_pool", "journal"))
def gated_delta_rule_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    journal: Tensor,
    slots: Tensor,
    accepted: Tensor,
    turn: Tensor,
    scale: float,
    qk_l2norm: str = "none",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Draft tokens, any of which may be rejected later (speculative decoding); eager reference.

    A rejected draft must leave no trace in the state. Keeping the state behind every draft would write it S times;
    instead the drafts themselves are kept in a journal, and the *next* call commits those that were accepted:

    1. the first ``accepted[b]`` tokens of the slot's last drafts are applied to its state (``S = diag(exp(g)) S +
       k u^T``, with the u that they had), and the state is written back: the state before this call's drafts;
    2. o of the drafts is computed from there; the drafts go to the journal, and the state keeps out of it.

    So a step reads and writes the state once, as a step of one token does. The journal has two halves, so that one is
    read while the other is written. Behind a prefill, ``accepted`` is 0 and ``turn`` is either.

    Args:
        q, k, v, g, beta: the drafts, as in `sm12x::gated_delta_rule_update`.
        state_pool: ``[P, Hv, K, V]``, floating point. **Mutated**; computed in fp32, rounded to the pool's dtype when
            it is written (the drafts see it unrounded).
        journal: fp32 (fp64 for fp64 inputs) ``[P, 2, D, Hv, K + V + G]`` with ``D >= S``; G is 1 for GDN, K for KDA:
            each token's k (normalised), u and g. **Mutated**: tokens 0 to S - 1 of the other half of the slots in use.
        slots: int64 ``[B]``, as in `sm12x::gated_delta_rule_update`.
        accepted: int64 ``[B]``: how many of the drafts of the slot's last call were accepted, at most D.
        turn: int64 ``[B]``, 0 or 1: the half that holds the slot's last drafts. The next call's is ``1 - turn``.
        scale, qk_l2norm, eps, out_dtype: as in `sm12x::gated_delta_rule`.

    Returns:
        o ``[B, S, Hv, V]``.

    Raises:
        ValueError: the shapes or ``qk_l2norm`` are not as above.
    """
    G = 1 if g.ndim == 3 else k.shape[3]
    q, k, v_wide, g, beta = _prepare("gated_delta_rule_verify", q, k, v, g, beta, scale, qk_l2norm, eps)
    B, Hv, S, V = v_wide.shape
    K = q.shape[3]
    _check_pool("gated_delta_rule_verify", state_pool, slots, B, (Hv, K, V))
    if journal.ndim != 5 or journal.shape[2] < S or journal.shape[:2] != (state_pool.shape[0], 2):
        raise ValueError(f"sm12x::gated_delta_rule_verify: journal {tuple(journal.shape)} for {S} drafts")
    if journal.shape[3:] != (Hv, K + V + G) or accepted.shape != (B,) or turn.shape != (B,):
        raise ValueError(
            f"sm12x::gated_delta_rule_verify: journal {tuple(journal.shape)}, accepted {tuple(accepted.shape)} and "
            f"turn {tuple(turn.shape)}, not {('P', 2, 'D', Hv, K + V + G)}, {(B,)} and {(B,)}"
        )
    state = read_slots(state_pool, slots).to(q.dtype)
    entries = read_slots(journal, slots)
    rows = torch.arange(B, device=turn.device)
    last = entries[rows, turn].to(q.dtype)
    for s in range(last.shape[1]):
        k_then, u_then, g_then = last[:, s].split([K, V, G], dim=-1)
        grown = state * torch.exp(g_then)[..., None] + k_then[..., :, None] * u_then[..., None, :]
        state = torch.where((s < accepted)[:, None, None, None], grown, state)
    write_slots(state_pool, slots, state)
    out = torch.zeros_like(v_wide, memory_format=torch.contiguous_format)
    for s in range(S):
        k_s, g_s = k[:, :, s], g[:, :, s]
        state, u, out[:, :, s] = _token(state, q[:, :, s], k_s, v_wide[:, :, s], g_s, beta[:, :, s])
        entries[rows, 1 - turn, s] = torch.cat([k_s, u, g_s], dim=-1).to(entries.dtype)
    write_slots(journal, slots, entries)
    return _output(out, slots, out_dtype or v.dtype)
