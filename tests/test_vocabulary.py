"""Synonyms: one name each in the normal form, and the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sm12x_compile.normalize import normalize
from sm12x_compile.vocabulary import _RENAMED

aten = torch.ops.aten


def targets(gm: GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def normal_form(function: Callable[[Tensor], Tensor], x: Tensor) -> GraphModule:
    """The normal form, after checking that it computes the same."""
    normal = normalize(make_fx(function, pre_dispatch=True, tracing_mode="fake")(x))
    found, expected = normal(x), function(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    return normal


X = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.1

SYNONYMS: dict[str, tuple[Callable[[Tensor], Tensor], object]] = {
    "multiply": (lambda x: torch.multiply(x, x + 1), aten.mul.Tensor),
    "multiply by a number": (lambda x: torch.multiply(x, 2), aten.mul.Tensor),
    "divide": (lambda x: torch.divide(x, x + 1), aten.div.Tensor),
    "divide and round": (lambda x: torch.divide(x, 0.3, rounding_mode="floor"), aten.div.Tensor_mode),
    "true_divide": (lambda x: torch.true_divide(x, 3), aten.div.Tensor),
    "subtract": (lambda x: torch.subtract(x, x * x, alpha=3), aten.sub.Tensor),
    "negative": (torch.negative, aten.neg.default),
    "greater": (lambda x: torch.greater(x, 0.5), aten.gt.Scalar),
    "greater_equal": (lambda x: torch.greater_equal(x, x.mean()), aten.ge.Tensor),
    "less": (lambda x: torch.less(x, 0.5), aten.lt.Scalar),
    "less_equal": (lambda x: torch.less_equal(x, x.mean()), aten.le.Tensor),
    "not_equal": (lambda x: torch.not_equal(x, 1.0), aten.ne.Scalar),
    "concat": (lambda x: torch.concat([x, -x], 1), aten.cat.default),
    "concatenate": (lambda x: torch.concatenate([x, -x], dim=-1), aten.cat.default),
    "absolute": (lambda x: (x - 0.5).absolute(), aten.abs.default),
    "clip": (lambda x: x.clip(0.3, 0.6), aten.clamp.default),
    "clip from below": (lambda x: torch.clip(x, min=0.3), aten.clamp.default),
    "linalg.matmul": (lambda x: torch.linalg.matmul(x, x.mT), aten.matmul.default),
    "special.softmax": (lambda x: torch.special.softmax(x, 1, dtype=torch.float64), aten.softmax.int),
    "special.logsumexp": (lambda x: torch.special.logsumexp(x, -1, keepdim=True), aten.logsumexp.default),
    "special.log_softmax": (lambda x: torch.special.log_softmax(x, 0), aten.log_softmax.int),
    "type_as": (lambda x: x.type_as(torch.ones(1, dtype=torch.float64)), aten._to_copy.default),
    "tile": (lambda x: x.tile(2, 1), aten.repeat.default),
    "tile every dimension": (lambda x: x.tile(2, 1, 3), aten.repeat.default),
}  # fmt: skip


@pytest.mark.parametrize("name", SYNONYMS)
def test_one_name(name: str) -> None:
    function, target = SYNONYMS[name]
    before = make_fx(function, pre_dispatch=True, tracing_mode="fake")(X)
    assert target not in targets(before), "no synonym to begin with"
    found = targets(normal_form(function, X))
    assert found[-1] is target, found


@pytest.mark.parametrize(("old", "new"), _RENAMED.items(), ids=map(str, _RENAMED))
def test_synonyms_take_the_same_arguments(old: torch._ops.OpOverload, new: torch._ops.OpOverload) -> None:
    def arguments(op: torch._ops.OpOverload) -> list[tuple[str, str, str]]:
        return [(a.name, str(a.type), str(a.default_value)) for a in op._schema.arguments]

    assert arguments(old) == arguments(new)
    for a, b in zip(old._schema.arguments, new._schema.arguments, strict=True):
        assert a.kwarg_only or not b.kwarg_only, "given by position, taken by name"


def test_a_cast_to_the_same_dtype_is_nothing() -> None:
    assert targets(normal_form(lambda x: x.type_as(x * 2) + 1, X))[-1] is aten.add.Tensor
    assert aten._to_copy.default not in targets(normal_form(lambda x: x.type_as(x * 2) + 1, X))


def test_a_tile_with_more_dimensions_stays() -> None:
    assert targets(normal_form(lambda x: x.tile(2, 1, 1, 3), X)) == [aten.tile.default]


def test_other_ops_keep_their_names() -> None:
    def function(x: Tensor) -> Tensor:
        return (x.softmax(-1) @ x.mT).exp().clamp(max=5.0).sum(0)

    assert targets(normal_form(function, X)) == [
        aten.softmax.int, aten.transpose.int, aten.matmul.default, aten.exp.default, aten.clamp.default,
        aten.sum.dim_IntList,
    ]  # fmt: skip
