"""Mixture of experts in any spelling → ``sm12x::moe``.

The equation (Shazeer 2017; Mixtral 2024; DeepSeekMoE 2024)::

    y[t] = sum over j of p[t, j] * W2[e] act(W13[e] x[t])      with e = ids[t, j]

A family member is written with rows sorted by expert and a grouped matmul, with gathered weights, with all experts
computed and most of them weighted by zero, or as a loop over the experts. `routed.py` makes these one expression,
`experts.py` reads it: which index selects the weights is all that differs.

What selects an expert is an anchor: a gather, a comparison or a scatter of expert numbers, a grouped matmul. From it
the recogniser walks towards the end of the graph and takes the farthest value that still is the sum above, so a
shared expert that is added stays outside.

Choices below 0 or not below E contribute nothing, as the op says; indexing from the end is turned into that. Sorted
rows whose ids are negative are not what their author's group ends count, so what they give is nobody's contract.

To add a case: another activation goes to `activation.py`, another way to say which tokens an expert gets to
`choice.py`, another way to sort to `row_order.py`.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from sm12x_compile.match import CannotArrange, GraphView, Refusal, Rewrite
from sm12x_compile.registry import register_pattern

from .expert_search import ANCHORS, Found, mark_dead, search, selects_experts
from .expert_weights import gather_experts
from .experts import read_block
from .moe_emit import Emitter
from .routed import Unreadable


@register_pattern("moe", anchors=ANCHORS, merit=0, packed=True)
def moe(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
    """Recognise one block of experts by what selects them."""
    if not selects_experts(anchor):
        return None
    found = search(anchor, lambda node: _read(node, anchor))
    if not isinstance(found, Found):
        return found
    block, weights, choices = found
    tags: dict[str, Any] = {}
    try:
        with graph.graph.inserting_before(block.node):
            call, value = Emitter(graph, block, weights, choices).emit(tags)
    except CannotArrange as why:
        return Refusal(f"no view expresses an operand: {why}", block.node, tags)
    except Unreadable as why:
        return why.refusal or Refusal("the experts could not be laid out", block.node, tags)
    mark_dead(block.node)
    return Rewrite(block.node, call, value, tags)


def _read(node: Node, anchor: Node) -> Found:
    block = read_block(node, anchor)
    return Found(block, *gather_experts(block))
