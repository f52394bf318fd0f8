"""Softmax-weighted sums: ``out = sum_t softmax(score)[t] * value[t]``, however the softmax is written.

    softmax   softmax(x, dim) @ v, with casts, inactive dropout and slices between
    exp       exp(x - m) / sum(exp(x - m)) @ v; the division before or after the sum with v;
              exp(x - logsumexp(x)); extra terms of the denominator are sinks
    sdpa      scaled_dot_product_attention (see `attention`)

Shared by the families that are attention: they read the scores, this file finds where they are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import (
    Apply,
    Element,
    Expr,
    Index,
    Reduce,
    Size,
    Var,
    look,
    same_size,
    step,
)
from sm12x_compile.index_algebra.expr import args_of, argument, operand, shape_of
from sm12x_compile.index_algebra.index import add
from sm12x_compile.index_algebra.layout import LAYOUT
from sm12x_compile.match import Refusal, source

aten = torch.ops.aten

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DIVISIONS = (aten.div.Tensor, aten.true_divide.Tensor)
_PRODUCTS = (
    aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default, aten.einsum.default,
    aten.baddbmm.default, aten.inner.default, aten.tensordot.default, aten.linear.default,
)  # fmt: skip


@dataclass(frozen=True)
class WeightedSum:
    """``node[out] = sum over key of softmax(scores) * value``.

    Attributes:
        node: the node whose value this is.
        out: its index, one variable a dimension (a constant where the size is 1).
        key: the variable t that is summed over.
        scores: the score at t.
        sinks: scores of columns that take probability and have no value.
        value: the element of v at t.
        rows: the index along the scores' dimension before the softmax one: most likely the query.
        form: ``softmax`` or ``exp``.
        dtype: the one that the softmax casts to, if any.
        stable: whether torch's own softmax subtracts the greatest score; by hand, the scores must.
    """

    node: Node
    out: tuple[Index, ...]
    key: Var
    scores: Element
    sinks: tuple[Element, ...]
    value: Element
    rows: Index | None
    form: str
    stable: bool
    dtype: torch.dtype | None


def fresh_index(node: Node) -> tuple[Index, ...]:
    """One variable a dimension, 0 where the size is 1."""
    shape = shape_of(node)
    return tuple(Index() if s == 1 else Index.of(Var(f"o{k}", s)) for k, s in enumerate(shape))


def is_inactive_dropout(node: Node) -> bool:
    if node.target is not aten.dropout.default:
        return False
    _, p, training = args_of(node)
    return p == 0 or training is False


def keeps_numbers(cast: Apply) -> bool:
    """Whether a cast only rounds: from one ordinary floating dtype to another."""
    before = args_of(cast.node)[-1 if cast.node.target is aten.copy.default else 0]
    return {before.meta["val"].dtype, cast.detail} <= _FLOATS


def strip(expr: Expr) -> Expr:
    """Through layout, casts and inactive dropout."""
    while isinstance(expr, Element):
        expr = source(expr)
        if is_inactive_dropout(expr.node):
            expr = Element(operand(expr.node), expr.index)
            continue
        inner = step(expr)
        if not (isinstance(inner, Apply) and inner.op == "cast" and keeps_numbers(inner)):
            return expr
        expr = inner.args[0]
    return expr


def find_weighted_sum(anchor: Node) -> WeightedSum | Refusal | None:
    """Where the softmax at `anchor` (a softmax or an exp) is summed with values; None if it is no such softmax."""
    top = _follow(anchor)
    if not isinstance(top, Node):
        return top
    out = fresh_index(top)
    total = step(Element(top, out))
    denominator: Expr | None = None
    if isinstance(total, Apply) and total.op == "div":
        denominator = total.args[1]
        numerator = strip(total.args[0])
        total = step(numerator) if isinstance(numerator, Element) else numerator
    summed: list[Var] = []
    while isinstance(total, Reduce) and total.kind == "sum":
        if total.var.extent != 1:
            summed.append(total.var)
        total = total.body
        if isinstance(total, Element):
            total = step(look(total))
    if not (isinstance(total, Apply) and total.op == "mul"):
        return Refusal("the weights do not meet the values in a plain product", top)
    for weights, value in (total.args, total.args[::-1]):
        found = _weights(anchor, strip(weights), denominator)
        if found is None:
            continue
        if isinstance(found, Refusal):
            return found
        element, dim, sinks, columns = found
        if not summed:
            return Refusal("there is only one key", top)
        if len(summed) != 1:
            return Refusal("the weights are summed over several dimensions at once", top)
        return _assemble(anchor, top, out, summed[0], element, dim, sinks, value, columns)
    return Refusal("the softmax does not reach the product unchanged", top)


def _assemble(
    anchor: Node, top: Node, out: tuple[Index, ...], key: Var, weights: Element, dim: int,
    sinks: tuple[Element, ...], value: Expr, columns: Size,
) -> WeightedSum | Refusal:  # fmt: skip
    """Check that the sum runs over the softmax dimension, and find columns without a value."""
    if not isinstance(value, Element):
        return Refusal("the values are no tensor", top)
    index = weights.index
    along = index[dim]
    if along - Index.of(key) != Index(None, along.const):
        return Refusal("the weights are not summed along the softmax dimension", top)
    if any(key in ix.vars() for k, ix in enumerate(index) if k != dim):
        return Refusal("the weights are summed along two dimensions", top)
    form = "exp" if anchor.target is aten.exp.default else "softmax"
    scores = operand(anchor)
    if scores.target is aten.log_softmax.int:
        scores = operand(scores)

    def at(ix: Index) -> Element:
        return Element(scores, (*index[:dim], ix, *index[dim + 1 :]))

    if not same_size(columns, key.extent):
        spare = _spare_column(columns, key, along)
        if spare is None:
            return Refusal("part of the weights is dropped before they meet the values", top)
        sinks = (at(spare), *sinks)
    elif along.const != 0:
        return Refusal("the weights are shifted along the keys", top)
    rows = next((index[d] for d in range(dim - 1, -1, -1)), None) if dim else None
    stable = form == "softmax" or operand(anchor).target is aten.log_softmax.int
    return WeightedSum(top, out, key, at(along), sinks, value, rows, form, stable, _cast_to(anchor))


def _cast_to(anchor: Node) -> torch.dtype | None:
    """The `dtype` of a softmax or log_softmax."""
    for node in (anchor, operand(anchor)):
        if node.target in (aten.softmax.int, aten.log_softmax.int):
            return argument(node, 2, "dtype")
    return None


def _spare_column(size: Size, key: Var, along: Index) -> Index | None:
    """The one column that the sum leaves out, at either end."""
    if not same_size(size, add(key.extent, 1)):
        return None
    if along.const == 0:
        return Index(None, key.extent)
    return Index() if along.const == 1 else None


def _follow(anchor: Node) -> Node | Refusal | None:
    """Forward from the softmax to the node that completes the weighted sum."""
    node, met, divided = anchor, False, anchor.target is not aten.exp.default or _normalised_dim(anchor) is not None
    for _ in range(64):
        # The exponentials of a softmax by hand have a second reader: the sum that they are divided by.
        users = [u for u in node.users if divided or met or u.target is not aten.sum.dim_IntList]
        if len(users) != 1:
            if met:
                return node if divided else None
            if anchor.target is aten.exp.default:
                return None
            reader = ", ".join(u.name for u in list(node.users)[:3]) or "nobody"
            return Refusal(f"the attention weights are also read elsewhere ({reader})", node)
        user = users[0]
        if met and divided:
            return node
        if user.target in _DIVISIONS and not divided and user.args[0] is node:
            node, divided = user, True
            if met:
                return node
        elif not met and user.target in _PRODUCTS:
            node, met = user, True
            if divided:
                return node
        elif not met and user.target is aten.mul.Tensor and _summed_next(user):
            node, met = next(iter(user.users)), True
            if divided:
                return node
        elif user.target in LAYOUT or user.target is aten._to_copy.default or is_inactive_dropout(user):
            node = user
        elif user.target in (aten.dropout.default, aten.native_dropout.default):
            return Refusal("dropout is active; call model.eval()", user)
        else:
            if met or anchor.target is aten.exp.default:
                return None  # an exponential that is not divided by its sum is no softmax
            if user.op == "output":
                return Refusal("the attention weights leave the graph: returned, or a graph break follows", node)
            what = str(user.target).removeprefix("aten.")
            return Refusal(f"{what} stands between softmax and values", user)
    return None


def _summed_next(product: Node) -> bool:
    users = list(product.users)
    return len(users) == 1 and users[0].target is aten.sum.dim_IntList


def _normalised_dim(exp: Node) -> int | None:
    """The softmax dimension of ``exp(x - logsumexp(x))`` and ``exp(log_softmax(x))``."""
    inner = operand(exp)
    if inner.target is aten.log_softmax.int:
        return argument(inner, 1, "dim")
    if inner.target is not aten.sub.Tensor or inner.kwargs:
        return None
    x, lse = args_of(inner)
    if not isinstance(lse, Node) or lse.target is not aten.logsumexp.default or operand(lse) is not x:
        return None
    dims = argument(lse, 1, "dim")
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return dims[0] if len(dims) == 1 and argument(lse, 2, "keepdim", False) else None


Found = tuple[Element, int, tuple[Element, ...], Size]  # weights, softmax dim, sinks, columns summed over


def _weights(anchor: Node, weights: Expr, denominator: Expr | None) -> Found | Refusal | None:
    """The element of the anchor that the weights are, the softmax dimension, the sinks, and the form."""
    if not isinstance(weights, Element):
        return None
    rank = len(shape_of(anchor))
    if weights.node is anchor and anchor.target is not aten.exp.default:
        dim = args_of(anchor)[1] % rank
        return (weights, dim, (), shape_of(anchor)[dim]) if denominator is None else None
    if weights.node is not anchor:
        quotient = step(weights)
        if denominator is not None or not isinstance(quotient, Apply) or quotient.op != "div":
            return None
        denominator = quotient.args[1]
        numerator = strip(quotient.args[0])
        if not isinstance(numerator, Element) or numerator.node is not anchor:
            return None
        weights = numerator
    if denominator is None:
        normalised = _normalised_dim(anchor)
        return None if normalised is None else (weights, normalised % rank, (), shape_of(anchor)[normalised])
    return _normaliser(anchor, weights, strip(denominator))


def _normaliser(anchor: Node, weights: Element, denominator: Expr) -> Found | Refusal | None:
    """Check that the denominator is the sum of the very same exponentials, plus exponentials of sinks."""
    total = step(denominator) if isinstance(denominator, Element) else denominator
    sinks: list[Element] = []
    if isinstance(total, Apply) and total.op == "add":
        parts = [strip(a) for a in total.args]
        sums = [p for p in parts if isinstance(p, Element) and isinstance(step(p), Reduce)]
        others = [p for p in parts if p not in sums]
        if len(sums) != 1 or len(others) != 1 or not isinstance(others[0], Element):
            return Refusal("the denominator is not the sum of the weights", anchor)
        if others[0].node.target is not aten.exp.default:
            return Refusal("the denominator has a term that is no exponential", anchor)
        sinks.append(Element(operand(others[0].node), others[0].index))
        total = step(sums[0])
    if not (isinstance(total, Reduce) and total.kind == "sum"):
        return Refusal("the denominator is not the sum of the weights", anchor)
    body = strip(total.body)
    if not isinstance(body, Element) or body.node is not anchor:
        return Refusal("the denominator sums something else than the weights", anchor)
    dims = [k for k, ix in enumerate(body.index) if total.var in ix.vars()]
    if len(dims) != 1 or body.index[dims[0]] != Index.of(total.var):
        return Refusal("the denominator is summed along several dimensions", anchor)
    dim = dims[0]
    if any(a != b for k, (a, b) in enumerate(zip(weights.index, body.index, strict=True)) if k != dim):
        return Refusal("weights and denominator belong to different rows", anchor)
    return weights, dim, tuple(sinks), total.var.extent
