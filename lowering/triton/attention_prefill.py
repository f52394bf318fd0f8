"""`sm12x::attention` by flash attention in Triton, for many queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...registry import Call
from .arguments import card_of, check, device_guard, operands, refusal, rope_operands, row_tiles
from .tiles import Tiles, prefill_tiles, spans_few_blocks


def prefill_refusal(call: Call, arch: Arch) -> str | None:
    """Why `attention_prefill` cannot take this call on this card, in one sentence, or None."""
    return refusal(call, arch)


def prefill_launch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, window_left: int | None = None,
    window_right: int | None = None, chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0,
    kv_len: Tensor | None = None, key_padding: Tensor | None = None, q_segments: Tensor | None = None,
    k_segments: Tensor | None = None, bias: Tensor | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None, empty_rows: str = "zero", out_dtype: torch.dtype | None = None,
    *, tiles: Tiles, q_rope: Tensor | None = None, k_rope: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any], tuple[int, int]]:  # fmt: skip
    """The result's storage ``[B, S, Hq, Dv]``, the kernel's arguments by name, and the grid.

    q_rope, k_rope: a second part of q and k, ``[B, Hq, S, R]`` and ``[B, T, R]``, which all heads share.
    """
    B, Hq, S, _ = q.shape
    out = q.new_empty((B, S, Hq, v.shape[3]), dtype=out_dtype or v.dtype)
    a = operands(
        q, k, v, scale, causal, window_left, window_right, chunk, q_offset, q_shift, kv_len, key_padding,
        q_segments, k_segments, bias, softcap, sinks, empty_rows,
    )  # fmt: skip
    a["out"] = out
    a["stride_ob"], a["stride_os"], a["stride_oh"], _ = out.stride()
    a["HEADS"] = Hq
    a |= rope_operands(q_rope, k_rope, a["WIDE"])
    a["D_REST"] = a.pop("ROPE_PAD") or a["D_REST"]
    a["BLOCK_M"], a["BLOCK_N"] = tiles.block_m, tiles.block_n
    a["NARROW"] = spans_few_blocks(tiles, causal, window_left, window_right)
    return out, a, (B * Hq, -(-S // tiles.block_m))


def attention_prefill(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, window_left: int | None = None,
    window_right: int | None = None, chunk: int | None = None, q_offset: Tensor | None = None, q_shift: int = 0,
    kv_len: Tensor | None = None, key_padding: Tensor | None = None, q_segments: Tensor | None = None,
    k_segments: Tensor | None = None, bias: Tensor | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None, empty_rows: str = "zero", out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`sm12x::attention`, see `sm12x_compile.ops.attention` for the arguments.

    Returns:
        ``[B, Hq, S, Dv]``, a transposed view of ``[B, S, Hq, Dv]``, which is what callers go on with.

    Raises:
        ValueError: the shapes do not fit.
    """
    check(q, k, v, empty_rows)
    tiles = prefill_tiles(card_of(q), sum(row_tiles(k)), sum(row_tiles(v)), q.dtype, bias is not None)
    if tiles.num_stages > 2 and spans_few_blocks(tiles, causal, window_left, window_right):
        tiles = replace(tiles, num_stages=2)  # the run is too short to fill a deeper pipeline
    return run_prefill(
        tiles, q, k, v, scale, causal, window_left, window_right, chunk, q_offset, q_shift, kv_len, key_padding,
        q_segments, k_segments, bias, softcap, sinks, empty_rows, out_dtype,
    )  # fmt: skip


def run_prefill(tiles: Tiles, *args: Any, **kwargs: Any) -> Tensor:
    """`attention_prefill` with the tiles given."""
    from .prefill_kernel import prefill_kernel

    out, arguments, grid = prefill_launch(*args, **kwargs, tiles=tiles)
    if not out.numel() or not arguments["T"]:
        return out.zero_().transpose(1, 2)
    with device_guard(out):
        prefill_kernel[grid](
            **arguments, num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.max_registers
        )
    return out.transpose(1, 2)
