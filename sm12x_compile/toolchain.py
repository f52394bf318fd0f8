"""The tools that kernels are compiled with on this machine, and whether they suit a card: checks for `doctor`.

Every check works with the tool missing. Facts about Triton's targets: compiled and disassembled with 3.6.0, 3.7.1 and
3.9.0; about FlashInfer's: read in its source.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .arch import Arch

Level = Literal["ok", "note", "broken"]

# The oldest PTX that knows a target (PTX ISA, "Target specific features" of each release).
_PTX = {"sm_121a": "8.8", "sm_120a": "8.7", "sm_100a": "8.6", "sm_90a": "8.0"}
_NVCC = {"sm_121a": (12, 9), "sm_120a": (12, 8), "sm_100a": (12, 8), "sm_90a": (12, 0)}
_LOWERS_SM121 = (3, 9)  # seen to give sm_121 what sm_120 gets; 3.6.0 and 3.7.1 do not, 3.8 was not looked at


@dataclass(frozen=True)
class Check:
    """One line of the findings. `advice` is a command or a sentence; only ``broken`` fails the run."""

    name: str
    level: Level
    found: str
    advice: str = ""


def check_cuda_build() -> Check:
    """Whether this torch can use the GPU that the driver has."""
    machine = platform.machine()
    if torch.version.cuda is None:
        if nvidia_driver() is None:
            return Check("CUDA", "ok", f"torch is a CPU build for {machine}, and there is no NVIDIA driver")
        index = "https://download.pytorch.org/whl/cu130"
        return Check("CUDA", "broken", f"an NVIDIA driver, but torch is a CPU build for {machine}",
                     f"pip install torch --index-url {index}")  # fmt: skip
    found = f"torch is built for CUDA {torch.version.cuda} on {machine}, driver {nvidia_driver() or 'none'}"
    if not torch.cuda.is_available():
        return Check("CUDA", "note", found, "torch finds no device: look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    major, minor = torch.cuda.get_device_capability()
    built = torch.cuda.get_arch_list()
    if not _covered((major, minor), built):
        return Check("CUDA", "broken", f"{found}; its kernels are for {', '.join(built)}, not for {major}.{minor}",
                     "install a torch for CUDA 12.8 or later")  # fmt: skip
    return Check("CUDA", "ok", found)


def _covered(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a build has code for a card: of its own major version and no later minor one, or PTX that is older."""
    for name in built:
        match = re.match(r"(sm|compute)_(\d+)(\d)", name)
        if match is None:
            continue
        kind, major, minor = match[1], int(match[2]), int(match[3])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def nvidia_driver() -> str | None:
    """The version of the kernel's NVIDIA driver, or None."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match.group(1) if match else "unknown"


def check_assembler(arch: Arch) -> Check:
    """The ptxas that Triton will use for the card, and whether it assembles for it."""
    if importlib.util.find_spec("triton") is None:
        return Check("ptxas", "note", "Triton is not installed", 'pip install "triton>=3.6"')
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        major, minor = arch.capability
        tool = get_ptxas(10 * major + minor)
        path, version = tool.path, tool.version
    except Exception as error:  # a Triton of another vendor, or a path in the environment that is wrong
        return Check("ptxas", "broken" if arch.is_cuda else "note", f"Triton finds none: {error}",
                     "reinstall Triton, or unset TRITON_PTXAS_PATH and TRITON_PTXAS_BLACKWELL_PATH")  # fmt: skip
    refused = assembles(path, arch.target)
    if refused:
        return Check("ptxas", "broken", f"{path} ({version}) does not assemble for {arch.target}: {refused}",
                     'pip install --upgrade "triton>=3.6", or point TRITON_PTXAS_BLACKWELL_PATH to one of CUDA 12.9'
                     )  # fmt: skip
    return Check("ptxas", "ok", f"{version}, assembles for {arch.target}: {path}")


def assembles(ptxas: str, target: str) -> str | None:
    """Why this assembler does not know a target, in one line, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.ptx"
        source.write_text(f".version {_PTX.get(target, '7.8')}\n.target {target}\n.address_size 64\n")
        command = [ptxas, "-arch", target, str(source), "-o", str(Path(folder) / "empty.cubin")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return None if done.returncode == 0 else (lines[0] if lines else f"exit code {done.returncode}")


def check_lowering(arch: Arch) -> Check | None:
    """Older releases of Triton do not give sm_121 the fp8 and fp4 instructions that it has."""
    version = _version("triton")
    if arch.capability != (12, 1) or version is None or version >= _LOWERS_SM121:
        return None
    name = ".".join(map(str, version))
    forced = os.environ.get("TRITON_OVERRIDE_ARCH")
    if forced == "sm120":
        return Check("Triton on sm_121", "ok", f"Triton {name} lowers for sm_120, as TRITON_OVERRIDE_ARCH says")
    return Check(
        "Triton on sm_121", "note",
        f"Triton {name} multiplies fp8, mxfp8 and mxfp4 without sm_121's own instructions, and fails on nvfp4. "
        "The kernels here dequantise to bf16 and are not affected",
        "for other Triton kernels: Triton 3.9, or TRITON_OVERRIDE_ARCH=sm120 before the process starts",
    )  # fmt: skip


def check_flashinfer(arch: Arch) -> Check | None:
    """Whether what FlashInfer compiles at first use can be compiled for the card; None if it is not installed."""
    version = _version("flashinfer-python")
    if version is None:
        return None
    found = f"{'.'.join(map(str, version))}"
    if not arch.is_cuda:
        return Check("FlashInfer", "ok", f"{found}, used on a GPU")
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return Check("FlashInfer", "ok", f"{found}, with kernels compiled ahead of time")
    path, release = nvcc()
    if path is None:
        return Check("FlashInfer", "note", f"{found}, but it compiles its kernels with nvcc, and there is none",
                     "install the CUDA toolkit and set CUDA_HOME, or install flashinfer-jit-cache")  # fmt: skip
    needed = _NVCC.get(arch.target, (11, 8))
    if release is not None and release < needed:
        return Check("FlashInfer", "note", f"{found}, but {path} is {release[0]}.{release[1]}",
                     f"{arch.target} needs nvcc {needed[0]}.{needed[1]} or later")  # fmt: skip
    shown = "" if release is None else f" ({release[0]}.{release[1]})"
    return Check("FlashInfer", "ok", f"{found}, compiles for {arch.target} at first use with {path}{shown}")


def nvcc() -> tuple[str | None, tuple[int, int] | None]:
    """nvcc's path and release, where FlashInfer looks for it: CUDA_HOME, PATH, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [shutil.which("nvcc", path=f"{home}/bin") if home else None, shutil.which("nvcc"),
              shutil.which("nvcc", path="/usr/local/cuda/bin")]  # fmt: skip
    path = next((p for p in places if p), None)
    if path is None:
        return None, None
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return path, None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return path, (int(match.group(1)), int(match.group(2))) if match else None


def check_memory(arch: Arch) -> Check | None:
    """Memory that CPU and GPU share (DGX Spark): the driver does not count what the page cache would give back."""
    if not arch.unified_memory:
        return None
    found = "shared by CPU and GPU; the driver counts Linux's page cache as used"
    free = available_memory() if torch.cuda.is_available() else None
    found += f"; {free >> 30} GiB can be had" if free is not None else ""
    return Check("memory", "note", found, "if a model does not fit: sync; echo 3 | sudo tee /proc/sys/vm/drop_caches")


def available_memory() -> int | None:
    """Bytes that Linux can hand out, page cache included, or None."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(match.group(1)) * 1024 if match else None


def _version(package: str) -> tuple[int, ...] | None:
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])
