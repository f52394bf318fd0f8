"""Tile choices of the expert kernels: pure functions of `Arch` and shape.

SM12x rows are chosen by what the compiler says for sm_120a: they fit 99 KiB and spill nothing in a loop. Those of
Hopper were timed on an H200 in bf16 and MXFP4. Those of A100 and B200, of fp32 and of rows that are not aligned are
compiled only.
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

    MXFP4 only: `whole_scales`: scales are read in words of four, which Triton can do for wgmma; `together`: the four
    planes of weights are one product; `max_registers`: a bound for the assembler, which takes the loop for large scales
    for as important as the other.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    whole_scales: bool = False
    max_registers: int | None = None
    together: bool = False


@dataclass(frozen=True)
class PairTiles:
    """Rows of a weight that a program of the pair kernels takes, the most words of them at once, and warps."""

    block_n: int
    most_words: int
    num_warps: int

    def block_q(self, words: int, choices: int = 1) -> int:
        """Words at once for rows of so many: of the powers of two that leave the fewest idle, the largest.

        choices: experts of a token whose rows are taken at once.
        """
        most = max(32, min(self.most_words, MOST_WORDS // choices))
        sizes = [1 << i for i in range(5, most.bit_length()) if 1 << i >= min(64, most)]
        return min(sizes, key=lambda size: (-(-words // size) * size, -size))


@dataclass(frozen=True)
class Plan:
    """How the two products of routed experts are run.

    Attributes:
        sort: sort the pairs by expert first; otherwise each pair reads its expert by itself.
        gate_up, down: tiles, of equal `block_m`.
        unpacked: MXFP4 experts whose weights are written out at once, before products of plain weights; 0: none are.
    """

    sort: bool
    gate_up: ExpertTiles
    down: ExpertTiles
    unpacked: int = 0


@dataclass(frozen=True)
class PairPlan:
    """The same where MXFP4 experts are read pair by pair; nothing is sorted."""

    gate_up: PairTiles
    down: PairTiles


MOST_WORDS = 1024  # of one row, in registers
# Rows an expert gets on average, up to which a block of so many rows is taken: routing is uneven, and an expert
# whose rows do not fit in one block is read twice.
BLOCK_M = ((8, 16), (20, 32), (48, 64))
LARGEST_M = 128
# What sorting costs (H200: 7 to 12 us with two launches more), and tokens beyond which pairs are never read singly.
SORT_SECONDS = 8e-6
MOST_PAIRS_TOKENS = 8
# The same for MXFP4, where pairs are multiplied without tensor cores: what part of the bandwidth pairs and sorted rows
# reach, what both take besides, and sorted rows for each step along a row of weights, which nothing hides while experts
# are few (H200, 1 to 16 tokens, 8 of 128 experts of 2048 x 768 and 4 of 32 of 2880 x 2880).
PAIRS_SHARE, PAIRS_SECONDS, SORTED_SHARE, STEP_SECONDS = 0.37, 4e-6, 0.67, 1.35e-6
# Bytes a multiprocessor below which pairs are spread over smaller programs.
FEW_BYTES = 200e3
# What a product with weights that are dequantised in the kernel takes beyond that with plain ones, in times of the
# peak rate (H200, 4096 tokens, the same experts); and what part of a card's memory plain copies may take.
MIXED_LOSS, WORKSPACE = 1.5, 1 / 64


def reads_singly(arch: Arch, tokens: int, top_k: int, experts: int, expert_bytes: float, packed: bool = False) -> bool:
    """Whether every token-expert pair should read its expert by itself, rather than be sorted by expert first.

    With uniformly random routing some experts are read twice; that may cost what sorting costs. One token chooses
    different experts.
    """
    if tokens <= 1 or tokens > MOST_PAIRS_TOKENS:
        return tokens <= 1
    hit = experts * (1.0 - (1.0 - min(top_k, experts) / experts) ** tokens)
    if packed:
        steps = 2 * (2 * expert_bytes / 3) ** 0.5 / 128  # along both products' rows, as if three matrices were square
        pairs = PAIRS_SECONDS + tokens * top_k * expert_bytes / (PAIRS_SHARE * arch.bandwidth)
        return pairs <= STEP_SECONDS * steps + hit * expert_bytes / (SORTED_SHARE * arch.bandwidth)
    return (tokens * top_k - hit) * expert_bytes <= SORT_SECONDS * arch.bandwidth


def unpacked_at_once(arch: Arch, tokens: int, top_k: int, experts: int, dtype: torch.dtype, expert_bytes: float) -> int:
    """How many MXFP4 experts to write out in bf16 at once, before products with them; 0: it does not pay."""
    if dtype == torch.float32 or not arch.bandwidth:
        return 0
    plain = 4 * expert_bytes
    seconds = experts * (expert_bytes + plain) / arch.bandwidth
    if seconds > MIXED_LOSS * 4 * tokens * top_k * expert_bytes / arch.bf16_flops:
        return 0
    rounds = -(-experts * plain // (WORKSPACE * arch.memory_bytes))
    return int(-(-experts // rounds))


def expert_plan(
    arch: Arch, tokens: int, top_k: int, experts: int, dtype: torch.dtype, packed: bool, expert_bytes: float,
    *, aligned: bool = True,
) -> Plan | PairPlan:  # fmt: skip
    """The plan for so many tokens with `top_k` experts each, of `expert_bytes`; see `expert_tiles` for the rest."""
    sort = not reads_singly(arch, tokens, top_k, experts, expert_bytes, packed)
    if packed and not sort:
        return PairPlan(pair_tiles(arch, tokens * top_k * expert_bytes), sum_tiles())
    unpacked = unpacked_at_once(arch, tokens, top_k, experts, dtype, expert_bytes) if packed else 0
    packed = packed and not unpacked
    rows = block_rows(tokens * top_k / max(1, experts)) if sort else 16
    gate_up, down = (expert_tiles(arch, rows, dtype, packed, gated, aligned) for gated in (True, False))
    return Plan(sort, gate_up, down, unpacked)


def pair_tiles(arch: Arch, total_bytes: float) -> PairTiles:
    """Tiles of the pair kernel, which reads so much in all."""
    return PairTiles(4 if total_bytes < FEW_BYTES * arch.sm_count else 8, 512, 4)


def sum_tiles() -> PairTiles:
    """Tiles of the kernel that adds up a token's experts."""
    return PairTiles(4, 256, 4)


def linear_tiles(arch: Arch, rows: int, dtype: torch.dtype) -> ExpertTiles | PairTiles:
    """Tiles for rows times a packed weight."""
    if rows == 1:
        return PairTiles(8, 512, 4)
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
    """Tiles for MXFP4 weights, the left operand, kept in registers.

    The depth is a multiple of 128: four scales, a word. With more rows the registers would not hold x's fragments,
    unless x stays in shared memory (wgmma).
    """
    if dtype == torch.float32:  # without tensor cores; larger tiles do not fit in the registers
        return ExpertTiles(16, 16, 128, 8, 2)
    if block_m >= 64 and arch.wgmma:
        if gated:
            return ExpertTiles(64, 64, 128, 4, 3, True, True, None, True)
        return ExpertTiles(64, 128, 128, 8, 3, True, True)
    few = block_m == 16
    most = (128 if few else 168) if arch.wgmma else None
    if gated:
        return ExpertTiles(16 if few else 32, 64, 128, 4, 3, True, arch.wgmma, 128 if arch.wgmma else None)
    return ExpertTiles(16 if few else 32, 128, 128, 4, 3, True, arch.wgmma, most, arch.wgmma)
