"""Tile choices of the Triton attention kernels: pure functions of `Arch` and shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...arch import KIB, Arch
from .arguments import split_head_dim


@dataclass(frozen=True)
class Tiles:
    """What one program computes at a time, and with how many warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def prefill_tiles(arch: Arch, head_dim: int, v_head_dim: int, dtype: torch.dtype, bias: bool = False) -> Tiles:
    width = max(sum(split_head_dim(head_dim)), sum(split_head_dim(v_head_dim)))
    if dtype == torch.float32:
        return Tiles(64, 32, 8, 1) if width <= 64 else Tiles(32, 32, 8, 1) if width <= 128 else Tiles(32, 16, 8, 2)
    roomy = arch.smem_per_block >= 160 * KIB
    if roomy:
        t = Tiles(64, 64, 4, 3) if width <= 64 else Tiles(128, 64, 8, 2, 128) if width <= 128 else Tiles(128, 32, 8, 3)
    elif width <= 96:
        t = Tiles(128, 64, 8, 2)
    elif width <= 128 or (width == 192 and v_head_dim <= 128):
        t = Tiles(128, 32, 8, 2)
    elif width == 256:
        t = Tiles(64, 32, 8, 2)
    else:
        t = Tiles(64, 16, 4, 2)
    if bias and t.block_n > 16:
        t = Tiles(t.block_m, t.block_n // 2, t.num_warps, t.num_stages, t.max_registers)
    return t


@dataclass(frozen=True)
class DecodeTiles:
    """Query rows and keys that one program takes at a time, warps, stages, and the combining kernel's warps."""

    block_r: int
    block_n: int
    num_warps: int
    num_stages: int
    combine_warps: int = 4


def decode_tiles(arch: Arch, head_dim: int, v_head_dim: int, dtype: torch.dtype, rows: int) -> DecodeTiles:
    block_r = max(16, min(64, 1 << (rows - 1).bit_length()))
    if dtype == torch.float32:
        return DecodeTiles(16, 32, 8, 2)
    return DecodeTiles(block_r, 64, 4, 2)


def decode_splits(arch: Arch, tiles: DecodeTiles, groups: int, keys: int) -> int:
    return 4
