"""Kernels traced into the graph: what calls share, what they must not share, and sizes that the run decides."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import sm12x_compile
from sm12x_compile import registry
from sm12x_compile.arch import CARDS
from sm12x_compile.lowering.select import lower
from sm12x_compile.lowering.splice import Splicer
from sm12x_compile.normalize import normalize
from sm12x_compile.options import Options
from sm12x_compile.pipeline import clean
from sm12x_compile.registry import YES, register_kernel
from sm12x_compile.report import Site

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def attention(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    return torch.ops.sm12x.attention(q, k, v, 0.5, **rest)


def heads(length: int = 6) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 2, length, 4, generator=torch.Generator().manual_seed(k)) for k in range(3))


def spliced(function: Any, *inputs: Tensor, backwards: bool = False) -> GraphModule:
    """The normal form with every attention lowered for the CPU."""
    gm = normalize(make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs))
    calls = [(Site("attention", "sm12x::attention", "", ""), n) for n in gm.graph.nodes
             if n.target is torch.ops.sm12x.attention.default]  # fmt: skip
    lower(gm, calls[::-1] if backwards else calls, Options(), CARDS["cpu"])
    clean(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def count(gm: GraphModule, target: Any) -> int:
    return sum(n.target is target for n in gm.graph.nodes)


def only(run: Any) -> list[int]:
    """The one kernel of attention from now on; the list gets an entry each time that it is called."""
    runs: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return run(*args, **kwargs)

    registry._kernels["attention"] = []
    register_kernel("attention", "only", accepts=lambda call, arch: YES, inline=True)(counted)
    return runs


def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = {"causal": True, "window_left": 2}
    return attention(attention(q, k, v, **mask), k * 2, v * 3, **mask)


@pytest.mark.parametrize("backwards", [False, True])
def test_layers_share_their_mask(backwards: bool) -> None:
    """One mask for all layers, however the calls are listed; what depends on q, k and v is each layer's own."""
    one = spliced(lambda q, k, v: attention(q, k, v, causal=True, window_left=2), *heads())
    two = spliced(two_layers, *heads(), backwards=backwards)
    assert count(two, aten.arange.default) == count(one, aten.arange.default) > 0
    assert count(two, aten.le.Tensor) == count(one, aten.le.Tensor) > 0
    assert count(two, aten.scaled_dot_product_attention.default) == 2
    torch.testing.assert_close(two(*heads()), two_layers(*heads()))
    assert torch.ops.sm12x.attention.default not in {n.target for n in two.graph.nodes}


def test_masks_that_differ_are_not_shared() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(attention(q, k, v, window_left=1), k, v, window_left=2)

    torch.testing.assert_close(spliced(function, *heads())(*heads()), function(*heads()))


def test_equal_calls_are_traced_once() -> None:
    runs = only(lambda q, k, v, scale, **rest: q * scale + v)
    gm = spliced(two_layers, *heads())
    assert len(runs) == 1
    torch.testing.assert_close(gm(*heads()), (heads()[0] * 0.5 + heads()[2]) * 0.5 + heads()[2] * 3)
    runs = only(lambda q, k, v, scale, causal, **rest: q * scale + v if causal else v)

    def three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v) + attention(q, k, v, causal=True) + attention(q[:1], k[:1], v[:1])

    spliced(three, *heads())
    assert len(runs) == 3
    runs = only(lambda q, k, v, scale, **rest: v)
    spliced(lambda q, k, v: attention(q, k, v) + attention(q, k.mT.contiguous().mT, v), *heads())
    assert len(runs) == 2, "other strides are another trace"


@pytest.mark.parametrize("kernel", ["torch.sdpa", "aten", "torch.sdpa.masked"])
def test_results_of_equal_calls_share_no_memory(kernel: str) -> None:
    """A user may write to one of them."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, causal=True), attention(q, k, v, causal=True)

    registry._kernels["attention"] = [k for k in registry.kernels("attention") if k.name == kernel]
    first, second = spliced(function, *heads())(*heads())
    kept = second.clone()
    first.zero_()
    torch.testing.assert_close(second, kept)
    torch.testing.assert_close(second, attention(*heads(), causal=True))


def test_buffers_that_a_kernel_writes_are_not_shared() -> None:
    def written(q: Tensor, k: Tensor, v: Tensor, scale: float, **rest: Any) -> Tensor:
        out = torch.zeros(q.shape, dtype=q.dtype)
        out[:, :, 1:].copy_(v[:, :, 1:])
        return out.add_(scale)

    only(written)
    inputs = heads()
    expected = [written(inputs[0], inputs[1], v, 0.5) for v in inputs]
    found = spliced(lambda q, k, v: (attention(q, k, q), attention(q, k, k), attention(q, k, v)), *inputs)(*inputs)
    torch.testing.assert_close(list(found), expected)


def test_random_numbers_are_not_shared() -> None:
    only(lambda q, k, v, scale, **rest: v + torch.rand(v.shape[2], 1))
    torch.manual_seed(0)
    expected = [heads()[2] + torch.rand(6, 1) for _ in range(2)]
    gm = spliced(lambda q, k, v: (attention(q, k, v), attention(q, k, v)), *heads())
    torch.manual_seed(0)
    torch.testing.assert_close(list(gm(*heads())), expected)


def test_constants_of_a_kernel() -> None:
    """A tensor written in a kernel's code becomes an attribute of the graph; each trace has its own."""

    def constants(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, **rest: Any) -> Tensor:
        return v * torch.tensor([1.0, 2.0, 3.0, 4.0] if causal else [5.0, 6.0, 7.0, 8.0])

    only(constants)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v) + attention(q, k, v, causal=True) * attention(q, k, k) + attention(q, k, q)

    q, k, v = heads()
    ones, others = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])
    gm = spliced(function, q, k, v)
    torch.testing.assert_close(gm(q, k, v), v * others + v * ones * (k * others) + q * others)


def test_constants_of_a_kernel_through_inductor() -> None:
    def constants(q: Tensor, k: Tensor, v: Tensor, scale: float, **rest: Any) -> Tensor:
        return v * torch.tensor([1.0, 2.0, 3.0, 4.0])

    only(constants)
    with warnings.catch_warnings(), sm12x_compile.collect() as report:
        warnings.filterwarnings("error", message=".*get_attr.*")
        step = torch.compile(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, backend=sm12x_compile.sm12x)
        found = step(*heads())
    torch.testing.assert_close(found, heads()[2] * torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert report.count("attention") == 1 and report.warnings == []


def test_results_in_other_strides() -> None:
    """A kernel may lay its result out as it likes: the reader's view becomes a reshape, the user gets his strides."""
    only(lambda q, k, v, scale, **rest: (v + 1).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = attention(q, k, v)
        return out, out.transpose(1, 2).flatten(2) @ torch.ones(8, 3)

    inputs = heads()
    found, product = spliced(function, *inputs)(*inputs)
    torch.testing.assert_close(found, inputs[2] + 1)
    torch.testing.assert_close(product, (inputs[2] + 1).transpose(1, 2).flatten(2) @ torch.ones(8, 3))
    assert found.stride() == attention(*inputs).stride()


def test_sizes_that_the_run_decides() -> None:
    """A mask spelled out for symbolic lengths is right for lengths that were never traced."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        far = (i[:, None] < i) | (i[:, None] - i >= 3)
        out = (q @ k.mT * 0.5).masked_fill(far, float("-inf")).softmax(-1) @ v
        return (out @ k.mT * 0.5).masked_fill(far, float("-inf")).softmax(-1) @ v

    step = torch.compile(
        function, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, dynamic=True, fullgraph=True
    )
    with sm12x_compile.collect() as report:
        for length in (6, 9, 2, 31):
            inputs = tuple(torch.randn(3, 2, length, 4) for _ in range(3))
            torch.testing.assert_close(step(*inputs), function(*inputs))
    assert report.graphs == 1
    assert [s.kernel for s in report.rewritten] == ["torch.sdpa.masked"] * 2


def test_the_call_is_gone_and_its_place_is_kept() -> None:
    gm = normalize(make_fx(lambda q, k, v: attention(q, k, v) + 1, pre_dispatch=True, tracing_mode="fake")(*heads()))
    (call,) = (n for n in gm.graph.nodes if n.target is torch.ops.sm12x.attention.default)
    kernel = next(k for k in registry.kernels("attention") if k.name == "torch.sdpa")
    Splicer(gm).inline(call, kernel)
    gm.graph.lint()
    names: list[Node] = list(gm.graph.nodes)
    assert call not in names
    for node in names:
        if node.op == "call_function":
            assert isinstance(node.meta["val"], Tensor), node
