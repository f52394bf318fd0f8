"""Kernels are compiled side by side before a race: on fake tensors, by Triton itself, with no GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sm12x_compile import YES, register_kernel, registry
from sm12x_compile.arch import CARDS
from sm12x_compile.lowering.select import acceptances
from sm12x_compile.options import Options
from sm12x_compile.race import ahead, races
from sm12x_compile.race.ahead import compile_ahead, fake_run
from sm12x_compile.race.spec import describe, with_defaults
from sm12x_compile.samples import Sample, samples

triton = pytest.importorskip("triton")
CPU = torch.device("cpu")


class Card:
    """What Triton asks its driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 80, 32)


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    from triton.runtime.driver import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(driver, "_active", Card())
    yield


@triton.jit
def add_kernel(x, y, out, n, BLOCK: triton.language.constexpr):
    at = triton.language.program_id(0) * BLOCK + triton.language.arange(0, BLOCK)
    some = at < n
    value = triton.language.load(x + at, some) + triton.language.load(y + at, some)
    triton.language.store(out + at, value, some)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *rest: Any, **more: Any) -> torch.Tensor:
    out = torch.empty_like(q)
    add_kernel[(q.numel() // 64,)](q, k, out, q.numel(), BLOCK=64)
    add_kernel[(q.numel() // 32,)](q, k, out, q.numel(), BLOCK=32)
    return out


def call() -> Any:
    q = torch.randn(1, 2, 24, 16)
    return with_defaults("attention", {"q": q, "k": q.clone(), "v": q.clone(), "scale": 0.1})


def test_what_would_be_launched_is_compiled_and_kept() -> None:
    register = register_kernel("attention", "mine.add", accepts=lambda call, arch: YES, triton=True)
    register(attend)
    kernel = next(k for k in registry.kernels("attention") if k.name == "mine.add")
    run = partial(fake_run, kernel, [describe(call())], CPU, CARDS["rtx5090"], Options())
    add_kernel.device_caches.clear()
    assert compile_ahead([run, run], CPU, threads=2) == 2
    kernels = list(add_kernel.device_caches[0][0].values())
    assert len(kernels) == 2 and all("ptx" in k.asm for k in kernels)
    # As they are called with real tensors, aligned as fresh memory is: nothing is left to compile.
    before = dict(add_kernel.device_caches[0][0])
    q = torch.randn(24 * 32)
    add_kernel.run(q, q, q, q.numel(), BLOCK=64, grid=(1,), warmup=True)
    assert add_kernel.device_caches[0][0] == before


def test_whoever_fails_is_left_to_the_race_and_the_others_are_compiled() -> None:
    def broken() -> None:
        add_kernel[(1,)](torch.ones(3, device="meta"), BLOCK=48)  # arguments are missing

    add_kernel.device_caches.clear()
    one = ahead._Address(torch.empty(4, dtype=torch.bfloat16))

    def works() -> None:
        add_kernel[(1,)](one, one, one, 4, BLOCK=16)

    assert compile_ahead([broken, works], CPU) == 1


def test_other_threads_launch_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[str, bool]] = []

    class Jit:
        def run(self, *args: Any, grid: Any, warmup: bool) -> object:
            launched.append((threading.current_thread().name, warmup))
            return SimpleNamespace()

    with ahead._compiling_only(Jit, made := []):
        Jit().run(grid=(1,), warmup=False)
        other = threading.Thread(target=lambda: Jit().run(grid=(1,), warmup=False), name="other")
        other.start()
        other.join()
    Jit().run(grid=(1,), warmup=False)
    me = threading.current_thread().name
    assert launched == [(me, True), ("other", False), (me, False)] and len(made) == 1


def test_a_device_that_needs_no_compiler_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "compile_ahead", lambda *given: pytest.fail("there is nothing to compile on a CPU"))
    chooser = races.Races(Options(select="race"), CARDS["cpu"])
    chooser.prepare([(call(), registry.kernels("attention"))])


@pytest.mark.parametrize("sample", samples("cpu", large=True), ids=lambda sample: sample.title)
def test_every_kernel_of_ours_says_on_fake_tensors_what_it_would_launch(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.jit import JITFunction

    launched: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: launched.append(self.__name__))
    given = sample.call
    found = [k for k in acceptances(given, CARDS["rtx5090"], Options())[0] if k.triton]
    for kernel in found:
        launched.clear()
        fake_run(kernel, [describe(given)], CPU, CARDS["rtx5090"], Options())
        assert launched, kernel.name
