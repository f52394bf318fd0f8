"""Ints that come to be tensors: the same results for every value, or no change at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.cuda_graphs.compiling import compile_lifted, fed
from sm12x_compile.cuda_graphs.host_values import Lifted, lift

from .fakes import Tracer

CPU = torch.device("cpu")
aten = torch.ops.aten


def lifted(function: Callable[..., Any], *tensors: Tensor, numbers: int = 1) -> tuple[Any, Lifted | None]:
    """The ATen graph of ``function(*numbers, *tensors)``, before and after."""
    tracer = Tracer()
    ints = [tracer.number(5 + k) for k in range(numbers)]
    fakes = [tracer.tensor(*t.shape, device="cpu", dtype=t.dtype) for t in tensors]
    gm = tracer.graph(function, *ints, *fakes, pre_dispatch=False)
    before = str(gm.graph)
    result = lift(gm, CPU)
    if result is None:
        assert str(gm.graph) == before, "a graph that is refused is not touched"
    return gm, result


def boxed(gm: Any) -> Any:
    def run(inputs: list[Any]) -> Any:
        given = list(inputs)
        inputs.clear()
        return gm(*given)

    return run


X = torch.arange(12).view(3, 4)
CASES: dict[str, tuple[Callable[..., Any], int]] = {
    "added": (lambda n, x: (x + n,), 1),
    "subtracted, other way round": (lambda n, x: (n - x, x * n), 1),
    "compared": (lambda n, x: (x <= n, n < x, x == n), 1),
    "computed on the host": (lambda n, x: (x + (n // 2 * 3 - torch.sym_max(n - 4, 0)),), 1),
    "a position": (lambda n, x: (torch.arange(1) + n, torch.arange(n, n + 3) + x[:, 0]), 1),
    "filled": (lambda n, x: (torch.full((2, 2), n), torch.scalar_tensor(n, dtype=torch.int64) + x), 1),
    "filled, int32": (lambda n, x: (torch.full((2,), n, dtype=torch.int32),), 1),
    "counted on": (lambda n, x: (n + 1, x + n, n * 2), 1),
    "a choice": (lambda n, x: (torch.where(torch.full((), torch.sym_ite(n >= 5, 1, 0)) != 0, x + n, x),), 1),
    "two": (lambda n, m, x: (x + n - m, n + m), 2),
    "clamped": (lambda n, x: (x.clamp(max=n), torch.where(x > n, x, 0)), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_for_every_value(case: str) -> None:
    function, count = CASES[case]
    gm, found = lifted(function, X, numbers=count)
    assert found is not None, gm.graph
    assert not any(isinstance(n.meta.get("val"), (torch.SymInt, torch.SymBool)) for n in found.graph.graph.nodes)
    run = fed(boxed(found.graph), found, CPU)
    for first in (0, 1, 4, 5, 7, 7, 1000003):
        numbers = [first + 2 * k for k in range(count)]
        want = function(*numbers, X)
        inputs = [*numbers, X]
        got = run(inputs)
        assert not inputs
        for g, w in zip(got, want, strict=True):
            if isinstance(w, Tensor):
                assert g.dtype == w.dtype and torch.equal(g, w) and g.stride() == w.stride()
            else:
                assert type(g) is int and g == w


REFUSED: dict[str, Callable[..., Any]] = {
    "a size": lambda n, x: (torch.zeros(n) + 1, x + n),
    "a slice": lambda n, x: (x[:, :n] + 1,),
    "a row": lambda n, x: (x[n - 4] + 1,),
    "in floating point": lambda n, x: (x.float() * n,),  # a number and a tensor are rounded at different places
    "a division": lambda n, x: (x / n,),
    "not used": lambda n, x: (x + 1, n + 1),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    assert lifted(REFUSED[case], X)[1] is None


class Cache:
    """Counts its tokens in Python, as Hugging Face's sliding-window caches do."""

    def __init__(self) -> None:
        self.table = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
        self.tokens = 0

    def read(self, x: Tensor) -> Tensor:
        rows = torch.arange(16)
        kept = (rows <= self.tokens) & (rows > self.tokens - 3)
        self.tokens += 1
        return x + self.table.masked_fill(~kept[:, None], 0.0).sum(0)


def test_through_inductor() -> None:
    """The whole way, Inductor's code for the CPU: one graph serves all later counts, and the count goes on."""
    made: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        def compile_inner(gm: Any, example_inputs: Any, **known: Any) -> Any:
            result = compile_lifted(CPU, gm, example_inputs, **known)
            made.append(result)
            return result

        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx(gm, inputs, inner_compile=compile_inner)

    torch._dynamo.reset()
    ours, theirs = Cache(), Cache()
    step = torch.compile(lambda x, cache: cache.read(x), backend=backend)
    with torch.no_grad():
        for _ in range(9):
            x = torch.randn(4)
            torch.testing.assert_close(step(x, ours), theirs.read(x))
            assert ours.tokens == theirs.tokens
    assert len(made) <= 3
    assert any(getattr(m, "__qualname__", "").startswith("fed") for m in made), "an int came to be a tensor"
    torch._dynamo.reset()


def test_inputs_that_stay_keep_their_places() -> None:
    tracer = Tracer()
    x, n, y = tracer.tensor(4, device="cpu", dtype=torch.int64), tracer.number(), tracer.tensor(4, device="cpu")
    gm = tracer.graph(lambda x, n, y: (x + n, y * 2), x, n, y, pre_dispatch=False)
    seen: dict[str, Any] = {}

    def inner(gm: Any, inputs: Any, **known: Any) -> Any:
        seen.update(known, inputs=inputs)
        return boxed(gm)

    from torch._inductor import compile_fx

    original, compile_fx.compile_fx_inner = compile_fx.compile_fx_inner, inner
    try:
        run = partial(compile_lifted, CPU)(gm, [x, n, y], static_input_idxs=[0, 2], is_inference=True)
    finally:
        compile_fx.compile_fx_inner = original
    assert seen["static_input_idxs"] == [0, 1, 2] and len(seen["inputs"]) == 3 and seen["is_inference"]
    got = run([torch.arange(4), 7, torch.ones(4)])
    assert torch.equal(got[0], torch.arange(4) + 7) and torch.equal(got[1], torch.full((4,), 2.0))
