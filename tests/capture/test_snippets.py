"""Data-dependent Python: one graph with eager's results, or a refusal that names the line."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sm12x_compile
from sm12x_compile.report import Report

from ..handwritten.rename import renamed
from . import memory, samplers, snippets
from .snippets import COMPILED, REFUSED, Rounding, Snippet

logging.getLogger("snippets").setLevel(logging.ERROR)
HITS = ("some", "none", "all", "some")


def compiled(function: Callable[..., Any], *, fullgraph: bool) -> Callable[..., Any]:
    return torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, fullgraph=fullgraph)


def made(snippet: Snippet) -> Callable[..., Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return snippet.make()


def outcome(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    """What a call gives: its result, its inputs as it leaves them, or its error."""
    own = [x.clone() for x in inputs]
    torch.manual_seed(1)
    try:
        with torch.no_grad():
            return [function(*own), *own]
    except Exception as error:
        return type(error)


def assert_same(got: Any, wanted: Any, rounding: Rounding) -> None:
    if isinstance(wanted, type):
        assert isinstance(got, type)  # Dynamo may wrap the error
        return
    bound = {"none": 0.0, "last bit": 1e-6, "sums": 1e-5}[rounding]
    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=bound, atol=bound)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("snippet", [*COMPILED, *memory.COMPILED, *samplers.COMPILED], ids=lambda s: s.name)
def test_one_graph_and_the_same_results(snippet: Snippet) -> None:
    function = made(snippet)
    call = compiled(function, fullgraph=True)
    with sm12x_compile.collect() as report:
        for seed in range(20):
            inputs = snippet.draw(HITS[seed % len(HITS)], torch.Generator().manual_seed(seed))
            assert_same(outcome(call, inputs), outcome(function, inputs), snippet.rounding)
    assert report.graphs == 1, report.recompiles
    assert report.code_rewrites and not any("left as it is" in line for line in report.code_rewrites)


def marked_line(function: Callable[..., Any]) -> str:
    source = type(function).forward if isinstance(function, nn.Module) else function
    lines, first = inspect.getsourcelines(source)
    (line,) = [first + k for k, text in enumerate(lines) if "# refused" in text]
    return f"{Path(inspect.getfile(source)).name}:{line} "


@pytest.mark.parametrize("snippet", [*REFUSED, *memory.REFUSED, *samplers.REFUSED], ids=lambda s: s.name)
def test_what_is_refused_names_its_line_and_runs_as_written(snippet: Snippet) -> None:
    function = made(snippet)
    call = compiled(function, fullgraph=False)
    with sm12x_compile.collect() as report:
        for seed in range(3):
            inputs = snippet.draw(HITS[seed % len(HITS)], torch.Generator().manual_seed(seed))
            fresh = copy.deepcopy(function)
            assert_same(outcome(call, inputs), outcome(fresh, inputs), "none")
    said = [line for line in report.code_rewrites if "left as it is" in line]
    assert any(line.startswith(marked_line(function)) for line in said), (marked_line(function), report.code_rewrites)


def test_every_kind_is_there() -> None:
    assert len(COMPILED) >= 25 and len(REFUSED) >= 15


@pytest.mark.parametrize("name", ["TopOne", "guard_any", "three_ways", "early_exit"])
def test_eager_and_other_backends_see_the_authors_code(name: str) -> None:
    """After the rewritten form has been used, nothing of it is left."""
    snippet = next(s for s in COMPILED if s.name == name)
    function = made(snippet)
    forward = type(function).forward if isinstance(function, nn.Module) else function
    code, attributes = forward.__code__, set(vars(forward))
    inputs = snippet.draw("some", torch.Generator().manual_seed(0))
    outcome(compiled(function, fullgraph=True), inputs)
    assert forward.__code__ is code and set(vars(forward)) == attributes
    torch._dynamo.reset()
    graphs = []

    def other_backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    outcome(torch.compile(function, backend=other_backend), inputs)
    assert len(graphs) > 1
    torch._dynamo.reset()
    with sm12x_compile.collect() as report:
        call = torch.compile(
            function, backend=sm12x_compile.sm12x, options={"codegen": "eager", "capture": False}
        )
        outcome(call, inputs)
    assert not report.code_rewrites and report.graphs == len(graphs)


def masked_relu(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    y[mask] = torch.relu(x[mask] @ torch.ones(x.shape[-1], x.shape[-1]))
    return y


def test_what_needs_gradients_is_left_as_it_is() -> None:
    torch._dynamo.reset()
    x, mask = torch.randn(5, 4, requires_grad=True), torch.rand(5) > 0.5
    with sm12x_compile.collect() as report:
        compiled(masked_relu, fullgraph=False)(x, mask).sum().backward()
    assert any("gradients" in line for line in report.code_rewrites)
    wanted = torch.autograd.grad(masked_relu(x, mask).sum(), x)[0]
    assert torch.equal(x.grad, wanted) if x.grad is not None else False


def test_uninstall_and_install_again() -> None:
    from torch._dynamo import convert_frame
    from torch._dynamo.variables.functions import UserFunctionVariable

    from sm12x_compile.capture import wrap

    with_us = convert_frame.trace_frame, UserFunctionVariable.get_code
    wrap.uninstall()
    without = convert_frame.trace_frame, UserFunctionVariable.get_code
    assert all(a is not b for a, b in zip(with_us, without, strict=True))
    assert all("_dynamo" in f.__code__.co_filename for f in without)
    torch._dynamo.reset()
    x, mask = torch.randn(5, 4), torch.tensor([True, False, True, False, False])
    with torch.no_grad():
        compiled(torch.sin, fullgraph=True)(x)  # the backend is called, and installs itself
        torch._dynamo.reset()
        with sm12x_compile.collect() as report:
            assert torch.equal(compiled(masked_relu, fullgraph=True)(x, mask), masked_relu(x, mask))
    assert report.graphs == 1


def report_of(function: Callable[..., Any], *inputs: Tensor) -> Report:
    torch._dynamo.reset()
    with sm12x_compile.collect() as report, torch.no_grad():
        compiled(function, fullgraph=False)(*inputs)
    return report


def test_the_report_says_what_was_done_and_where() -> None:
    (line,) = report_of(masked_relu, torch.randn(5, 4), torch.rand(5) > 0.5).code_rewrites
    first = masked_relu.__code__.co_firstlineno
    assert line.startswith(f"test_snippets.py:{first} masked_relu: ")
    assert f"assignment to selected elements (line {first + 2})" in line


def test_code_without_breaks_is_not_looked_at() -> None:
    def plain(x: Tensor, index: Tensor) -> Tensor:
        out = x[index] * 2
        if x.shape[0] > 3:
            out = out + 1
        return out

    report = report_of(plain, torch.randn(5, 4), torch.tensor([1, 2]))
    assert report.graphs == 1 and not report.code_rewrites


@pytest.mark.parametrize("name", ["LoopOverItems", "ModuleListLoop", "TopOne", "SortedSlices", "nested_conditions"])
def test_names_decide_nothing(name: str, tmp_path: Path) -> None:
    """The same code under other names is rewritten as well."""
    fields = {"name", "make", "draw", "rounding", "Snippet", "COMPILED", "REFUSED"}
    path = tmp_path / "elsewhere.py"
    path.write_text(renamed(Path(snippets.__file__).read_text(), frozenset(fields)))
    spec = importlib.util.spec_from_file_location("elsewhere", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["elsewhere"] = module
    try:
        spec.loader.exec_module(module)
        index = [s.name for s in COMPILED].index(name)
        snippet = module.COMPILED[index]
        function = made(snippet)
        code = (type(function).forward if isinstance(function, nn.Module) else function).__code__
        assert name not in (type(function).__name__, code.co_name)
        call = compiled(function, fullgraph=True)
        for seed in range(4):
            inputs = snippet.draw(HITS[seed], torch.Generator().manual_seed(seed))
            assert_same(outcome(call, inputs), outcome(function, inputs), snippet.rounding)
    finally:
        del sys.modules["elsewhere"]
