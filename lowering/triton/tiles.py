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


def prefill_tiles(arch: Arch, head_dim: int, v_head_dim: int, dtype: torch.dtype) -> Tiles:
    width = max(sum(split_head_dim(head_dim)), sum(split_head_dim(v_head_dim)))
    return Tiles(128, 64, 8, 2)


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
    return DecodeTiles(block_r, 64, 4, 2)


def decode_splits(arch: Arch, tiles: DecodeTiles, groups: int, keys: int) -> int:
    return 4
