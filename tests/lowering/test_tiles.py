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
from sm12x_compile.lowering.triton.attention_decode import decode_launch, decode_refusal
from sm12x_compile.lowering.triton.attention_prefill import prefill_launch, prefill_refusal
from sm12x_compile.lowering.triton.tiles import (
    MAX_SPLITS,
    DecodeTiles,
    decode_splits,
    decode_tiles,
    prefill_tiles,
)
from sm12x_compile.ops.attention import attention
from sm12x_compile.registry import Call

GPUS = [card for card in CARDS.values() if card.is_cuda]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BF16, FP16, FP32 = DTYPES
HEAD_DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def masks(kind: str, S: int, T: int) -> dict[str, Any]:
    length, flags, ids = meta(1, dtype=torch.int64), torch.bool, torch.int64
    padding = dict(key_padding=meta(1, T, dtype=flags), kv_len=length, q_offset=length)
    packed = dict(q_segments=meta(1, S, dtype=ids), k_segments=meta(1, T, dtype=ids))
    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": dict(causal=True),
        "window, sinks": dict(causal=True, window_left=1023, sinks=meta(32)),
        "window, softcap": dict(causal=True, window_left=1023, softcap=50.0),
        "bias": dict(bias=meta(1, 1, S, T)),
        "keep mask": dict(bias=meta(1, 1, S, T, dtype=flags), empty_rows="mean"),
        "padding, length": dict(causal=True, **padding),
        "packed": dict(causal=True, **packed),
        "everything": dict(
            causal=True, window_left=1023, chunk=2048, softcap=50.0, bias=meta(1, 1, S, T), sinks=meta(32),
            empty_rows="mean", **padding, **packed,
        ),
    }  # fmt: skip
    return kinds[kind]


KINDS = [
    "none", "causal", "window, sinks", "window, softcap", "bias", "keep mask", "padding, length", "packed",
    "everything",
]  # fmt: skip


def states(S: int, T: int, D: int, DV: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return meta(1, 32, S, D, dtype=dtype), meta(1, 8, T, D, dtype=dtype), meta(1, 8, T, DV, dtype=dtype)


def check_prefill(card: Arch, D: int, DV: int, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from sm12x_compile.lowering.triton.prefill_kernel import prefill_kernel
    from sm12x_compile.offline import compile_kernel

    given = masks(kind, 4096, 4096)
    tiles = prefill_tiles(card, D, DV, dtype, "bias" in given)
    arguments = prefill_launch(*states(4096, 4096, D, DV, dtype), 0.1, **given, tiles=tiles)[1]
    made = compile_kernel(
        prefill_kernel, arguments, card,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.max_registers,
    )  # fmt: skip
    assert made.fits(card), made
    assert made.forbidden == ()
    assert bool(made.matrix) == (dtype != torch.float32), made
    if card.family == "sm12x":
        assert all(name.startswith("HMMA.16816") for name in made.matrix)
        # The rarest combinations may spill a word or two; the usual masks nothing.
        rare = kind in ("packed", "everything") or (kind == "bias" and dtype == torch.float32)
        assert made.loop_spills <= (4 if rare else 0), made


def check_decode(card: Arch, D: int, DV: int, kind: str, dtype: torch.dtype, S: int) -> None:
    pytest.importorskip("triton")
    from sm12x_compile.lowering.triton.decode_kernel import combine_kernel, decode_kernel
    from sm12x_compile.offline import compile_kernel

    given = masks(kind, S, 8192)
    tiles = decode_tiles(card, D, DV, dtype, 4 * S, "bias" in given)
    q, k, v = states(S, 8192, D, DV, dtype)
    _, arguments, _, combine = decode_launch(q, k, v, 0.1, **given, tiles=tiles, splits=8, pdl=card.pdl)
    made = compile_kernel(decode_kernel, arguments, card, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    assert combine is not None
    combined = compile_kernel(combine_kernel, combine, card, num_warps=tiles.combine_warps, num_stages=2)
    assert made.fits(card) and combined.fits(card), made
    assert made.forbidden == combined.forbidden == ()
    if card.family == "sm12x":
        assert made.loop_spills == combined.loop_spills == 0, made


@pytest.mark.parametrize(
    ("card", "head_dims", "kind", "dtype"),
    [
        ("sm120", (64, 64), "window, sinks", BF16),
        ("sm120", (128, 128), "causal", BF16),
        ("sm120", (96, 96), "bias", FP16),
        ("sm120", (256, 256), "window, softcap", BF16),
        ("sm120", (128, 128), "everything", BF16),
        ("sm121", (192, 128), "padding, length", BF16),
        ("sm121", (80, 80), "causal", FP32),
        ("h200", (128, 128), "causal", BF16),
    ],
)
def test_prefill_compiles_and_fits(card: str, head_dims: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    check_prefill(by_name(card), *head_dims, kind, dtype)


@pytest.mark.parametrize(
    ("card", "head_dims", "kind", "dtype", "queries"),
    [
        ("sm120", (128, 128), "padding, length", BF16, 1),
        ("sm121", (64, 64), "window, sinks", FP16, 1),
        ("sm120", (256, 256), "causal", BF16, 16),
        ("h200", (128, 128), "causal", BF16, 1),
    ],
)
def test_decode_compiles_and_fits(
    card: str, head_dims: tuple[int, int], kind: str, dtype: torch.dtype, queries: int
) -> None:
    check_decode(by_name(card), *head_dims, kind, dtype, queries)


# fp16 compiles like bf16. Every mask on one card; the plainest and the richest on all.
PLAIN_AND_RICH = ("causal", "everything")
OTHERS = ("sm121", "h200", "b200", "a100")
NIGHTLY_PREFILL = [("sm120", kind, dtype) for kind in KINDS for dtype in (BF16, FP32)] + [
    (card, kind, dtype) for card in OTHERS for kind in PLAIN_AND_RICH for dtype in (BF16, FP32)
]
NIGHTLY_DECODE = [
    ("sm120", kind, dtype, queries) for kind in PLAIN_AND_RICH for dtype in (BF16, FP32) for queries in (1, 6, 16)
] + [(card, "everything", BF16, queries) for card in OTHERS for queries in (1, 16)]


@pytest.mark.nightly
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(("card", "kind", "dtype"), NIGHTLY_PREFILL)
def test_every_prefill_choice(card: str, kind: str, dtype: torch.dtype, head_dims: tuple[int, int]) -> None:
    check_prefill(by_name(card), *head_dims, kind, dtype)


@pytest.mark.nightly
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(("card", "kind", "dtype", "queries"), NIGHTLY_DECODE)
def test_every_decode_choice(
    card: str, kind: str, dtype: torch.dtype, queries: int, head_dims: tuple[int, int]
) -> None:
    check_decode(by_name(card), *head_dims, kind, dtype, queries)


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
