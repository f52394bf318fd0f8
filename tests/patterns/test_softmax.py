"""Where a softmax is summed with values: one `WeightedSum` for every way of writing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from sm12x_compile.index_algebra import Element, Index, look
from sm12x_compile.match import Refusal
from sm12x_compile.normalize import normalize
from sm12x_compile.patterns.softmax import WeightedSum, find_weighted_sum, fresh_index, strip

aten = torch.ops.aten
ANCHORS = (aten.softmax.int, aten._safe_softmax.default, aten.exp.default)

X = torch.randn(2, 3, 5, 7)  # scores
V = torch.randn(2, 3, 7, 4)


def anchors(function: Callable[..., Any], *inputs: Tensor) -> list[Node]:
    gm = normalize(make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs))
    return [n for n in gm.graph.nodes if n.target in ANCHORS]


def find(function: Callable[..., Any], *inputs: Tensor) -> WeightedSum | Refusal | None:
    """What is found at the first anchor."""
    return find_weighted_sum(anchors(function, *inputs)[0])


def found(function: Callable[..., Any], *inputs: Tensor) -> WeightedSum:
    result = find(function, *inputs)
    assert isinstance(result, WeightedSum), result
    return result


def placeholder(element: Element, number: int) -> bool:
    nodes = element.node.graph.find_nodes(op="placeholder")
    return element.node is nodes[number]


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda x, v: x.softmax(-1) @ v,
    "softmax(dim=3)": lambda x, v: F.softmax(x, dim=3) @ v,
    "nn.Softmax": lambda x, v: torch.nn.Softmax(-1)(x) @ v,
    "einsum": lambda x, v: torch.einsum("bhst,bhtd->bhsd", x.softmax(-1), v),
    "einsum, values first": lambda x, v: torch.einsum("bhtd,bhst->bhsd", v, x.softmax(-1)),
    "bmm": lambda x, v: torch.bmm(x.softmax(-1).flatten(0, 1), v.flatten(0, 1)).unflatten(0, (2, 3)),
    "multiplied and summed": lambda x, v: (x.softmax(-1)[..., None] * v[:, :, None]).sum(-2),
    "summed the other way": lambda x, v: (v[:, :, None] * x.softmax(-1).unsqueeze(-1)).sum(3),
    "transposed twice": lambda x, v: (v.mT @ x.mT.softmax(-2)).mT,
    "cast and back": lambda x, v: x.softmax(-1, dtype=torch.float64).to(v.dtype) @ v,
    "dropout in eval": lambda x, v: F.dropout(x.softmax(-1), 0.1, training=False) @ v,
    "dropout of nothing": lambda x, v: F.dropout(x.softmax(-1), 0.0, training=True) @ v,
    "a view between": lambda x, v: x.softmax(-1).flatten(0, 1).contiguous().unflatten(0, (2, 3)) @ v,
}
BY_HAND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divided": lambda x, v: (x.exp() / x.exp().sum(-1, keepdim=True)) @ v,
    "divided after": lambda x, v: (lambda e: (e @ v) / e.sum(-1, keepdim=True))(x.exp()),
    "divided, unsqueezed": lambda x, v: (lambda e: (e / e.sum(-1)[..., None]) @ v)(x.exp()),
    "divided before": lambda x, v: (lambda e: (e / e.sum(-1, keepdim=True)) @ v)(x.exp()),
    "exp of log_softmax": lambda x, v: x.log_softmax(-1).exp() @ v,
    "exp of x - logsumexp": lambda x, v: (x - x.logsumexp(-1, keepdim=True)).exp() @ v,
}


@pytest.mark.parametrize("name", WAYS)
def test_one_weighted_sum(name: str) -> None:
    result = found(WAYS[name], X, V)
    assert (result.form, result.stable, result.sinks) == ("softmax", True, ())
    assert result.key.extent == 7
    assert result.dtype == (torch.float64 if name == "cast and back" else None)
    scores, value = look(result.scores), look(result.value)
    assert placeholder(scores, 0) and placeholder(value, 1)
    key = Index.of(result.key)
    assert scores.index[3] == key and value.index[2] == key
    assert scores.index[:2] == value.index[:2]
    # The result runs over the rows of the scores and the features of the values.
    running = {v for ix in result.out for v in ix.vars()}
    assert scores.vars() | value.vars() == running | {result.key}


@pytest.mark.parametrize("name", [n for n in BY_HAND if n != "divided"])
def test_one_weighted_sum_by_hand(name: str) -> None:
    result = found(BY_HAND[name], X, V)
    assert (result.form, result.sinks, result.key.extent) == ("exp", (), 7)
    assert result.stable == ("log_softmax" in name)
    scores = look(result.scores)
    key = Index.of(result.key)
    assert scores.index[3] == key and look(result.value).index[2] == key
    if "logsumexp" in name:  # what is subtracted is read with the scores
        assert scores.node.target is aten.sub.Tensor
    else:
        assert placeholder(scores, 0)


def test_exponentials_computed_twice_are_not_the_same() -> None:
    """The denominator must be the sum of the very node; nobody proves that two are equal."""
    result = find(BY_HAND["divided"], X, V)
    assert isinstance(result, Refusal) and "sums something else" in result.reason


def test_values_of_any_rank() -> None:
    assert found(lambda x, v: x.softmax(-1) @ v, X, V[0, 0]).key.extent == 7
    result = found(lambda x, v: x.softmax(-1) @ v, X[0, 0, 0], V[0, 0])
    assert (result.rows, len(result.out)) == (None, 1)
    result = found(lambda x, v: x.softmax(0) @ v, X[0, 0, 0], V[0, 0, :, 0])
    assert result.out == () and result.key.extent == 7


def test_the_rows_are_the_dimension_before() -> None:
    result = found(lambda x, v: x.softmax(-1) @ v, X, V)
    assert result.rows == result.out[2]
    one = found(lambda x, v: x.softmax(-1) @ v, X[:, :, :1], V)
    assert one.rows == Index() and one.out[2] == Index()


# ------------------------------------------------------------------ columns without values


@pytest.mark.parametrize("first", [False, True])
def test_a_column_without_value(first: bool) -> None:
    def function(x: Tensor, v: Tensor, z: Tensor) -> Tensor:
        z = z[None, :, None, None].expand(2, 3, 5, 1)
        x = torch.cat([z, x] if first else [x, z], -1)
        return x.softmax(-1)[..., slice(1, None) if first else slice(-1)] @ v

    result = found(function, X, V, torch.zeros(3))
    (sink,) = map(look, result.sinks)
    assert placeholder(sink, 2) and sink.index == (result.out[1],)
    assert placeholder(look(result.scores), 0) and look(result.scores).index[3] == Index.of(result.key)
    assert result.key.extent == 7


def test_a_column_in_the_denominator() -> None:
    def function(x: Tensor, v: Tensor, z: Tensor) -> Tensor:
        e = x.exp()
        return (e / (z[:, None, None].exp() + e.sum(-1, keepdim=True))) @ v

    result = found(function, X, V, torch.zeros(3))
    (sink,) = map(look, result.sinks)
    assert placeholder(sink, 2) and sink.index == (result.out[1],)


def test_columns_that_are_more_than_one() -> None:
    def function(x: Tensor, v: Tensor) -> Tensor:
        return x.softmax(-1)[..., :-2] @ v

    result = find(function, torch.randn(2, 3, 5, 9), V)
    assert isinstance(result, Refusal) and "dropped" in result.reason

    def middle(x: Tensor, v: Tensor) -> Tensor:
        return x.softmax(-1)[..., 1:-1] @ v

    result = find(middle, torch.randn(2, 3, 5, 9), V)
    assert isinstance(result, Refusal)


# ------------------------------------------------------------------ no weighted sum


@pytest.mark.parametrize(
    "function",
    [
        lambda x, v: x.exp(),
        lambda x, v: x.exp() @ v,
        lambda x, v: x.exp() / x.sum(),
        lambda x, v: (x.exp() * 2) @ v,
        lambda x, v: x.exp() / (1 + x.exp()),
        lambda x, v: (lambda e: (e / e.mean(-1, keepdim=True)) @ v)(x.exp()),
        lambda x, v: (lambda e: e.sum(-1, keepdim=True) / e)(x.exp()),
        lambda x, v: (x - x.logsumexp(-1)[..., None]).exp() @ v,
        lambda x, v: (x - (x * 2).logsumexp(-1, keepdim=True)).exp() @ v,
        lambda x, v: torch.sub(x, x.logsumexp(-1, keepdim=True), alpha=2).exp() @ v,
        lambda x, v: (x - x.logsumexp((-1, -2), keepdim=True)).exp() @ v,
    ],
)
def test_an_exponential_that_is_no_softmax(function: Callable[..., Any]) -> None:
    assert find(function, X, V) is None


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, v: x.softmax(-1), "leave the graph"),
        (lambda x, v: x.softmax(-1) * 2, "mul.Tensor stands between"),
        (lambda x, v: x.softmax(-1) @ v + x.softmax(-1).sum(), None),
        (lambda x, v: (lambda p: p @ v + p.sum())(x.softmax(-1)), "read elsewhere"),
        (lambda x, v: F.dropout(x.softmax(-1), 0.5, training=True) @ v, "dropout is active"),
        (lambda x, v: x.softmax(-1).topk(3, -1).values.sum(), "topk.default stands between"),
        (lambda x, v: x.softmax(-2) @ v, "not summed along the softmax dimension"),
        (lambda x, v: x.softmax(-1).int().float() @ v, "does not reach the product unchanged"),
        (lambda x, v: x.softmax(-1).bool().float() @ v, "does not reach the product unchanged"),
    ],
)
def test_a_softmax_whose_weights_do_not_arrive(function: Callable[..., Any], why: str | None) -> None:
    result = find(function, X, V)
    if why is None:
        assert isinstance(result, WeightedSum)
    else:
        assert isinstance(result, Refusal) and why in result.reason, result


# ------------------------------------------------------------------ small parts


def test_fresh_index() -> None:
    (anchor,) = anchors(lambda x: x.softmax(-1), torch.randn(2, 1, 3))
    a, b, c = fresh_index(anchor)
    assert b == Index() and a.var is not None and c.var is not None and a.var is not c.var
    assert (a.var.extent, c.var.extent) == (2, 3)


def test_strip() -> None:
    def function(x: Tensor) -> Tensor:
        y = F.dropout(x.transpose(1, 2).double(), 0.3, training=False).bfloat16().transpose(1, 2)
        return y.int().softmax(-1, dtype=torch.float32)

    (anchor,) = anchors(function, X)
    index = fresh_index(anchor)
    integers = strip(Element(anchor.args[0], index))  # type: ignore[arg-type]
    assert isinstance(integers, Element)
    assert integers.node.meta["val"].dtype == torch.int32, "stops where numbers change"
    rounded = strip(Element(integers.node.args[0], integers.index))  # type: ignore[arg-type]
    assert isinstance(rounded, Element) and placeholder(rounded, 0) and rounded.index == index
