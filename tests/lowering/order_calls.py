"""The ordering kernel by itself, with a block so small that it needs several."""

from __future__ import annotations

from torch import Tensor

from sm12x_compile.lowering.triton.experts import order_launch


def ordered(ids: Tensor, experts: int, block_m: int, block: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order, table of tiles, and x in planes ``[T, 4, D / 4]``."""
    from sm12x_compile.lowering.triton.order_kernel import order_kernel

    arguments, grid = order_launch(ids, experts, block_m, x)
    arguments["order"].fill_(-1)
    order_kernel[grid](**(arguments | {"BLOCK": block}), num_warps=4)
    return arguments["order"], arguments["table"], arguments["x_planes"].view(x.shape[0], 4, -1)


def tiles_of(ids: Tensor, experts: int, block_m: int) -> list[tuple[int, list[int]]]:
    """What the table should say: an expert and the pairs of each of its tiles, by expert and then by pair."""
    flat = ids.flatten().tolist()
    tiles = []
    for e in range(experts):
        pairs = [pair for pair, chosen in enumerate(flat) if chosen == e]
        tiles += [(e, pairs[i : i + block_m]) for i in range(0, len(pairs), block_m)]
    return tiles


def said(order: Tensor, table: Tensor) -> list[tuple[int, list[int]]]:
    """What order and table say."""
    rows = [(e, order[first : first + count].tolist()) for e, first, count in table.tolist() if e >= 0]
    return sorted(rows)
