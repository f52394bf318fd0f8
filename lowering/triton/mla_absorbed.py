"""`sm12x::mla` with its weights, for one token: into latent space, split-KV decode, out of latent space.

Four kernels that start early, each while the one before it ends. More rows go through a library's batched products
(`absorbed` in `lowering/mla.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...registry import Call
from .arguments import card_of, device_guard, launches_early
from .mla_decode import mla_decode_refusal, mla_splits, mla_tiles, run_mla_decode
from .tiles import DecodeTiles

MAX_WIDTH = 512


def mla_absorbed_refusal(call: Call, arch: Arch) -> str | None:
    """Why `mla_absorbed` cannot or should not take this call on this card, in one sentence, or None."""
    B, H, S, N = call.q_nope.shape
    if B != 1 or S != 1:
        return "made for one token of one sequence; batched products serve more"
    if call.w_uk.shape[0] != H:
        return "several heads share one up-projection"
    if call.w_uk.dtype != call.q_nope.dtype or call.w_uv.dtype != call.q_nope.dtype:
        return "queries and weights have different dtypes"
    if not all(isinstance(n, int) and n <= MAX_WIDTH for n in (N, call.w_uv.shape[1])):
        return f"a head is wider than {MAX_WIDTH}"
    latent = call.q_nope.new_empty((B, H, S, call.latent.shape[2]))
    return mla_decode_refusal(Call("mla", {**call.arguments, "q_nope": latent}), arch)


@dataclass(frozen=True)
class ProjectionTiles:
    """Columns that a program of a product takes (a power of two), and its warps."""

    block_j: int
    num_warps: int


def projection_tiles(inner: int, columns: int) -> ProjectionTiles:
    """About 16 KiB of weight a program, so that many loads are in flight on every multiprocessor."""
    return ProjectionTiles(max(16, min(8192 // _power(inner), _power(columns))), 2 if inner <= 128 else 4)


def mla_absorbed(
    q_nope: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None, w_uk: Tensor, w_uv: Tensor,
    scale: float, causal: bool = False, window_left: int | None = None, window_right: int | None = None,
    chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0, kv_len: Tensor | None = None,
    key_padding: Tensor | None = None, q_segments: Tensor | None = None, k_segments: Tensor | None = None,
    bias: Tensor | None = None, softcap: float = 0.0, sinks: Tensor | None = None, empty_rows: str = "zero",
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::mla`, see `sm12x_compile.ops.mla` for the arguments.

    No host synchronisation, no atomics: it can be captured in a CUDA graph, and its result is the same every time.

    Returns:
        ``[B, H, S, V]``.
    """
    arch = card_of(q_nope)
    H, (T, L) = q_nope.shape[1], latent.shape[1:]
    tiles = mla_tiles(arch, L, H, T, bias is not None)
    splits = mla_splits(arch, tiles, -(-H // tiles.block_r), T)
    return run_mla_absorbed(
        tiles, splits, q_nope, q_rope, latent, k_rope, w_uk, w_uv, out_dtype, scale, causal, window_left,
        window_right, chunk, q_offset, q_shift, kv_len, key_padding, q_segments, k_segments, bias, softcap, sinks,
        empty_rows,
    )  # fmt: skip


def run_mla_absorbed(
    tiles: DecodeTiles, splits: int, q: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None,
    w_uk: Tensor, w_uv: Tensor, out_dtype: torch.dtype | None, *masks: Any, **more_masks: Any,
) -> Tensor:  # fmt: skip
    """`mla_absorbed` with the decode kernel's tiles and the number of splits given."""
    query = project(q, w_uk)
    mixed = run_mla_decode(tiles, splits, query, q_rope, latent, k_rope, *masks, **more_masks, follows=True)
    return project(mixed, w_uv.mT, out_dtype or latent.dtype, follows=True)


def project(x: Tensor, w: Tensor, dtype: torch.dtype | None = None, follows: bool = False) -> Tensor:
    """``x[0, h, 0] @ w[h]``: ``[1, H, 1, I]`` and ``[H, I, J]`` to ``[1, H, 1, J]``.

    follows: the kernel launched last is one of ours that lets the next one start early (`launches_early`).
    """
    from .project_kernel import project_kernel

    out = x.new_empty((*x.shape[:3], w.shape[2]), dtype=dtype or x.dtype)
    pdl = launches_early(x)
    arguments, grid, tiles = project_launch(x, w, out, pdl)
    with device_guard(out):
        project_kernel[grid](**arguments, num_warps=tiles.num_warps, launch_pdl=pdl and follows)
    return out


def project_launch(
    x: Tensor, w: Tensor, out: Tensor, pdl: bool
) -> tuple[dict[str, Any], tuple[int, int], ProjectionTiles]:
    """The kernel's arguments by name, the grid, and the tiles."""
    H, inner, columns = w.shape
    tiles = projection_tiles(inner, columns)
    a: dict[str, Any] = {"x": x, "w": w, "out": out, "stride_xh": x.stride(1), "stride_xi": x.stride(3)}
    a |= zip(("stride_wh", "stride_wi", "stride_wj"), w.stride(), strict=True)
    a |= {"I": inner, "I_PAD": _power(inner), "J": columns, "BLOCK_J": tiles.block_j, "PDL": pdl}
    return a, (H, -(-columns // tiles.block_j)), tiles


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
