"""Tile choices of the expert kernels: pure functions of `Arch` and shape.

SM12x rows are chosen by what the compiler says for sm_120a: they fit 99 KiB and spill nothing in a loop. Those of
Hopper were timed on an H200 in bf16 and MXFP4 (benchmarks/results/moe_kernels-h200.json). Those of A100 and B200, of
fp32 and of rows that are not aligned are compiled only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...arch import KIB, Arch


@dataclass(frozen=True)
class ExpertTiles:
    """Rows, columns and depth of a program of the expert kernel, its warps and pipeline stages.

    Gate and up are two tiles of `block_n` columns each. `swap`: the weight is the product's left operand, which
    keeps few rows from being padded, and lets dequantised weights stay in registers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False


@dataclass(frozen=True)
class PairTiles:
    """Rows of a weight that a program of the pair kernels takes, the most words of them at once, warps and stages.

    prefetch: whether the second kernel calls its weights into the L2 while the first is at work.
    """

    block_n: int
    most_words: int
    num_warps: int
    num_stages: int
    prefetch: bool = False

    def block_q(self, words: int) -> int:
        """Words at once for rows of so many: a power of two, the largest of those that leave the fewest idle."""
        sizes = [1 << i for i in range(5, self.most_words.bit_length()) if 1 << i >= min(128, self.most_words)]
        return min(sizes, key=lambda size: (-(-words // size) * size, -size))


@dataclass(frozen=True)
class Plan:
    """How the two products of routed experts are run.

    Attributes:
        sort: sort the pairs by expert first; otherwise each pair reads its expert by itself.
        gate_up, down: tiles; both `ExpertTiles` of equal `block_m`, or both `PairTiles` (packed and not sorted).
    """

    sort: bool
    gate_up: ExpertTiles | PairTiles
    down: ExpertTiles | PairTiles


# Rows an expert gets on average, up to which a block of so many rows is taken: routing is uneven, and an expert
# whose rows do not fit in one block is read twice.
BLOCK_M = ((8, 16), (20, 32), (48, 64))
LARGEST_M = 128
# What sorting costs (H200: 7 to 12 us with two launches more), and tokens beyond which pairs are never read singly.
SORT_SECONDS = 8e-6
MOST_PAIRS_TOKENS = 8


def reads_singly(arch: Arch, tokens: int, top_k: int, experts: int, expert_bytes: float) -> bool:
    """Whether every token-expert pair should read its expert by itself, rather than be sorted by expert first.

    With uniformly random routing some experts are read twice; that may cost what sorting costs. One token chooses
    different experts.
    """
    if tokens <= 1 or tokens > MOST_PAIRS_TOKENS:
        return tokens <= 1
    hit = experts * (1.0 - (1.0 - min(top_k, experts) / experts) ** tokens)
    return (tokens * top_k - hit) * expert_bytes <= SORT_SECONDS * arch.bandwidth


def expert_plan(
    arch: Arch, tokens: int, top_k: int, experts: int, dtype: torch.dtype, packed: bool, expert_bytes: float,
    *, aligned: bool = True,
) -> Plan:  # fmt: skip
    """The plan for so many tokens with `top_k` experts each, of `expert_bytes`; see `expert_tiles` for the rest."""
    sort = not reads_singly(arch, tokens, top_k, experts, expert_bytes)
    if packed and not sort:
        return Plan(False, pair_tiles(gated=True), pair_tiles(gated=False))
    rows = block_rows(tokens * top_k / max(1, experts)) if sort else 16
    gate_up, down = (expert_tiles(arch, rows, dtype, packed, gated, aligned) for gated in (True, False))
    return Plan(sort, gate_up, down)


def pair_tiles(gated: bool) -> PairTiles:
    """Tiles of the pair kernels, for gate and up or for one weight."""
    return PairTiles(4, 512, 4, 2) if gated else PairTiles(4, 256, 4, 3, prefetch=True)


def linear_tiles(arch: Arch, rows: int, dtype: torch.dtype) -> ExpertTiles | PairTiles:
    """Tiles for rows times a packed weight."""
    if rows == 1:
        return pair_tiles(gated=False)
    return expert_tiles(arch, block_rows(rows, uneven=False), dtype, True, False)


def block_rows(mean: float, uneven: bool = True) -> int:
    """Rows of a program where an expert has `mean` rows on average, or exactly if not `uneven`."""
    return next((block for most, block in BLOCK_M if mean <= (most if uneven else block)), LARGEST_M)


def expert_tiles(
    arch: Arch, block_m: int, dtype: torch.dtype, packed: bool, gated: bool, aligned: bool = True
) -> ExpertTiles:
    """Tiles for programs of `block_m` rows.

    packed: MXFP4 weights; gated: two tiles of weights at once; aligned: rows lie a multiple of 16 elements apart.
    Triton reads others element by element, which takes a register each.
    """
    if packed:
        return packed_tiles(arch, block_m, dtype, gated)
    if dtype == torch.float32:
        return ExpertTiles(min(block_m, 32), 32 if gated else 64, 32, 8, 2)
    if not aligned:
        return ExpertTiles(min(block_m, 32), 32 if gated else 64, 32, 4, 2)
    stages = 4 if arch.smem_per_block >= 160 * KIB else 3
    if block_m == 16:
        return ExpertTiles(16, 32 if gated else 64, 128, 4, stages, not gated)
    if block_m <= 64:
        return ExpertTiles(block_m, 64 if gated else 128, 64, 4, stages, True)
    return ExpertTiles(block_m, 64 if gated else 128, 64, 8, 3 if gated else stages)


def packed_tiles(arch: Arch, block_m: int, dtype: torch.dtype, gated: bool) -> ExpertTiles:
    """Tiles for MXFP4 weights: depths are whole words of four scales; the weight is the left operand, in registers."""
    if dtype == torch.float32:
        return ExpertTiles(min(block_m, 32), 32, 128, 8, 2)
    large = arch.smem_per_block >= 160 * KIB
    if block_m <= 32:
        return ExpertTiles(block_m, 64, 128, 4, 4 if large else 3, True)
    if block_m == 64:
        return ExpertTiles(64, 64, 128, 4, 3 if large else 2, True)
    return ExpertTiles(128, 64, 128, 4, 3 if large else 2, True)
