"""What our Triton attention kernels choose: tiles that compile and fit, splits, and calls that they decline."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sm12x_compile.arch import CARDS, Arch, by_name
from sm12x_compile.lowering.triton.arguments import split_head_dim
from sm12x_compile.lowering.triton.attention_decode import decode_refusal
from sm12x_compile.lowering.triton.attention_prefill import prefill_refusal
from sm12x_compile.lowering.triton.launches import meta
from sm12x_compile.lowering.triton.tiles import (
    MAX_SPLITS,
    DecodeTiles,
    decode_splits,
    decode_tiles,
    prefill_tiles,
)
from sm12x_compile.ops.attention import attention
from sm12x_compile.registry import Call

from .compiled import check_launches

GPUS = [card for card in CARDS.values() if card.is_cuda]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BF16, FP16, FP32 = DTYPES


def states(S: int, T: int, D: int, DV: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return meta(1, 32, S, D, dtype=dtype), meta(1, 8, T, D, dtype=dtype), meta(1, 8, T, DV, dtype=dtype)


@pytest.mark.parametrize(
    ("card", "kernel", "case"),
    [
        ("sm120", "attention_prefill", "64x64, bfloat16, mask: window, sinks"),
        ("sm120", "attention_prefill", "128x128, bfloat16, mask: causal"),
        ("sm120", "attention_prefill", "96x96, float16, mask: bias"),
        ("sm120", "attention_prefill", "256x256, bfloat16, mask: window, softcap"),
        ("sm120", "attention_prefill", "128x128, bfloat16, mask: everything"),
        ("sm121", "attention_prefill", "192x128, bfloat16, mask: padding, length"),
        ("sm121", "attention_prefill", "80x80, float32, mask: causal"),
        ("h200", "attention_prefill", "128x128, bfloat16, mask: causal"),
        ("sm120", "attention_decode", "128x128, bfloat16, 1 queries, mask: padding, length"),
        ("sm121", "attention_decode", "64x64, float16, 1 queries, mask: window, sinks"),
        ("sm120", "attention_decode", "256x256, bfloat16, 16 queries, mask: causal"),
        ("h200", "attention_decode", "128x128, bfloat16, 1 queries, mask: causal"),
    ],
)
def test_compiles_and_fits(card: str, kernel: str, case: str) -> None:
    """A sample; `prove` goes through all of them."""
    check_launches(card, kernel, case)


@pytest.mark.nightly
@pytest.mark.parametrize("card", ["sm120", "sm121", "h200", "b200", "a100"])
def test_every_configuration_fits(card: str) -> None:
    """On SM12x nothing is wrong with any; elsewhere spills are nobody's promise."""
    pytest.importorskip("triton")
    from sm12x_compile.prove import prove

    arch = by_name(card)
    wrong = [(p.case, v) for p in prove([card]) for v in p.violations]
    assert not [w for w in wrong if arch.family == "sm12x" or "local-memory" not in w[1]], wrong


def test_at_most_40_configurations_a_kernel() -> None:
    sizes = [8, 32, 40, 64, 72, 80, 96, 112, 128, 144, 160, 192, 224, 256]
    shapes = list(itertools.product(GPUS, sizes, sizes, DTYPES))
    assert len({prefill_tiles(*shape, bias) for shape in shapes for bias in (False, True)}) <= 40
    assert len({decode_tiles(*shape, rows) for shape in shapes for rows in (1, 8, 16, 24, 48, 256)}) <= 40


@given(st.integers(1, 256))
def test_split_head_dim_covers_the_head(size: int) -> None:
    main, rest = split_head_dim(size)
    for width in (main, rest):
        assert width == 0 or (width >= 16 and width & (width - 1) == 0)
    assert main + rest >= size and rest < main
    assert main + rest <= max(16, 1 << (size - 1).bit_length())


@given(st.sampled_from(GPUS), st.sampled_from([16, 32, 64]), st.integers(1, 5000), st.integers(1, 1 << 20))
def test_splits_fill_the_card(card: Arch, block_n: int, groups: int, keys: int) -> None:
    splits = decode_splits(card, DecodeTiles(16, block_n, 4, 2), groups, keys)
    assert 1 <= splits <= MAX_SPLITS
    assert splits == 1 or splits * block_n <= keys
    resident = 2 * card.sm_count
    if keys >= MAX_SPLITS * 2 * block_n and groups * MAX_SPLITS >= resident and groups < resident:
        waves = -(-groups * splits // resident)
        assert groups * splits >= 0.75 * resident * waves, "a wave leaves a quarter of the card idle"


def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Call:
    bound = attention.signature.bind(q, k, v, 0.1, **given)
    bound.apply_defaults()
    return Call("attention", dict(bound.arguments))


REFUSED = [
    ("CUDA GPU", "cpu", call(*states(64, 64, 64, 64, BF16))),
    ("not float64", "sm120", call(*states(64, 64, 64, 64, torch.float64))),
    ("one dtype", "sm120", call(meta(1, 4, 8, 64), meta(1, 4, 8, 64, dtype=FP16), meta(1, 4, 8, 64))),
    ("head dim 320 is over 256", "sm120", call(*states(64, 64, 320, 64, BF16))),
    ("value head dim 512 is over 256", "sm120", call(*states(64, 64, 64, 512, BF16))),
    ("writes", "sm120", call(*states(64, 64, 64, 64, BF16), out_dtype=torch.float64)),
    ("bias", "sm120", call(*states(64, 64, 64, 64, BF16), bias=meta(64, 64, dtype=torch.int32))),
]


@pytest.mark.parametrize(("reason", "card", "refused"), REFUSED, ids=[r for r, _, _ in REFUSED])
def test_refusals_say_why(reason: str, card: str, refused: Call) -> None:
    pytest.importorskip("triton")
    answer = prefill_refusal(refused, by_name(card))
    assert answer is not None and reason in answer


def test_decode_declines_many_queries() -> None:
    pytest.importorskip("triton")
    assert decode_refusal(call(*states(16, 64, 64, 64, BF16)), by_name("sm120")) is None
    answer = decode_refusal(call(*states(17, 64, 64, 64, BF16)), by_name("sm120"))
    assert answer == "17 queries are more than the 16 that it is made for"
    assert prefill_refusal(call(*states(17, 64, 64, 64, BF16)), by_name("sm120")) is None
