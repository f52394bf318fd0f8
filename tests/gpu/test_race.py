"""A kernel that a GPU does not come back from, in a real race: the model runs without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sm12x_compile
from sm12x_compile import YES, register_kernel, registry
from sm12x_compile.race import races

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TURNS = 10_000_000  # some seconds, should nobody end it


@triton.jit
def wait_kernel(flag, out, TURNS: tl.constexpr):
    turn = 0
    found = tl.load(flag, volatile=True)
    while (found == 0) & (turn < TURNS):
        found = tl.load(flag, volatile=True)
        turn += 1
    tl.store(out, turn)


def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(races, "_settled", {})
    monkeypatch.setattr(registry, "_kernels", {op: list(found) for op, found in registry._kernels.items()})
    monkeypatch.setattr(races.Races, "patience", 2.0)
    torch._dynamo.reset()
    made = torch.zeros(1, dtype=torch.int32, device="cuda")
    out = torch.zeros_like(made)
    wait_kernel.warmup(made, out, TURNS=TURNS, grid=(1,))  # compiling it is not what takes long
    torch.cuda.synchronize()
    yield made
    with torch.cuda.stream(torch.cuda.Stream()):
        made.fill_(1)
    torch.cuda.synchronize()
    torch._dynamo.reset()


def test_a_kernel_that_hangs_is_left_behind(flag: Tensor) -> None:
    def hang(q: Tensor, k: Tensor, v: Tensor, scale: float, *rest: Any, **more: Any) -> Tensor:
        wait_kernel[(1,)](flag, torch.zeros_like(flag), TURNS=TURNS)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    register_kernel("attention", "mine.hangs", accepts=lambda call, arch: YES, merit=90)(hang)
    given = [torch.randn(1, 2, 64, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = model(*given)
    compiled = torch.compile(model, backend="sm12x", options={"cuda_graphs": False})
    with sm12x_compile.collect() as report, torch.no_grad():
        found = compiled(*given)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    (race,) = report.races
    (entry,) = (e for e in race["entries"] if e["name"] == "mine.hangs")
    assert entry["status"] == "out" and "did not come back within 2 s" in entry["reason"]
    assert race["winner"] != "mine.hangs"
    assert report.sites[0].kernel != "mine.hangs"
