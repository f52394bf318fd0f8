"""Compiling Triton kernels for cards that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sm12x_compile.arch import by_name
from sm12x_compile.lowering.triton.attention_prefill import prefill_launch
from sm12x_compile.lowering.triton.prefill_kernel import prefill_kernel
from sm12x_compile.lowering.triton.tiles import Tiles
from sm12x_compile.offline import Compiled, compile_kernel


def arguments(tiles: Tiles, head_dim: int = 64) -> dict[str, Any]:
    q = torch.empty(1, 8, 512, head_dim, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 2, 512, head_dim, dtype=torch.bfloat16, device="meta")
    return prefill_launch(q, k, k, 0.125, causal=True, tiles=tiles)[1]


def compiled(card: str, tiles: Tiles, head_dim: int = 64) -> Compiled:
    return compile_kernel(
        prefill_kernel, arguments(tiles, head_dim), by_name(card),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.max_registers,
    )  # fmt: skip


@pytest.mark.parametrize(("card", "target"), [("sm120", "sm_120a"), ("sm121", "sm_121a")])
def test_sm12x_gets_warp_level_mma_and_nothing_it_lacks(card: str, target: str) -> None:
    made = compiled(card, Tiles(64, 32, 4, 2))
    assert made.target == target
    assert made.kernel == "prefill_kernel"
    assert made.num_warps == 4
    assert 32 < made.registers <= 255
    assert made.shared_bytes >= (64 + 2 * 32) * 64 * 2  # one tile of each operand
    assert list(made.matrix) == ["HMMA.16816.F32.BF16"]
    assert made.forbidden == ()
    assert made.spill_bytes == made.loop_spills == 0


def test_hopper_gets_warpgroup_mma() -> None:
    """The control: the same source for another card gives the instructions that SM12x lacks."""
    made = compiled("h200", Tiles(64, 64, 4, 2))
    assert made.target == "sm_90a"
    assert made.matrix and all(name.startswith("HGMMA") for name in made.matrix)
    assert made.forbidden == ()


def test_too_much_shared_memory_is_seen() -> None:
    made = compiled("sm120", Tiles(64, 64, 4, 4), head_dim=128)
    assert made.shared_bytes > 99 * 1024
    assert not made.fits(by_name("rtx5090"))
    assert made.fits(by_name("h200"))


def test_spills_are_seen() -> None:
    made = compiled("sm120", Tiles(64, 64, 4, 2, max_registers=80))
    assert made.registers <= 80
    assert made.spill_bytes > 0
    assert made.loop_spills > 0


def test_wrong_requests_say_why() -> None:
    given = arguments(Tiles(64, 32, 4, 2))
    with pytest.raises(ValueError, match="cpu is no CUDA card"):
        compile_kernel(prefill_kernel, given, by_name("cpu"), num_warps=4, num_stages=2)
    missing = {name: value for name, value in given.items() if name != "scale"}
    with pytest.raises(ValueError, match="prefill_kernel: no value for scale"):
        compile_kernel(prefill_kernel, missing, by_name("sm120"), num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match="cannot pass str as scale"):
        compile_kernel(prefill_kernel, {**given, "scale": "1"}, by_name("sm120"), num_warps=4, num_stages=2)
