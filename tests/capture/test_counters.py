"""Python ints that a frame counts up: one graph for all their values, and the counter itself goes on counting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sm12x_compile


class Cache:
    """Rows written one by one; how many is a Python int."""

    def __init__(self, start: int) -> None:
        self.length = start
        self.rows = torch.zeros(32, 4)

    def append(self, x: Tensor) -> Tensor:
        self.rows[self.length : self.length + 1] = x
        self.length += 1
        return self.rows * (torch.arange(32) < self.length)[:, None]


class Counting(nn.Module):
    """A module that counts its own calls."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.seen = start

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.arange(self.seen, self.seen + x.shape[0])[:, None]
        self.seen += x.shape[0]
        return y


class Stored(nn.Module):
    """An int that is set to the same value in each call is no counter."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 3

    def forward(self, x: Tensor) -> Tensor:
        self.rows = x.shape[0]
        return x.reshape(self.rows, 2, 2)


def run(call: Callable[..., Tensor], like: Callable[..., Tensor], rows: int = 1) -> sm12x_compile.Report:
    with sm12x_compile.collect() as report, torch.no_grad():
        for step in range(9):
            x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(step))
            assert torch.equal(call(x), like(x))
    return report


def compiled(function: Callable[..., Tensor], **options: bool) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager", **options})


@pytest.mark.parametrize("start", [2, 5])
def test_a_cache_that_counts_in_python(start: int) -> None:
    own, other = Cache(start), Cache(start)
    report = run(compiled(lambda x: own.append(x).cumsum(0)), lambda x: other.append(x).cumsum(0))
    assert report.graphs == 1, report.recompiles
    assert own.length == other.length == start + 9 and torch.equal(own.rows, other.rows)


def test_a_module_that_counts() -> None:
    own, other = Counting(2), Counting(2)
    report = run(compiled(own), other, rows=3)
    assert report.graphs == 1, report.recompiles
    assert own.seen == other.seen == 2 + 9 * 3


def test_what_does_not_change_stays_a_constant() -> None:
    own, other = Stored(), Stored()
    assert run(compiled(own), other, rows=3).graphs == 1
    assert own.rows == other.rows == 3


def test_without_capture_dynamo_counts_as_ever() -> None:
    own, other = Cache(5), Cache(5)
    report = run(compiled(lambda x: own.append(x).cumsum(0), capture=False), lambda x: other.append(x).cumsum(0))
    assert report.graphs == 2


class Window:
    """The last `size` rows: written at their place until it is full, shifted by one afterwards."""

    def __init__(self, size: int, start: int) -> None:
        self.size, self.seen = size, start
        self.place = torch.tensor(start)
        self.rows = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))

    def append(self, x: Tensor) -> Tensor:
        seen, self.seen = self.seen, self.seen + x.shape[0]
        if not seen < self.size:
            shifted = self.rows.roll(-1, 0)
            shifted[torch.tensor([-1])] = x
            self.rows.copy_(shifted)
        elif seen + x.shape[0] > self.size:  # cannot be for one row
            self.rows.copy_(torch.cat((self.rows[:seen], x))[-self.size :])
        else:
            self.rows.index_copy_(0, self.place[None], x)
            self.place += 1
        return self.rows


class Turns:
    """Every third call does something else; what is drawn under it is a tensor of its own."""

    def __init__(self) -> None:
        self.calls = 2

    def step(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = x * 2 if self.calls % 3 == 0 else x.flip(0)
        if 5 <= self.calls < 7:
            y = y + 1
            y[0] = self.calls
        return y


class Grows:
    """The two sides end in different shapes: they are two graphs."""

    def __init__(self) -> None:
        self.calls = 2

    def step(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 6:
            return torch.cat((x, x))
        return x + 1


class Remarks:
    """A number that is counted, and one that the data know; what happens by the count is no tensor."""

    def __init__(self) -> None:
        self.calls, self.said = 2, ""

    def step(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 6:
            self.said = "many"
        y = x - 1 if x.sum().item() > 0 else x + 1
        return y


def test_a_window_that_comes_to_be_full() -> None:
    own, other = Window(5, 2), Window(5, 2)
    report = run(compiled(lambda x: own.append(x).cumsum(0)), lambda x: other.append(x).cumsum(0))
    assert report.graphs == 1, report.recompiles
    assert own.seen == other.seen == 11 and torch.equal(own.rows, other.rows) and torch.equal(own.place, other.place)
    assert any("branch on a count" in line for line in report.code_rewrites)


def test_a_branch_on_a_count() -> None:
    own, other = Turns(), Turns()
    assert run(compiled(own.step), other.step, rows=3).graphs == 1
    assert own.calls == other.calls == 11


def test_sides_of_different_shapes_are_two_graphs() -> None:
    own, other = Grows(), Grows()
    report = run(compiled(own.step), other.step, rows=3)
    assert report.graphs == 2, report.recompiles
    assert not report.code_rewrites


def test_what_the_data_decide_beside_a_count() -> None:
    """A branch on the count that has to be given up leaves the rest of the function rewritten."""
    own, other = Remarks(), Remarks()
    report = run(compiled(own.step), other.step, rows=3)
    assert report.graphs <= 3 and not report.graph_breaks, report.recompiles
    assert own.said == other.said == "many" and own.calls == other.calls
