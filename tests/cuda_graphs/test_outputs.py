"""Results of earlier calls stay what they were, however the memory of the newest is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sm12x_compile.cuda_graphs.outputs import Way, copies, kept, ways_to_copy


class Replayed:
    """Writes its results to the same memory in every call, as a recording does."""

    def __init__(self, like: Tensor, layout: Any) -> None:
        self.memory = torch.empty_like(like)
        self.layout = layout

    def __call__(self, x: Tensor) -> Any:
        self.memory.copy_(x)
        return self.layout(self.memory)


LAYOUTS = {
    "one": lambda y: (y,),
    "transposed": lambda y: (y.T,),
    "gaps": lambda y: (y[:, ::2],),
    "expanded": lambda y: (y[:1].expand(3, -1),),
    "two of one memory": lambda y: (y, y[1:]),
    "two parts": lambda y: (y[:2], y[2:].T, 7, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_stay(layout: str) -> None:
    inputs = [torch.randn(4, 6) for _ in range(3)]
    replayed = Replayed(inputs[0], LAYOUTS[layout])
    function = kept(replayed, lambda: True)
    results = [function(x) for x in inputs]
    overwritten = [replayed(x) for x in inputs]
    for x, result, raw in zip(inputs, results, overwritten, strict=True):
        for got, want, there in zip(result, LAYOUTS[layout](x), raw, strict=True):
            if isinstance(want, Tensor):
                assert torch.equal(got, want)
                assert got.stride() == there.stride() or layout == "expanded"
            else:
                assert got == want
    assert not torch.equal(overwritten[0][0], LAYOUTS[layout](inputs[0])[0]), "the test would see it"


def test_shared_memory_stays_shared() -> None:
    whole, part = kept(lambda x: (x * 2, None), lambda: False)(torch.ones(3))
    assert part is None and torch.equal(whole, torch.full((3,), 2.0))
    y = torch.zeros(4, 4)
    first, second = copies((y, y[2:]), ways_to_copy((), (y, y[2:])))
    first.fill_(1.0)
    assert torch.equal(second, torch.ones(2, 4)) and torch.equal(y, torch.zeros(4, 4))


def test_an_argument_that_is_returned_is_not_copied() -> None:
    cache = torch.zeros(4)
    function = kept(lambda c: (c, c[1:], c + 1), lambda: True)
    same, view, new = function(cache)
    assert same is cache and view.data_ptr() == cache[1:].data_ptr()
    assert new.data_ptr() != cache.data_ptr()


def test_nothing_is_copied_before_the_first_replay() -> None:
    memory = torch.ones(3)
    replays = False
    function = kept(lambda: (memory,), lambda: replays)
    assert function()[0] is memory
    replays = True
    assert function()[0].data_ptr() != memory.data_ptr()
    assert ways_to_copy((memory,), (memory, 3)) == [Way.KEEP, Way.KEEP]
