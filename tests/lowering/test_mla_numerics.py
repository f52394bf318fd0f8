"""The kernels of latent attention against the reference in fp64: interpreted here, native where a GPU is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.arch import by_name, of_device
from sm12x_compile.lowering.triton.arguments import card_of
from sm12x_compile.lowering.triton.mla_decode import mla_splits, mla_tiles
from sm12x_compile.lowering.triton.tiles import DecodeTiles
from sm12x_compile.ops import mla

from .test_triton_numerics import BOUND, run  # noqa: F401 (the fixture)

MODULE = "sm12x_compile.lowering.triton.mla_decode"
ABSORBED = "sm12x_compile.lowering.triton.mla_absorbed"
PREFILL = "sm12x_compile.lowering.triton.mla_prefill"
Runner = Callable[..., Tensor]
SMALL = DecodeTiles(16, 16, 4, 2)

MASKS: dict[str, dict[str, Any]] = {
    "none": {}, "causal": {"causal": True, "q_shift": 40}, "length": {"kv_len": 33}, "lengths": {"kv_len": [33, 0]},
    "window": {"causal": True, "q_shift": 40, "window_left": 20}, "padding": {"key_padding": True},
    "bias": {"bias": True}, "sinks and softcap": {"sinks": True, "softcap": 2.0},
    "mean of empty rows": {"kv_len": 0, "empty_rows": "mean"},
}  # fmt: skip


def operands(B: int, H: int, S: int, T: int, L: int, R: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)

    # The rotary part of the queries is strided, as a split of a projection is.
    q_rope = randn(B, S, H, R + 8)[..., 8:].transpose(1, 2) if R else None
    return randn(B, H, S, L), q_rope, randn(B, T, L), randn(B, T, R) if R else None


def masks_of(name: str, B: int, H: int, S: int, T: int, device: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    made = dict(MASKS[name])
    if "kv_len" in made:
        made["kv_len"] = torch.tensor((made["kv_len"] * B)[:B] if isinstance(made["kv_len"], list) else made["kv_len"])
    if "key_padding" in made:
        made["key_padding"] = torch.rand(B, T, generator=g) < 0.7
    if "bias" in made:
        made["bias"] = torch.randn(1, H, S, T, generator=g)
    if "sinks" in made:
        made["sinks"] = torch.randn(H, generator=g)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}


def weights(H: int, N: int, V: int, L: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Views of one parameter, as the halves of an up-projection are."""
    both = torch.randn(H, N + V, L, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * L**-0.5
    both = both.to(like)
    return both[:, :N], both[:, N:]


def expected(
    ops: tuple[Any, ...], scale: float, masks: dict[str, Any], w: tuple[Any, Any] = (None, None)
) -> Tensor:
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in masks.items()}
    return mla.reference(*(None if x is None else x.double() for x in (*ops, *w)), scale, **wide)


def assert_close(out: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert out.shape == wanted.shape and out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert (out.double() - wanted).norm() <= BOUND[dtype] * wanted.norm().clamp(min=1e-30)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("R", [0, 8])
@pytest.mark.parametrize("name", MASKS)
def test_mla_decode(name: str, R: int, splits: int, run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    B, H, S, T, L = 2, 5, 3, 53, 32
    cases = [(torch.float32, SMALL, L, R)]
    if device == "cuda":
        cases = [(d, SMALL, L, R) for d in (torch.float16, torch.bfloat16)]
        for card in (of_device(0), by_name("rtx5090")):
            for keys in (T, 8192):
                cases += [(torch.bfloat16, mla_tiles(card, 512, 128, keys, name == "bias"), 512, 8 * R)]
    for dtype, tiles, latent, rope in cases:
        ops = operands(B, H if device == "cpu" else 40, S, T, latent, rope, dtype, device)
        heads = ops[0].shape[1]
        masks = masks_of(name, B, heads, S, T, device)
        out = run(MODULE, "run_mla_decode", tiles, splits, *ops, 0.3, **masks)
        assert_close(out, expected(ops, 0.3, masks), dtype)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_mla_absorbed(name: str, splits: int, run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    H, T, N, V = 5, 53, 24, 40  # widths that are no powers of two
    cases = [(torch.float32, SMALL, 32, 8)]
    if device == "cuda":
        cases = [(d, SMALL, 64, 8) for d in (torch.float16, torch.bfloat16)]
        for card in (of_device(0), by_name("rtx5090")):
            cases += [(torch.bfloat16, mla_tiles(card, 512, H, T, name == "bias"), 512, 64)]
    for dtype, tiles, L, R in cases:
        ops = operands(1, H, 1, T, N, R, dtype, device)
        latent = operands(1, H, 1, T, L, R, dtype, device)[2]
        ops, w = (*ops[:2], latent, ops[3]), weights(H, N, V, L, latent)
        masks = masks_of(name, 1, H, 1, T, device)
        out = run(ABSORBED, "run_mla_absorbed", tiles, splits, *ops, *w, None, 0.3, **masks)
        assert_close(out, expected(ops, 0.3, masks, w), dtype)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("R", [0, 8])
@pytest.mark.parametrize("name", MASKS)
def test_mla_prefill(name: str, R: int, joined: bool, run: Runner) -> None:  # noqa: F811
    device = run.device  # type: ignore[attr-defined]
    B, H, S, T, N, V, L = 2, 6, 21, 53, 16, 24, 32
    cases = [(torch.float32, N, V, R)]
    if device == "cuda":
        cases = [(d, N, V, R) for d in (torch.float16, torch.bfloat16)] + [(torch.bfloat16, 128, 128, 8 * R)]
    for dtype, nope, v_dim, rope in cases:
        ops = operands(B, H, S, T, nope, rope, dtype, device)
        latent = operands(B, H, S, T, L, rope, dtype, device)[2]
        ops, w = (*ops[:2], latent, ops[3]), weights(H, nope, v_dim, L, latent)
        if not joined:
            w = (w[0][::2].clone(), w[1][::2].clone())  # pairs of heads share one
        masks = masks_of(name, B, H, S, T, device)
        out = run(PREFILL, "mla_prefill", *ops, *w, 0.3, **masks)
        assert_close(out, expected(ops, 0.3, masks, w), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [1, 16, 128])
@pytest.mark.parametrize("S", [1, 4, 64])
def test_the_entry_point_at_real_sizes(H: int, S: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ops = operands(2, H, S, 3000, 512, 64, torch.bfloat16, "cuda")
    masks = {"kv_len": torch.tensor([2100, 3000], device="cuda")}
    out = importlib.import_module(MODULE).mla_decode(*ops, None, None, 0.07, **masks)
    assert_close(out, expected(ops, 0.07, masks), torch.bfloat16)


def test_splits_fill_the_card_and_no_more() -> None:
    card = card_of(torch.empty(0))
    tiles = mla_tiles(card, 512, 128, 8192)
    for groups in (1, 2, 16, 500):
        for keys in (1, 40, 4096, 1 << 17):
            splits = mla_splits(card, tiles, groups, keys)
            assert splits >= 1
            assert splits == 1 or (splits * tiles.block_n <= keys and splits * groups <= card.sm_count)
