"""Launches of `pair_kernel`: MXFP4 experts, or one packed weight, for so few rows that each reads its weight itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import device_guard
from .expert_tiles import PairTiles


def run_pairs(
    gate_up: PairTiles, down: PairTiles, x: Tensor, ids: Tensor, weights: Tensor | None, first: dict[str, Any],
    second: dict[str, Any], out: Tensor, between: dict[str, Any], pdl: bool,
) -> Tensor:  # fmt: skip
    """Both products and the sum. first, second: weights as `weight_operands` gives them; weights None: all are 1."""
    from .pair_kernel import pair_sum_kernel

    h = x.new_empty((ids.numel(), first["N"]), dtype=torch.float32)
    with device_guard(x):
        start_pairs(gate_up, x, h, first, ids, planes=True, pdl=pdl, **between)
        a, grid = sum_launch(down, h, out, second, ids, weights, wide=x.dtype == torch.float32, pdl=pdl)
        pair_sum_kernel[grid](**a, num_warps=down.num_warps, launch_pdl=pdl)
    return out


def start_pairs(
    tiles: PairTiles, x: Tensor, out: Tensor, weight: dict[str, Any], ids: Tensor | None = None, *, pdl: bool = False,
    **between: Any,
) -> None:  # fmt: skip
    """Launch `pair_kernel`."""
    from .pair_kernel import pair_kernel

    a, grid = pair_launch(tiles, x, out, weight, ids, pdl=pdl, **between)
    pair_kernel[grid](**a, num_warps=tiles.num_warps, launch_pdl=pdl)


def pair_launch(
    tiles: PairTiles, x: Tensor, out: Tensor, weight: dict[str, Any], ids: Tensor | None = None, *,
    row_weights: Tensor | None = None, activation: int = 0, alpha: float = 0.0, limit: float | None = None,
    planes: bool = False, pdl: bool = False,
) -> tuple[dict[str, Any], tuple[int]]:  # fmt: skip
    """The kernel's arguments by name, and its grid. x: ``[T, K]``; ids: ``[T, top_k]``, or None for the only expert."""
    tiles_n = -(-weight["N"] // tiles.block_n)
    a = _weight(weight) | {name: weight[name] for name in ("stride_wup", "stride_sup", "stride_bup", "GATED")}
    a |= dict(x=in_words(x), out=out, ids=ids, row_weights=row_weights, stride_om=out.stride(0), tiles_n=tiles_n)
    a["stride_xm"] = a["x"].stride(0)
    a["stride_it"], a["stride_ij"] = (None, None) if ids is None else ids.stride()
    a["stride_rt"], a["stride_rj"] = (None, None) if row_weights is None else row_weights.stride()
    a |= dict(alpha=float(alpha), limit=None if limit is None else float(limit), ACTIVATION=activation, PDL=pdl)
    a |= dict(TOPK=1 if ids is None else ids.shape[1], WIDE=x.dtype == torch.float32, PLANES=planes)
    a |= _blocks(tiles, weight["K"] // 4)
    a["STEPS"] = -(-weight["K"] // (4 * a["BLOCK_Q"]))
    return a, (out.shape[0] * tiles_n,)


def sum_launch(
    tiles: PairTiles, h: Tensor, out: Tensor, weight: dict[str, Any], ids: Tensor, weights: Tensor | None, *,
    wide: bool, pdl: bool,
) -> tuple[dict[str, Any], tuple[int]]:  # fmt: skip
    """The arguments of `pair_sum_kernel` by name, and its grid. h: fp32, in planes."""
    tiles_n = -(-weight["N"] // tiles.block_n)
    a = _weight(weight) | dict(h=h, out=out, ids=ids, weights=weights, tiles_n=tiles_n)
    a["stride_it"], a["stride_ij"] = ids.stride()
    a["stride_rt"], a["stride_rj"] = (None, None) if weights is None else weights.stride()
    top_k = ids.shape[1]
    a |= dict(TOPK=top_k, CHOICES=1 << (top_k - 1).bit_length(), WEIGHTED=weights is not None, WIDE=wide, PDL=pdl)
    return a | _blocks(tiles, weight["K"] // 4, a["CHOICES"]), (out.shape[0] * tiles_n,)


def _weight(weight: dict[str, Any]) -> dict[str, Any]:
    """What both kernels take of a weight."""
    names = ("w", "scale", "bias", "stride_we", "stride_wn", "stride_se", "stride_sn", "stride_be", "stride_bn")
    a = {name: weight[name] for name in (*names, "N", "E")} | {"Q": weight["K"] // 4}
    return a | {"scale": a["scale"].view(torch.uint8)}


def _blocks(tiles: PairTiles, words: int, choices: int = 1) -> dict[str, Any]:
    size = tiles.block_q(words, choices)
    return dict(BLOCK_N=tiles.block_n, BLOCK_Q=size, EVEN=words % size == 0)


def in_words(x: Tensor) -> Tensor:
    """Rows of bf16 as words of four; rows of fp32 as they are. Copied if they cannot be read so."""
    if x.dtype == torch.float32:
        return x if x.stride(1) == 1 else x.contiguous()
    if x.stride(1) != 1 or x.stride(0) % 4 or x.storage_offset() % 4:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int64)
