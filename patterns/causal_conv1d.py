"""A short depthwise convolution that looks back only, in any spelling → ``sm12x::causal_conv1d``.

The equation, for every batch b, channel c and position t::

    y[b, c, t] = activation(bias[c] + sum_i w[c, i] * X[b, c, t + n0 - (W - 1) + i])

with zeros where X is read before its beginning. It is found at ``conv1d`` with one group a channel, and at a sum of
products over a window (``unfold``, the last W inputs of a decode step). What the kept positions read tells n0; the
index algebra then says what X is there: the new inputs from position n0 on, and before them zeros or the state that
was put in front. So padding, cutting off the tail, ``cat([state, x])``, ``roll`` and shifted copies are one thing.

A state that is an input of the graph and is written back with the latest inputs becomes the pool of
``sm12x::causal_conv1d_update``, mutated in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import (
    Apply,
    Element,
    Expr,
    Index,
    Number,
    Reduce,
    Size,
    Var,
    known_nonnegative,
    look,
    same_size,
    step,
)
from sm12x_compile.index_algebra.expr import argument, shape_of
from sm12x_compile.index_algebra.index import add, mul
from sm12x_compile.match import CannotArrange, GraphView, Refusal, Rewrite, source
from sm12x_compile.registry import register_pattern

from .state import FEW_TOKENS, every_row, is_private, write_of

aten = torch.ops.aten
_WIDEST_WINDOW = 16  # a longer filter is another family


@dataclass(frozen=True)
class Window:
    """A convolution as it was read.

    Attributes:
        node: the last node that belongs to it; `out` names the variable of each of its dimensions (None: of size 1).
        activation: ``none`` or ``silu``.
        history: an element of X at (b, c, n); `n` stands for the position.
        weight: an element of w at (c, i).
        n0: position in X of the newest input that the first output reads.
    """

    node: Node
    activation: str
    out: tuple[Var | None, ...]
    history: Element
    weight: Element
    bias: Element | None
    b: Var
    c: Var
    t: Var
    i: Var
    n: Var
    n0: Size

    @property
    def width(self) -> Size:
        return self.i.extent

    def at(self, position: Index) -> Element:
        return self.history.subs({self.n: position})


@register_pattern("causal_conv1d", anchors=[aten.conv1d.default, aten.sum.dim_IntList])
def causal_conv1d(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
    """Recognise one convolution at its ``conv1d``, or at the sum over its window."""
    window = _of_conv1d(anchor) if anchor.target is aten.conv1d.default else _of_sum(anchor)
    if not isinstance(window, Window):
        return window
    if not isinstance(window.width, int) or not 2 <= window.width <= _WIDEST_WINDOW:
        return None
    if not window.node.meta["val"].dtype.is_floating_point:
        return None
    tags: dict[str, Any] = {"window": window.width, "activation": window.activation}
    if window.bias is not None:
        tags["bias"] = True
    try:
        with graph.graph.inserting_before(window.node):
            return _emit(graph, window, tags)
    except CannotArrange as reason:
        return Refusal(f"no view expresses an operand: {reason}", window.node, tags)


# ---------------------------------------------------------------- reading


def _of_conv1d(anchor: Node) -> Window | Refusal | None:
    x, w, bias = (argument(anchor, k, name) for k, name in enumerate(("input", "weight", "bias")))
    stride, padding, dilation = (argument(anchor, 3 + k, n, [d]) for k, (n, d) in enumerate(
        (("stride", 1), ("padding", 0), ("dilation", 1))))  # fmt: skip
    groups = argument(anchor, 6, "groups", 1)
    if x.meta["val"].dim() != 3:
        return None
    channels, per_group, width = shape_of(w)
    if per_group != 1 or not same_size(channels, shape_of(x)[1]) or groups == 1 or groups != channels:
        return None
    if list(stride) != [1] or list(dilation) != [1]:
        return Refusal("the depthwise convolution has a stride or a dilation", anchor)
    inner = _cut(anchor)
    last, activation = _activated(inner)
    node = _cut(last)
    out = shape_of(node)
    b, c, t = Var("b", out[0]), Var("c", out[1]), Var("t", out[2])
    i, n = Var("i", width), Var("n", shape_of(x)[2])
    kept = look(Element(node, (Index.of(b), Index.of(c), Index.of(t))), lambda e: e.node is last)
    kept = look(Element(inner, kept.index), lambda e: e.node is anchor)
    if kept.node is not anchor or kept.index[:2] != (Index.of(b), Index.of(c)) or set(kept.index[2].terms) != {t}:
        return Refusal("the result of the depthwise convolution is not cut out as one stretch", anchor)
    n0 = add(kept.index[2].const, add(add(width, -1), -int(padding[0])))
    behind = add(shape_of(x)[2], mul(add(n0, t.extent), -1))
    if not known_nonnegative(n0) or not known_nonnegative(behind):
        return Refusal("the depthwise convolution reads inputs after its own position", anchor)
    history = Element(x, (Index.of(b), Index.of(c), Index.of(n)))
    weight = Element(w, (Index.of(c), Index(), Index.of(i)))
    offset = Element(bias, (Index.of(c),)) if bias is not None else None
    return Window(node, activation, (b, c, t), history, weight, offset, b, c, t, i, n, n0)


def _cut(node: Node) -> Node:
    """The last of the slices that alone read a convolution."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in (aten.slice.Tensor, aten.narrow.default) or user.args[0] is not node:
            break
        node = user
    return node


def _of_sum(anchor: Node) -> Window | None:
    """A sum over the last dimension of inputs times weights."""
    value = anchor.meta["val"]
    if value.dim() not in (2, 3) or argument(anchor, 3, "dtype") is not None:
        return None
    variables = tuple(None if s == 1 else Var(f"o{k}", s) for k, s in enumerate(shape_of(anchor)))
    total = step(Element(anchor, tuple(Index() if v is None else Index.of(v) for v in variables)))
    if not isinstance(total, Reduce) or total.kind != "sum" or not isinstance(total.body, Element):
        return None
    product = step(total.body)
    if not isinstance(product, Apply) or product.op != "mul" or len(product.args) != 2:
        return None
    for x, w in (product.args, product.args[::-1]):
        window = _of_product(anchor, variables, total.var, x, w)
        if window is not None:
            return window
    return None


def _of_product(anchor: Node, variables: tuple[Var | None, ...], i: Var, x: Expr, w: Expr) -> Window | None:
    if not isinstance(x, Element) or not isinstance(w, Element):
        return None
    x, w = look(x), look(w)
    channel = [v for v in variables if v is not None and v in w.vars()]
    if len(channel) != 1 or w.vars() != {channel[0], i} or w.node.meta["val"].dtype != x.node.meta["val"].dtype:
        return None
    c = channel[0]
    places = [k for k, ix in enumerate(x.index) if i in ix.vars()]
    if len(places) != 1 or x.index[places[0]].terms.get(i) != 1:
        return None
    where = x.index[places[0]]
    moving = [v for v in where.terms if v is not i]
    if len(moving) > 1 or any(not isinstance(v, Var) or where.terms[v] != 1 for v in moving):
        return None
    others = [v for v in variables if v is not None and v is not c and v not in moving]
    if len(others) > 1 or {v for v in x.vars() if v is not i} - {c, *others, *moving}:
        return None
    if c not in x.vars():
        return None
    b = others[0] if others else Var("b", 1)
    t = moving[0] if moving else Var("t", 1)
    assert isinstance(t, Var)
    if not moving and not _is_a_window(x, w, places[0]):
        return None
    n = Var("n", shape_of(x.node)[places[0]])
    history = Element(x.node, tuple(Index.of(n) if k == places[0] else ix for k, ix in enumerate(x.index)))
    n0 = add(where.const, add(i.extent, -1))
    node, activation = _activated(anchor)
    return Window(node, activation, variables, history, w, None, b, c, t, i, n, n0)


def _is_a_window(x: Element, w: Element, place: int) -> bool:
    """Whether a sum over a single window is one of past inputs and a new one, not any scalar product.

    The weights are a parameter, and the last of the inputs comes from elsewhere than those before.
    """
    size = shape_of(x.node)[place]
    if w.node.op not in ("placeholder", "get_attr") or not isinstance(size, int) or size < 2:
        return False
    parts = []
    for first, count in ((size - 1, 1), (0, size - 1)):
        moved = Index.of(Var("p", count)) + first
        parts.append(look(Element(x.node, (*x.index[:place], moved, *x.index[place + 1 :]))).node)
    return x.node not in parts and parts[0] is not parts[1]


def _activated(node: Node) -> tuple[Node, str]:
    if len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.silu.default:
            return user, "silu"
    return node, "none"


# ---------------------------------------------------------------- writing


def _emit(graph: GraphView, window: Window, tags: dict[str, Any]) -> Rewrite | Refusal:
    node, b, c, t, width = window.node, window.b, window.c, window.t, window.width
    assert isinstance(width, int)
    newest = source(window.at(Index.of(t) + window.n0))
    x = graph.arrange(newest, [(b,), (c,), (t,)])
    w = graph.arrange(source(window.weight), [(c,), (window.i,)])
    extra: dict[str, Any] = {}
    if window.bias is not None:
        extra["bias"] = graph.arrange(source(window.bias), [(c,)])
    if window.activation != "none":
        extra["activation"] = window.activation
    if x.meta["val"].dtype != node.meta["val"].dtype:
        return Refusal("the convolution's result has another dtype than its input", node, tags)
    past = _past(window, width)
    if isinstance(past, Refusal):
        return past
    pool = _pool(window, past, newest) if past is not None else None
    if pool is not None:
        slots = every_row(graph, pool[0])
        call = graph.call(torch.ops.sm12x.causal_conv1d_update.default, x, w, pool[0], slots, **extra)
        return Rewrite(node, call, _restore(graph, call, window), {**tags, "state": "in place"}, obsolete=(pool[1],))
    if past is not None:
        j = next(v for v in past.vars() if v not in (b, c))
        extra["initial_state"] = graph.arrange(past, [(b,), (c,), (j,)])
        tags = {**tags, "state": "given"}
    call = graph.call(torch.ops.sm12x.causal_conv1d.default, x, w, **extra)
    with graph.graph.inserting_before(node):
        y = graph.graph.call_function(getitem, (call, 0))
    y.meta["val"] = call.meta["val"][0]
    return Rewrite(node, call, _restore(graph, y, window), tags)


def _past(window: Window, width: int) -> Element | Refusal | None:
    """The W - 1 inputs before the first new one; None where they are zeros."""
    if window.n0 == 0:
        return None
    before = add(window.n0, 1 - width)
    short = isinstance(before, int) and before < 0  # the convolution's own padding stands in front of X
    if not short and not known_nonnegative(before):
        return Refusal("fewer inputs than the window stand in front of the first one", window.node)
    j = Var("j", window.n0 if short else width - 1)
    element = window.at(Index.of(j) + (0 if short else before))
    found = step(element)
    while isinstance(found, Element):
        element, found = found, step(found)
    if isinstance(found, Number) and found.value == 0:
        return None
    if short:
        return Refusal("the state in front of the first input is shorter than the window", window.node)
    return source(element)


def _pool(window: Window, past: Element, newest: Element) -> tuple[Node, Node] | None:
    """The placeholder that holds the state and its write, where an update in place is the same.

    The state is all of the placeholder, what is written back are its last inputs with the new ones behind, and
    nobody else reads it.
    """
    pool, T = past.node, window.t.extent
    write = write_of(pool)
    value = pool.meta["val"]
    if write is None or value.dim() != 3 or not isinstance(T, int) or T > FEW_TOKENS:
        return None
    P, C, L = shape_of(pool)
    b, c = window.b, window.c
    j = next((v for v in past.vars() if v not in (b, c)), None)
    if j is None or not isinstance(L, int) or T > L or not same_size(P, b.extent) or not same_size(C, c.extent):
        return None
    rows = Index() if P == 1 else Index.of(b)
    if past.index[1:] != (Index.of(c), Index.of(j) + (L - j.extent)) or past.index[0] not in (rows, Index.of(b)):
        return None
    if value.dtype != newest.node.meta["val"].dtype:
        return None
    written = write.args[1]
    assert isinstance(written, Node)
    kept, fresh = Var("l", L - T), window.t
    old = look(Element(written, (rows, Index.of(c), Index.of(kept))))
    new = look(Element(written, (rows, Index.of(c), Index.of(fresh) + (L - T))))
    unmoved = L == T or (old.node is pool and old.index == (rows, Index.of(c), Index.of(kept) + T))
    there = look(newest)
    if not unmoved or new.node is not there.node or new.index != there.index:
        return None
    return (pool, write) if is_private(pool, {window.node, write}) else None


def _restore(graph: GraphView, y: Node, window: Window) -> Node:
    """From ``[B, C, T]`` to the layout of the node."""
    order = {id(window.b): 0, id(window.c): 1, id(window.t): 2}
    dims = [order[id(v)] for v in window.out if v is not None]
    spare = [k for k in range(3) if k not in dims]
    places = iter(spare)
    moves = [order[id(v)] if v is not None else next(places) for v in window.out]
    rest = [k for k in spare if k not in moves]
    for k in sorted(rest, reverse=True):
        y = graph.call(aten.squeeze.dim, y, k)
        moves = [m - (m > k) for m in moves]
    return y if moves == sorted(moves) else graph.call(aten.permute.default, y, moves)
