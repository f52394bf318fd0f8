"""Tile choices of the Triton attention kernels: pure functions of `Arch` and shape.

Nobody here has an SM12x card. Its rows were chosen by what the compiler says for sm_120a: they fit 99 KiB, and in
their usual masks spill nothing inside a loop (tests/lowering/test_tiles.py). The Hopper rows were timed on an H200
(benchmarks/results/attention_kernels-h200.json). The rows of A100 and B200 are compiled only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ...arch import KIB, Arch
from .arguments import split_head_dim


@dataclass(frozen=True)
class Tiles:
    """Queries and keys that a prefill program takes at a time, its warps and pipeline stages.

    `max_registers` caps the registers of a thread, where two programs a multiprocessor beat one.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class DecodeTiles:
    """Query rows and keys that a decode program takes at a time, its warps and pipeline stages.

    `prefetch`: blocks of keys that it calls into the L2 ahead of their loads.
    """

    block_r: int
    block_n: int
    num_warps: int
    num_stages: int
    combine_warps: int = 4
    prefetch: int = 0


# The first row with room for both padded head dims is taken.
Table = tuple[tuple[int, int, Tiles], ...]

SM12X: Table = (
    (64, 64, Tiles(128, 64, 8, 2)),
    (128, 128, Tiles(128, 32, 8, 2)),
    (192, 128, Tiles(128, 16, 8, 2)),
    (192, 192, Tiles(32, 32, 4, 2)),
    (256, 256, Tiles(64, 32, 8, 2)),
)
HOPPER: Table = (
    (128, 128, Tiles(64, 64, 4, 3)),
    (192, 128, Tiles(128, 32, 8, 3, 128)),
    (192, 192, Tiles(64, 32, 4, 3)),
    (256, 256, Tiles(128, 32, 8, 3)),
)
DATACENTER: Table = (
    (128, 128, Tiles(128, 64, 8, 3)),
    (192, 128, Tiles(128, 32, 8, 3)),
    (192, 192, Tiles(64, 16, 4, 3)),
    (256, 256, Tiles(64, 64, 8, 2)),
)
# fp32 is kept whole, so it runs on the plain cores: small tiles, and their size depends on registers alone.
FP32: Table = (
    (64, 64, Tiles(64, 32, 8, 1)),
    (128, 128, Tiles(32, 16, 8, 2)),
    (256, 256, Tiles(16, 16, 8, 2)),
)


def prefill_tiles(arch: Arch, head_dim: int, v_head_dim: int, dtype: torch.dtype, bias: bool = False) -> Tiles:
    """Tiles of the prefill kernel. A bias, which is a tile of its own, halves the keys."""
    width, v_width = sum(split_head_dim(head_dim)), sum(split_head_dim(v_head_dim))
    tiles = next(t for w, v, t in _prefill_table(arch, dtype) if width <= w and v_width <= v)
    return replace(tiles, block_n=tiles.block_n // 2) if bias and tiles.block_n > 16 else tiles


def spans_few_blocks(tiles: Tiles, causal: bool, window_left: int | None, window_right: int | None) -> bool:
    """Whether a window is so narrow that one masked run over its blocks beats separate edges and middle."""
    right = 0 if causal else window_right
    return window_left is not None and right is not None and window_left + right <= 4 * tiles.block_n


def _prefill_table(arch: Arch, dtype: torch.dtype) -> Table:
    if dtype == torch.float32:
        return FP32
    if arch.wgmma:
        return HOPPER
    return DATACENTER if arch.smem_per_block >= 160 * KIB else SM12X


def decode_tiles(
    arch: Arch, head_dim: int, v_head_dim: int, dtype: torch.dtype, rows: int, bias: bool = False
) -> DecodeTiles:
    """Tiles of the decode kernel for this many query rows a KV head.

    A bias takes registers: beside 64 rows more warps, beside a head of two tiles (80 = 64 + 16) fewer keys at a time.
    """
    wide = max(head_dim, v_head_dim) > 128
    parted = head_dim & (head_dim - 1) != 0
    if dtype == torch.float32:
        return DecodeTiles(16, 32, 8, 2)
    stages = 3 if arch.smem_per_block >= 160 * KIB else 2
    if rows <= 16:
        return DecodeTiles(16, 32 if wide or (bias and parted) else 64, 4, stages)
    if rows <= 32:
        return DecodeTiles(32, 32, 4, stages)
    return DecodeTiles(64, 16 if wide else 32, 8 if bias else 4, stages)


@lru_cache(maxsize=4096)
def decode_splits(arch: Arch, tiles: DecodeTiles, groups: int, keys: int) -> int:
    """Splits of the keys, for this many programs a split (batches x KV heads x row blocks).

    Two programs a multiprocessor saturate the memory; more splits are taken only where they fill the last wave by
    another twentieth, and none gets fewer than two blocks of keys. Combining costs a launch, so short caches aren't
    split.
    """
    if keys <= 4 * tiles.block_n:
        return 1
    resident = 2 * arch.sm_count
    most = min(MAX_SPLITS, -(-keys // (2 * tiles.block_n)), 8 * max(1, resident // groups))
    waves = [-(-groups * s // resident) / s for s in range(1, most + 1)]
    enough = 1.05 * min(waves)
    return 1 + next(i for i, w in enumerate(waves) if w <= enough)


MAX_SPLITS = 64
