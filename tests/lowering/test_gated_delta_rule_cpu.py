"""The kernels in plain PyTorch against the references in fp64: lengths, strong decay, beta at its ends, states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.lowering import causal_conv1d as conv
from sm12x_compile.lowering import gated_delta_rule as rule
from sm12x_compile.ops import OPS

B, HK, H, K, V = 2, 2, 4, 12, 20


def operands(T: int, channels: bool, strength: float, beta: float | None = None) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(T)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    g = -strength * uniform(B, T, H, *((K,) if channels else ()))
    rate = 2 * uniform(B, T, H) if beta is None else torch.full((B, T, H), beta)
    return normal(B, T, HK, K), normal(B, T, HK, K), normal(B, T, H, V), g, rate


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, S: Tensor) -> Any:
    """Token by token in fp64, as the papers write it; q and k of unit length."""
    q, k, v, g, beta, S = map(wide, (q, k, v, g, beta, S))
    q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(H // HK, dim=2) for x in (q, k))
    out = []
    for t in range(v.shape[1]):
        decay = g[:, t].exp()
        S = S * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, :, :, None] * u[:, :, None]
        out.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(out, 1), S


def assert_near(found: Tensor, truth: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == truth.shape
    assert (found - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
def test_chunked_against_the_recurrence(T: int, channels: bool):
    start = torch.randn(B, H, K, V, generator=torch.Generator().manual_seed(1))
    for strength in (0.1, 80.0):
        given = operands(T, channels, strength)
        for state in (None, start):
            o, final = rule.chunked(*given, 0.3, state, "sqrt", 1e-6)
            truth = recurrence(*given, 0.3, torch.zeros_like(start) if state is None else state)
            assert_near(o, truth[0])
            assert_near(final, truth[1])
            assert final.dtype == torch.float32


@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
def test_one_token_against_the_recurrence(channels: bool):
    given = operands(1, channels, 0.5)
    for state in (None, torch.randn(B, H, K, V, generator=torch.Generator().manual_seed(3))):
        o, final = rule.one_token(*given, 0.3, state, "sqrt", 1e-6)
        truth = recurrence(*given, 0.3, torch.zeros(B, H, K, V) if state is None else state)
        assert_near(o, truth[0])
        assert_near(final, truth[1])


@pytest.mark.nightly
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
def test_chunked_on_a_long_prompt(channels: bool):
    given = operands(4097, channels, 0.2)
    o, final = rule.chunked(*given, 0.3, None, "sqrt", 1e-6)
    truth = recurrence(*given, 0.3, torch.zeros(B, H, K, V))
    assert_near(o, truth[0])
    assert_near(final, truth[1])


@pytest.mark.parametrize("beta", [0.0, 1e-6, 1.0, 2.0])
def test_beta_at_its_ends(beta: float):
    given = operands(70, False, 0.5, beta)
    o, final = rule.chunked(*given, 1.0, None, "sqrt", 1e-6)
    truth = recurrence(*given, 1.0, torch.zeros(B, H, K, V))
    assert_near(o, truth[0]) if beta else None
    assert torch.allclose(final.double(), truth[1], atol=1e-5)


@pytest.mark.parametrize("slots", [[0, 1], [1, 0], [-1, 1]])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
def test_step_in_place(slots: list[int], channels: bool):
    given = operands(3, channels, 0.5)
    pool = torch.randn(B, H, K, V, generator=torch.Generator().manual_seed(2))
    exact, index = pool.double(), torch.tensor(slots)
    o = rule.step(*given, pool, index, 0.3, "sqrt", 1e-6)
    truth = OPS["gated_delta_rule_update"].reference(*map(wide, given), exact, index, 0.3, "sqrt", 1e-6)
    assert_near(o, truth)
    assert_near(pool, exact)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_convolution(T: int, state: bool):
    generator = torch.Generator().manual_seed(T)
    x, w, bias = (torch.randn(s, generator=generator) for s in ((B, 6, T), (6, 4), (6,)))
    start = torch.randn(B, 6, 5, generator=generator) if state else None
    for length in (None, 3, 7):
        y, final = conv.aten_conv1d(x, w, bias, "silu", start, length)
        exact = OPS["causal_conv1d"].reference(*map(wide, (x, w, bias)), "silu", wide(start), length)
        assert_near(y, exact[0])
        assert_near(final, exact[1])
    pool = torch.randn(B, 6, 5, generator=generator)
    exact_pool, slots = pool.double(), torch.arange(B)
    if T <= 2:
        y = conv.step(x, w, pool, slots, bias, "silu")
        truth = OPS["causal_conv1d_update"].reference(*map(wide, (x, w)), exact_pool, slots, wide(bias), "silu")
        assert_near(y, truth)
        assert_near(pool, exact_pool)
