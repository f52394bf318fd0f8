"""From the normal form to kernels on one graph: who is asked, what is said about a site, what is cleaned away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import sm12x_compile
from sm12x_compile import GraphView, Refusal, Rewrite, register_pattern, registry
from sm12x_compile.normalize import normalize
from sm12x_compile.options import Options
from sm12x_compile.pipeline import clean, device_of, recognise, transform
from sm12x_compile.report import Report

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def no_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_patterns", {})


def traced(function: Any, *inputs: Tensor) -> GraphModule:
    return make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)


def normal_form(function: Any, *inputs: Tensor) -> GraphModule:
    return normalize(traced(function, *inputs))


def targets(gm: GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def heads() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(k)) for k in range(3))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))


# ------------------------------------------------------------------ patterns are asked


def answering(log: list[str], name: str, answer: Any) -> Any:
    def pattern(anchor: Node, graph: GraphView) -> Any:
        log.append(f"{name} {anchor.name}")
        return answer(anchor, graph) if callable(answer) else answer

    return pattern


def sine_for_cosine(anchor: Node, graph: GraphView) -> Rewrite:
    """A rewrite that shows in the numbers."""
    with graph.graph.inserting_before(anchor):
        call = graph.call(aten.sin.default, anchor.args[0])
    return Rewrite(anchor, call, call, {"kind": "test"})


@pytest.mark.usefixtures("no_patterns")
def test_who_is_asked_in_which_order() -> None:
    log: list[str] = []
    register_pattern("low", anchors=[aten.cos.default], merit=1)(answering(log, "low", None))
    register_pattern("high", anchors=[aten.cos.default, aten.exp.default], merit=9)(answering(log, "high", None))
    register_pattern("other", anchors=[aten.tanh.default])(answering(log, "other", None))
    normal = normal_form(lambda x: x.cos().exp().cos(), X)
    before = targets(normal)
    assert recognise(normal, Options()) == []
    assert log == ["high cos", "high exp", "high cos_1", "low cos", "low cos_1"]
    assert targets(normal) == before
    log.clear()
    recognise(normal, Options(patterns=("low",)))
    assert log == ["low cos", "low cos_1"]
    log.clear()
    recognise(normal, Options(patterns=("-high",)))
    assert log == ["low cos", "low cos_1"]


@pytest.mark.usefixtures("no_patterns")
def test_what_one_pattern_took_another_does_not_see() -> None:
    log: list[str] = []
    register_pattern("first", anchors=[aten.cos.default], merit=9)(sine_for_cosine)
    register_pattern("second", anchors=[aten.cos.default, aten.sin.default], merit=1)(answering(log, "second", None))
    normal = normal_form(lambda x: x.cos() + 1, X)
    ((site, call),) = recognise(normal, Options())
    assert log == ["second sin_default"]
    assert targets(normal) == [aten.sin.default, aten.add.Tensor]
    normal.recompile()
    torch.testing.assert_close(normal(X), X.sin() + 1)
    assert call is not None and (site.pattern, site.op, site.status) == ("first", "aten::sin", "rewritten")
    assert site.tags == {"kind": "test"}


@pytest.mark.usefixtures("no_patterns")
def test_nodes_that_nobody_reads_are_no_anchors() -> None:
    log: list[str] = []
    register_pattern("p", anchors=[aten.cos.default])(answering(log, "p", None))
    recognise(normal_form(lambda x: (x.cos(), x + 1)[1], X), Options())
    assert log == []


@pytest.mark.usefixtures("no_patterns")
def test_litter_is_removed() -> None:
    def litter(anchor: Node, graph: GraphView) -> Refusal:
        with graph.graph.inserting_before(anchor):
            graph.call(aten.exp.default, graph.call(aten.neg.default, anchor.args[0]))
        return Refusal("only looking around here", anchor)

    register_pattern("litter", anchors=[aten.cos.default])(litter)
    normal = normal_form(lambda x: x.cos(), X)
    nodes = list(normal.graph.nodes)
    ((site, call),) = recognise(normal, Options())
    assert list(normal.graph.nodes) == nodes
    assert call is None and site.reason == "only looking around here"


@pytest.mark.usefixtures("no_patterns")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda anchor, graph: 1 / 0, "the pattern itself failed (ZeroDivisionError: division by zero); please report"),
        (lambda anchor, graph: 42, "the pattern itself failed (TypeError: a pattern answers with Rewrite, Refusal or "),
    ],
)
def test_bugs_of_patterns_are_near_misses(answer: Any, reason: str) -> None:
    register_pattern("buggy", anchors=[aten.cos.default])(answer)
    normal = normal_form(lambda x: x.cos(), X)
    ((site, call),) = recognise(normal, Options())
    assert call is None and site.status == "near-miss" and (site.reason or "").startswith(reason)
    normal.recompile()
    torch.testing.assert_close(normal(X), X.cos())


def test_where_a_site_stands() -> None:
    """The module's path and the user's line, for rewritten sites and for near-misses."""

    class Attention(nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.power = power

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = (q @ k.mT).softmax(-1)
            return weights.pow(self.power) @ v if self.power != 1 else weights @ v

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Attention(1.0), Attention(2.0)])

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for layer in self.layers:
                q = layer(q, k, v)
            return q

    report = sm12x_compile.explain(Model(), *heads())
    good, missed = report.sites
    assert (good.module, missed.module) == ("layers.0", "layers.1")
    line = Attention.forward.__code__.co_firstlineno
    assert good.source == f"{__file__}:{line + 1}" and missed.source == f"{__file__}:{line + 2}"
    assert (good.status, missed.status) == ("rewritten", "near-miss")
    assert good.op == "sm12x::attention" and missed.op is None
    assert good.kernel == "torch.sdpa" and missed.kernel is None
    assert missed.reason == "pow.Tensor_Scalar stands between softmax and values"


def test_the_call_keeps_module_and_line() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    found: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: list[Tensor]) -> Any:
        normal = normalize(gm)
        recognise(normal, Options())
        found.append(normal)
        return gm.forward

    model = Attention()
    torch.compile(lambda q, k, v: model(q, k, v), backend=backend)(*heads())
    (call,) = (n for n in found[0].graph.nodes if n.target is torch.ops.sm12x.attention.default)
    assert list(call.meta["nn_module_stack"].values())[-1][1] is Attention
    assert "softmax(-1)" in call.meta["stack_trace"]


# ------------------------------------------------------------------ one graph


def test_transform() -> None:
    gm = traced(lambda q, k, v: attend(attend(q, k, v), k, v), *heads())
    nodes = [n.format_node() for n in gm.graph.nodes]
    report = Report()
    result = transform(gm, Options(), report)
    assert [s.kernel for s in result.sites] == ["torch.sdpa", "torch.sdpa"]
    assert list(report.seconds) == ["normalize", "match", "lower"]
    found = targets(result.graph)
    assert found.count(aten.scaled_dot_product_attention.default) == 2
    assert not {aten.softmax.int, aten.matmul.default, torch.ops.sm12x.attention.default} & set(found)
    torch.testing.assert_close(result.graph(*heads()), attend(attend(*heads()), *heads()[1:]))
    assert [n.format_node() for n in gm.graph.nodes] == nodes, "Dynamo's graph is not touched"


def test_transform_of_nothing() -> None:
    result = transform(traced(lambda x: x.relu() + 1, X), Options(), Report())
    assert result.sites == []
    torch.testing.assert_close(result.graph(X), X.relu() + 1)


# ------------------------------------------------------------------ cleaning


def cleaned(function: Any, *inputs: Tensor) -> list[object]:
    normal = normal_form(function, *inputs)
    clean(normal)
    return targets(normal)


def test_what_nothing_reads_goes() -> None:
    def function(x: Tensor) -> Tensor:
        (x * 2).exp()
        x.softmax(-1) @ x.mT
        F.dropout(x, 0.0, training=True)
        F.dropout(x, 0.5, training=False)
        F.scaled_dot_product_attention(x[None], x[None], x[None])
        return x + 1

    assert cleaned(function, X) == [aten.add.Tensor]


@pytest.mark.parametrize(
    ("effect", "target"),
    [
        (lambda x: torch.rand_like(x), aten.rand_like.default),
        (lambda x: torch.randn(3), aten.randn.default),
        (lambda x: torch.bernoulli(x.sigmoid()), aten.bernoulli.default),
        (lambda x: F.dropout(x, 0.5, training=True), aten.dropout.default),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.3),
         aten.scaled_dot_product_attention.default),
        (lambda x: x.zero_(), aten.copy_.default),
    ],
)  # fmt: skip
def test_effects_stay(effect: Any, target: object) -> None:
    """Writes to inputs, and random numbers that nobody uses: the next ones would be others."""

    def function(x: Tensor) -> Tensor:
        y = x + 1
        effect(x)
        return y

    assert target in cleaned(function, X.clone())


def test_random_numbers_behind_a_rewrite_are_the_same() -> None:
    """What a rewrite makes useless must not take random numbers with it."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        torch.rand(7)
        out = attend(q, k, v)
        F.dropout(q @ k.mT, 0.5, training=True)
        return out, torch.rand(3)

    torch.manual_seed(0)
    expected = function(*heads())
    torch.manual_seed(0)
    found = torch.compile(function, backend=sm12x_compile.sm12x, options={"codegen": "eager"})(*heads())
    torch.testing.assert_close(found, expected)


def test_the_device() -> None:
    gm = traced(lambda x: x + 1, X)
    assert device_of(gm) == torch.device("cpu")
    (x,) = gm.graph.find_nodes(op="placeholder")
    with x.meta["val"].fake_mode:
        x.meta["val"] = torch.empty(3, device="meta")
        assert device_of(gm) == torch.device("cpu"), "anything but a GPU is as good as a CPU"
