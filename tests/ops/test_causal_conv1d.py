"""The causal convolutions' references against a loop, `F.conv1d`, and Hugging Face's functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sm12x_compile.ops import causal_conv1d, causal_conv1d_update


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, past: Tensor) -> Tensor:
    (B, C, T), W = x.shape, w.shape[1]
    y = torch.zeros_like(x)
    for b in range(B):
        for c in range(C):
            series = [*past[b, c].tolist(), *x[b, c].tolist()]
            for t in range(T):
                now = past.shape[2] + t
                total = 0.0 if bias is None else float(bias[c])
                for i in range(W):
                    at = now - (W - 1) + i
                    total += float(w[c, i]) * (series[at] if at >= 0 else 0.0)
                y[b, c, t] = total / (1 + math.exp(-total)) if activation == "silu" else total
    return y


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    B=st.integers(1, 2),
    T=st.integers(1, 7),
    W=st.integers(1, 4),
    past=st.none() | st.integers(0, 3),
    state_len=st.none() | st.integers(0, 9),
    with_bias=st.booleans(),
    activation=st.sampled_from(["none", "silu"]),
)
def test_sequence(
    seed: int,
    B: int,
    T: int,
    W: int,
    past: int | None,
    state_len: int | None,
    with_bias: bool,
    activation: str,
) -> None:
    x, w = randn(B, 3, T, seed=seed), randn(3, W, seed=seed + 1)
    bias = randn(3, seed=seed + 2) if with_bias else None
    state = None if past is None else randn(B, 3, W - 1 + past, seed=seed + 3)
    before = torch.zeros(B, 3, W - 1, dtype=torch.float64) if state is None else state
    y, final = causal_conv1d.reference(x, w, bias, activation, state, state_len)
    torch.testing.assert_close(y, oracle(x, w, bias, activation, before))
    length = before.shape[2] if state_len is None else state_len
    padded = torch.cat([torch.zeros(B, 3, 20, dtype=torch.float64), before, x], -1)
    assert torch.equal(final, padded[..., padded.shape[-1] - length :])


def test_against_padded_conv1d() -> None:
    x, w, bias = randn(2, 5, 9), randn(5, 4, seed=1), randn(5, seed=2)
    want = F.silu(F.conv1d(x, w[:, None], bias, padding=3, groups=5)[..., :9])
    torch.testing.assert_close(causal_conv1d.reference(x, w, bias, "silu")[0], want)


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
def test_a_sequence_in_pieces_is_the_whole(cut: int) -> None:
    x, w = randn(2, 5, 9), randn(5, 4, seed=1)
    whole, final = causal_conv1d.reference(x, w)
    first, state = causal_conv1d.reference(x[..., :cut], w)
    second, last = causal_conv1d.reference(x[..., cut:], w, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], -1), whole)
    assert torch.equal(last, final)


@pytest.mark.parametrize("S", [1, 3, 6])
def test_update_walks_the_pool(S: int) -> None:
    x, w, bias = randn(3, 5, S), randn(5, 4, seed=1), randn(5, seed=2)
    pool = randn(6, 5, 4, seed=3)
    before, slots = pool.clone(), torch.tensor([4, -1, 0])
    y = causal_conv1d_update.overload(x, w, pool, slots, bias, "silu")
    for row, slot in ((0, 4), (2, 0)):
        alone = slice(row, row + 1)
        want, state = causal_conv1d.reference(x[alone], w, bias, "silu", before[slot : slot + 1])
        torch.testing.assert_close(y[alone], want)
        assert torch.equal(pool[slot], state[0])
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    for slot in (1, 2, 3, 5):
        assert torch.equal(pool[slot], before[slot])


def test_update_skips_every_row() -> None:
    pool = randn(3, 5, 3)
    before = pool.clone()
    x = torch.full((2, 5, 1), math.nan, dtype=torch.float64)
    y = causal_conv1d_update.overload(x, randn(5, 4), pool, torch.tensor([-1, -7]))
    assert torch.equal(y, torch.zeros_like(x)) and torch.equal(pool, before)
    empty = causal_conv1d_update.overload(x[:0], randn(5, 4), pool, torch.tensor([], dtype=torch.int64))
    assert empty.shape == (0, 5, 1) and torch.equal(pool, before)


def test_against_hugging_face() -> None:
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    fn = getattr(theirs.causal_conv1d_fn, "__wrapped__", theirs.causal_conv1d_fn)
    update = getattr(theirs.causal_conv1d_update, "__wrapped__", theirs.causal_conv1d_update)
    x, w, bias = (randn(*s, dtype=torch.float32) for s in ((2, 6, 9), (6, 4), (6,)))
    torch.testing.assert_close(causal_conv1d.reference(x, w, bias, "silu")[0], fn(x, w, bias, "silu"))
    # Their cache keeps W inputs, one more than the convolution needs.
    _, state = causal_conv1d.reference(x, w, state_len=4)
    pool, token = state.clone(), randn(2, 6, 1, seed=4, dtype=torch.float32)
    want = update(token, state, w, bias, "silu")
    got = causal_conv1d_update.reference(token, w, pool, torch.arange(2), bias, "silu")
    torch.testing.assert_close(got, want)
    assert torch.equal(pool, state)


def test_dtypes() -> None:
    x, w = randn(2, 5, 9, dtype=torch.bfloat16), randn(5, 4, seed=1, dtype=torch.float32)
    y, final = causal_conv1d.overload(x, w, initial_state=torch.zeros(2, 5, 3))
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    exact = oracle(x.double(), w.double(), None, "none", torch.zeros(2, 5, 3, dtype=torch.float64))
    torch.testing.assert_close(y.double(), exact, atol=1e-6, rtol=torch.finfo(torch.bfloat16).eps)
    assert causal_conv1d.overload(x, w)[1].dtype == torch.bfloat16


def test_bad_operands() -> None:
    x, w = torch.zeros(2, 5, 3), torch.zeros(5, 4)
    pool, slots = torch.zeros(4, 5, 3), torch.arange(2)
    for bad, message in (
        (lambda: causal_conv1d.overload(x, w, activation="relu"), "activation='relu', not one of"),
        (lambda: causal_conv1d.overload(x[:, :4], w), "do not fit"),
        (lambda: causal_conv1d.overload(x, w, initial_state=torch.zeros(2, 5, 2)), "at least 3"),
        (lambda: causal_conv1d.overload(x, w, initial_state=torch.zeros(1, 5, 3)), "1 rows, x has 2"),
        (lambda: causal_conv1d_update.overload(x, w, pool, slots[:1]), "slots"),
        (lambda: causal_conv1d_update.overload(x, w, pool[..., 1:], slots), "at least 3"),
        (lambda: causal_conv1d_update.overload(x, w, pool, slots, activation=""), "activation=''"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_schema_and_fake(check_op: Any) -> None:
    x, w, bias = randn(2, 5, 9, dtype=torch.bfloat16), randn(5, 4), randn(5)
    check_op(causal_conv1d, x, w)
    check_op(causal_conv1d, x.mT.contiguous().mT, w, bias, "silu", initial_state=torch.ones(2, 5, 6))
    check_op(causal_conv1d, x, w, bias, "silu", state_len=4)
    pool = randn(4, 5, 4, dtype=torch.bfloat16)
    check_op(causal_conv1d_update, x[..., :2], w, pool, torch.tensor([3, -1]), bias, "silu")
    assert causal_conv1d_update.mutates == ("state_pool",)


def test_cost() -> None:
    x, w = torch.empty(2, 64, 128, dtype=torch.bfloat16), torch.empty(64, 4, dtype=torch.bfloat16)
    assert causal_conv1d.cost is not None and causal_conv1d_update.cost is not None
    cost = causal_conv1d.cost({"x": x, "w": w})
    assert (cost.bytes, cost.flops) == (
        2 * (2 * 2 * 64 * 128 + 2 * 2 * 64 * 3 + 64 * 4),
        2 * 2 * 64 * 128 * 4,
    )
    pool = torch.empty(99, 64, 4, dtype=torch.bfloat16)
    step = causal_conv1d_update.cost({"x": x[..., :1], "w": w, "state_pool": pool})
    assert (step.bytes, step.flops) == (2 * (2 * 2 * 64 + 2 * 2 * 64 * 3 + 64 * 4), 2 * 2 * 64 * 4)


def test_channels_last_stay_last() -> None:
    x, w = randn(2, 5, 3).transpose(1, 2), randn(3, 4, seed=1)
    y, _ = causal_conv1d.overload(x, w)
    step = causal_conv1d_update.overload(x, w, randn(2, 3, 3), torch.tensor([1, -1]))
    assert y.stride() == step.stride() == x.stride()
    torch.testing.assert_close(y, causal_conv1d.overload(x.contiguous(), w)[0])
    with torch._subclasses.FakeTensorMode() as mode:
        fake = causal_conv1d.overload(mode.from_tensor(x), mode.from_tensor(w))[0]
    assert fake.stride() == y.stride()
