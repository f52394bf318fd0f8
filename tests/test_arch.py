"""Facts of the cards, names and aliases, and the record of a device that a driver describes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sm12x_compile import arch
from sm12x_compile.arch import ALIASES, CARDS, Arch, by_name, resolve

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)

# name: family, capability, SMs, shared memory of a block and of an SM in KiB, warps of an SM, L2 in MiB,
# memory in GiB, bandwidth in GB/s, compiler target
FACTS = {
    "rtx5090": ("sm12x", (12, 0), 170, 99, 100, 48, 96, 32, 1792, "sm_120a"),
    "rtxpro6000": ("sm12x", (12, 0), 188, 99, 100, 48, 128, 96, 1792, "sm_120a"),
    "gb10": ("sm12x", (12, 1), 48, 99, 100, 48, 24, 128, 273, "sm_121a"),
    "h200": ("sm9x", (9, 0), 132, 227, 228, 64, 50, 141, 4800, "sm_90a"),
    "h100": ("sm9x", (9, 0), 132, 227, 228, 64, 50, 80, 3350, "sm_90a"),
    "b200": ("sm10x", (10, 0), 148, 227, 228, 64, 126, 180, 8000, "sm_100a"),
    "a100": ("sm8x", (8, 0), 108, 163, 164, 64, 40, 80, 2039, "sm_80"),
    "l40s": ("sm8x", (8, 9), 142, 99, 100, 48, 96, 48, 864, "sm_89"),
    "cpu": ("cpu", (0, 0), 0, 0, 0, 0, 0, 0, 20, "cpu"),
}
# family: wgmma, tcgen05, TMA, block-scaled mma
FEATURES = {
    "sm12x": (False, False, True, True),
    "sm10x": (False, True, True, True),
    "sm9x": (True, False, True, False),
    "sm8x": (False, False, False, False),
    "cpu": (False, False, False, False),
}


def test_every_card_is_listed() -> None:
    assert set(CARDS) == set(FACTS)
    assert arch.known_names() == [*CARDS, *ALIASES]


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str) -> None:
    card = by_name(name)
    family, capability, sms, block, sm, warps, l2, memory, bandwidth, target = FACTS[name]
    assert (card.name, card.family, card.capability, card.sm_count) == (name, family, capability, sms)
    assert (card.smem_per_block, card.smem_per_sm) == (block * 1024, sm * 1024)
    assert (card.warps_per_sm, card.l2_bytes, card.memory_bytes) == (warps, l2 * 1024**2, memory * 1024**3)
    assert card.bandwidth == pytest.approx(bandwidth * 1e9)
    assert (card.wgmma, card.tcgen05, card.tma, card.block_scaled_mma) == FEATURES[family]
    assert card.is_cuda == (name != "cpu")
    assert card.target == target
    assert card.unified_memory == (name == "gb10")
    assert card.bf16_flops > 0


def test_sm12x_blocks_get_101376_bytes() -> None:
    assert {c.smem_per_block for c in CARDS.values() if c.family == "sm12x"} == {101376}


def test_aliases() -> None:
    assert ALIASES == {
        "sm120": "rtx5090", "sm121": "gb10", "sm90": "h200", "sm100": "b200", "sm80": "a100", "sm89": "l40s",
    }  # fmt: skip
    for alias, name in ALIASES.items():
        assert by_name(alias) is CARDS[name]
        assert CARDS[name].target.rstrip("a") == alias.replace("sm", "sm_")


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"unknown arch 'rtx4090'; known: auto, rtx5090, .*cpu, sm120, .*sm89$"
    ):
        by_name("rtx4090")


def test_records_are_frozen_and_hashable() -> None:
    with pytest.raises(AttributeError):
        CARDS["gb10"].sm_count = 1  # type: ignore[misc]
    assert len(set(CARDS.values())) == len(CARDS)
    assert CARDS["h200"].to_dict() | {"name": "x"} == CARDS["h200"].to_dict() | {
        "name": "x",
        "target": "sm_90a",
    }
    fields = CARDS["gb10"].to_dict()
    del fields["target"]
    assert Arch(**fields) == CARDS["gb10"]


def device(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], **facts: Any) -> None:
    """Pretend that device 0 is this one."""
    properties = dict(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=7, total_memory=10,
        L2_cache_size=20, shared_memory_per_block_optin=30, shared_memory_per_multiprocessor=40,
    )  # fmt: skip
    properties |= facts
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
    monkeypatch.setattr(
        arch, "of_device", getattr(arch.of_device, "__wrapped__", arch.of_device)
    )  # no memory


@pytest.mark.parametrize(
    ("title", "capability", "name"),
    [
        ("NVIDIA GeForce RTX 5090", (12, 0), "rtx5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), "rtxpro6000"),
        ("NVIDIA GB10", (12, 1), "gb10"),
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100"),
        ("NVIDIA B200", (10, 0), "b200"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100"),
    ],
)
def test_a_device_is_its_card_with_what_the_driver_tells(
    monkeypatch: pytest.MonkeyPatch, title: str, capability: tuple[int, int], name: str
) -> None:
    device(monkeypatch, title, capability)
    here, card = arch.of_device(0), CARDS[name]
    assert (here.name, here.family, here.capability) == (name, card.family, capability)
    assert (here.sm_count, here.memory_bytes, here.l2_bytes) == (7, 10, 20)
    assert (here.smem_per_block, here.smem_per_sm) == (30, 40)
    assert (here.bandwidth, here.bf16_flops, here.tma) == (card.bandwidth, card.bf16_flops, card.tma)


def test_a_card_without_a_record_of_a_known_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "NVIDIA GeForce RTX 5080", (12, 0))
    here = arch.of_device(0)
    assert (here.name, here.family, here.target) == ("NVIDIA GeForce RTX 5080", "sm12x", "sm_120a")
    assert here.tma and here.block_scaled_mma and not here.tcgen05 and not here.wgmma


@pytest.mark.parametrize(
    ("capability", "family", "target"),
    [((8, 9), "sm8x", "sm_89"), ((11, 0), "sm11x", "sm_110"), ((7, 5), "sm7x", "sm_75")],
)
def test_an_unknown_capability_promises_no_feature(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], family: str, target: str
) -> None:
    device(monkeypatch, "NVIDIA Something", capability)
    here = arch.of_device(0)
    assert (here.family, here.target, here.capability) == (family, target, capability)
    assert not (here.tma or here.wgmma or here.tcgen05 or here.block_scaled_mma)


def test_resolving_on_a_cpu() -> None:
    assert resolve("auto", CPU) == (CARDS["cpu"], False)
    assert resolve("cpu", CPU) == (CARDS["cpu"], False)
    for name in (*CARDS, *ALIASES):
        if name != "cpu":
            assert resolve(name, CPU) == (by_name(name), True)


def test_resolving_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "NVIDIA H200", (9, 0))
    here = arch.of_device(0)
    for name in ("auto", "h200", "sm90"):
        assert resolve(name, CUDA) == (here, False)
    # Same capability, another card; other families; the CPU.
    for name in ("h100", "sm120", "b200", "cpu"):
        assert resolve(name, CUDA) == (by_name(name), True)
    device(monkeypatch, "NVIDIA GeForce RTX 5080", (12, 0))
    assert resolve("sm120", CUDA) == (arch.of_device(0), False)  # the family is meant
    assert resolve("rtx5090", CUDA) == (CARDS["rtx5090"], True)
    assert resolve("sm121", CUDA) == (CARDS["gb10"], True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_at_hand() -> None:
    here, planned = resolve("auto", CUDA)
    assert not planned and here.capability == torch.cuda.get_device_capability(0)
    assert here.smem_per_block >= 48 * 1024
