"""What the Triton kernels of the delta rule and the convolutions choose: tiles that fit, calls that they decline."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sm12x_compile.arch import CARDS, Arch, by_name
from sm12x_compile.lowering.triton import delta_launches
from sm12x_compile.lowering.triton.delta_launches import HEAD_DIMS
from sm12x_compile.lowering.triton.delta_tiles import chunk_tiles, parts, step_tiles
from sm12x_compile.lowering.triton.launches import meta
from sm12x_compile.ops import OPS
from sm12x_compile.registry import Call

from .compiled import check_launches

GPUS = [card for card in CARDS.values() if card.is_cuda]


def operands(K: int, V: int, kda: bool, T: int = 4096) -> tuple[torch.Tensor, ...]:
    return delta_launches.operands(K, V, kda, T, 16, 32)


@pytest.mark.parametrize(
    ("card", "kernel", "case"),
    [
        ("sm120", "delta_chunked", "128x128, GDN, 8 heads"),
        ("sm121", "delta_chunked", "128x128, KDA, 32 heads"),
        ("sm120", "delta_chunked", "256x256, KDA, 32 heads"),
        ("sm120", "delta_step", "128x128, GDN, 1 states"),
        ("sm121", "delta_step", "256x256, KDA, 1 states"),
        ("sm120", "causal_conv1d", "channels last, width 4"),
        ("sm120", "causal_conv1d", "positions last, width 4"),
        ("sm121", "causal_conv1d", "one token, width 4"),
    ],
)
def test_compiles_and_fits(card: str, kernel: str, case: str) -> None:
    """A sample; `prove` goes through all of them."""
    check_launches(card, kernel, case)


def test_at_most_40_configurations_a_kernel() -> None:
    shapes = list(itertools.product(GPUS, HEAD_DIMS, HEAD_DIMS, (False, True), (1, 8, 32, 64, 500), (1, 40, 900)))
    assert len({chunk_tiles(*shape) for shape in shapes}) <= 40
    assert len({step_tiles(*s[:3], s[4] * 100) for s in shapes}) <= 40


DIMS = st.sampled_from(HEAD_DIMS)


@given(st.sampled_from(GPUS), DIMS, DIMS, st.integers(1, 300), st.integers(1, 3000))
def test_parts_fill_the_card_and_no_more(card: Arch, K: int, V: int, heads: int, chunks: int) -> None:
    tiles = chunk_tiles(card, K, V, False, heads, chunks)
    count = parts(card, tiles, K, V, heads, chunks)
    programs = heads * (V // tiles.state.width)
    assert count == 1 or (programs * count <= card.sm_count and 8 * count <= chunks)
    if K <= 128 and chunks >= 8 * card.sm_count and 2 * heads * (V // 32) <= card.sm_count:
        assert 2 * programs * count > card.sm_count, "half of the card is idle"


def call(op: str, *args: Any, **kwargs: Any) -> Call:
    bound = OPS[op].signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return Call(op, dict(bound.arguments))


def prefill(**given: Any) -> Call:
    return call("gated_delta_rule", *operands(128, 128, False), 0.1, **given)


def decode(S: int = 1, slots: torch.dtype = torch.int64, pool: torch.dtype = torch.float32) -> Call:
    ops = operands(128, 128, False, T=S)
    return call("gated_delta_rule_update", *ops, meta(4, 32, 128, 128, dtype=pool), meta(1, dtype=slots), 0.1)


def convolution(width: int = 4, state: int = 4, dtype: torch.dtype = torch.bfloat16) -> Call:
    x, w = meta(1, 64, 100, dtype=dtype), meta(64, width, dtype=dtype)
    return call("causal_conv1d", x, w, None, "silu", meta(1, 64, state, dtype=dtype))


REFUSED = [
    ("CUDA GPU", "cpu", prefill()),
    ("not float32", "sm120", call("gated_delta_rule", *(x.float() for x in operands(128, 128, False)), 0.1)),
    ("not 96 and 128", "sm120", call("gated_delta_rule", *operands(96, 128, False), 0.1)),
    ("Hopper's 227 KiB", "h200", call("gated_delta_rule", *operands(256, 128, True), 0.1)),
    ("initial_state is float64", "sm120", prefill(initial_state=meta(1, 32, 128, 128, dtype=torch.float64))),
    ("out_dtype is float64", "sm120", prefill(out_dtype=torch.float64)),
    ("cu_seqlens must be", "sm120", prefill(cu_seqlens=meta(2, dtype=torch.int16))),
    ("17 tokens are more than the 16", "sm120", decode(17)),
    ("slots must be", "sm120", decode(slots=torch.int8)),
    ("state_pool is float64", "sm120", decode(pool=torch.float64)),
    ("at most 8, not 9", "sm120", convolution(9, 9)),
    ("state's length", "sm120", convolution(4, 40)),
    ("x is float64", "sm120", convolution(dtype=torch.float64)),
]


@pytest.mark.parametrize(("reason", "card", "refused"), REFUSED, ids=[r for r, _, _ in REFUSED])
def test_refusals_say_why(reason: str, card: str, refused: Call) -> None:
    pytest.importorskip("triton")
    from sm12x_compile.lowering import delta_kernels

    families = {
        "gated_delta_rule": delta_kernels.chunked_refusal,
        "gated_delta_rule_update": delta_kernels.step_refusal,
        "causal_conv1d": delta_kernels.conv_refusal,
    }
    answer = families[refused.op](refused, by_name(card))
    assert answer is not None and reason in answer, answer


def test_ordinary_calls_are_taken() -> None:
    pytest.importorskip("triton")
    from sm12x_compile.lowering import delta_kernels

    card = by_name("sm120")
    assert delta_kernels.chunked_refusal(prefill(cu_seqlens=meta(3, dtype=torch.int32)), card) is None
    assert delta_kernels.step_refusal(decode(), card) is None
    assert delta_kernels.conv_refusal(convolution(), card) is None
