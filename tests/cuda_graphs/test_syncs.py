"""Operations that wait for the GPU are listed with their lines; others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sm12x_compile.cuda_graphs.syncs import host_syncs

from .fakes import Tracer

aten = torch.ops.aten


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_size_that_only_the_device_knows(device: str) -> None:
    """Listed once: what is computed from the size does not wait again. On the CPU nothing waits."""
    tracer = Tracer()
    with tracer.mode:
        found = torch.empty(tracer.unbacked(), 2, device=device, dtype=torch.int64)
    gm = tracer.step(aten.nonzero.default, found, tracer.tensor(8, 8, device=device))
    gm.graph.find_nodes(op="call_function", target=aten.nonzero.default)[0].meta["stack_trace"] = (
        'File "model.py", line 12, in forward\n    y = x.nonzero()'
    )
    assert host_syncs(gm) == (["aten::nonzero at model.py:12"] if device == "cuda" else [])


def test_a_number_that_only_the_device_knows() -> None:
    tracer = Tracer()
    gm = tracer.step(aten.item.default, tracer.unbacked(), tracer.tensor(dtype=torch.int64))
    assert host_syncs(gm) == ["aten::item"]


def test_a_tensor_that_goes_to_the_host() -> None:
    tracer = Tracer()
    gm = tracer.step(aten._to_copy.default, tracer.tensor(8, device="cpu"), tracer.tensor(8))
    assert host_syncs(gm) == ["aten::_to_copy"]
    back = tracer.step(aten._to_copy.default, tracer.tensor(8), tracer.tensor(8, device="cpu"))
    assert host_syncs(back) == []


@pytest.mark.parametrize(("dtype", "rows", "waits"), [
    (torch.bool, 4, True), (torch.uint8, 4, True), (torch.int64, 4, False), (torch.bool, 0, False),
])  # fmt: skip
def test_values_written_where_a_mask_is(dtype: torch.dtype, rows: int, waits: bool) -> None:
    """How many elements a mask has before another decides which value goes there; one value for all does not ask."""
    tracer = Tracer()
    x, index = tracer.tensor(8, 8), tracer.tensor(8, dtype=dtype)
    values = tracer.tensor(rows, 8) if rows else tracer.tensor()
    gm = tracer.step(aten.index_put.default, tracer.tensor(8, 8), x, [index], values)
    assert host_syncs(gm) == (["aten::index_put"] if waits else [])


@pytest.mark.parametrize("function", [
    lambda x: torch.where(x > 0, x, 0.0), lambda x: x.cumsum(0).topk(2).values, lambda x: x.masked_fill(x > 0, 1.0),
])  # fmt: skip
def test_what_does_not_wait(function: Callable[..., Any]) -> None:
    tracer = Tracer()
    assert host_syncs(tracer.graph(function, tracer.tensor(8, 8))) == []
