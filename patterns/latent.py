"""Keys and values that are linear maps of one latent vector a token: what `mla.py` looks for.

Three ways to write the same attention::

    expanded   k = [sum_l latent[t, l] * w_uk[h, n, l], k_rope[t]],  v = sum_l latent[t, l] * w_uv[h, v, l]
    absorbed   two scores added, q_latent . latent[t] + q_rope . k_rope[t], and v = latent
    joined     one score over a cache that holds both, q . [latent, k_rope][t], and v its first columns

The first is what models say; in the others their author has moved w_uk and w_uv out already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from sm12x_compile.index_algebra import Apply, Cases, Element, Expr, Index, Reduce, Var, look, same_size, step
from sm12x_compile.match import Refusal, source

from .roles import Problem, Roles
from .scores import Scores, read_scores


@dataclass(frozen=True)
class Projection:
    """``sum over inner of latent * weight``, plus `bias`, where only `latent` runs along the keys."""

    latent: Element
    weight: Element
    inner: Var
    bias: Element | None = None


@dataclass(frozen=True)
class Latent:
    """The operands of ``sm12x::mla``; the weights are None where the author has absorbed them."""

    form: str
    q: Element
    nope: tuple[Var, ...]
    latent: Element
    inner: Var
    q_rope: Element | None = None
    k_rope: tuple[tuple[Var, Element], ...] = ()
    rope: Var | None = None
    w_uk: Element | None = None
    w_uv: Element | None = None
    k_bias: Element | None = None
    v_bias: Element | None = None


@dataclass(frozen=True)
class Piece:
    """A part of a dimension, ``offset <= index < offset + var.extent``, over a variable of its own."""

    offset: int
    var: Var
    element: Element


def pieces_along(element: Element, var: Var, offset: int = 0) -> list[Piece]:
    """Cut a dimension where its tensor was put together (`cat`, writes into slices)."""
    whole = [Piece(offset, var, element)]
    inner = step(look(element))
    if not isinstance(inner, Cases) or not isinstance(var.extent, int):
        return whole
    start = inner.index.const
    if inner.index.terms != {var: 1} or not isinstance(start, int):
        return whole
    cuts = {0, var.extent}
    for low, high, _ in inner.pieces:
        for edge in (low, high):
            if not isinstance(edge, int):
                return whole
            cuts.add(min(max(edge - start, 0), var.extent))
    edges = sorted(cuts)
    if len(edges) == 2:
        return whole
    found: list[Piece] = []
    for low, high in pairwise(edges):
        part = Var(f"{var.name}{low}", high - low)
        # Within its bounds the algebra sees through the cut by itself.
        found += pieces_along(element.subs({var: Index.of(part) + low}), part, offset + low)
    return found


def read_projection(element: Expr, key: Var) -> Projection | None:
    """A linear map of something that runs along the keys, by something that does not."""
    expr = step(look(element)) if isinstance(element, Element) else element
    if isinstance(expr, Apply) and expr.op == "add":
        for product, bias in (expr.args, expr.args[::-1]):
            found = read_projection(product, key)
            if found is not None and found.bias is None and isinstance(bias, Element) and key not in look(bias).vars():
                return replace(found, bias=bias)
        return None
    if not (isinstance(expr, Reduce) and expr.kind == "sum"):
        return None
    body = step(look(expr.body)) if isinstance(expr.body, Element) else expr.body
    if not (isinstance(body, Apply) and body.op == "mul") or not all(isinstance(a, Element) for a in body.args):
        return None
    a, b = (source(x, (key, expr.var)) for x in body.args if isinstance(x, Element))
    if key in b.vars():
        a, b = b, a
    if key not in a.vars() or key in b.vars() or expr.var not in a.vars() or expr.var not in b.vars():
        return None
    return Projection(a, b, expr.var)


def same_element(a: Element, b: Element) -> bool:
    return look(a) == look(b)


# ---------------------------------------------------------------- the three ways


def find_latent(roles: Roles) -> tuple[Latent, Roles] | Refusal | None:
    """The latent attention that an attention is, and the roles of its variables; None if it is an ordinary one."""
    problem = roles.problem
    if len(problem.summed) != 1:
        return None
    for find in (_expanded, _absorbed, _joined):
        found = find(problem, roles)
        if found is not None:
            return found
    return None


def _expanded(problem: Problem, roles: Roles) -> tuple[Latent, Roles] | Refusal | None:
    value = read_projection(problem.value, problem.key)
    if value is None:
        return None
    (d,) = problem.summed
    parts = [(piece, read_projection(piece.element, problem.key)) for piece in pieces_along(problem.k, d)]
    mapped = [(piece, p) for piece, p in parts if p is not None and _same_latent(p, value)]
    if len(mapped) != 1:
        return None
    ((nope, key),) = mapped
    rest = _rest(nope, d)
    if rest is None:
        return None
    shared = {*roles.batch, *roles.kv_head}
    batch, heads = key.latent.vars() & shared, (key.weight.vars() | value.weight.vars()) & shared
    if batch & heads or key.latent.vars() - batch - {problem.key, key.inner}:
        return None
    settled = replace(
        roles,
        batch=tuple(v for v in (*roles.batch, *roles.kv_head) if v not in heads),
        kv_head=tuple(v for v in (*roles.batch, *roles.kv_head) if v in heads),
    )
    start, r = rest
    rope = _shared_part(problem, settled, d, start, r) if r.extent else ()
    if rope is None:
        return None  # an ordinary key with a low-rank part; the heads share nothing
    if not rope and not _is_narrow(key.inner, settled, nope.var):
        return None  # an ordinary projection of the hidden states
    weights = (*settled.kv_head, nope.var, key.inner), (*settled.kv_head, *settled.feature, value.inner)
    if key.weight.vars() - set(weights[0]) or value.weight.vars() - set(weights[1]):
        return Refusal("the weights of the latent attention depend on more than head and feature", problem.node)
    at = {d: Index.of(nope.var) + nope.offset}
    latent = Latent(
        "expanded", source(problem.q.subs(at), (nope.var,)), (nope.var,), key.latent, key.inner,
        w_uk=key.weight, w_uv=value.weight.subs({value.inner: Index.of(key.inner)}),
        k_bias=key.bias, v_bias=value.bias,
    )  # fmt: skip
    if rope:
        q_rope = source(problem.q.subs({d: Index.of(r) + start}), (r,))
        latent = replace(latent, q_rope=q_rope, k_rope=rope, rope=r)
    return latent, settled


def _same_latent(a: Projection, b: Projection) -> bool:
    there = b.latent.subs({b.inner: Index.of(a.inner)})
    return same_size(a.inner.extent, b.inner.extent) and same_element(a.latent, there)


def _rest(nope: Piece, whole: Var) -> tuple[int, Var] | None:
    """Where the rest of the dimension begins, and a variable for it; None if it lies on both sides."""
    if not isinstance(whole.extent, int) or not isinstance(nope.var.extent, int):
        return None
    left, right = nope.offset, whole.extent - nope.offset - nope.var.extent
    if left and right:
        return None
    return (0, Var("r", left)) if left else (nope.offset + nope.var.extent, Var("r", right))


def _shared_part(
    problem: Problem, roles: Roles, d: Var, start: int, r: Var
) -> tuple[tuple[Var, Element], ...] | None:
    """The columns of the keys from `start` on, which all heads share: one tensor, or several side by side."""
    whole = source(problem.k.subs({d: Index.of(r) + start}), (problem.key, r))
    pieces = [Piece(0, r, whole)]
    if whole.vars() - {*roles.batch, problem.key, r}:
        pieces = pieces_along(whole, r)
    found = tuple((piece.var, source(piece.element, (problem.key, piece.var))) for piece in pieces)
    return None if any(e.vars() - {*roles.batch, problem.key, v} for v, e in found) else found


def _is_narrow(inner: Var, roles: Roles, nope: Var) -> bool:
    """Whether the latent is at most a quarter of the keys and values that it becomes.

    Without a rotary part nothing else tells it from cross-attention to a somewhat narrower memory, or from the
    hidden states of a model, which gain nothing.
    """
    widths = [nope.extent, *(v.extent for v in (*roles.kv_head, *roles.feature, inner))]
    if not all(isinstance(w, int) for w in widths):
        return False
    heads = math.prod(int(v.extent) for v in roles.kv_head)
    return 4 * int(inner.extent) <= heads * (int(nope.extent) + math.prod(int(v.extent) for v in roles.feature))


def _absorbed(problem: Problem, roles: Roles) -> tuple[Latent, Roles] | Refusal | None:
    (d,) = problem.summed
    settled = _headless(problem, roles)
    # What is added behind a softcap is not inside it, and the op has one softcap around both products.
    if settled is None or len(roles.feature) != 1 or problem.softcap:
        return None
    value = problem.value.subs({roles.feature[0]: Index.of(d)})
    for k, (element, factor) in enumerate(problem.biases):
        second = read_scores(element, problem.key)
        if not isinstance(second, Scores) or not _is_plain(second) or second.scale * factor != problem.scale:
            continue
        rest = replace(problem, biases=(*problem.biases[:k], *problem.biases[k + 1 :]))
        r = second.summed[0]
        if same_size(d.extent, roles.feature[0].extent) and same_element(problem.k, value):
            latent = Latent("absorbed", problem.q, (d,), problem.k, d, second.q, ((r, second.k),), r)
        elif same_size(r.extent, roles.feature[0].extent) and same_element(
            second.k, problem.value.subs({roles.feature[0]: Index.of(r)})
        ):
            latent = Latent("absorbed", second.q, (r,), second.k, r, problem.q, ((d, problem.k),), d)
        else:
            continue
        # The second product brings no variable that the first did not have, and its keys none of the heads.
        keys, rows = latent.latent.vars() | latent.k_rope[0][1].vars(), {*settled.heads, *settled.queries}
        known = {*settled.batch, problem.key, d, r}
        if keys - known or (latent.q.vars() | second.q.vars()) - known - rows:
            continue
        return latent, replace(settled, problem=rest)
    return None


def _is_plain(scores: Scores) -> bool:
    """A product and nothing else."""
    extra = scores.masks or scores.biases or scores.shifts or scores.softcap or scores.constant
    return not extra and len(scores.summed) == 1


def _joined(problem: Problem, roles: Roles) -> tuple[Latent, Roles] | Refusal | None:
    (d,) = problem.summed
    settled = _headless(problem, roles)
    if settled is None or len(roles.feature) != 1:
        return None
    width, total = roles.feature[0].extent, d.extent
    if not isinstance(width, int) or not isinstance(total, int) or not 0 < width < total:
        return None
    for start in (0, total - width):
        if not same_element(problem.k.subs({d: Index.of(roles.feature[0]) + start}), problem.value):
            continue
        inner, rope = Var("l", width), Var("r", total - width)
        columns, rest = Index.of(inner) + start, Index.of(rope) + (width if start == 0 else 0)
        return Latent(
            "joined", source(problem.q.subs({d: columns}), (inner,)), (inner,),
            source(problem.k.subs({d: columns}), (problem.key, inner)), inner,
            source(problem.q.subs({d: rest}), (rope,)),
            ((rope, source(problem.k.subs({d: rest}), (problem.key, rope))),), rope,
        ), settled  # fmt: skip
    return None


def _headless(problem: Problem, roles: Roles) -> Roles | None:
    """The roles if all heads share keys and values: what q, k and v have in common is the batch then."""
    shared = {*roles.batch, *roles.kv_head}
    if shared - problem.k.vars() or shared - problem.value.vars():
        return None
    return replace(roles, batch=(*roles.batch, *roles.kv_head), kv_head=())
