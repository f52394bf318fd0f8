"""The custom op that `lowering/linear.py` puts in place of linear layers of one row, and its launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from .arguments import card_of, device_guard, launches_early

MAX_LAYERS = 4


@dataclass(frozen=True)
class RowTiles:
    """Rows of a weight that a program takes, how many of their elements at a time, and its warps."""

    block_n: int
    block_k: int
    num_warps: int


def row_tiles(arch: Arch, outputs: int, inner: int, element_size: int) -> RowTiles:
    """Long rows in steps of 1 KiB, four at once; others in 4 KiB, two at once. The best of 11 on an H200, by bf16."""
    long = inner > 4096
    block_k = min((1024 if long else 4096) // element_size, 1 << (inner - 1).bit_length())
    wanted = 4 if long else 2
    block_n = next((n for n in (4, 2) if n <= wanted and outputs >= 4 * n * arch.sm_count), 1)
    return RowTiles(block_n, block_k, 4 if long else 8)


def row_linear_launch(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], outputs: Sequence[Tensor], tiles: RowTiles,
    pdl: bool,
) -> tuple[dict[str, Any], tuple[int]]:  # fmt: skip
    """The kernel's arguments by name, and the grid."""
    a: dict[str, Any] = {"x": x}
    ends = []
    programs = 0
    for layer in range(MAX_LAYERS):
        real = min(layer, len(weights) - 1)  # places that are not used hold a copy of the last layer's
        a[f"w{layer}"], a[f"y{layer}"] = weights[real], outputs[real]
        a[f"b{layer}"] = biases[real] if biases else x
        a[f"N{layer}"] = weights[real].shape[0]
        if real == layer:
            programs += -(-weights[layer].shape[0] // tiles.block_n)
        ends.append(programs)
    a |= {"end0": ends[0], "end1": ends[1], "end2": ends[2], "K": weights[0].shape[1], "LAYERS": len(weights)}
    a |= {"BIASED": bool(biases), "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "PDL": pdl}
    return a, (programs,)


@torch.library.custom_op("sm12x_kernels::row_linear", mutates_args=())
def row_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor], follows: bool) -> list[Tensor]:
    """``[x @ w.T + b for w, b in zip(weights, biases)]``, summed in fp32 and rounded once.

    Args:
        x: ``[..., K]`` with one row in all, contiguous.
        weights: up to four, ``[N, K]``, contiguous, of x's dtype.
        biases: one for each weight, ``[N]``, or none.
        follows: whether another kernel of the same graph has run before: then this one may start while that ends.

    Returns:
        ``[..., N]`` for each weight.
    """
    from .row_linear_kernel import row_linear_kernel

    outputs = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]
    pdl = launches_early(x)
    tiles = row_tiles(card_of(x), sum(w.shape[0] for w in weights), x.shape[-1], x.element_size())
    arguments, grid = row_linear_launch(x, weights, biases, outputs, tiles, pdl)
    with device_guard(x):
        row_linear_kernel[grid](**arguments, num_warps=tiles.num_warps, launch_pdl=pdl and follows)
    return outputs


@row_linear.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor], follows: bool) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]
