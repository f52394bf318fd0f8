"""The kernels of latent attention: which one is chosen, and that all compile for SM12x, fit and spill nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.arch import by_name
from sm12x_compile.lowering.select import choose
from sm12x_compile.lowering.triton.attention_decode import decode_launch
from sm12x_compile.lowering.triton.attention_prefill import prefill_launch
from sm12x_compile.lowering.triton.mla_absorbed import project_launch
from sm12x_compile.lowering.triton.mla_decode import mla_tiles
from sm12x_compile.lowering.triton.tiles import prefill_tiles
from sm12x_compile.ops import OPS
from sm12x_compile.options import Options
from sm12x_compile.registry import Call

H, N, R, V, L = 128, 128, 64, 128, 512  # DeepSeek-V3
CARDS = ["sm120", "sm121"]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def call(B: int, S: int, T: int, absorbed: bool = False, groups: int = 1, **given: Any) -> Call:
    weights = (None, None) if absorbed else (meta(H // groups, N, L), meta(H // groups, V, L))
    q = meta(B, H, S, L if absorbed else N)
    operands = (q, meta(B, H, S, R), meta(B, T, L), meta(B, T, R), *weights, 0.1)
    bound = OPS["mla"].signature.bind(*operands, **given)
    bound.apply_defaults()
    return Call("mla", dict(bound.arguments))


@pytest.mark.parametrize(
    ("given", "on_gpu", "on_cpu"),
    [
        (dict(B=1, S=1, T=4096), "triton.mla_absorbed", "absorbed"),
        (dict(B=8, S=1, T=4096), "absorbed", "absorbed"),
        (dict(B=1, S=4, T=4096), "absorbed", "absorbed"),
        (dict(B=1, S=1, T=4096, groups=2), "absorbed", "absorbed"),
        (dict(B=1, S=2048, T=2048, causal=True), "triton.mla_prefill", "expanded"),
        (dict(B=2, S=1, T=4096, absorbed=True), "triton.mla_decode", "aten"),
        (dict(B=1, S=2048, T=2048, absorbed=True), "aten", "aten"),
    ],
)
def test_choice(given: dict[str, Any], on_gpu: str, on_cpu: str) -> None:
    options = Options()
    for card, wanted in (("sm120", on_gpu), ("sm121", on_gpu), ("h200", on_gpu), ("cpu", on_cpu)):
        kernel, refused = choose(call(**given), by_name(card), options)
        assert kernel is not None and kernel.name == wanted, (card, refused)
        assert all(reason for _, reason in refused)


@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("card", CARDS)
def test_decode_compiles_and_fits(card: str, heads: int) -> None:
    """A tile of 512 + 64 columns, and up to 64 rows of 512 accumulators."""
    pytest.importorskip("triton")
    from sm12x_compile.lowering.triton.decode_kernel import combine_kernel, decode_kernel
    from sm12x_compile.offline import compile_kernel

    arch = by_name(card)
    tiles = mla_tiles(arch, L, heads, 8192)
    latent, rope = meta(1, 1, 8192, L), dict(q_rope=meta(1, heads, 1, R), k_rope=meta(1, 8192, R))
    given = dict(kv_len=meta(1, dtype=torch.int64), tiles=tiles, splits=8, pdl=True, **rope)
    _, arguments, _, combine = decode_launch(meta(1, heads, 1, L), latent, latent, 0.1, **given)
    made = compile_kernel(decode_kernel, arguments, arch, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    assert made.fits(arch) and made.forbidden == () and made.loop_spills == 0, made
    assert list(made.matrix) == ["HMMA.16816.F32.BF16"]
    assert combine is not None
    combined = compile_kernel(combine_kernel, combine, arch, num_warps=2, num_stages=2)
    assert combined.fits(arch) and combined.spill_bytes == 0, combined


@pytest.mark.parametrize("card", CARDS)
def test_projections_compile_and_fit(card: str) -> None:
    pytest.importorskip("triton")
    from sm12x_compile.lowering.triton.project_kernel import project_kernel
    from sm12x_compile.offline import compile_kernel

    arch, weight = by_name(card), meta(H, N + V, L)
    for x, w in ((meta(1, H, 1, N), weight[:, :N]), (meta(1, H, 1, L), weight[:, N:].mT)):
        arguments, _, tiles = project_launch(x, w, meta(1, H, 1, w.shape[2]), pdl=True)
        made = compile_kernel(project_kernel, arguments, arch, num_warps=tiles.num_warps, num_stages=2)
        assert made.fits(arch) and made.spill_bytes == 0 and made.forbidden == (), made


@pytest.mark.parametrize("card", CARDS)
def test_prefill_compiles_and_fits(card: str) -> None:
    pytest.importorskip("triton")
    from sm12x_compile.lowering.triton.prefill_kernel import prefill_kernel
    from sm12x_compile.offline import compile_kernel

    arch, tiles = by_name(card), prefill_tiles(by_name(card), N + R, V, torch.bfloat16)
    keys = meta(1, H, 2048, N + V)
    rope = dict(q_rope=meta(1, H, 2048, R), k_rope=meta(1, 2048, R))
    arguments = prefill_launch(
        meta(1, H, 2048, N), keys[..., :N], keys[..., N:], 0.1, causal=True, tiles=tiles, **rope
    )[1]
    made = compile_kernel(prefill_kernel, arguments, arch, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    assert made.fits(arch) and made.forbidden == () and made.loop_spills == 0, made
    assert all(name.startswith("HMMA.16816") for name in made.matrix)
