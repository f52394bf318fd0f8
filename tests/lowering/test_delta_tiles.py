"""What the Triton kernels of the delta rule and the convolutions choose: tiles that fit, calls that they decline."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sm12x_compile.arch import CARDS, Arch, by_name
from sm12x_compile.lowering.triton.causal_conv1d import conv_launch, conv_update_launch
from sm12x_compile.lowering.triton.delta_chunked import chunked_launches, kernel_of
from sm12x_compile.lowering.triton.delta_tiles import CHUNK, chunk_tiles, parts, step_tiles
from sm12x_compile.lowering.triton.delta_update import update_launch, verify_launch
from sm12x_compile.ops import OPS
from sm12x_compile.registry import Call

GPUS = [card for card in CARDS.values() if card.is_cuda]
HEAD_DIMS = (64, 128, 256)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(K: int, V: int, kda: bool, T: int = 4096, Hk: int = 16, Hv: int = 32) -> tuple[torch.Tensor, ...]:
    g = meta(1, T, Hv, K, dtype=torch.float32) if kda else meta(1, T, Hv, dtype=torch.float32)
    return meta(1, T, Hk, K), meta(1, T, Hk, K), meta(1, T, Hv, V), g, meta(1, T, Hv)


def assert_made(made: Any, card: Arch) -> None:
    assert made.fits(card) and made.forbidden == (), made
    if card.family == "sm12x":
        assert made.loop_spills == 0, made


def check_chunked(card: Arch, K: int, V: int, kda: bool, Hv: int, packed: bool = False, state: bool = True) -> None:
    pytest.importorskip("triton")
    from sm12x_compile.offline import compile_kernel

    chunks = 4096 // CHUNK
    tiles = chunk_tiles(card, K, V, kda, Hv, chunks)
    count = parts(card, tiles, K, V, Hv, chunks)
    initial = meta(1, Hv, K, V, dtype=torch.float32) if state else None
    bounds = meta(2, dtype=torch.int64) if packed else None
    ops = operands(K, V, kda, Hk=Hv, Hv=Hv)
    _, _, launches = chunked_launches(tiles, count, *ops, 0.1, initial, "rsqrt", 1e-6, bounds)
    assert len(launches) == (3 if count > 1 else 2)
    for launch in launches:
        kernel, tile = kernel_of(launch.kernel), launch.tile
        arguments = {name: launch.arguments[name] for name in kernel.arg_names}
        made = compile_kernel(
            kernel, arguments, card,
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
        )  # fmt: skip
        assert_made(made, card)
        if card.family == "sm12x":
            assert "HMMA.16816.F32.BF16" in made.matrix, made


def check_steps(card: Arch, K: int, V: int, kda: bool, states: int) -> None:
    pytest.importorskip("triton")
    from sm12x_compile.lowering.triton import delta_step_kernel
    from sm12x_compile.offline import compile_kernel

    pool, slots = meta(9, 32, K, V, dtype=torch.float32), meta(1, dtype=torch.int64)
    journal = meta(9, 2, 4, 32, K + V + (K if kda else 1), dtype=torch.float32)
    one, many = (step_tiles(card, K, V, states, drafts) for drafts in (False, True))
    update = update_launch(one, *operands(K, V, kda, T=1), pool, slots, 0.1, "rsqrt")[1]
    verify = verify_launch(many, *operands(K, V, kda, T=4), pool, journal, slots, slots, slots, 0.1, "rsqrt")[1]
    for name, arguments, tiles in (("update_kernel", update, one), ("verify_kernel", verify, many)):
        kernel = getattr(delta_step_kernel, name)
        assert_made(compile_kernel(kernel, arguments, card, num_warps=tiles.num_warps, num_stages=3), card)


@pytest.mark.parametrize(
    ("card", "K", "V", "kda", "heads"),
    [("sm120", 128, 128, False, 8), ("sm121", 128, 128, True, 32)],
)
def test_chunked_compiles_and_fits(card: str, K: int, V: int, kda: bool, heads: int) -> None:
    check_chunked(by_name(card), K, V, kda, heads)


@pytest.mark.parametrize(("card", "K", "kda"), [("sm120", 128, False), ("sm121", 256, True)])
def test_steps_compile_and_fit(card: str, K: int, kda: bool) -> None:
    check_steps(by_name(card), K, K, kda, 32)


@pytest.mark.parametrize("card", ["sm120", pytest.param("sm121", marks=pytest.mark.nightly)])
def test_convolutions_compile_and_fit(card: str) -> None:
    pytest.importorskip("triton")
    from sm12x_compile.lowering.triton.conv_kernel import conv_kernel, conv_update_kernel
    from sm12x_compile.offline import compile_kernel

    arch, w, bias = by_name(card), meta(8192, 4), meta(8192)
    for x in (meta(1, 4096, 8192).mT, meta(1, 8192, 4096)):
        arguments = conv_launch(x, w, bias, "silu", meta(1, 8192, 4))[2]
        assert_made(compile_kernel(conv_kernel, arguments, arch, num_warps=4, num_stages=3), arch)
    update = conv_update_launch(meta(1, 8192, 1), w, meta(9, 8192, 4), meta(1, dtype=torch.int64), bias, "silu")[1]
    assert_made(compile_kernel(conv_update_kernel, update, arch, num_warps=4, num_stages=3), arch)


NIGHTLY = [
    (card, K, V, kda, heads)
    for card in ("sm120", "sm121", "h200", "b200", "a100")
    for K, V in itertools.product(HEAD_DIMS, HEAD_DIMS)
    for kda in (False, True)
    if K <= 128 or not kda
    for heads in ((8, 32) if card == "sm120" else (8,) if card == "sm121" else (128,))
]


@pytest.mark.nightly
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("card", "K", "V", "kda", "heads"), NIGHTLY)
def test_every_chunked_choice(card: str, K: int, V: int, kda: bool, heads: int, packed: bool) -> None:
    check_chunked(by_name(card), K, V, kda, heads, packed, state=not packed)


@pytest.mark.nightly
@pytest.mark.parametrize("states", [1, 1 << 16])
@pytest.mark.parametrize("kda", [False, True], ids=["gdn", "kda"])
@pytest.mark.parametrize(("K", "V"), itertools.product(HEAD_DIMS, HEAD_DIMS))
@pytest.mark.parametrize("card", ["sm120", "sm121", "h200"])
def test_every_step_choice(card: str, K: int, V: int, kda: bool, states: int) -> None:
    check_steps(by_name(card), K, V, kda, states)


def test_at_most_40_configurations_a_kernel() -> None:
    shapes = list(itertools.product(GPUS, HEAD_DIMS, HEAD_DIMS, (False, True), (1, 8, 32, 64, 500), (1, 40, 900)))
    assert len({chunk_tiles(*shape) for shape in shapes}) <= 40
    assert len({step_tiles(*s[:3], s[4] * 100, s[3]) for s in shapes}) <= 40


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
    ("256 channels", "sm120", call("gated_delta_rule", *operands(256, 128, True), 0.1)),
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
