"""The gated delta rule → ``sm12x::gated_delta_rule``.

Calls of functions that `sm12x_compile/capture/` knows stand in the graph already; they are reported here, and a
single step whose state is an input that is written back becomes ``sm12x::gated_delta_rule_update``, which mutates
that input in place.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.match import GraphView, Refusal, Rewrite
from sm12x_compile.ops import gated_delta_rule as op
from sm12x_compile.registry import register_pattern

from .state import FEW_TOKENS, every_row, is_private, write_of

aten = torch.ops.aten
_COPIES = {aten.copy.default, aten._to_copy.default, aten.clone.default, aten.alias.default}


@register_pattern("gated_delta_rule", anchors=[torch.ops.sm12x.gated_delta_rule.default])
def gated_delta_rule(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
    """Report a call of the op; take its state in place where that is the same."""
    tags = describe(anchor)
    pool = _pool(anchor)
    if pool is None:
        return Rewrite(anchor, anchor, anchor, tags)
    with graph.graph.inserting_before(anchor):
        call, value = _update(graph, anchor, pool[0])
    (output,) = (u for u in anchor.users if u.target is operator.getitem and u.args[1] == 0)
    return Rewrite(output, call, value, {**tags, "state": "in place"}, obsolete=(pool[1],))


def describe(call: Node) -> dict[str, Any]:
    """The tags of a site."""
    bound = op.bind(call)
    tags: dict[str, Any] = {
        "decay": "channel" if bound["g"].meta["val"].dim() == 4 else "head",
        "qk_l2norm": bound["qk_l2norm"],
        "scale": round(bound["scale"], 6),
        "state": "zeros" if bound["initial_state"] is None else "given",
    }
    groups = bound["v"].meta["val"].shape[2] // bound["q"].meta["val"].shape[2]
    if groups != 1:
        tags["groups"] = int(groups)
    return tags


def _pool(call: Node) -> tuple[Node, Node] | None:
    """The placeholder that holds the state and its write, where an update in place is the same."""
    bound = op.bind(call)
    state, tokens = bound["initial_state"], bound["q"].meta["val"].shape[1]
    if state is None or not isinstance(tokens, int) or tokens > FEW_TOKENS or bound["cu_seqlens"] is not None:
        return None
    outputs = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    if set(outputs) != {0, 1} or len(call.users) != 2:
        return None
    pool = _behind(state)
    write = write_of(pool)
    if write is None or not isinstance(write.args[1], Node) or _behind(write.args[1], wide=True) is not outputs[1]:
        return None
    if pool.meta["val"].shape != outputs[1].meta["val"].shape or not pool.meta["val"].dtype.is_floating_point:
        return None
    if not _leads_only_to(outputs[1], write) or not is_private(pool, {call, write}):
        return None
    return pool, write


def _behind(node: Node, *, wide: bool = False) -> Node:
    """What a node is a copy of, casts to a wider dtype included; `wide`: to any dtype, once."""
    narrowed = False
    while node.target in _COPIES:
        source = node.args[1] if node.target is aten.copy.default else node.args[0]
        assert isinstance(source, Node)
        before, after = source.meta["val"].dtype, node.meta["val"].dtype
        if before != after and after != torch.promote_types(before, after):
            if not wide or narrowed:
                break
            narrowed = True
        elif before != after and narrowed:
            break
        node = source
    return node


def _leads_only_to(node: Node, write: Node) -> bool:
    while True:
        if len(node.users) != 1:
            return False
        (user,) = node.users
        if user is write:
            return True
        if user.target not in _COPIES:
            return False
        node = user


def _update(graph: GraphView, call: Node, pool: Node) -> tuple[Node, Node]:
    bound = op.bind(call)
    slots = every_row(graph, pool)
    extra = {k: bound[k] for k in ("qk_l2norm", "eps", "out_dtype") if bound[k] != _DEFAULTS[k]}
    operands = (bound[k] for k in ("q", "k", "v", "g", "beta"))
    target = torch.ops.sm12x.gated_delta_rule_update.default
    made = graph.call(target, *operands, pool, slots, bound["scale"], **extra)
    return made, made


_DEFAULTS = {k: p.default for k, p in op.signature.parameters.items()}
