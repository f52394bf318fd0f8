"""What the expert kernels choose: tiles that compile and fit for every card, and calls that they decline."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sm12x_compile.arch import CARDS, Arch, by_name
from sm12x_compile.lowering.moe_kernels import _accepts_decode, _accepts_grouped, _accepts_linear, _accepts_route
from sm12x_compile.lowering.triton.expert_tiles import (
    PairPlan,
    PairTiles,
    block_rows,
    expert_plan,
    expert_tiles,
    reads_singly,
    unpacked_at_once,
)
from sm12x_compile.lowering.triton.launches import meta
from sm12x_compile.ops import OPS
from sm12x_compile.registry import Call, Verdict

from .compiled import check_launches

GPUS = [card for card in CARDS.values() if card.is_cuda]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = (16, 32, 64, 128)


@pytest.mark.parametrize(
    ("card", "kernel", "case"),
    [
        ("sm121", "moe_packed", "rows of words, bfloat16, gate and up, 32 rows"),
        ("sm120", "moe_packed", "gpt-oss, bfloat16, down, 16 rows"),
        ("sm120", "moe_packed", "gpt-oss, bfloat16, gate and up, pairs"),
        ("sm121", "moe_packed", "rows of words, bfloat16, down, sum of pairs"),
        ("sm120", "moe_packed", "scales in bytes, bfloat16, down, 16 rows, alone"),
        ("sm121", "moe_packed", "gpt-oss, bfloat16, down, unpacked"),
        ("sm120", "moe_experts", "enk, bfloat16, gate and up, 16 rows"),
        ("sm121", "moe_experts", "enk, bfloat16, down, 128 rows, sorted"),
        ("sm120", "moe_order_and_route", "4096 tokens, 8 of 128, with planes"),
        ("sm121", "moe_order_and_route", "8 of 256, sigmoid"),
    ],
)
def test_compiles_and_fits(card: str, kernel: str, case: str) -> None:
    """A sample; `prove` goes through all of them."""
    check_launches(card, kernel, case)


def test_at_most_40_configurations() -> None:
    shapes = [(c, r, d, p, g) for c in GPUS for r in ROWS for d in (BF16, FP16, FP32) for p in (0, 1) for g in (0, 1)]
    assert len({expert_tiles(c, r, d, bool(p), bool(g)) for c, r, d, p, g in shapes}) <= 40


@given(
    st.sampled_from(GPUS), st.integers(1, 9000), st.integers(1, 16), st.integers(1, 512), st.integers(100, 10**8),
    st.booleans(),
)  # fmt: skip
def test_plans(card: Arch, tokens: int, top_k: int, experts: int, size: int, packed: bool) -> None:
    for dtype in (BF16, FP32):
        plan = expert_plan(card, tokens, top_k, experts, dtype, packed, size)
        if isinstance(plan, PairPlan):
            assert packed and tokens <= 8
            continue
        assert plan.sort or (tokens <= 8 and not packed)
        assert plan.gate_up.block_m == plan.down.block_m, "both products share one table of tiles"
        assert not packed or plan.unpacked or plan.gate_up.block_k % 128 == 0, "whole words of scales"


def test_blocks_of_words_leave_few_idle() -> None:
    tiles = PairTiles(8, 512, 4)
    assert [tiles.block_q(words) for words in (8, 192, 512, 720, 3584)] == [64, 64, 512, 256, 512]
    assert [tiles.block_q(512, choices) for choices in (1, 4, 8, 64)] == [512, 256, 128, 32]


def test_pairs_are_sorted_where_experts_would_be_read_twice() -> None:
    h200, small, large = by_name("h200"), 9.4e6, 49.8e6  # 3 * 768 * 2048 and 3 * 2880 * 2880 numbers in bf16
    assert reads_singly(h200, 1, 4, 32, large) and reads_singly(h200, 4, 8, 128, small)
    assert not reads_singly(h200, 16, 8, 128, small) and not reads_singly(h200, 4, 4, 32, large)
    for tokens, top_k, experts, size, singly in (
        (2, 8, 128, small, True), (8, 8, 128, small, False), (2, 4, 32, large, True), (4, 4, 32, large, False),
    ):  # fmt: skip
        assert reads_singly(h200, tokens, top_k, experts, size / 4, packed=True) == singly


def test_weights_are_unpacked_for_many_rows_in_bounded_memory() -> None:
    for card, expert_bytes in product((by_name("h200"), by_name("sm120")), (2.36e6, 12.4e6, 50e6)):
        few, many = (unpacked_at_once(card, T, 8, 128, BF16, expert_bytes) for T in (256, 65536))
        assert few == 0 and 1 <= many <= 128 and 4 * many * expert_bytes <= card.memory_bytes / 64 + 4 * expert_bytes
        assert unpacked_at_once(card, 65536, 8, 128, FP32, expert_bytes) == 0


def test_block_rows_grow_with_the_rows_of_an_expert() -> None:
    assert [block_rows(mean) for mean in (0.1, 1, 16, 40, 256)] == [16, 16, 32, 64, 128]
    assert [block_rows(rows, uneven=False) for rows in (1, 16, 17, 128, 5000)] == [16, 16, 32, 128, 128]


def call(op: str, *args: Any, **kwargs: Any) -> Call:
    bound = OPS[op].signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return Call(op, dict(bound.arguments))


def moe_call(T: int = 64, dtype: torch.dtype = BF16, w_dtype: torch.dtype | None = None, **kwargs: Any) -> Call:
    ids, weights = meta(T, 4, dtype=kwargs.pop("ids", torch.int64)), meta(T, 4, dtype=FP32)
    w13, w2 = meta(8, 128, 64, dtype=w_dtype or dtype), meta(8, 64, 64, dtype=w_dtype or dtype)
    return call("moe", meta(T, 64, dtype=dtype), ids, weights, w13, w2, **kwargs)


def packed_call(dtype: torch.dtype = BF16, format: str = "mxfp4", scale: torch.dtype = torch.uint8) -> Call:
    weights = meta(8, 128, 32, dtype=torch.uint8), meta(8, 64, 32, dtype=torch.uint8)
    given = dict(w13_scale=meta(8, 128, 2, dtype=scale), w2_scale=meta(8, 64, 2, dtype=scale), format=format)
    ids = meta(64, 4, dtype=torch.int64), meta(64, 4, dtype=FP32)
    return call("moe", meta(64, 64, dtype=dtype), *ids, *weights, **given)


def linear_call(format: str, scale: torch.dtype, columns: int) -> Call:
    return call(
        "mxfp4_linear", meta(3, 64), meta(48, 32, dtype=torch.uint8), meta(48, columns, dtype=scale), None, format
    )


REFUSED: list[tuple[str, Any, str, Call]] = [
    ("9 tokens share experts", _accepts_decode, "sm120", moe_call(T=9)),
    ("needs a CUDA GPU", _accepts_grouped, "cpu", moe_call()),
    ("not float64", _accepts_grouped, "sm120", moe_call(dtype=torch.float64)),
    ("one dtype, got bfloat16 and float32, float32", _accepts_grouped, "sm120", moe_call(w_dtype=FP32)),
    ("not uint8", _accepts_grouped, "sm120", moe_call(ids=torch.uint8)),
    ("writes", _accepts_grouped, "sm120", moe_call(out_dtype=torch.float64)),
    ("not nvfp4", _accepts_grouped, "sm120", packed_call(format="nvfp4")),
    ("not fp8", _accepts_grouped, "sm120", packed_call(format="fp8")),
    ("fp16 cannot hold their range", _accepts_grouped, "sm120", packed_call(dtype=FP16)),
    ("not nvfp4", _accepts_linear, "sm120", linear_call("nvfp4", torch.float8_e4m3fn, 4)),
    ("weights are float64", _accepts_route, "sm120", call("moe_route", meta(4, 8), 2, out_dtype=torch.float64)),
    ("up to 4096 experts", _accepts_route, "sm120", call("moe_route", meta(4, 5000), 2)),
]


@pytest.mark.parametrize(("reason", "accepts", "card", "refused"), REFUSED, ids=[r for r, *_ in REFUSED])
def test_refusals_say_why(reason: str, accepts: Any, card: str, refused: Call) -> None:
    pytest.importorskip("triton")
    answer: Verdict = accepts(refused, by_name(card))
    assert not answer and reason in answer.reason  # type: ignore[union-attr]


def test_what_is_accepted() -> None:
    pytest.importorskip("triton")
    card = by_name("sm120")
    assert _accepts_decode(moe_call(T=2), card) and _accepts_grouped(moe_call(T=5000), card)
    assert _accepts_grouped(packed_call(), card) and _accepts_grouped(packed_call(scale=torch.float8_e8m0fnu), card)
    assert _accepts_linear(linear_call("mxfp4", torch.uint8, 2), card)
    assert _accepts_route(call("moe_route", meta(4, 8), 2), card)
