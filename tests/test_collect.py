"""What `collect` gathers: everything compiled inside the block, nothing before or after, however blocks nest."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.utils as dynamo_utils
from torch import Tensor

import sm12x_compile
from sm12x_compile.collect import active_reports, collect


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    assert active_reports() == []


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def heads(length: int = 5) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 2, length, 4) for _ in range(3))


def compile_one() -> None:
    """One graph with one attention, compiled anew."""
    torch._dynamo.reset()
    torch.compile(attend, backend=sm12x_compile.sm12x, options={"codegen": "eager"})(*heads())


def test_only_what_is_compiled_inside() -> None:
    step = torch.compile(attend, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    step(*heads())
    with collect() as report:
        step(*heads())
    assert (report.graphs, report.sites) == (0, [])
    with collect() as report:
        compile_one()
    compile_one()
    assert (report.graphs, report.count("attention")) == (1, 1)
    assert list(report.seconds) == ["normalize", "match", "lower"]


def test_nested_blocks() -> None:
    """Two reports that are still equal are two reports all the same."""
    with collect() as outer:
        with collect() as inner:
            pass
        compile_one()
        with collect() as later:
            compile_one()
    assert (inner.graphs, later.graphs, outer.graphs) == (0, 1, 2)
    assert [s.graph for s in outer.sites] == [0, 1]
    assert [s.graph for s in later.sites] == [0], "its own count, not the outer block's"


def test_blocks_that_end_in_another_order() -> None:
    first, second = collect(), collect()
    a = first.__enter__()
    b = second.__enter__()
    first.__exit__(None, None, None)
    compile_one()
    second.__exit__(None, None, None)
    compile_one()
    assert (a.graphs, b.graphs) == (0, 1)


def test_a_block_that_raises() -> None:
    with pytest.raises(ZeroDivisionError), collect() as report:
        compile_one()
        raise ZeroDivisionError
    assert active_reports() == []
    compile_one()
    assert report.graphs == 1


def test_several_graphs_add_up() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        torch._dynamo.graph_break()
        return attend(attend(out, k, v), k, v)

    with collect() as report:
        torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"})(*heads())
    assert report.graphs == 2
    assert [s.graph for s in report.sites] == [0, 1, 1]
    (line,) = report.graph_breaks
    assert "graph_break()" in line and "\n" not in line
    with collect() as other:
        compile_one()
    assert other.graph_breaks == [], "breaks of before are not counted again"


def test_the_same_break_again_is_counted() -> None:
    def function(x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        x = x * 3
        torch._dynamo.graph_break()
        return x * 4

    with collect() as report:
        torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"})(torch.ones(2))
    assert len(report.graph_breaks) == 1
    assert report.graph_breaks[0].endswith(" (2 times)")


def test_recompiles_say_why() -> None:
    step = torch.compile(attend, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, dynamic=False)
    with collect() as report:
        for length in (4, 5, 5, 6):
            step(*heads(length))
    assert report.graphs == 3
    assert len(report.recompiles) == 2
    for line in report.recompiles:
        assert "size mismatch" in line and "\n" not in line and " # " not in line


def test_recompiles_after_many_compilations() -> None:
    """Dynamo remembers the last 64 compilations only: a full memory does not hide new ones."""
    remembered = dynamo_utils._compilation_metrics
    assert remembered.maxlen is not None
    while len(remembered) < remembered.maxlen:
        remembered.append(dynamo_utils.CompilationMetrics())
    step = torch.compile(attend, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, dynamic=False)
    with collect() as report:
        for length in (4, 5):
            step(*heads(length))
    assert len(dynamo_utils.get_compilation_metrics()) == remembered.maxlen
    assert len(report.recompiles) == 1


def test_a_graph_that_is_left_counts() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    with collect() as report:
        torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"})(torch.ones(2, 2))
        compile_one()
    assert report.graphs == 2 and [s.graph for s in report.sites] == [1]
    assert len(report.warnings) == 1


def test_other_backends_are_not_collected() -> None:
    with collect() as report:
        torch.compile(attend, backend="eager")(*heads())
    assert (report.graphs, report.sites, report.seconds) == (0, [], {})


def test_blocks_of_two_threads() -> None:
    """A block sees what other threads compile meanwhile, and ends without disturbing theirs."""
    entered, leave = threading.Event(), threading.Event()
    reports: list[sm12x_compile.Report] = []

    def work() -> None:
        with torch.no_grad(), collect() as report:
            reports.append(report)
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(60)
    with collect() as mine:
        compile_one()
    leave.set()
    thread.join()
    assert mine.graphs == 1 and reports[0].graphs == 1
