"""Linear layers on MXFP4 weights, in any spelling of the product → ``sm12x::mxfp4_linear``.

    y[.., n] = bias[n] + sum over k of x[.., k] * W[n, k]        W as `dequantise.py` says

Anchors are products. What is summed over must be the dimension along which codes share a scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Apply, Element, Expr, Index, Reduce, Var, look, step
from sm12x_compile.index_algebra.expr import shape_of
from sm12x_compile.index_algebra.index import flatten
from sm12x_compile.match import CannotArrange, GraphView, Refusal, Rewrite, refine, source
from sm12x_compile.registry import register_pattern

from .dequantise import EITHER, TAGS, WEIGHT

aten = torch.ops.aten
ANCHORS = [
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.mv.default, aten.bmm.default,
    aten.addmm.default, aten.einsum.default, aten.inner.default, aten.tensordot.default,
]  # fmt: skip


@register_pattern("mxfp4_linear", anchors=ANCHORS, merit=0, packed=True)
def mxfp4_linear(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
    """Recognise a product of activations and a packed weight."""
    if not graph.graph.find_nodes(op="call_function", target=EITHER):
        return None
    if not any(_leads_to_packed(n) for n in anchor.all_input_nodes):
        return None
    shape = shape_of(anchor)
    dims = tuple(Var("bstuvw"[k % 6], s) for k, s in enumerate(shape))
    index = tuple(Index() if s == 1 else Index.of(v) for v, s in zip(dims, shape, strict=True))
    total, bias = _terms(step(Element(anchor, index)))
    if total is None or not isinstance(total.body, Apply) or total.body.op != "mul":
        return None
    factors = [look(a) if isinstance(a, Element) else None for a in total.body.args]
    packed = [k for k, f in enumerate(factors) if f is not None and f.node.target is WEIGHT]
    if len(packed) != 1:
        return None
    weight, x = factors[packed[0]], total.body.args[1 - packed[0]]
    assert weight is not None and isinstance(x, Element)
    tags: dict[str, Any] = {"format": "mxfp4", **weight.node.meta.get(TAGS, {})}
    if any(ix.has_datum() for ix in weight.index):
        return None  # gathered rows: experts
    if weight.index[-1] != Index.of(total.var):
        reason = "its blocks of 32 do not lie along the dimension that is summed over"
        return Refusal(reason, anchor, tags)
    lead = weight.index[:-1]
    features = [v for v in dims if any(v in ix.vars() for ix in lead)]
    if not features or x.vars() & set(features):
        return None  # a batch of products
    rows = [v for v in dims if v not in features and v.extent != 1]
    try:
        with graph.graph.inserting_before(anchor):
            return _rewrite(graph, anchor, dims, (x, total.var, rows), (weight, lead, features), bias, tags)
    except CannotArrange as why:
        return Refusal(f"no view expresses an operand: {why}", anchor, tags)


def _rewrite(
    graph: GraphView, anchor: Node, dims: tuple[Var, ...], left: tuple[Element, Var, list[Var]],
    right: tuple[Element, tuple[Index, ...], list[Var]], bias: Element | None, tags: dict[str, Any],
) -> Rewrite | Refusal:  # fmt: skip
    (x, inner, rows), (weight, lead, features) = left, right
    activations = _placed(graph, x, [*((v,) for v in rows), (inner,)])
    codes, scales = packed_parts(graph, weight, lead, [tuple(features)])
    extra: dict[str, Any] = {}
    if bias is not None:
        if bias.vars() - set(features):
            return Refusal("what is added is no bias of the features", anchor, tags)
        extra["bias"] = graph.arrange(bias, [tuple(features)])
    wanted, given = anchor.meta["val"].dtype, activations.meta["val"].dtype
    if given not in (torch.float32, torch.bfloat16, torch.float16, torch.float64) or wanted != given:
        return Refusal(f"multiplies {given} and gives {wanted}", anchor, tags)
    call = graph.call(torch.ops.sm12x.mxfp4_linear.default, activations, codes, scales, **extra)
    sizes = [v.extent for v in features]
    column = flatten([Index.of(v) for v in features], sizes)
    value = call
    single = [() if v.extent == 1 and v not in features else (v,) for v in dims]
    if single != [*((v,) for v in rows), *((v,) for v in features)] or len(features) > 1:
        value = graph.arrange(Element(call, (*map(Index.of, rows), column)), single)
    tags |= {"features": math.prod(sizes), "width": inner.extent}
    return Rewrite(anchor, call, value, tags)


def packed_parts(
    graph: GraphView, weight: Element, lead: tuple[Index, ...], groups: list[tuple[Var, ...]]
) -> tuple[Node, Node]:
    """The bytes and the scales of (some) rows of a packed weight, laid out over `groups` and the row."""
    codes, scales = weight.node.args[:2]
    parts = []
    for node in (codes, scales):
        assert isinstance(node, Node)
        byte = Var("y", shape_of(node)[-1])
        at = Index() if byte.extent == 1 else Index.of(byte)
        last = () if byte.extent == 1 else (byte,)
        parts.append(_placed(graph, Element(node, (*lead, at)), [*groups, last], look_back=False))
    return parts[0], parts[1]


def _placed(graph: GraphView, element: Element, groups: list[tuple[Var, ...]], look_back: bool = True) -> Node:
    """`arrange`, from as far back as views alone tell, with variables split where that needs it."""
    inner = set(groups[-1])
    tries = [source(element, inner), element] if look_back else [element]
    for k, at in enumerate(tries):
        split = refine([at])
        parts = [tuple(p for v in group for p in (split[v].terms if v in split else (v,))) for group in groups]
        try:
            return graph.arrange(at.subs(split), parts)  # type: ignore[arg-type]
        except CannotArrange:
            if k == len(tries) - 1:
                raise
    raise AssertionError("one of them was tried last")


def _terms(expr: Expr | None) -> tuple[Reduce | None, Element | None]:
    """``sum + bias``"""
    if isinstance(expr, Reduce):
        return (expr if expr.kind == "sum" else None), None
    if isinstance(expr, Apply) and expr.op == "add":
        total, bias = expr.args
        if isinstance(total, Reduce) and total.kind == "sum" and isinstance(bias, Element):
            return total, bias
    return None, None


def _leads_to_packed(node: Node) -> bool:
    """Whether a tensor is a packed weight, moved."""
    element = Element(node, tuple(Index() if s == 1 else Index.of(Var("i", s)) for s in shape_of(node)))
    return node.target is EITHER or look(element).node.target is WEIGHT


__all__ = ["mxfp4_linear", "packed_parts"]
