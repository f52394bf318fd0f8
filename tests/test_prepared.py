"""Prepared weights: taken out of the graph, shared, and prepared again when a weight changes."""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import sm12x_compile
from sm12x_compile import hoist as hoisting
from sm12x_compile import prepared, registry
from sm12x_compile.match import GraphView, Rewrite
from sm12x_compile.prepared import STORE, Recipe

aten = torch.ops.aten
runs: list[Tensor] = []


def _doubled(w: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    runs.append(w)
    return w * 2 + shift, w.sum(0)


PREPARE = hoisting.preparation(
    "test_doubled", _doubled, lambda w, shift: (torch.empty_like(w), w.new_empty(w.shape[1])), title="doubling",
    describe=lambda event: {"bytes": event.results[0].nbytes},
)  # fmt: skip


@pytest.fixture(autouse=True)
def doubling() -> Iterator[None]:
    """A pattern that writes ``linear(x, w)`` as ``linear(x, (prepared w - 1) / 2)``, so that eager is the oracle."""
    saved = dict(registry._patterns)
    registry._patterns.clear()
    torch._dynamo.reset()
    STORE.forget()
    runs.clear()

    @sm12x_compile.register_pattern("doubling", anchors=[aten.linear.default])
    def pattern(anchor: Node, graph: GraphView) -> Rewrite | None:
        x, w = anchor.args[:2]
        with graph.graph.inserting_before(anchor):
            transposed = graph.call(aten.t.default, w)
            both = graph.call(PREPARE, transposed, 1)
            large = graph.call(operator.getitem, both, 0)
            small = graph.call(aten.div.Tensor, graph.call(aten.sub.Tensor, large, 1), 2)
            call = graph.call(aten.matmul.default, x, small)
        return Rewrite(anchor, call, call)

    yield
    registry._patterns.clear()
    registry._patterns.update(saved)
    STORE.forget()
    torch._dynamo.reset()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def compiled(model: nn.Module, codegen: str = "eager") -> Callable[..., Any]:
    return torch.compile(model, backend=sm12x_compile.sm12x, options={"codegen": codegen})


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@torch.no_grad()
def test_prepared_once_and_again_after_a_change(codegen: str) -> None:
    model, x = Two(), torch.randn(3, 8)
    step = compiled(model, codegen)

    def check(prepared_since: int) -> None:
        torch.testing.assert_close(step(x), model(x))
        assert len(runs) == prepared_since
        runs.clear()

    check(2)
    check(0)
    torch.testing.assert_close(step(x[:2]), model(x[:2]))  # another graph, the same prepared weights
    check(0)
    model.a.weight.mul_(2)
    check(1)
    model.load_state_dict(Two().state_dict())
    check(2)
    model.a.weight.data = torch.randn(8, 8)
    check(1)
    model.a.weight.data.add_(torch.randn(8, 8))  # as a LoRA is merged: no version counts it
    check(1)
    model.a.weight.data += 1
    check(1)
    model.b.weight = nn.Parameter(torch.randn(8, 8))
    check(1)
    model.a, model.b = model.b, model.a
    check(0)
    model.b.weight = model.a.weight  # tied: one preparation serves both
    check(0)


@torch.no_grad()
def test_results_keep_their_address() -> None:
    """A CUDA graph holds addresses, so a change goes into the same memory."""
    recipe = Recipe("square", lambda w: (w * w,))
    w = nn.Parameter(torch.randn(4, 4))
    (first,) = STORE.get(recipe, (w,))
    w.add_(1)
    (second,) = STORE.get(recipe, (w,))
    assert second is first
    torch.testing.assert_close(first, w * w)


@torch.no_grad()
def test_entries_go_with_their_weights() -> None:
    recipe = Recipe("square", lambda w: (w * w,))
    w = nn.Parameter(torch.randn(4, 4))
    STORE.get(recipe, (w,))
    assert STORE.bytes() == 64
    del w
    gc.collect()
    assert STORE.bytes() == 0


@torch.no_grad()
def test_a_weight_made_in_inference_mode_is_prepared_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_said", set())
    with torch.inference_mode():
        w = torch.ones(2, 2)
    recipe = Recipe("square", lambda w: (w * w,))
    with pytest.warns(UserWarning, match="inference_mode"):
        assert STORE.get(recipe, (w,))[0].sum() == 4
    with torch.inference_mode():
        w.mul_(2)
    assert STORE.get(recipe, (w,))[0].sum() == 16


@torch.no_grad()
def test_memory_of_the_source_can_be_given_up() -> None:
    recipe = Recipe("square", lambda w: (w * w,), drops=True)
    w = nn.Parameter(torch.full((4, 4), 3.0))
    assert STORE.get(recipe, (w,))[0].sum() == 144
    assert w.untyped_storage().nbytes() == 4 and w.shape == (4, 4)
    assert STORE.get(recipe, (w,))[0].sum() == 144
    assert w.sum().isnan()
    with pytest.raises(RuntimeError):
        w.copy_(torch.ones(4, 4))
    assert STORE.get(recipe, (w,))[0].sum() == 144
    w.data = torch.ones(4, 4)
    assert STORE.get(recipe, (w,))[0].sum() == 16
    STORE.forget(w)
    with pytest.raises(RuntimeError, match="load the model again"):
        STORE.get(recipe, (w,))


def test_memory_is_given_up_under_inference_mode_too() -> None:
    recipe = Recipe("square", lambda w: (w * w,), drops=True)
    w = nn.Parameter(torch.full((4, 4), 3.0))
    with torch.inference_mode():
        for _ in range(3):
            assert STORE.get(recipe, (w,))[0].sum() == 144
    assert not w.is_inference() and w.isnan().all()
    with torch.no_grad():
        assert STORE.get(recipe, (w,))[0].sum() == 144


@torch.no_grad()
def test_what_is_no_parameter_is_prepared_in_the_graph() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w)

    step = torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    for _ in range(2):
        x, w = torch.randn(3, 8), torch.randn(8, 8)
        torch.testing.assert_close(step(x, w), function(x, w))
    assert len(runs) == 2 and STORE.bytes() == 0


@torch.no_grad()
def test_a_weight_that_the_graph_writes_is_prepared_in_the_graph() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            self.a.weight.mul_(0.5)
            return self.a(x)

    model, other, x = Writing(), Writing(), torch.randn(3, 8)
    other.load_state_dict(model.state_dict())
    step = compiled(model)
    for _ in range(3):
        torch.testing.assert_close(step(x), other(x))


@torch.no_grad()
def test_static_inputs_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared tensors are static inputs, or CUDA graphs would copy them at each step."""
    import torch._inductor.compile_fx as inductor

    seen: list[list[str]] = []
    original = inductor.compile_fx

    def inner(gm: GraphModule, inputs: list[Tensor], **given: Any) -> Callable[..., Any]:
        static = given["static_input_idxs"]
        seen.append([n.name for k, n in enumerate(gm.graph.find_nodes(op="placeholder")) if k not in static])
        return gm.forward

    def compile_fx(gm: GraphModule, inputs: list[Tensor], **given: Any) -> Any:
        return original(gm, inputs, inner_compile=inner, **{k: v for k, v in given.items() if v is not None})

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    model, x = Two(), torch.randn(3, 8)
    with sm12x_compile.collect() as report, torch._functorch.config.patch(enable_autograd_cache=False):
        torch.testing.assert_close(compiled(model, "inductor")(x), model(x))
    assert list(map(len, seen)) == [1], "x alone may move"
    assert [(w["weight"], w["bytes"]) for w in report.weights] == [("a.weight", 256), ("b.weight", 256)]
