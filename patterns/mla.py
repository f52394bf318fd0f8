"""Multi-head latent attention in any spelling → ``sm12x::mla``.

The equation (DeepSeek-V2, 2024, section 2.1)::

    k[h, t]  = [sum_l latent[t, l] * w_uk[h, :, l],  k_rope[t]]
    v[h, t]  =  sum_l latent[t, l] * w_uv[h, :, l]
    out      =  attention(q, k, v)

Read as any attention (`problem.py`), then `latent.py` asks the index algebra what one element of k and of v is
made of: a sum over the latent, whether the projection is a `linear`, an `einsum` or a `matmul` of one weight or of
two, and whether k was joined by `cat` or written in parts. The latent may be a cache, a normed projection, anything.

Not taken, and left to `attention`: values that are no map of the keys' latent (a cache of expanded keys: refused
with that reason), heads that share nothing, a latent as wide as the keys without a rotary part.

To add a case: another way to write it is one more function in `latent.py`.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Cases, Element, Index, Var, look, step
from sm12x_compile.index_algebra.expr import args_of, shape_of
from sm12x_compile.masks import StructuredMask
from sm12x_compile.match import CannotArrange, GraphView, Refusal, Rewrite, refine
from sm12x_compile.registry import register_pattern

from .emit import cut_to_length, describe, restore, shared_arguments
from .empty_rows import settle_masks
from .latent import Latent, find_latent, pieces_along, read_projection
from .problem import ANCHORS, read_problem
from .roles import Problem, Roles, assign_roles

aten = torch.ops.aten


@register_pattern("mla", anchors=ANCHORS, merit=10)
def mla(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
    """Recognise one latent attention at its softmax; None leaves it to `attention`."""
    problem = graph.once(read_problem, anchor)
    if not isinstance(problem, Problem):
        return None
    roles = assign_roles(problem.subs(refine(_inside(problem))))
    if isinstance(roles, Refusal):
        return None
    found = find_latent(roles)
    if not isinstance(found, tuple):
        return found or _cached_expanded(roles)
    latent, roles = found
    settled = settle_masks(roles.problem, roles)
    if isinstance(settled, Refusal):
        return settled
    mask, empty_rows = settled
    tags = describe(roles, mask) | {"form": latent.form, "latent": latent.inner.extent}
    if latent.rope is not None:
        tags["rope"] = latent.rope.extent
    reason = _biased(latent, roles, mask, empty_rows)
    if reason:
        return Refusal(reason, problem.node, tags)
    try:
        with graph.graph.inserting_before(problem.node):
            call, value = _emit(graph, latent, roles, mask, empty_rows)
    except CannotArrange as why:
        return Refusal(f"no view expresses an operand: {why}", problem.node, tags)
    return Rewrite(problem.node, call, value, tags)


def _inside(problem: Problem) -> list[Element]:
    """What the keys and values are made of: their heads may be grouped inside."""
    elements = [problem.q]
    for piece in [p for d in problem.summed for p in pieces_along(problem.k, d)]:
        projection = read_projection(piece.element, problem.key)
        elements += [projection.weight] if projection else [look(piece.element)]
    return elements


def _biased(latent: Latent, roles: Roles, mask: StructuredMask, empty_rows: str) -> str | None:
    """A bias of the keys adds the same to all scores of a query, one of the values is added to the result."""
    problem = roles.problem
    if latent.k_bias is not None and (problem.softcap or problem.sink is not None):
        return "the keys' up-projection has a bias, which a softcap or a sink does not let cancel"
    if latent.v_bias is not None and problem.sink is not None:
        return "the values' up-projection has a bias, and the weights do not add up to one beside a sink"
    if latent.v_bias is not None and empty_rows == "zero" and mask.may_be_empty(roles.query, problem.key):
        return "the values' up-projection has a bias, and a query may have no key"
    return None


def _emit(
    graph: GraphView, latent: Latent, roles: Roles, mask: StructuredMask, empty_rows: str
) -> tuple[Node, Node]:
    before = roles.problem.key
    roles, mask = cut_to_length(roles, mask, empty_rows)
    problem, key = roles.problem, (roles.problem.key,)
    cut = {before: Index.of(problem.key)}
    batch, heads, query, inner = roles.batch, roles.heads, roles.queries, (latent.inner,)
    q = graph.arrange(latent.q, [batch, heads, query, latent.nope])
    kv = graph.arrange(latent.latent.subs(cut), [batch, key, inner])
    operands = [q, kv]
    q_rope = k_rope = w_uk = w_uv = None
    if latent.q_rope is not None and latent.rope is not None:
        q_rope = graph.arrange(latent.q_rope, [batch, heads, query, (latent.rope,)])
        parts = [graph.arrange(element.subs(cut), [batch, key, (var,)]) for var, element in latent.k_rope]
        k_rope = parts[0] if len(parts) == 1 else graph.call(aten.cat.default, parts, -1)
        operands = [q, q_rope, k_rope, kv]
    if latent.w_uk is not None and latent.w_uv is not None:
        w_uk = graph.arrange(latent.w_uk, [roles.kv_head, latent.nope, inner])
        w_uv = graph.arrange(latent.w_uv, [roles.kv_head, roles.feature, inner])
        operands = [w_uk, w_uv, *operands]
    extra = shared_arguments(graph, roles, mask, empty_rows, tuple(operands))
    call = graph.call(
        torch.ops.sm12x.mla.default, q, q_rope, kv, k_rope, w_uk, w_uv, problem.scale, **extra
    )
    value = call
    if latent.v_bias is not None:
        bias = graph.arrange(latent.v_bias, [heads, (), roles.feature])
        value = graph.call(aten.add.Tensor, call, bias)
    return call, restore(graph, value, problem, [batch, heads, query, roles.feature])


def _cached_expanded(roles: Roles) -> Refusal | None:
    """Why a latent attention whose cache holds expanded keys can't be absorbed."""
    problem = roles.problem
    for d in problem.summed:
        for new in _new_tokens(problem.k, problem.key):
            shared = [_is_shared(piece.element, roles) for piece in pieces_along(new, d)]
            if any(shared) and not all(shared):
                reason = "the cache holds expanded keys and values; a cache of the latents could be absorbed"
                return Refusal(reason, problem.node)
    return None


def _is_shared(element: Element, roles: Roles) -> bool:
    return not look(element).vars() & {*roles.kv_head, *roles.group}


def _new_tokens(k: Element, key: Var) -> list[Element]:
    """What is written into a cache, or put behind it, in this graph."""
    found = look(k)
    inner = step(found)
    if isinstance(inner, Cases) and key in inner.index.vars():
        return [e for _, _, e in inner.pieces if isinstance(e, Element)]
    if found.node.target is aten.index_copy.default:
        _, dim, _, new = args_of(found.node)[:4]
        dim %= len(found.index)
        token = Index.of(Var("new", shape_of(new)[dim]))
        return [Element(new, (*found.index[:dim], token, *found.index[dim + 1 :]))]
    return []

