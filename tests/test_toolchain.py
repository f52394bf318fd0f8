"""The doctor's look at the tools: what it says of good ones, bad ones and missing ones."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sm12x_compile import doctor, toolchain
from sm12x_compile.arch import CARDS

GB10, CARD, CPU = CARDS["gb10"], CARDS["rtx5090"], CARDS["cpu"]


def versions(monkeypatch: pytest.MonkeyPatch, **known: str | None) -> None:
    """Pretend that these packages have these versions."""
    original = importlib.metadata.version

    def version(package: str) -> str:
        name = package.replace("-", "_")
        if name not in known:
            return original(package)
        if known[name] is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return str(known[name])

    monkeypatch.setattr(importlib.metadata, "version", version)


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# ---------------------------------------------------------------- ptxas


@pytest.mark.parametrize("card", ["rtx5090", "gb10", "h200", "a100", "l40s", "b200"])
def test_tritons_assembler_knows_every_card(card: str) -> None:
    pytest.importorskip("triton")
    check = toolchain.check_assembler(CARDS[card])
    assert check.level == "ok" and f"assembles for {CARDS[card].target}" in check.found


def test_an_assembler_that_does_not_know_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    says = "case $1 in --version) echo release 12.0, V12.0.1;; *) echo \"Value 'sm_120a' is not defined\" >&2; exit 1;;"
    old = script(tmp_path / "ptxas", f"{says} esac")
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", old)
    check = toolchain.check_assembler(CARD)
    assert check.level == "broken" and not doctor.healthy([check])
    assert f"{old} (12.0" in check.found and "Value 'sm_120a' is not defined" in check.found
    assert "no such" in (toolchain.assembles(str(tmp_path / "nothing"), "sm_120a") or "").lower()


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    check = toolchain.check_assembler(CARD)
    assert (check.level, check.found) == ("note", "Triton is not installed")


@pytest.mark.parametrize(
    ("arch", "version", "forced", "level"),
    [
        (GB10, "3.6.0", None, "note"), (GB10, "3.7.1", None, "note"), (GB10, "3.7.1", "sm120", "ok"),
        (GB10, "3.9.0", None, None), (CARD, "3.6.0", None, None), (GB10, None, None, None),
    ],
)  # fmt: skip
def test_the_trap_of_sm_121(
    arch: Any, version: str | None, forced: str | None, level: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(monkeypatch, triton=version)
    monkeypatch.delenv("TRITON_OVERRIDE_ARCH", raising=False)
    if forced:
        monkeypatch.setenv("TRITON_OVERRIDE_ARCH", forced)
    check = toolchain.check_lowering(arch)
    assert (check.level if check else None) == level


# ---------------------------------------------------------------- CUDA and torch


@pytest.mark.parametrize(
    ("capability", "built", "covered"),
    [
        ((12, 0), ["sm_80", "sm_90", "sm_120"], True),
        ((12, 1), ["sm_80", "sm_90", "sm_120"], True),  # same major version, a later minor one
        ((12, 0), ["sm_80", "sm_90", "sm_121"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # PTX, compiled by the driver
        ((9, 0), ["sm_90a", "sm_120"], True),
        ((8, 9), ["sm_90"], False),
    ],
)
def test_which_builds_of_torch_serve_a_card(capability: Any, built: list[str], covered: bool) -> None:
    assert toolchain._covered(capability, built) is covered


def test_a_driver_and_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(toolchain, "nvidia_driver", lambda: None)
    assert toolchain.check_cuda_build().level == "ok"
    monkeypatch.setattr(toolchain, "nvidia_driver", lambda: "580.65.06")
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "aarch64")
    check = toolchain.check_cuda_build()
    assert check.level == "broken" and "aarch64" in check.found and "pip install torch --index-url" in check.advice


def test_a_torch_that_has_no_code_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    for built, level in ((["sm_80", "sm_90"], "broken"), (["sm_90", "sm_120"], "ok")):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda built=built: built)
        assert toolchain.check_cuda_build().level == level


# ---------------------------------------------------------------- FlashInfer


def test_flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, flashinfer_python=None)
    assert toolchain.check_flashinfer(CARD) is None
    versions(monkeypatch, flashinfer_python="0.7.2.post1")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None: None)
    said = toolchain.check_flashinfer(CARD)
    assert said is not None and said.level == "note" and "0.7.2, but it compiles its kernels with nvcc" in said.found
    for release, level in (("12.6", "note"), ("12.8", "ok"), ("13.0", "ok")):
        found = script(tmp_path / release / "nvcc", f"echo Cuda compilation tools, release {release}, V1")
        monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None, found=found: found)
        said = toolchain.check_flashinfer(CARD)
        assert said is not None and said.level == level and release in said.found
    assert toolchain.check_flashinfer(CPU) is not None


# ---------------------------------------------------------------- the whole, with little installed


def test_memory_that_is_shared() -> None:
    said = toolchain.check_memory(GB10)
    assert said is not None and "page cache" in said.found
    assert toolchain.check_memory(CARD) is None
    free = toolchain.available_memory()
    assert free is None or free > 1 << 20


def test_doctor_shows_brackets_and_every_op() -> None:
    from rich.console import Console

    check = toolchain.Check("x", "note", "found [1]", 'pip install "sm12x-compile[cuda]"')
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(doctor.render([check], doctor.choices("sm120")))
    shown = console.export_text()
    assert 'pip install "sm12x-compile[cuda]"' in shown and "found [1]" in shown
    for op in ("attention", "mla", "moe_route", "mxfp4_linear", "gated_delta_rule_verify", "causal_conv1d_update"):
        assert op in shown


def test_doctor_with_neither_triton_nor_transformers_nor_flashinfer() -> None:
    """In a process where importing them fails."""
    code = (
        "import sys, importlib.util as u, importlib.metadata as m\n"
        "gone = ('triton', 'transformers', 'flashinfer')\n"
        "find, version = u.find_spec, m.version\n"
        "u.find_spec = lambda n, *r: None if n.split('.')[0] in gone else find(n, *r)\n"
        "def v(n):\n"
        "    if n.split('-')[0] in gone: raise m.PackageNotFoundError(n)\n"
        "    return version(n)\n"
        "m.version = v\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in gone: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "sys.argv = ['x', 'doctor', '--arch', 'sm120']\n"
        "from sm12x_compile.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr  # Triton is needed on Linux
    assert "Traceback" not in done.stderr
    assert "Triton is not installed" in done.stdout and "pip install" in done.stdout and "aten" in done.stdout
