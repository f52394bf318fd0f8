"""What is said about a graph, by whom and when: Inductor and its trees are stood in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._inductor import compile_fx as inductor
from torch._inductor import cudagraph_utils

import sm12x_compile
from sm12x_compile.cuda_graphs.compiling import Outcome, compile_with_graphs
from sm12x_compile.cuda_graphs.decision import Decision
from sm12x_compile.report import Report

from .fakes import Tracer

WANTED, ASKED = Decision(True, None, False), Decision(True, None, True)


@pytest.fixture
def inductor_that(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Any]]]:
    """Replaces Inductor by one that hands so many stretches of code to the trees, or says why it hands none."""

    def install(parts: int, says: str = "", code: Any = lambda inputs: (inputs.clear(), [1])[1]) -> list[Any]:
        seen: list[Any] = []

        def compile_fx(gm: Any, inputs: Any, config_patches: Any = None, **more: Any) -> Any:
            seen.append((config_patches, more, torch._functorch.config.enable_autograd_cache))
            made = [
                inductor.cudagraphify(code, device_index=0, mutated_input_idxs=(), placeholders=())
                for _ in range(parts)
            ]  # fmt: skip
            if says:
                cudagraph_utils.cudagraphs_log.warning(says)
            return lambda *args: made[0](list(args)) if made else [1]

        monkeypatch.setattr(inductor, "compile_fx", compile_fx)
        monkeypatch.setattr(inductor, "cudagraphify", lambda code, **known: code)
        return seen

    yield install


def graph(function: Any = lambda x: x.relu(), *more: Any) -> Any:
    tracer = Tracer()
    return tracer.graph(function, tracer.tensor(4), *more)


def compiled(gm: Any, decision: Decision, *, gradients: bool = False, patches: Any = None) -> tuple[Any, Report]:
    report, outcome = Report(), Outcome()
    outcome.tell(report)
    run = compile_with_graphs(gm, [torch.ones(4)], decision, patches or {}, outcome, gradients=gradients)
    return run, report


def test_recorded(inductor_that: Any) -> None:
    seen = inductor_that(1)
    run, report = compiled(graph(), WANTED, patches={"max_autotune": True})
    assert report.cuda_graphs == [(True, None)]
    assert seen[0][0] == {"max_autotune": True, "triton.cudagraphs": True} and not seen[0][1]
    assert [run(torch.ones(1)) for _ in range(4)] == [[1]] * 4


def test_not_wanted(inductor_that: Any) -> None:
    seen = inductor_that(0)
    compiled(graph(), Decision(False, "no", False), patches={"triton.cudagraphs": True})
    compiled(graph(), Decision(False, "no", False))
    assert [s[0] for s in seen] == [{"triton.cudagraphs": False}, None]


def test_in_parts(inductor_that: Any) -> None:
    inductor_that(2)
    assert compiled(graph(), WANTED)[1].cuda_graph == (True, "2 CUDA graphs with code between them")
    tracer = Tracer()
    gm = tracer.step(torch.ops.aten._to_copy.default, tracer.tensor(8, device="cpu"), tracer.tensor(8))
    said = "2 CUDA graphs with code between them, because it waits for the GPU: aten::_to_copy"
    assert compiled(gm, WANTED)[1].cuda_graph == (True, said)


@pytest.mark.parametrize("decision", [WANTED, ASKED])
def test_inductor_records_nothing(inductor_that: Any, decision: Decision) -> None:
    """Its own reason is passed on; who asked is told loudly."""
    inductor_that(0, "skipping cudagraphs due to cpu device (arg0_1). Found from : \n   File x.py")
    if decision.asked:
        with pytest.warns(UserWarning, match="a CUDA graph was asked for, and the graph runs without one: cpu device"):
            report = compiled(graph(), decision)[1]
        assert len(report.warnings) == 1
    else:
        report = compiled(graph(), decision)[1]
        assert not report.warnings
    assert report.cuda_graph == (False, "cpu device (arg0_1). Found from : File x.py")
    inductor_that(0)
    assert compiled(graph(), WANTED)[1].cuda_graph == (False, "nothing to record")


def test_a_recording_that_gives_up_later_is_told_in_every_report(inductor_that: Any) -> None:
    inductor_that(1)
    outcome, first, second = Outcome(), Report(), Report(cuda_graphs=[(True, None)])
    outcome.tell(first)
    run = compile_with_graphs(graph(), [torch.ones(4)], ASKED, {}, outcome, gradients=False)
    outcome.tell(second)
    assert second.cuda_graph == (True, None)
    with pytest.warns(UserWarning, match="a number that it is given changes"):
        for n in range(20):
            assert run(torch.ones(1), n) == [1]
    for report in (first, second):
        assert not report.cuda_graphs[-1][0] and "a number" in str(report.cuda_graphs[-1][1])
        assert report.warnings
    assert second.cuda_graphs[0] == (True, None)


def test_gradients_are_left_to_inductor(inductor_that: Any) -> None:
    """No call runs first, no result is copied: its trees have rules of their own for a forward and its backward."""
    result = [torch.ones(3)]
    inductor_that(1, code=lambda inputs: result)
    run, report = compiled(graph(), ASKED, gradients=True)
    assert all(run(torch.ones(1)) is result for _ in range(4))
    assert report.cuda_graph == (True, None)


def test_only_graphs_with_ints_go_without_the_cache_of_whole_graphs(inductor_that: Any) -> None:
    seen = inductor_that(1)
    before = torch._functorch.config.enable_autograd_cache
    compiled(graph(), WANTED)
    tracer = Tracer()
    with_int = tracer.graph(lambda x, n: x + n, tracer.tensor(4, dtype=torch.int64), tracer.number())
    compiled(with_int, WANTED)
    assert [s[2] for s in seen] == [before, False] and "inner_compile" in seen[1][1]
    assert torch._functorch.config.enable_autograd_cache == before


def test_through_the_backend_on_the_cpu() -> None:
    """`explain` and `collect` name the reason, for every graph."""
    torch._dynamo.reset()
    report = sm12x_compile.explain(lambda x: x.softmax(-1) @ x, torch.randn(4, 4))
    assert report.cuda_graph == (False, "no CUDA device" if not torch.cuda.is_available() else report.cuda_graph[1])
    assert len(report.cuda_graphs) == report.graphs == 1
    assert "CUDA graph: no, " in str(report) and report.to_dict()["cuda_graph"] == report.cuda_graph
