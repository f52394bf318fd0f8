"""Whether FlashInfer can be used in this process, and its entry points; FlashInfer is imported at the first call.

Only entry points that run on SM12x are named in this package, and none that needs tcgen05, wgmma or a prebuilt binary
of another family (trtllm-gen, DeepGEMM, the CUTLASS attention).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ...arch import Arch
from ...ops import OPS
from ...registry import kernels

OLDEST = (0, 6, 18)  # the oldest release whose signatures and gates the tests have read
INSTALL = 'pip install "sm12x-compile[flashinfer]"'
CUTE = "pip install nvidia-cutlass-dsl"
P = ParamSpec("P")
R = TypeVar("R")


class FlashInferError(RuntimeError):
    """FlashInfer could not be imported, could not compile a kernel, or refused a call; says what to do."""


@cache
def release() -> tuple[int, ...] | None:
    """The release that is installed, as numbers, or None."""
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def named(version: tuple[int, ...]) -> str:
    """``0.7.2``."""
    return ".".join(map(str, version))


@cache
def _nvcc() -> bool:
    """Whether FlashInfer finds a CUDA compiler, or kernels that were compiled ahead of time."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = shutil.which("nvcc") or any(home and (Path(home) / "bin" / "nvcc").exists() for home in homes)
    return bool(found) or importlib.util.find_spec("flashinfer_jit_cache") is not None


def refusal(
    arch: Arch,
    families: tuple[str, ...],
    *,
    needs_nvcc: bool = True,
    needs_cute: bool = False,
    since: tuple[int, ...] = OLDEST,
) -> str | None:
    """Why no kernel of this kind can run on the card, in one sentence with the remedy, or None.

    Args:
        arch: the card.
        families: the families of cards that FlashInfer's own gate lets through.
        needs_nvcc: whether FlashInfer compiles the kernel with nvcc at first use.
        needs_cute: whether it compiles it with the CuTe DSL.
        since: the first release that has what the adapter relies on.
    """
    if arch.family not in families:
        return f"FlashInfer has this kernel for {_listed(families)}, not for {arch.name}"
    version = release()
    if version is None:
        return f"flashinfer-python is not installed: {INSTALL}"
    if version < max(since, OLDEST):
        wanted, found = named(max(since, OLDEST)), named(version)
        return f"needs flashinfer-python {wanted} or later, not {found}: {INSTALL} --upgrade"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "FlashInfer cannot be imported without apache-tvm-ffi: pip install apache-tvm-ffi"
    if needs_cute and importlib.util.find_spec("cutlass") is None:
        return f"FlashInfer compiles this kernel with the CuTe DSL, which is not installed: {CUTE}"
    if needs_nvcc and not _nvcc():
        return "FlashInfer compiles this kernel with nvcc, which is neither on PATH nor under CUDA_HOME"
    return None


def _listed(families: tuple[str, ...]) -> str:
    names = [family.replace("sm", "SM") for family in families]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@cache
def entry(target: str) -> Any:
    """A function or class of FlashInfer by its place, such as ``flashinfer.decode:xqa_batch_decode_with_kv_cache``.

    Raises:
        FlashInferError: FlashInfer does not import, or has no such thing; says what to do.
    """
    module, name = target.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # its import compiles, writes to the home directory and asks the driver
        ours = sorted({f"-{k.name}" for op in OPS for k in kernels(op) if k.name.startswith("flashinfer.")})
        raise FlashInferError(
            f"FlashInfer {named(release() or ())} does not give {target}: {type(error).__name__}: {error}. Leave its "
            f"kernels out with options={{'kernels': {ours}}}"
        ) from error


def explained(kernel: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """What goes wrong inside FlashInfer, most often the compilation of a kernel, becomes a `FlashInferError`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except FlashInferError:
                raise
            except Exception as error:
                lines = str(error).strip().splitlines()
                cause = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
                raise FlashInferError(
                    f"{kernel} failed in FlashInfer {named(release() or ())}: {type(error).__name__}: {cause[:300]}. "
                    f"Leave it out with options={{'kernels': ['-{kernel}']}}"
                ) from error

        # torch.library reads the annotations, in the module of the function that it is given.
        run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
        return run

    return decorate
