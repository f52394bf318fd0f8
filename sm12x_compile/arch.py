"""What a lowering may know about a GPU: frozen facts, compared for equality, never with `>=`.

SM12x is not "more than" SM100: it lacks tcgen05, tensor memory and wgmma and gives a block 99 KiB of shared
memory. `capability >= (10, 0)` is the most repeated bug in the stacks that serve these cards.

Sources of the numbers: NVIDIA's RTX Blackwell, RTX PRO Blackwell, Hopper, Ampere and Blackwell architecture
whitepapers and datasheets (SMs, memory, L2, bandwidth, dense bf16 rate with fp32 accumulation); CUDA C++
Programming Guide, table "Technical specifications per compute capability" (shared memory, warps, registers).
Bandwidths and rates are datasheet leads for planning floors, not measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

KIB = 1024


@dataclass(frozen=True)
class Arch:
    """Facts of one card. Sizes in bytes, bandwidth in bytes/s, rates in FLOP/s."""

    name: str
    family: str  # "sm12x", "sm10x", "sm9x", "sm8x", "cpu"
    capability: tuple[int, int]
    sm_count: int
    smem_per_block: int
    smem_per_sm: int
    warps_per_sm: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: float
    bf16_flops: float
    wgmma: bool = False
    tcgen05: bool = False
    tma: bool = False
    pdl: bool = False
    block_scaled_mma: bool = False
    unified_memory: bool = False
    registers_per_sm: int = 65536

    @property
    def is_cuda(self) -> bool:
        return self.family != "cpu"

    @property
    def target(self) -> str:
        """The compiler's name of the target, with the suffix that arch-specific instructions need."""
        if not self.is_cuda:
            return "cpu"
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if self.family in ('sm9x', 'sm10x', 'sm12x') else ''}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "target": self.target}


_SM12X: dict[str, Any] = dict(
    family="sm12x", smem_per_block=99 * KIB, smem_per_sm=100 * KIB, warps_per_sm=48,
    tma=True, pdl=True, block_scaled_mma=True,
)  # fmt: skip
_HOPPER: dict[str, Any] = dict(
    family="sm9x", capability=(9, 0), sm_count=132, smem_per_block=227 * KIB, smem_per_sm=228 * KIB,
    warps_per_sm=64, l2_bytes=50 * KIB**2, bf16_flops=989e12, wgmma=True, tma=True, pdl=True,
)  # fmt: skip

CARDS: dict[str, Arch] = {
    card.name: card
    for card in (
        Arch(name="rtx5090", capability=(12, 0), sm_count=170, l2_bytes=96 * KIB**2, memory_bytes=32 * KIB**3,
             bandwidth=1792e9, bf16_flops=209.5e12, **_SM12X),
        Arch(name="rtxpro6000", capability=(12, 0), sm_count=188, l2_bytes=128 * KIB**2,
             memory_bytes=96 * KIB**3, bandwidth=1792e9, bf16_flops=503.8e12, **_SM12X),
        # NVIDIA publishes no bf16 rate for GB10: a quarter of its dense FP4 figure (500e12), as on GB202.
        Arch(name="gb10", capability=(12, 1), sm_count=48, l2_bytes=24 * KIB**2, memory_bytes=128 * KIB**3,
             bandwidth=273e9, bf16_flops=125e12, unified_memory=True, **_SM12X),
        Arch(name="h200", memory_bytes=141 * KIB**3, bandwidth=4.8e12, **_HOPPER),
        Arch(name="h100", memory_bytes=80 * KIB**3, bandwidth=3.35e12, **_HOPPER),
        Arch(name="b200", family="sm10x", capability=(10, 0), sm_count=148, smem_per_block=227 * KIB,
             smem_per_sm=228 * KIB, warps_per_sm=64, l2_bytes=126 * KIB**2, memory_bytes=180 * KIB**3,
             bandwidth=8e12, bf16_flops=2250e12, tcgen05=True, tma=True, pdl=True, block_scaled_mma=True),
        Arch(name="a100", family="sm8x", capability=(8, 0), sm_count=108, smem_per_block=163 * KIB,
             smem_per_sm=164 * KIB, warps_per_sm=64, l2_bytes=40 * KIB**2, memory_bytes=80 * KIB**3,
             bandwidth=2.039e12, bf16_flops=312e12),
        # Ada: no fact beyond Ampere's that a kernel of ours asks for, and 99 KiB a block.
        Arch(name="l40s", family="sm8x", capability=(8, 9), sm_count=142, smem_per_block=99 * KIB,
             smem_per_sm=100 * KIB, warps_per_sm=48, l2_bytes=96 * KIB**2, memory_bytes=48 * KIB**3,
             bandwidth=864e9, bf16_flops=362e12),
        # Rates of a CPU are only there so that floors can be printed: two cores' worth of AVX-512.
        Arch(name="cpu", family="cpu", capability=(0, 0), sm_count=0, smem_per_block=0, smem_per_sm=0,
             warps_per_sm=0, l2_bytes=0, memory_bytes=0, bandwidth=2e10, bf16_flops=2e11),
    )
}  # fmt: skip

ALIASES = {
    "sm120": "rtx5090", "sm121": "gb10", "sm90": "h200", "sm100": "b200", "sm80": "a100", "sm89": "l40s",
}  # fmt: skip

_FAMILY_OF_MAJOR = {8: "sm8x", 9: "sm9x", 10: "sm10x", 12: "sm12x"}


def known_names() -> list[str]:
    return [*CARDS, *ALIASES]


def by_name(name: str) -> Arch:
    """The record of a card or family.

    Raises:
        ValueError: no such name; the message lists the known ones.
    """
    try:
        return CARDS[ALIASES.get(name, name)]
    except KeyError:
        raise ValueError(
            f"unknown arch {name!r}; known: auto, {', '.join(known_names())}"
        ) from None


@cache
def of_device(index: int = 0) -> Arch:
    """The record of a CUDA device that is present: what the driver tells, the rest from its card's record."""
    props = torch.cuda.get_device_properties(index)
    capability = (props.major, props.minor)
    family = _FAMILY_OF_MAJOR.get(props.major, f"sm{props.major}x")
    title = props.name.lower().replace(" ", "")
    cards = [c for c in CARDS.values() if c.capability == capability]
    card = next((c for c in cards if c.name in title), cards[0] if cards else None)
    base = asdict(card) if card else asdict(CARDS["a100"])
    if card is None:
        base |= dict(wgmma=False, tcgen05=False, tma=False, block_scaled_mma=False)
    base |= dict(
        name=card.name if card and card.name in title else props.name,
        family=family,
        capability=capability,
        sm_count=props.multi_processor_count,
        memory_bytes=props.total_memory,
        l2_bytes=props.L2_cache_size,
        smem_per_block=getattr(props, "shared_memory_per_block_optin", base["smem_per_block"]),
        smem_per_sm=getattr(props, "shared_memory_per_multiprocessor", base["smem_per_sm"]),
    )
    return Arch(**base)


def resolve(name: str, device: torch.device) -> tuple[Arch, bool]:
    """The arch to plan for and whether it is only planned (not the device at hand)."""
    here = of_device(device.index or 0) if device.type == "cuda" else CARDS["cpu"]
    if name == "auto":
        return here, False
    wanted = by_name(name)
    same = wanted.capability == here.capability and wanted.family == here.family
    return (here, False) if same and (wanted.name == here.name or name in ALIASES) else (wanted, True)
