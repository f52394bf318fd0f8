"""Triton kernels are compiled side by side before the first of them runs.

A race would compile one after the other, and so would the first call of a model. Here every candidate is called once
on fake tensors, in a thread whose launches compile and launch nothing: the work is Triton's, in a pool of threads
(its passes, the assembler and the launcher's C compiler let go of Python's lock). Nothing is ever run, so nothing can
hang the device or depend on values; what fails here fails again in its race, where it is reported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..arch import Arch
from ..options import Options
from ..registry import Kernel
from .entrant import Lowered
from .spec import Spec

logger = logging.getLogger("sm12x_compile")

THREADS = 16  # at most: each holds some hundred MiB of LLVM's memory
PATIENCE = 60.0  # seconds for all; what is late is compiled again where it runs

Run = Callable[[], object]


class _Address:
    """What Triton's binder asks of a tensor: dtype, and how its memory is aligned."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.dtype.itemsize  # a fresh allocation is aligned

    def data_ptr(self) -> int:
        return self._offset


def fake_run(kernel: Kernel, specs: Sequence[Spec], device: torch.device, arch: Arch, options: Options) -> None:
    """Call a kernel on fake tensors, once for each of these calls."""
    with FakeTensorMode(), torch.no_grad():
        for spec in specs:
            tensors = {
                name: torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device=device)
                for name, t in spec.tensors.items()
            }  # fmt: skip
            with Lowered(arch, options, []):
                kernel.run(**spec.values, **tensors)


def compile_ahead(runs: Sequence[Run], device: torch.device, threads: int | None = None) -> int:
    """Compile what these calls would launch; returns how many kernels that were.

    Args:
        runs: each calls kernels on fake tensors of `device`.
        device: the GPU that they are compiled for.
        threads: as many as there are cores, up to 16, if not given.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:  # none, or one that compiles in another way
        return 0
    made: list[Any] = []

    def work() -> None:
        count = threads or min(THREADS, os.cpu_count() or 1)
        with _on(device), ThreadPoolExecutor(count, initializer=_use, initargs=(device,)) as pool:
            with _compiling_only(JITFunction, made), AsyncCompileMode(pool, ignore_errors=True):
                for run in runs:
                    _attempt(run)
            kernels = {id(k): k for k in map(_finished, made) if k is not None}
            made[:] = kernels.values()
            list(pool.map(_load, made))

    # A thread of its own: none of the compiler's modes is active there.
    thread = threading.Thread(target=lambda: _attempt(work), name="compiling ahead", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return len(made)


@contextmanager
def _compiling_only(jit: Any, made: list[Any]) -> Iterator[None]:
    """In this thread no Triton kernel is launched; those that would be are compiled, and noted."""
    launch, me = jit.run, threading.get_ident()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if threading.get_ident() != me:
            return launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        args = tuple(map(_plain, args))
        kernel = launch(self, *args, grid=grid, warmup=True, **{n: _plain(a) for n, a in kwargs.items()})
        made.append(kernel)
        return kernel

    jit.run = run
    try:
        yield
    finally:
        jit.run = launch


def _plain(value: Any) -> Any:
    return _Address(value) if isinstance(value, FakeTensor) else value


def _finished(kernel: Any) -> Any:
    """The kernel behind a promise of it; None if it could not be compiled."""
    return vars(kernel).get("kernel") if hasattr(kernel, "finalize_compile") else kernel


def _load(kernel: Any) -> None:
    """Onto the device, with its launcher."""
    with contextlib.suppress(Exception):
        _ = kernel.run


def _attempt(work: Run) -> None:
    try:
        work()
    except Exception as error:
        logger.debug("not compiled ahead: %s: %s", type(error).__name__, error)


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
