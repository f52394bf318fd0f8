"""The gated delta rule's references against the token-by-token recurrence and Hugging Face's functions."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sm12x_compile.ops import gated_delta_rule, gated_delta_rule_update, gated_delta_rule_verify

MODULE = sys.modules["sm12x_compile.ops.gated_delta_rule"]  # the package shows the op under this name


def operands(
    B: int = 2,
    T: int = 5,
    Hk: int = 1,
    G: int = 2,
    K: int = 4,
    V: int = 3,
    *,
    kda: bool = False,
    decay: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, ...]:
    """q, k, v, g, beta."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    Hv = Hk * G
    q, k, v = randn(B, T, Hk, K), randn(B, T, Hk, K) / math.sqrt(K), randn(B, T, Hv, V)
    g = -decay * torch.rand((B, T, Hv, K) if kda else (B, T, Hv), generator=generator, dtype=torch.float64)
    beta = torch.rand(B, T, Hv, generator=generator, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (q, k, v, g, beta))


def oracle(ops: Iterable[Tensor], scale: float, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One head and one token at a time: o, the final state, and the states behind every token."""
    q, k, v, g, beta = (x.double() for x in ops)
    (B, T, Hv, V), (Hk, K) = v.shape, k.shape[2:]
    o = torch.zeros(B, T, Hv, V, dtype=torch.float64)
    states = torch.zeros(B, T, Hv, K, V, dtype=torch.float64)
    final = torch.zeros(B, Hv, K, V, dtype=torch.float64) if state is None else state.double().clone()
    for b in range(B):
        for h in range(Hv):
            S, kh = final[b, h].clone(), h // (Hv // Hk)
            for t in range(T):
                decay = torch.exp(g[b, t, h]).expand(K)
                S = decay[:, None] * S
                u = beta[b, t, h] * (v[b, t, h] - S.T @ k[b, t, kh])
                S = S + torch.outer(k[b, t, kh], u)
                o[b, t, h] = S.T @ (scale * q[b, t, kh])
                states[b, t, h] = S
            final[b, h] = S
    return o, final, states


def assert_matches(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float = 1e-9) -> None:
    for a, b in zip(got, want, strict=False):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    T=st.integers(0, 11),
    Hk=st.integers(1, 2),
    G=st.integers(1, 2),
    kda=st.booleans(),
    with_state=st.booleans(),
    decay=st.sampled_from([0.0, 1.0, 30.0, 2000.0]),
    chunk=st.sampled_from([1, 3, 4, 64]),
)
def test_the_recurrence(
    seed: int, T: int, Hk: int, G: int, kda: bool, with_state: bool, decay: float, chunk: int
) -> None:
    ops = operands(T=T, Hk=Hk, G=G, kda=kda, decay=decay, seed=seed)
    state = torch.randn(2, Hk * G, 4, 3, dtype=torch.float64) if with_state else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "CHUNK", chunk)
        got = gated_delta_rule.reference(*ops, 0.5, state)
    assert_matches(got, oracle(ops, 0.5, state)[:2])


@pytest.mark.parametrize("kda", [False, True], ids=["gdn", "kda"])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths_about_the_chunk_in_fp32(T: int, kda: bool) -> None:
    ops = operands(T=T, K=8, V=8, kda=kda, decay=0.2, dtype=torch.float32)
    state = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    got = gated_delta_rule.overload(*ops, 8**-0.5, state)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert_matches(got, oracle(ops, 8**-0.5, state)[:2], 2e-5)


@pytest.mark.parametrize("kda", [False, True], ids=["gdn", "kda"])
def test_a_token_behind_a_strong_decay_keeps_its_digits(kda: bool) -> None:
    q, k, v, g, beta = operands(T=64, kda=kda, decay=1e-3, dtype=torch.float32)
    g[:, :32] -= 3000.0
    got = gated_delta_rule.reference(q, k, v, g, beta, 1.0)
    assert_matches(got, oracle((q, k, v, g, beta), 1.0)[:2], 1e-5)
    g[:, 5] = -math.inf  # forgets everything
    assert_matches(gated_delta_rule.reference(q, k, v, g, beta, 1.0), oracle((q, k, v, g, beta), 1.0)[:2], 1e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_the_ends_of_beta(beta: float) -> None:
    q, k, v, g, _ = operands(T=70)
    k = k / k.norm(dim=-1, keepdim=True)
    full = torch.full((2, 70, 2), beta, dtype=torch.float64)
    o, final = gated_delta_rule.reference(q, k, v, g, full, 1.0)
    assert_matches((o, final), oracle((q, k, v, g, full), 1.0)[:2])
    if beta == 0:
        assert not o.any() and not final.any()
    if beta == 1:  # what was written last can be read back
        read = torch.einsum("bhkv,bhk->bhv", final, k[:, -1].repeat_interleave(2, dim=1))
        torch.testing.assert_close(read, v[:, -1])


@pytest.mark.parametrize("mode", ["rsqrt", "sqrt"])
def test_qk_norm_comes_before_the_scale(mode: str) -> None:
    q, k, v, g, beta = operands()
    unit = [x / (x.square().sum(-1, keepdim=True) + 0.1).sqrt() for x in (q, k)]
    want = oracle((*unit, v, g, beta), 0.5)[:2]
    assert_matches(gated_delta_rule.reference(q, k, v, g, beta, 0.5, qk_l2norm=mode, eps=0.1), want)
    pool = torch.zeros(2, 2, 4, 3, dtype=torch.float64)
    o = gated_delta_rule_update.reference(q, k, v, g, beta, pool, torch.arange(2), 0.5, qk_l2norm=mode, eps=0.1)
    assert_matches((o, pool), want)


@pytest.mark.parametrize("kda", [False, True], ids=["gdn", "kda"])
def test_packed_sequences(kda: bool) -> None:
    ops = operands(B=1, T=80, kda=kda, decay=0.1)
    bounds = [0, 3, 3, 70, 80]  # one of them is empty
    state = torch.randn(4, 2, 4, 3, dtype=torch.float64)
    o, final = gated_delta_rule.overload(*ops, 0.5, state, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert final.shape == (4, 2, 4, 3)
    for i, (first, last) in enumerate(pairwise(bounds)):
        want = oracle((x[:, first:last] for x in ops), 0.5, state[i : i + 1])[:2]
        assert_matches((o[:, first:last], final[i : i + 1]), want)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 65, 100])
def test_against_hugging_face_gdn(T: int, heads: tuple[int, int]) -> None:
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    Hk, G = heads
    ops = operands(T=T, Hk=Hk, G=G, K=16, V=8, decay=0.5, dtype=torch.float32)
    state = torch.randn(2, Hk * G, 16, 8, generator=torch.Generator().manual_seed(2))
    got = gated_delta_rule.reference(*ops, 16**-0.5, state, qk_l2norm="rsqrt")
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        function = getattr(theirs, name)
        q, k, v, g, beta = ops
        # transformers 5.17 wants the heads repeated, 5.23 takes it either way.
        q, k = (x.repeat_interleave(G, 2) for x in (q, k))
        want = getattr(function, "__wrapped__", function)(
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        torch.testing.assert_close(got, want, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("T", [1, 70])
def test_against_hugging_face_kda(T: int) -> None:
    theirs = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    q, k, v, g, beta = operands(T=T, Hk=3, G=1, K=8, V=8, kda=True, decay=0.5, dtype=torch.float32)
    got = gated_delta_rule.reference(q, k, v, g, beta, 8**-0.5, qk_l2norm="sqrt")
    for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):
        function = getattr(theirs, name)
        want = getattr(function, "__wrapped__", function)(
            q, k, v, g, beta, initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        torch.testing.assert_close(got, want, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("kda", [False, True], ids=["gdn", "kda"])
@pytest.mark.parametrize("S", [1, 4])
def test_update_walks_the_pool(S: int, kda: bool) -> None:
    ops = operands(B=3, T=S, kda=kda)
    pool = torch.randn(6, 2, 4, 3, dtype=torch.float64)
    before, slots = pool.clone(), torch.tensor([4, -1, 0])
    o = gated_delta_rule_update.overload(*ops, pool, slots, 0.5)
    for row, slot in ((0, 4), (2, 0)):
        want = oracle((x[row : row + 1] for x in ops), 0.5, before[slot : slot + 1])
        assert_matches((o[row : row + 1], pool[slot : slot + 1]), want)
    assert not o[1].any()
    for slot in (1, 2, 3, 5):
        assert torch.equal(pool[slot], before[slot])


def test_update_skips_every_row() -> None:
    ops = [torch.full_like(x, math.nan) for x in operands(T=1)]
    pool = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    before = pool.clone()
    o = gated_delta_rule_update.overload(*ops, pool, torch.tensor([-1, -1]), 0.5)
    assert torch.equal(pool, before) and torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize("kda", [False, True], ids=["gdn", "kda"])
@pytest.mark.parametrize("norm", ["none", "rsqrt"])
def test_rejected_drafts_leave_no_trace(kda: bool, norm: str) -> None:
    """Each round drafts more tokens than are accepted: as if only the accepted ones had ever been there."""
    ops = operands(B=3, T=9, kda=kda, decay=0.5)
    if norm == "rsqrt":
        unit = [x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in ops[:2]]
    exact = (*(unit if norm == "rsqrt" else ops[:2]), *ops[2:])
    pool = torch.randn(5, 2, 4, 3, dtype=torch.float64)
    start, slots = pool.clone(), torch.tensor([4, -1, 0])
    # Only what was accepted may be read.
    journal = torch.full((5, 2, 4, 2, 4 + 3 + (4 if kda else 1)), math.nan, dtype=torch.float64)
    want_o, _, states = oracle(exact, 0.5, start[[4, 1, 0]])
    at, accepted, turn = torch.zeros(3, 3, dtype=torch.int64)
    turn[2] = 1
    generator = torch.Generator().manual_seed(3)
    for drafts in (4, 3, 1, 4):
        rows = at[:, None] + torch.arange(drafts)
        inputs = (x[torch.arange(3)[:, None], rows] for x in ops)
        o = gated_delta_rule_verify.overload(*inputs, pool, journal, slots, accepted, turn, 0.5, qk_l2norm=norm)
        for row in (0, 2):
            torch.testing.assert_close(o[row], want_o[row, rows[row]])
            before = start[slots[row]] if at[row] == 0 else states[row, at[row] - 1]
            torch.testing.assert_close(pool[slots[row]], before)
        assert not o[1].any()
        accepted = torch.randint(1, min(drafts, 2) + 1, (3,), generator=generator)
        at, turn = at + accepted, 1 - turn
    for slot in (1, 2, 3):
        assert torch.equal(pool[slot], start[slot]) and journal[slot].isnan().all()


def test_decode_continues_prefill() -> None:
    ops = operands(T=70, decay=0.1)
    whole, final = gated_delta_rule.reference(*ops, 0.5)
    first, pool = gated_delta_rule.reference(*(x[:, :67] for x in ops), 0.5)
    rest = gated_delta_rule_update.reference(*(x[:, 67:] for x in ops), pool, torch.arange(2), 0.5)
    assert_matches((torch.cat([first, rest], 1), pool), (whole, final))


def test_a_low_precision_pool_is_rounded_once() -> None:
    ops = operands(T=4, dtype=torch.bfloat16)
    pool = torch.randn(2, 2, 4, 3).bfloat16()
    o, final, _ = oracle(ops, 0.5, pool)
    got = gated_delta_rule_update.overload(*ops, pool, torch.arange(2), 0.5)
    assert (got.dtype, pool.dtype) == (torch.bfloat16, torch.bfloat16)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(pool.double(), final, atol=1e-5, rtol=eps)
    torch.testing.assert_close(got.double(), o, atol=1e-5, rtol=eps)
    wide = gated_delta_rule_update.overload(*ops, pool, torch.arange(2), 0.5, out_dtype=torch.float32)
    assert wide.dtype == torch.float32


def test_bad_operands() -> None:
    q, k, v, g, beta = operands()
    pool, slots, journal = torch.zeros(2, 2, 4, 3), torch.arange(2), torch.zeros(2, 2, 5, 2, 8)
    forward, update = gated_delta_rule.overload, gated_delta_rule_update.overload
    verify = gated_delta_rule_verify.overload
    for bad, message in (
        (lambda: forward(q, k, v, g, beta, 1.0, qk_l2norm="l2"), "qk_l2norm='l2', not one of"),
        (lambda: forward(q[:, 1:], k, v, g, beta, 1.0), "do not fit"),
        (lambda: forward(q, k, v, g, beta[..., :1], 1.0), "do not fit"),
        (lambda: forward(q, k, v, g[..., :1], beta, 1.0), r"\(GDN\) or .* \(KDA\)"),
        (lambda: forward(q, k, v, g, beta, 1.0, torch.zeros(1, 2, 4, 3)), "state"),
        (lambda: forward(q, k, v, g, beta, 1.0, cu_seqlens=torch.tensor([0, 5])), "batch of 1"),
        (lambda: update(q, k, v, g, beta, pool[:, :, :3], slots, 1.0), "state_pool"),
        (lambda: update(q, k, v, g, beta, pool, slots[:1], 1.0), "slots"),
        (lambda: verify(q, k, v, g, beta, pool, journal[:, :, :4], slots, slots, slots, 1.0), "5 drafts"),
        (lambda: verify(q, k, v, g, beta, pool, journal[..., 1:], slots, slots, slots, 1.0), "journal"),
        (lambda: verify(q, k, v, g, beta, pool, journal, slots, slots[:1], slots, 1.0), "accepted"),
        (lambda: verify(q, k, v, g, beta, pool[..., :2], journal, slots, slots, slots, 1.0), "state_pool"),
        (lambda: update(q, k, v, g, beta, pool, slots, 1.0, qk_l2norm=""), "qk_l2norm=''"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_schema_and_fake(check_op: Any) -> None:
    ops = operands(dtype=torch.bfloat16)
    check_op(gated_delta_rule, *ops, 0.5)
    check_op(gated_delta_rule, *operands(kda=True), 0.5, torch.zeros(2, 2, 4, 3), qk_l2norm="sqrt")
    packed = operands(B=1, T=9, dtype=torch.bfloat16)
    check_op(gated_delta_rule, *packed, 0.5, cu_seqlens=torch.tensor([0, 2, 5, 9]), out_dtype=torch.float32)
    check_op(gated_delta_rule_update, *ops, torch.zeros(4, 2, 4, 3), torch.tensor([3, -1]), 0.5)
    check_op(
        gated_delta_rule_verify, *ops, torch.zeros(4, 2, 4, 3), torch.zeros(4, 2, 6, 2, 8), torch.tensor([3, -1]),
        torch.tensor([2, 0]), torch.tensor([1, 0]), 0.5, out_dtype=torch.float32,
    )  # fmt: skip
    assert gated_delta_rule_update.mutates == ("state_pool",)
    assert gated_delta_rule_verify.mutates == ("state_pool", "journal")


def test_cost() -> None:
    q, k, v, g, beta = operands(B=1, T=10, Hk=2, G=2, K=64, V=32, dtype=torch.bfloat16)
    assert gated_delta_rule.cost is not None and gated_delta_rule_update.cost is not None
    call = dict(q=q, k=k, v=v, g=g.float(), beta=beta, cu_seqlens=None, initial_state=None)
    cost = gated_delta_rule.cost(call)
    tokens = 2 * (2 * 10 * 2 * 64 + 2 * 10 * 4 * 32 + 10 * 4) + 4 * 10 * 4
    assert (cost.bytes, cost.flops) == (tokens + 4 * 4 * 64 * 32, 6 * 10 * 4 * 64 * 32)
    step = gated_delta_rule_update.cost(call | dict(state_pool=torch.zeros(9, 4, 64, 32)))
    assert step.bytes == tokens + 2 * 4 * 4 * 64 * 32
    assert gated_delta_rule_verify.cost is not None
    drafts = call | dict(state_pool=torch.zeros(9, 4, 64, 32), journal=torch.zeros(9, 2, 12, 4, 97))
    assert gated_delta_rule_verify.cost(drafts).bytes == step.bytes + 2 * 10 * 4 * 97 * 4
