"""`sm12x::mla` without weights by split-KV decode in Triton: few queries, all heads, one latent cache.

The kernel is that of `attention_decode` with one KV head. All H * S rows of a batch share the latents, so a program
takes up to 64 of them, and the cache is read H * S / 64 times at most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import KIB, Arch
from ...registry import Call
from .arguments import DTYPES, card_of, device_guard, launches_early, refusal
from .attention_decode import decode_launch, launch_combine
from .tiles import DecodeTiles

MAX_QUERIES = 64
MAX_LATENT = 512
MAX_ROPE = 128
MAX_SPLITS = 64


def mla_decode_refusal(call: Call, arch: Arch) -> str | None:
    """Why `mla_decode` cannot or should not take this call on this card, in one sentence, or None."""
    queries, latent = call.hint(call.q_nope.shape[2]), call.latent
    if queries > MAX_QUERIES:
        return f"{queries} queries are more than the {MAX_QUERIES} that it is made for"
    if call.q_nope.dtype not in DTYPES or call.q_nope.dtype == torch.float32:
        return f"computes in fp16 or bf16, not {str(call.q_nope.dtype).removeprefix('torch.')}"
    width = latent.shape[2]
    if not isinstance(width, int) or width & (width - 1) or not 16 <= width <= MAX_LATENT:
        return f"the latent's width must be a power of two up to {MAX_LATENT}, not {width}"
    if call.k_rope is not None and not (isinstance(call.k_rope.shape[2], int) and call.k_rope.shape[2] <= MAX_ROPE):
        return f"the rotary part is wider than {MAX_ROPE}"
    seen = {"q": call.q_nope[..., :16], "k": latent[:, None, :, :16], "v": latent[:, None, :, :16]}
    return refusal(Call("attention", {**call.arguments, **seen}), arch)


def mla_tiles(arch: Arch, latent: int, rows: int, keys: int, bias: bool = False) -> DecodeTiles:
    """Rows and keys that a program takes, for this many query rows a batch and keys in all batches.

    A tile of latents is key and value, so it decides what fits. A short cache has too few blocks to keep all
    multiprocessors busy, so its rows are shared out among more programs (timed on an H200, where shared memory allows
    either). A bias is a tile of its own: beside 512 columns it takes more warps.
    """
    block_r = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if arch.smem_per_block >= 200 * KIB:
        if keys <= 48 * arch.sm_count:
            block_r = 16
        block_n = 64 if arch.wgmma and not bias else 32
        if block_r == 16:
            return DecodeTiles(16, block_n, 4, 3)
        return DecodeTiles(block_r, block_n, 8, 2, prefetch=1)
    few = block_r == 16 and not (bias and latent > 256)
    return DecodeTiles(block_r, 16 if latent > 256 and block_r == 64 else 32, 4 if few else 8, 2)


def mla_splits(arch: Arch, tiles: DecodeTiles, groups: int, keys: int) -> int:
    """Splits of the keys: one program a multiprocessor, at least two blocks of keys each."""
    most = min(MAX_SPLITS, -(-keys // (2 * tiles.block_n)))
    return max(1, min(most, arch.sm_count // max(1, groups)))


def mla_decode(
    q_nope: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None, w_uk: Tensor | None,
    w_uv: Tensor | None, scale: float, causal: bool = False, window_left: int | None = None,
    window_right: int | None = None, chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0,
    kv_len: Tensor | None = None, key_padding: Tensor | None = None, q_segments: Tensor | None = None,
    k_segments: Tensor | None = None, bias: Tensor | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None, empty_rows: str = "zero", out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::mla` for queries in latent space; see `sm12x_compile.ops.mla` for the arguments.

    No host synchronisation, no atomics: it can be captured in a CUDA graph, and its result is the same every time.

    Returns:
        ``[B, H, S, L]``.

    Raises:
        ValueError: weights are given.
    """
    if w_uk is not None or w_uv is not None:
        raise ValueError("mla_decode takes queries in latent space, and no weights")
    arch = card_of(q_nope)
    B, H, S, L = q_nope.shape
    tiles = mla_tiles(arch, L, H * S, B * latent.shape[1], bias is not None)
    splits = mla_splits(arch, tiles, B * -(-H * S // tiles.block_r), latent.shape[1])
    return run_mla_decode(
        tiles, splits, q_nope, q_rope, latent, k_rope, scale, causal, window_left, window_right, chunk, q_offset,
        q_shift, kv_len, key_padding, q_segments, k_segments, bias, softcap, sinks, empty_rows, out_dtype,
    )  # fmt: skip


def run_mla_decode(
    tiles: DecodeTiles, splits: int, q: Tensor, q_rope: Tensor | None, latent: Tensor, k_rope: Tensor | None,
    *args: Any, follows: bool = False, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`mla_decode` with the tiles and the number of splits given.

    follows: the kernel launched last is one of ours that lets the next one start early (`launches_early`).
    """
    from .decode_kernel import decode_kernel

    keys, pdl = latent[:, None], launches_early(q)
    out, arguments, grid, combine = decode_launch(
        q, keys, keys, *args, **kwargs, tiles=tiles, splits=splits, q_rope=q_rope, k_rope=k_rope, pdl=pdl
    )
    if not out.numel() or not arguments["T"]:
        return out.zero_().transpose(1, 2)
    with device_guard(out):
        launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "launch_pdl": pdl and follows}
        decode_kernel[grid](**arguments, **launch)
        if combine is not None:
            launch_combine(combine, out, tiles, pdl)
    return out.transpose(1, 2)
