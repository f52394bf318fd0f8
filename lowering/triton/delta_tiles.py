"""Tile choices of the gated delta rule's Triton kernels: pure functions of `Arch` and shape.

The rows of SM12x were chosen by what the compiler says for sm_120a: they fit 99 KiB and spill nothing in loops
(tests/lowering/test_delta_tiles.py). Those of Hopper were timed on an H200 (benchmarks/delta_kernels.py).
Those of A100 and B200 are compiled only.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...arch import KIB, Arch

CHUNK = 64


@dataclass(frozen=True)
class Tile:
    """Columns that a program takes at a time, its warps and pipeline stages, and a cap on a thread's registers."""

    width: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class ChunkTiles:
    """Tiles of the chunked kernels.

    `fused`: the walk over the chunks writes the output as well, instead of every chunk's state.
    """

    prepare: Tile
    state: Tile
    output: Tile
    transition: Tile
    fused: bool = False


@dataclass(frozen=True)
class StepTiles:
    """Columns of V that a program of the step kernels takes, and its warps."""

    width: int
    num_warps: int


def chunk_tiles(arch: Arch, K: int, V: int, per_channel: bool, heads: int) -> ChunkTiles:
    """Tiles for head dims K and V and this many programs' worth of heads (sequences times heads)."""
    large = arch.smem_per_block >= 160 * KIB
    state = Tile(min(V, 32), 4, 2)
    return ChunkTiles(
        prepare=Tile(min(64, K, V), 4, 2), state=state, output=Tile(min(V, 64), 4, 2), transition=state, fused=large
    )


def segments(arch: Arch, tiles: ChunkTiles, V: int, heads: int, chunks: int) -> int:
    """Parts to cut every sequence into, so that the walk over the chunks fills the card."""
    programs = heads * (V // tiles.state.width)
    if 2 * programs > arch.sm_count or chunks < 32:
        return 1
    return max(1, min(chunks // 8, -(-arch.sm_count // programs)))


def step_tiles(arch: Arch, K: int, V: int, programs: int) -> StepTiles:
    """Tiles of the step kernels for this many states. One warp a program: sums over K need no barrier."""
    width = 32 if 4 * programs > 16 * arch.sm_count and K <= 128 else 16 if K <= 128 else 8
    return StepTiles(min(V, width), 1)
