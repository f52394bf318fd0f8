"""Offline proof: what it finds wrong, what it keeps, and how it is asked."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton")

from sm12x_compile.arch import Arch, by_name
from sm12x_compile.cli import app
from sm12x_compile.lowering.triton import launches
from sm12x_compile.lowering.triton.attention_prefill import prefill_launch
from sm12x_compile.lowering.triton.launches import Launch, meta
from sm12x_compile.lowering.triton.tiles import Tiles
from sm12x_compile.offline import Compiled
from sm12x_compile.proof_table import render
from sm12x_compile.prove import Proof, ProofError, blocks_per_sm, prove


@pytest.fixture
def spaces(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No kernel but those that a test adds."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(launches, "SPACES", found)
    return found


def prefill(tiles: Tiles, times: int = 1) -> Any:
    def space(arch: Arch) -> Iterator[Launch]:
        from sm12x_compile.lowering.triton.prefill_kernel import prefill_kernel

        for n in range(times):
            states = (meta(1, 8, 512 * (n + 1), 128) for _ in range(3))
            arguments = prefill_launch(*states, 0.1, causal=True, tiles=tiles)[1]
            yield Launch(f"case {n}", prefill_kernel, arguments, tiles.num_warps, tiles.num_stages)

    return space


def test_a_sample_of_everything_holds(tmp_path: Path) -> None:
    proofs = prove(sample=6, jobs=1, cache=tmp_path)
    assert len(proofs) == 6
    assert {p.target for p in proofs} <= {"sm_120a", "sm_121a"}
    assert not [p for p in proofs if p.violations]
    assert all(p.blocks >= 1 and p.registers <= 255 and p.shared_bytes <= 101376 for p in proofs)


def test_every_kernel_has_a_space_on_every_card() -> None:
    for card in ("sm120", "sm121", "h200", "b200", "a100"):
        for name, space in launches.SPACES.items():
            assert next(space(by_name(card))).kernel is not None, name


def test_a_tile_that_is_too_large_is_a_violation(spaces: dict[str, Any], tmp_path: Path) -> None:
    spaces["huge"] = prefill(Tiles(128, 128, 8, 3))
    (proof,) = prove(["sm120"], jobs=1, cache=tmp_path)
    assert any("of shared memory, a block gets 101376 B" in reason for reason in proof.violations)
    assert proof.blocks == 0
    # The very same tile is fine where there is room.
    (proof,) = prove(["h200"], jobs=1, cache=tmp_path)
    assert not [reason for reason in proof.violations if "shared memory" in reason]


def test_spills_in_the_hot_loop_are_a_violation(spaces: dict[str, Any], tmp_path: Path) -> None:
    spaces["spilling"] = prefill(Tiles(128, 64, 4, 1))
    (proof,) = prove(["sm120"], jobs=1, cache=tmp_path)
    assert proof.spills > 0
    assert any("local-memory instructions" in reason for reason in proof.violations)


def test_equal_launches_are_compiled_once_and_kept(
    spaces: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces["small"] = prefill(Tiles(64, 32, 4, 2), times=3)
    (first,) = prove(["sm120"], jobs=1, cache=tmp_path)
    assert first.cases == 3
    monkeypatch.setattr("sm12x_compile.prove.compile_kernel", None)  # a second compilation would fail
    assert prove(["sm120"], jobs=1, cache=tmp_path) == [first]


def test_a_broken_proof_on_disk_is_made_again(spaces: dict[str, Any], tmp_path: Path) -> None:
    spaces["small"] = prefill(Tiles(64, 32, 4, 2))
    (first,) = prove(["sm120"], jobs=1, cache=tmp_path)
    (kept,) = tmp_path.glob("*.json")
    for broken in ("", "{", json.dumps({"kernel": "prefill_kernel"}), json.dumps([1])):
        kept.write_text(broken)
        assert prove(["sm120"], jobs=1, cache=tmp_path) == [first]
    assert json.loads(kept.read_text())["kernel"] == "prefill_kernel"


def test_blocks_by_registers_memory_and_warps() -> None:
    def made(registers: int, shared: int, warps: int) -> Compiled:
        return Compiled("k", "sm_120a", "3", registers, 0, 0, shared, warps, {}, ())

    card = by_name("sm120")
    assert blocks_per_sm(made(255, 0, 8), card) == 1  # 65,536 registers
    assert blocks_per_sm(made(32, 48 * 1024, 4), card) == 2  # 100 KiB
    assert blocks_per_sm(made(32, 0, 4), card) == 12  # 48 warps


@pytest.mark.parametrize(
    ("archs", "kernels", "reason"),
    [
        (["cpu"], [], "no GPU"),
        (["rtx9090"], [], "known: auto, rtx5090"),
        (["sm120"], ["flash"], "unknown kernel 'flash'; known: attention_prefill"),
    ],
)
def test_what_cannot_be_proved_is_said(archs: list[str], kernels: list[str], reason: str) -> None:
    with pytest.raises(ProofError, match=reason):
        prove(archs, kernels)


def test_command_line(spaces: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spaces["small"], spaces["huge"] = prefill(Tiles(64, 32, 4, 2)), prefill(Tiles(128, 128, 8, 3))
    runner = CliRunner()
    one = ["prove", "--arch", "sm120", "--jobs", "1"]
    fine = runner.invoke(app, [*one, "--kernel", "small", "--json"])
    assert fine.exit_code == 0, fine.output
    assert [p["violations"] for p in json.loads(fine.stdout)] == [[]]
    bad = runner.invoke(app, one)
    assert bad.exit_code == 1 and "1 of 2 configurations hold" in bad.stdout
    assert runner.invoke(app, ["prove", "--arch", "nothing"]).exit_code == 2


def test_the_table_names_every_violation() -> None:
    proof = Proof("k", "rtx5090", "case", 2, "sm_120a", "3.9.0", 4, 2, 99, 5, 3, 12, 1, ("HMMA.16816",), ("broken",))
    out = io.StringIO()
    Console(width=160, file=out).print(render([proof]))
    text = out.getvalue()
    assert "k on rtx5090, case: broken" in text and "0 of 1 configurations hold" in text and "HMMA" in text
