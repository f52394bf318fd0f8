"""What a verdict depends on besides the call: the device, the versions, the kernels' source."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..registry import Kernel

PACKAGES = ("torch", "triton", "flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache")


def device_key(device: torch.device) -> dict[str, Any]:
    """The device, in facts that another one of its kind shares."""
    if device.type == "cuda":
        props = torch.cuda.get_device_properties(device)
        return {
            "name": props.name, "capability": [props.major, props.minor],
            "multiprocessors": props.multi_processor_count, "memory": props.total_memory >> 30,
        }  # fmt: skip
    return {"name": device.type, "machine": platform.machine(), "threads": torch.get_num_threads()}


@cache
def versions() -> dict[str, str]:
    """The packages that kernels come from, and the source of ours."""
    found = {"cuda": str(torch.version.cuda), "ours": source_hash()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


@cache
def source_hash() -> str:
    """Of everything that decides what a kernel computes or how it is raced."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for part in ("lowering", "ops", "race"):
        for path in sorted((package / part).resolve().rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def kernel_key(kernel: Kernel) -> str:
    """A kernel's name; of one that is not ours, with a hash of its source."""
    if kernel.run.__module__.startswith("sm12x_compile."):
        return kernel.name
    try:
        source = inspect.getsource(kernel.run)
    except (OSError, TypeError):
        source = repr(getattr(kernel.run, "__code__", kernel.run))
    return f"{kernel.name} {hashlib.sha256(source.encode()).hexdigest()[:12]}"
