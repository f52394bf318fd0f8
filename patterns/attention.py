"""Softmax attention in any spelling → ``sm12x::attention``.

The equation, with any layout of q, k, v and of the result::

    score[t]  = softcap(scale * sum_d q[b, h, s, d] * k[b, h div G, t, d]) + masks + biases
    out[v]    = sum_t softmax(score)[t] * v[b, h div G, t, v]

Anchors: `scaled_dot_product_attention`, softmax, exp (a softmax written by hand). From the anchor (`problem.py`)
we walk to the sum with the values (`softmax.py`), read the scores inwards to the product of q and k
(`scores.py`), prove the masks (`sm12x_compile/masks.py`), give every index variable its role (`roles.py`), and lay
the operands out again (`emit.py`).

Refused, with the reason in the report: weights read elsewhere or changed after the softmax, active dropout,
scores that are no product of two tensors, a scale that is not a positive constant, indices that no view can
express. A mask that cannot be proved is no refusal: it is passed on as a dense tensor.

To add a case: a new spelling of the softmax goes into `softmax.py`, a new op on the scores into `scores.py`, a
new kind of mask into `masks.py`; each is one branch that answers with a `Refusal` where it is not sure.
"""

from __future__ import annotations

from torch.fx import Node

from sm12x_compile.match import CannotArrange, GraphView, Refusal, Rewrite
from sm12x_compile.registry import register_pattern

from .emit import describe, emit_attention
from .empty_rows import settle_masks
from .problem import ANCHORS, read_problem
from .roles import Problem, assign_roles


@register_pattern("attention", anchors=ANCHORS, merit=0)
def attention(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
    """Recognise one attention at its softmax."""
    problem = graph.once(read_problem, anchor)
    if not isinstance(problem, Problem):
        return problem
    roles = assign_roles(problem)
    if isinstance(roles, Refusal):
        return roles
    settled = settle_masks(roles.problem, roles)
    if isinstance(settled, Refusal):
        return settled
    mask, empty_rows = settled
    tags = describe(roles, mask)
    try:
        with graph.graph.inserting_before(problem.node):
            call, value = emit_attention(graph, roles, mask, empty_rows)
    except CannotArrange as reason:
        return Refusal(f"no view expresses an operand: {reason}", problem.node, tags)
    return Rewrite(problem.node, call, value, tags)
