"""Where in a graph a carried state is computed: what goes in, what comes out, and the nodes between.

The recurrences of linear attention carry one state ``[B, H, K, V]`` through the graph, token by token or chunk by
chunk, however the copies of the loop are spelled. That state is the anchor:

* it begins as an operand that is decayed or as zeros, and is followed to the final state (`delta_carry.py`);
* what reads it and does not lead back into it converges on one node, the output;
* what these two are made of, back to where the operands have the shapes of the operator's, is the region.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.smooth import LAYOUT, SMOOTH, words

from .delta_carry import follow, initial_state, is_zero, op_name, shape

aten = torch.ops.aten
# Smooth as well, but where a layer's own projections and gates begin.
_OUTSIDE = words("linear sigmoid expm1 embedding")
_REGION = SMOOTH - _OUTSIDE
_OF_SIZE = words("zeros_like ones_like new_zeros new_ones full_like new_full empty_like new_empty sym_size")


@dataclass(frozen=True)
class Region:
    """A carried state with what belongs to it.

    Attributes:
        state: the initial state.
        final: the final state; None if nobody outside reads it.
        decays: whether a state was followed that an exponential decays; else it may be anything.
        outputs: nodes that could stand for the output, from the first to the last: copies and views of one another.
        nodes: everything between `state`, the leaves and the outputs, in the order of the graph.
        leaves: where the data comes from.
    """

    state: Node
    final: Node | None
    decays: bool
    outputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]


def find_region(anchor: Node) -> Region | None:
    """The region whose state begins at `anchor`: a first decay of a state, or a state of zeros."""
    state = initial_state(anchor)
    if state is None:
        return None
    last, decays = follow(state)
    if last is None and (len(shape(state) or ()) == 3 or not is_zero(state)):
        return None
    order = {node: k for k, node in enumerate(state.graph.nodes)}
    after = _descendants(state)
    path = _ancestors_within(last, after) if last is not None else set()
    outputs = _converge(state, path, after, order)
    if not outputs:
        return None
    final = last if last is not None and any(_keeps_state(u, last, shape(last)) for u in last.users) else None
    ends = [outputs[-1], *([final] if final is not None else [])]
    nodes, leaves = _between(state, ends, order)
    return Region(state, final, decays, outputs, nodes, leaves)


# ---------------------------------------------------------------- the output


def _descendants(state: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [state]
    while waiting:
        for user in waiting.pop().users:
            if user not in found and op_name(user) in _REGION:
                found.add(user)
                waiting.append(user)
    return found


def _ancestors_within(node: Node, allowed: set[Node]) -> set[Node]:
    found = {node}
    waiting = [node]
    while waiting:
        for given in waiting.pop().all_input_nodes:
            if given in allowed and given not in found:
                found.add(given)
                waiting.append(given)
    return found


def _converge(state: Node, path: set[Node], after: set[Node], order: dict[Node, int]) -> tuple[Node, ...]:
    """The nodes on which all that reads the state converges; empty if it does not."""
    reads: set[Node] = set()
    for node in (state, *path):
        for user in node.users:
            if user in path or not user.users:
                continue
            if _keeps_state(user, node, shape(state)):
                continue
            if user not in after:
                return ()
            reads.add(user)
    while len(reads) > 1:
        node = min(reads, key=order.__getitem__)
        reads.discard(node)
        users = [u for u in node.users if u.users or u.op == "output"]
        if any(u not in after for u in users):
            return ()
        reads.update(users)
    return _chain(reads.pop()) if reads else ()


def _keeps_state(user: Node, node: Node, size: Any) -> bool:
    """Whether a reader only hands the state on: to the graph's outputs or into a cache."""
    if user.op == "output" or user.target is aten.copy_.default:
        return True
    if op_name(user) not in LAYOUT or shape(user) is None or user.args[0] is not node:
        return user.target is aten.copy.default and user.args[1] is node and all(
            _keeps_state(u, user, size) for u in user.users
        )  # fmt: skip
    return bool(user.users) and all(_keeps_state(u, user, size) for u in user.users)


def _chain(node: Node) -> tuple[Node, ...]:
    """A node and what follows it alone: reductions, views, casts, writes into a buffer."""
    found = [node]
    while len(node.users) == 1:
        (user,) = node.users
        others = [n for n in user.all_input_nodes if n is not node and shape(n) is not None]
        if op_name(user) not in LAYOUT | {"sum", "squeeze"} or any(not is_zero(_base(n)) for n in others):
            break
        node = user
        found.append(node)
    return tuple(found)


def _base(node: Node) -> Node:
    while op_name(node) in ("select", "slice", "view") and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


# ---------------------------------------------------------------- what they are made of


def _between(state: Node, ends: Iterable[Node], order: dict[Node, int]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The nodes behind `ends`, as far as they are read by one another alone, and the leaves behind these."""
    inside: set[Node] = set()
    leaves: set[Node] = set()
    ends = set(ends)
    waiting = [(-order[node], node) for node in ends]  # readers before what they read
    heapq.heapify(waiting)
    seen = set(ends)
    while waiting:
        _, node = heapq.heappop(waiting)
        if node is state:
            continue
        if not _belongs(node, inside, ends):
            leaves.add(node)
            continue
        inside.add(node)
        for given in node.all_input_nodes:
            if given not in seen:
                seen.add(given)
                heapq.heappush(waiting, (-order[given], given))
    return tuple(sorted(inside, key=order.__getitem__)), tuple(sorted(leaves, key=order.__getitem__))


def _belongs(node: Node, inside: set[Node], ends: set[Node]) -> bool:
    if node.op != "call_function":
        return False
    if not node.all_input_nodes:
        return (
            isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags
        )
    if not isinstance(node.meta.get("val"), torch.Tensor):
        if node.target is not aten.sym_size.int and op_name(node) not in _REGION:
            return False
        return _is_read_inside(node, inside)
    if _is_of_sizes(node):
        return True
    if op_name(node) not in _REGION or (
        node.target is operator.getitem and op_name(node.all_input_nodes[0]) not in _REGION
    ):
        return False
    return node in ends or _is_read_inside(node, inside)


def _is_read_inside(node: Node, inside: set[Node]) -> bool:
    """Whether nobody outside reads the values of a node."""
    return all(u in inside or op_name(u) in _OF_SIZE or (not u.users and u.op != "output") for u in node.users)


def _is_of_sizes(node: Node) -> bool:
    """Whether a value follows from sizes alone: masks, identity matrices."""
    waiting, seen = [node], 0
    while waiting:
        node, seen = waiting.pop(), seen + 1
        if node.op != "call_function" or seen > 32:
            return False
        if op_name(node) in _OF_SIZE:
            continue
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
        waiting += node.all_input_nodes
    return True
