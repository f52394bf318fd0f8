"""Choosing a kernel: in order of merit, every No kept, for the card at hand and for one that is not there."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import sm12x_compile
from sm12x_compile import registry
from sm12x_compile.arch import CARDS
from sm12x_compile.lowering.select import REFERENCE, choose, floor, lower, plan
from sm12x_compile.match import GraphView
from sm12x_compile.normalize import normalize
from sm12x_compile.ops import OPS
from sm12x_compile.options import Options
from sm12x_compile.registry import YES, Call, No, register_kernel, register_pattern
from sm12x_compile.report import Site

CPU, CARD = CARDS["cpu"], CARDS["rtx5090"]
Q = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kernels that a test registers."""
    monkeypatch.setattr(registry, "_kernels", {})


@pytest.fixture(autouse=True)
def inference() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def call_of(*args: Any, **kwargs: Any) -> Call:
    bound = OPS["attention"].signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return Call("attention", dict(bound.arguments))


def stub(name: str, answer: Any, merit: int = 100, adds: float = 0.0) -> None:
    """A kernel that answers so; what it computes is v plus a number, so that it shows which one ran."""

    def accepts(call: Call, arch: Any) -> Any:
        return answer(call, arch) if callable(answer) else answer

    register_kernel("attention", name, accepts=accepts, inline=True, merit=merit)(lambda q, k, v, **rest: v + adds)


def chosen(call: Call, arch: Any = CPU, options: Options | None = None) -> tuple[str | None, list[tuple[str, str]]]:
    kernel, refused = choose(call, arch, options or Options())
    return (kernel.name if kernel else None), refused


# ------------------------------------------------------------------ who is asked


@pytest.mark.usefixtures("no_kernels")
def test_in_order_of_merit_and_every_no_is_kept() -> None:
    asked: list[str] = []

    def saying(name: str, verdict: Any) -> Any:
        return lambda call, arch: (asked.append(name), verdict)[1]

    stub("last", saying("last", YES), merit=1)
    stub("second", saying("second", No("too narrow")), merit=20)
    stub("third", saying("third", YES), merit=10)
    stub("first", saying("first", No("only on Sundays")), merit=30)
    assert chosen(call_of(Q, Q, Q, 1.0)) == ("third", [("first", "only on Sundays"), ("second", "too narrow")])
    assert asked == ["first", "second", "third"]


@pytest.mark.usefixtures("no_kernels")
def test_nobody_accepts() -> None:
    assert chosen(call_of(Q, Q, Q, 1.0)) == (None, [])
    stub("a", No("no"))
    assert chosen(call_of(Q, Q, Q, 1.0)) == (None, [("a", "no")])


@pytest.mark.usefixtures("no_kernels")
def test_the_option_kernels() -> None:
    for k, name in enumerate("abc"):
        stub(name, YES, merit=9 - k)
    call = call_of(Q, Q, Q, 1.0)
    left = "left out by the option 'kernels'"
    assert chosen(call) == ("a", [])
    assert chosen(call, options=Options.parse({"kernels": ["-a"]})) == ("b", [("a", left)])
    assert chosen(call, options=Options.parse({"kernels": ["c"]})) == ("c", [("a", left), ("b", left)])
    assert chosen(call, options=Options.parse({"kernels": ["other"]})) == (None, [(name, left) for name in "abc"])


def raising(call: Call, arch: Any) -> Any:
    return call.no_such_argument


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (raising, "its accepts() failed: AttributeError: attention has no argument 'no_such_argument'"),
        (lambda call, arch: 1 / 0, "its accepts() failed: ZeroDivisionError: division by zero"),
        (False, "declined"), (None, "declined"), (No("plainly"), "plainly"),
    ],
)  # fmt: skip
def test_accepts_that_raises_or_only_says_false(answer: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    stub("bad", answer, merit=9)
    stub("good", True, merit=1)  # a plain True is as good as YES
    with caplog.at_level(logging.WARNING, "sm12x_compile"):
        assert chosen(call_of(Q, Q, Q, 1.0)) == ("good", [("bad", reason)])
    assert [r.getMessage() for r in caplog.records] == (
        ["kernel bad failed to decide"] if reason.startswith("its") else []
    )


@pytest.mark.usefixtures("no_kernels")
def test_a_kernel_is_asked_about_the_card() -> None:
    stub("card", lambda call, arch: YES if arch.family == "sm12x" else No(f"not on {arch.name}"))
    assert chosen(call_of(Q, Q, Q, 1.0), CARD) == ("card", [])
    assert chosen(call_of(Q, Q, Q, 1.0), CPU) == (None, [("card", "not on cpu")])


# ------------------------------------------------------------------ in a graph


def graph_of(function: Any, *inputs: Tensor) -> GraphModule:
    return normalize(make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs))


def attention_call(q: Tensor, **rest: Any) -> Tensor:
    return torch.ops.sm12x.attention(q, q, q, 0.5, **rest)


def lowered(gm: GraphModule, options: Options | None = None, planned: Any = None) -> list[Site]:
    calls = [(Site("attention", "sm12x::attention", "", ""), n) for n in gm.graph.nodes
             if n.target is torch.ops.sm12x.attention.default]  # fmt: skip
    if planned is not None:
        plan(gm, calls, options or Options(), planned)
    lower(gm, [(replace(site, refused=[]), n) for site, n in calls] if planned else calls, options or Options(), CPU)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return [site for site, _ in calls]


def targets(gm: GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.usefixtures("no_kernels")
def test_the_reference_runs_where_nobody_accepts() -> None:
    stub("a", No("no"))
    gm = graph_of(attention_call, Q)
    (site,) = lowered(gm)
    assert (site.kernel, site.refused) == (REFERENCE, [("a", "no")]) and REFERENCE == "reference"
    assert targets(gm) == [torch.ops.sm12x.attention.default]
    torch.testing.assert_close(gm(Q), attention_call(Q))


@pytest.mark.usefixtures("no_kernels")
def test_inline_and_opaque_kernels() -> None:
    stub("inlined", YES, merit=9, adds=1.0)
    gm = graph_of(attention_call, Q)
    (site,) = lowered(gm)
    assert site.kernel == "inlined" and targets(gm)[0] is torch.ops.aten.add.Tensor
    torch.testing.assert_close(gm(Q), Q + 1)
    register_kernel("attention", "opaque", accepts=lambda call, arch: YES)(lambda q, k, v, scale, *rest: v + 2.0)
    gm = graph_of(attention_call, Q)
    (site,) = lowered(gm)
    assert site.kernel == "opaque"
    (target,) = targets(gm)
    assert target is registry.kernels("attention")[0].overload
    torch.testing.assert_close(gm(Q), Q + 2)


@pytest.mark.usefixtures("no_kernels")
def test_each_call_is_chosen_for_itself() -> None:
    stub("causal", lambda call, arch: YES if call.causal else No("only causal"), merit=9, adds=1.0)
    stub("any", YES, merit=1, adds=10.0)
    gm = graph_of(lambda q: attention_call(attention_call(q), causal=True), Q)
    first, second = lowered(gm)
    assert (first.kernel, first.refused) == ("any", [("causal", "only causal")])
    assert (second.kernel, second.refused) == ("causal", [])
    torch.testing.assert_close(gm(Q), Q + 11)


@pytest.mark.usefixtures("no_kernels")
def test_planned_for_a_card_that_is_not_there() -> None:
    """The report is about the card; the graph gets what runs here."""
    stub("card", lambda call, arch: YES if arch.is_cuda else No("needs a GPU"), merit=9, adds=1.0)
    stub("here", lambda call, arch: No("not on a GPU") if arch.is_cuda else YES, merit=20, adds=10.0)
    gm = graph_of(attention_call, Q)
    (site,) = lowered(gm, planned=CARD)
    assert (site.kernel, site.refused) == ("card", [("here", "not on a GPU")])
    torch.testing.assert_close(gm(Q), Q + 10)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    far = (i[:, None] < i) | (i[:, None] - i >= 3)
    return (q @ k.mT * 0.5).masked_fill(far, torch.finfo(q.dtype).min).softmax(-1) @ v


@pytest.mark.parametrize("card", ["rtx5090", "gb10", "sm120", "h200"])
def test_explaining_for_a_card_on_a_cpu(card: str) -> None:
    inputs = tuple(torch.randn(1, 2, 20, 16) for _ in range(3))
    step = torch.compile(windowed, backend=sm12x_compile.sm12x, options={"codegen": "eager", "arch": card})
    with sm12x_compile.collect() as report:
        torch.testing.assert_close(step(*inputs), windowed(*inputs))
    (site,) = report.sites
    assert report.planned and report.arch == {"sm120": "rtx5090"}.get(card, card)
    assert site.kernel == "triton.prefill"
    assert [name for name, _ in site.refused] == ["torch.sdpa", "triton.decode"]
    here = sm12x_compile.explain(windowed, *inputs)
    assert not here.planned and here.sites[0].kernel == "torch.sdpa.masked"
    assert site.floor is not None and here.sites[0].floor is not None
    assert site.floor.microseconds < here.sites[0].floor.microseconds


def test_patterns_of_ones_own_may_call_any_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_patterns", {})

    @register_pattern("silu_by_hand", anchors=[torch.ops.aten.sigmoid.default])
    def silu_by_hand(anchor: Any, graph: GraphView) -> Any:
        (product,) = anchor.users
        with graph.graph.inserting_before(product):
            call = graph.call(torch.ops.aten.silu.default, anchor.args[0])
        return sm12x_compile.Rewrite(product, call, call)

    report = sm12x_compile.explain(lambda x: x * x.sigmoid() + 1, torch.randn(4))
    (site,) = report.sites
    assert (site.op, site.kernel, site.floor, site.refused) == ("aten::silu", "aten::silu", None, [])


# ------------------------------------------------------------------ floors


def test_floors_by_hand() -> None:
    """bytes = what q, k, v and the result take; FLOPs = 2 a product, twice; the slower of the two."""
    k, v = torch.randn(2, 2, 1024, 128, dtype=torch.bfloat16), torch.randn(2, 2, 1024, 64, dtype=torch.bfloat16)
    for queries, bound in ((64, "flops"), (1, "bytes")):
        q = torch.randn(2, 8, queries, 128, dtype=torch.bfloat16)
        found = floor(call_of(q, k, v, 1.0), CARD)
        assert found is not None
        moved = 2 * (2 * 8 * queries * 128 + 2 * 8 * queries * 64 + 2 * 2 * 1024 * 128 + 2 * 2 * 1024 * 64)
        flops = 2 * (2 * 8 * queries * 1024 * 128) + 2 * (2 * 8 * queries * 1024 * 64)
        assert (found.bytes, found.flops) == (moved, flops)
        seconds = {"bytes": moved / 1792e9, "flops": flops / 209.5e12}
        assert max(seconds, key=lambda k: seconds[k]) == bound
        assert found.microseconds == pytest.approx(1e6 * seconds[bound])


def test_floors_of_masks() -> None:
    def flops(length: int, queries: int, **mask: Any) -> float:
        q, k = torch.zeros(1, 1, queries, 8), torch.zeros(1, 1, length, 8)
        found = floor(call_of(q, k, k, 1.0, **mask), CARD)
        assert found is not None
        return found.flops / (2 * queries * 16)  # keys a query, on average

    assert flops(100, 100) == 100
    assert flops(100, 100, causal=True) == 50.5
    assert flops(100, 4, causal=True, q_shift=96) == 98.5
    assert flops(100, 100, causal=True, window_left=7) == 8
    assert flops(100, 100, window_left=7, window_right=2) == 10
    assert flops(100, 1, causal=True, q_shift=99) == 100
    # One query with a window reads no more keys than the window holds.
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 100, 8)
    found = floor(call_of(q, k, k, 1.0, causal=True, q_shift=99, window_left=9), CARD)
    assert found is not None and found.bytes == 4 * (8 + 8 + 10 * 16)


def test_floors_of_symbolic_sizes_use_their_hints() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = torch.zeros(1, 2, 37, 8)
    kinds = [DimDynamic.DYNAMIC if n == 37 else DimDynamic.STATIC for n in x.shape]
    context: Any = StatelessSymbolicContext(kinds)
    fake = mode.from_tensor(x, symbolic_context=context)
    assert isinstance(fake.shape[2], torch.SymInt)
    assert floor(call_of(fake, fake, fake, 1.0), CARD) == floor(call_of(x, x, x, 1.0), CARD)
    assert floor(call_of(fake, fake, fake, 1.0, causal=True, q_shift=fake.shape[2]), CARD) == floor(
        call_of(x, x, x, 1.0, causal=True, q_shift=37), CARD
    )


def test_no_floor() -> None:
    call = call_of(Q, Q, Q, 1.0)
    assert floor(call, replace(CARD, bandwidth=0.0)) is None
    without = next((name for name, op in OPS.items() if op.cost is None), None)
    if without is not None:
        assert floor(Call(without, {}), CARD) is None
