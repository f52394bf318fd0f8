"""Tile choices of the gated delta rule's Triton kernels: pure functions of `Arch` and shape.

The rows of SM12x were chosen by what the compiler says for sm_120a: they fit 99 KiB and spill nothing in loops
(tests/lowering/test_delta_tiles.py). Those of Hopper were timed on an H200 (benchmarks/delta_kernels.py).
A100 and B200 get those of SM12x.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...arch import Arch

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
    """Tiles of the chunked kernels: columns of K for the first, of V (and K, in a transition) for the walks."""

    prepare: Tile
    state: Tile
    transition: Tile


@dataclass(frozen=True)
class StepTiles:
    """Columns of V that a program of the step kernel takes, and its warps."""

    width: int
    num_warps: int


def chunk_tiles(
    arch: Arch, K: int, V: int, per_channel: bool, heads: int, chunks: int, packed: bool = False
) -> ChunkTiles:
    """Tiles for head dims K and V, so many heads (of all sequences) and chunks a sequence.

    `packed`: sequences lie in one row, and finding a chunk's own takes registers.
    """
    if per_channel:
        prepare = Tile(32, 4, 1) if arch.wgmma else Tile(16 if packed else 32, 8, 1)
    else:
        prepare = Tile(64, 4, 1, 168 if arch.wgmma else None)
    if not arch.wgmma:
        warps = 8 if packed and K > 64 else 4  # with four, Triton 3.9 keeps registers in local memory
        state = Tile(32, warps, 2) if K <= 128 else Tile(16, 8, 1 if per_channel else 2)
        return ChunkTiles(prepare, state, transition=Tile(32, 4, 2))
    # Never one stage here: with unpipelined loads, wgmma reads shared memory that is not its own (Triton 3.6 and 3.7,
    # triton-lang/triton#11366; seen on an H200 as wrong results and illegal accesses).
    state = Tile(32, 4, 3 if K <= 128 else 2)
    # Half as many programs read half as much, unless that leaves the card half empty.
    if _in_parts(arch, K, V, heads, chunks) or (K <= 128 and 4 * heads * (V // 64) >= 3 * arch.sm_count):
        state = Tile(64, 4, 2 if per_channel else 3)
    return ChunkTiles(prepare, state, transition=Tile(64, 4, 3))


def keys_fit(arch: Arch, K: int) -> bool:
    """Whether two chunks' tiles of a decay per channel fit: k to read, k to write and q, each ``[64, K]``.

    Other cards do with one chunk's; on Hopper see above.
    """
    return not arch.wgmma or K <= 128


def _in_parts(arch: Arch, K: int, V: int, heads: int, chunks: int) -> bool:
    """Whether sequences are so long, and heads so few, that walking them twice in parts is worth it."""
    return K <= 128 and chunks >= 32 and 2 * heads * (V // 32) <= arch.sm_count


def parts(arch: Arch, tiles: ChunkTiles, K: int, V: int, heads: int, chunks: int) -> int:
    """Parts to cut every sequence into, so that the walk over the chunks fills the card; at least 8 chunks each."""
    if not _in_parts(arch, K, V, heads, chunks):
        return 1
    return max(1, min(chunks // 8, arch.sm_count // (heads * (V // tiles.state.width))))


def step_tiles(arch: Arch, K: int, V: int, states: int) -> StepTiles:
    """Tiles of the step kernel for so many states. Few warps a program: sums over K then need no barrier.

    Few states are spread over more programs, many are read in longer rows.
    """
    warps = 1 if K <= 128 else 2
    many = states * (V // 16) >= 16 * arch.sm_count
    return StepTiles(32 if many and arch.wgmma else 16, warps)
