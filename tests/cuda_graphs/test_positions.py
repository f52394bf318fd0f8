"""A position that the host counts is given to the op as a tensor; one that is a size stays a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.cuda_graphs.positions import positions_as_tensors

from .fakes import Tracer

attention = torch.ops.sm12x.attention


def calls(gm: Any) -> list[Any]:
    return list(gm.graph.find_nodes(op="call_function", target=attention.default))


@pytest.mark.parametrize("offset", [False, True])
def test_a_counted_position(offset: bool) -> None:
    def function(n: int, q: Tensor, k: Tensor, start: Tensor) -> Tensor:
        given = {"q_offset": start} if offset else {}
        result: Tensor = attention(q, k, k, 0.3, causal=True, window_left=3, q_shift=n - 1, **given)
        return result

    tracer = Tracer()
    shapes = (2, 4, 3, 8), (2, 2, 12, 8)
    fakes = [tracer.tensor(*s, device="cpu") for s in shapes] + [tracer.tensor(device="cpu", dtype=torch.int64)]
    gm = tracer.graph(function, tracer.number(), *fakes)
    positions_as_tensors(gm, calls(gm))
    (call,) = calls(gm)
    assert len(call.args) == 3 and "q_shift" not in call.kwargs
    assert call.kwargs["q_offset"].meta["val"].dtype == torch.int64
    gm.graph.lint()
    gm.recompile()
    q, k = (torch.randn(s) for s in shapes)
    for n in (1, 4, 7):
        start = torch.tensor(2)
        torch.testing.assert_close(gm(n, q, k, start), function(n, q, k, start))


def test_a_position_that_is_a_size() -> None:
    """Of a cache that grows: kernels plan with it, and such a graph is not recorded anyway."""
    tracer = Tracer()
    q, k = tracer.tensor(2, 4, 1, 8, device="cpu"), tracer.tensor(2, 2, 12, 8, device="cpu", dynamic=2)
    gm = tracer.graph(lambda q, k: attention(q, k, k, 0.3, causal=True, q_shift=k.shape[2] - 1), q, k)
    before = str(gm.graph)
    positions_as_tensors(gm, calls(gm))
    assert str(gm.graph) == before


def test_a_position_that_is_known() -> None:
    tracer = Tracer()
    q = tracer.tensor(2, 4, 3, 8, device="cpu")
    gm = tracer.graph(lambda q: attention(q, q, q, 0.3, causal=True, q_shift=2), q)
    before = str(gm.graph)
    positions_as_tensors(gm, calls(gm))
    assert str(gm.graph) == before
