"""Who sees a captured function: our backend, with capture on, where no gradient is needed. Nobody else."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule

import sm12x_compile
from sm12x_compile.capture import install, scope
from sm12x_compile.capture.captured import captured_call

from .test_told_apart import caller, compare, operands
from .variants import CHUNKED, load

EAGER = {"codegen": "eager"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def reference(tmp_path: Path) -> Any:
    return load(CHUNKED, tmp_path)


class Recorder:
    """A backend that keeps the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, inputs: Any) -> Any:
        self.graphs.append(gm)
        return gm.forward

    def captured(self) -> int:
        return sum(len(gm.graph.find_nodes(op="call_function", target=captured_call)) for gm in self.graphs)


def run(function: Any, backend: Any, **options: Any) -> tuple[Any, Any]:
    given = operands(11)
    compiled = torch.compile(caller(function), backend=backend, **options)
    with torch.no_grad():
        return compiled(**given, with_state=True), function(**given, with_state=True)


def test_other_backends_trace_the_original(reference: Any):
    assert len(compare(reference).captures) == 1
    torch._dynamo.reset()
    recorder = Recorder()
    ours, eager = run(reference, recorder)
    assert recorder.graphs and not recorder.captured()
    assert torch.equal(ours[0], eager[0])


def test_two_backends_in_one_process_take_turns(reference: Any):
    """No reset between: Dynamo keeps the code of each backend apart."""
    recorder = Recorder()
    with sm12x_compile.collect() as report:
        run(reference, sm12x_compile.sm12x, options=EAGER)
        run(reference, recorder)
        run(reference, sm12x_compile.sm12x, options=EAGER)
    assert len(report.captures) == 1 and not recorder.captured()


@pytest.mark.parametrize("options", [{"capture": False}, {"patterns": ["-gated_delta_rule"]}, {"patterns": ["mla"]}])
def test_options_switch_it_off(reference: Any, options: dict[str, Any]):
    with sm12x_compile.collect() as report:
        ours, eager = run(reference, sm12x_compile.sm12x, options={**EAGER, **options})
    assert not report.captures
    torch.testing.assert_close(ours[0], eager[0], rtol=1e-4, atol=1e-5)


def test_backend_by_name_and_partial(reference: Any):
    for backend, options in (
        ("sm12x", {"options": EAGER}),
        (functools.partial(sm12x_compile.sm12x, options=EAGER), {}),
    ):
        torch._dynamo.reset()
        with sm12x_compile.collect() as report:
            run(reference, backend, **options)
        assert len(report.captures) == 1


def test_gradients_flow_through_the_original(reference: Any):
    given = operands(9)
    for tensor in given.values():
        tensor.requires_grad_(True)
    compiled = torch.compile(caller(reference), backend=sm12x_compile.sm12x, options=EAGER)
    with sm12x_compile.collect() as report:
        compiled(**given)[0].square().sum().backward()
    mine = {k: v.grad.clone() for k, v in given.items() if v.grad is not None}
    for tensor in given.values():
        tensor.grad = None
    reference(**given)[0].square().sum().backward()
    assert not report.captures and mine
    for name, grad in mine.items():
        torch.testing.assert_close(grad, given[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_expanded_back_where_the_backend_declines(reference: Any, codegen: str):
    """Autocast makes the backend leave the graph: then the user's own code runs, not our op."""

    def model(**given: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            extra = given["value"] @ torch.ones(4, 4)
        return reference(**given, with_state=True), extra

    given = operands(11)
    with torch.no_grad(), sm12x_compile.collect() as report:
        ours = torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": codegen})(**given)
        eager = model(**given)
    assert any("autocast" in w for w in report.warnings) and not report.captures
    torch.testing.assert_close(ours[0][0], eager[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[0][1], eager[0][1], rtol=1e-4, atol=1e-5)


def test_uninstall_gives_the_original_back(reference: Any):
    compare(reference)
    held = install.installed()
    assert reference in held
    sm12x_compile.uninstall()
    try:
        assert not install.installed()
        from torch._dynamo import trace_rules
        from torch._dynamo.variables.builder import VariableBuilder

        assert not any(id(f) in VariableBuilder._id_dispatch() for f in held)
        assert not any(trace_rules.is_polyfilled_callable(f) for f in held)
        recorder = Recorder()
        run(reference, recorder)
        assert not recorder.captured()
    finally:
        install.install()
    assert len(compare(reference).captures) == 1


def test_functions_that_appear_later_and_in_closures(tmp_path: Path):
    compare(load(CHUNKED, tmp_path))
    local = load(CHUNKED, tmp_path)

    def model(**given: torch.Tensor) -> Any:
        return local(**given)

    with sm12x_compile.collect() as report:
        run_model = torch.compile(model, backend=sm12x_compile.sm12x, options=EAGER)
        with torch.no_grad():
            run_model(**operands(7))
    assert len(report.captures) == 1


def test_private_attributes_of_this_torch():
    """If one of these fails on a new torch, capture finds less there, and says nothing wrong."""
    assert hasattr(InstructionTranslator, "current_tx")
    assert install._handler() is not None
    assert scope.current_options() is None
    seen: list[Any] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        return gm.forward

    @torch._dynamo.assume_constant_result
    def look() -> bool:
        seen.append(scope._current_compiler())
        return True

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if look() else x

    torch.compile(function, backend=backend)(torch.zeros(1))
    assert any(f is backend for f, _ in scope._chain(seen[0]))


def test_reset_keeps_the_callback():
    torch._dynamo.reset()
    handler = install._handler()
    assert handler is not None and install._before_compiling in handler.start_callbacks
