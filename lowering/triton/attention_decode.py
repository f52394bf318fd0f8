"""`sm12x::attention` by split-KV decode in Triton, for few queries against a long, contiguous cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...registry import Call
from .arguments import card_of, check, device_guard, launches_early, operands, refusal, rope_operands, row_tiles
from .tiles import DecodeTiles, decode_splits, decode_tiles

MAX_QUERIES = 16


def decode_refusal(call: Call, arch: Arch) -> str | None:
    """Why `attention_decode` cannot or should not take this call on this card, in one sentence, or None."""
    queries = call.hint(call.q.shape[2])
    if queries > MAX_QUERIES:
        return f"{queries} queries are more than the {MAX_QUERIES} that it is made for"
    return refusal(call, arch)


def decode_launch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, window_left: int | None = None,
    window_right: int | None = None, chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0,
    kv_len: Tensor | None = None, key_padding: Tensor | None = None, q_segments: Tensor | None = None,
    k_segments: Tensor | None = None, bias: Tensor | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None, empty_rows: str = "zero", out_dtype: torch.dtype | None = None,
    *, tiles: DecodeTiles, splits: int, q_rope: Tensor | None = None, k_rope: Tensor | None = None,
    pdl: bool = False,
) -> tuple[Tensor, dict[str, Any], tuple[int, int, int], dict[str, Any] | None]:  # fmt: skip
    """Storage of the result, the kernel's arguments by name, its grid, and the combining kernel's arguments.

    pdl: see `launches_early`.
    """
    B, Hq, S, _ = q.shape
    Hkv, DV = k.shape[1], v.shape[3]
    out = q.new_empty((B, S, Hq, DV), dtype=out_dtype or v.dtype)
    a = operands(
        q, k, v, scale, causal, window_left, window_right, chunk, q_offset, q_shift, kv_len, key_padding,
        q_segments, k_segments, bias, softcap, sinks, empty_rows,
    )  # fmt: skip
    a["out"] = out
    a["stride_ob"], a["stride_os"], a["stride_oh"], _ = out.stride()
    a["splits"] = splits
    a["KV_HEADS"] = Hkv
    a |= rope_operands(q_rope, k_rope, a["WIDE"])
    a["SHARED"] = v is k and not a["D_REST"]  # latents are keys and values at once
    a["BLOCK_R"], a["BLOCK_N"] = tiles.block_r, tiles.block_n
    a["PREFETCH"] = tiles.prefetch if k.device.type != "cpu" and k.stride(-1) == 1 else 0  # not interpreted
    a["PDL"] = pdl
    a["partial"] = None
    grid = (B * Hkv, splits, -(-S * (Hq // Hkv) // tiles.block_r))
    if splits == 1:
        return out, a, grid, None
    rows = B * Hq * S
    a["partial"] = q.new_empty(rows * splits * (DV + 2), dtype=torch.float32)
    shared = (
        "partial", "out", "v", "stride_ob", "stride_os", "stride_oh", "stride_vb", "stride_vh",
        "stride_vt", "stride_vd", "S", "T", "splits", "sinks", "stride_sink", "GROUP", "DV", "NATURAL", "EMPTY",
        "WIDE", "BLOCK_N", "PDL",
    )  # fmt: skip
    combine = {name: a[name] for name in shared}
    combine["HEADS"] = Hq
    combine["DV_PAD"] = combine_width(DV, rows)
    combine["SPLITS_PAD"] = 1 << (splits - 1).bit_length()
    return out, a, grid, combine


def combine_width(v_head_dim: int, rows: int) -> int:
    """Columns that a program of the combining kernel takes: a few wide rows are shared out, to fill the card."""
    padded = 1 << (v_head_dim - 1).bit_length()
    return min(padded, 128) if padded == v_head_dim and rows <= 256 else padded


def launch_combine(combine: dict[str, Any], out: Tensor, tiles: DecodeTiles, pdl: bool) -> None:
    """One program for every row of the result and every share of its columns."""
    from .decode_kernel import combine_kernel

    rows = out.shape[0] * out.shape[1] * out.shape[2]
    grid = rows, -(-out.shape[3] // combine["DV_PAD"])
    combine_kernel[grid](**combine, num_warps=combine_warps(combine, tiles), launch_pdl=pdl)


def combine_warps(combine: dict[str, Any], tiles: DecodeTiles) -> int:
    """Warps of the combining kernel: two for a share of a row."""
    return 2 if combine["DV_PAD"] < combine["DV"] else tiles.combine_warps


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, window_left: int | None = None,
    window_right: int | None = None, chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0,
    kv_len: Tensor | None = None, key_padding: Tensor | None = None, q_segments: Tensor | None = None,
    k_segments: Tensor | None = None, bias: Tensor | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None, empty_rows: str = "zero", out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::attention`, see `sm12x_compile.ops.attention` for the arguments; right for any number of queries.

    No host synchronisation, no atomics: it can be captured in a CUDA graph, and its result is the same every time.

    Returns:
        ``[B, Hq, S, Dv]``, a transposed view of ``[B, S, Hq, Dv]``, which is what callers go on with.

    Raises:
        ValueError: the shapes do not fit.
    """
    check(q, k, v, empty_rows)
    arch = card_of(q)
    rows = q.shape[2] * (q.shape[1] // k.shape[1])
    tiles = decode_tiles(arch, sum(row_tiles(k)), sum(row_tiles(v)), q.dtype, rows, bias is not None)
    splits = decode_splits(arch, tiles, q.shape[0] * k.shape[1] * -(-rows // tiles.block_r), k.shape[2])
    return run_decode(
        tiles, splits, q, k, v, scale, causal, window_left, window_right, chunk, q_offset, q_shift, kv_len,
        key_padding, q_segments, k_segments, bias, softcap, sinks, empty_rows, out_dtype,
    )  # fmt: skip


def run_decode(tiles: DecodeTiles, splits: int, *args: Any, **kwargs: Any) -> Tensor:
    """`attention_decode` with the tiles and the number of splits given."""
    from .decode_kernel import decode_kernel

    pdl = launches_early(args[0])
    out, arguments, grid, combine = decode_launch(*args, **kwargs, tiles=tiles, splits=splits, pdl=pdl)
    if not out.numel() or not arguments["T"]:
        return out.zero_().transpose(1, 2)
    with device_guard(out):
        decode_kernel[grid](**arguments, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
        if combine is not None:
            launch_combine(combine, out, tiles, pdl)
    return out.transpose(1, 2)
