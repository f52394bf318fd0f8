"""States that live in an input of the graph and are written back: the pools that update ops mutate in place.

In the normal form a state that the user updates in place is a placeholder, read by the step, and a ``copy_`` at the
end. An op that updates a state mutates the *whole* placeholder; that is the same only if nobody else reads it, and
if what is written is the op's new state and nothing else sees it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Node

from sm12x_compile.match import GraphView

aten = torch.ops.aten
FEW_TOKENS = 8  # what an update op is for; a longer stretch is a prefill
_READS_SIZES = {aten.sym_size.int}


def write_of(pool: Node) -> Node | None:
    """The ``copy_`` that writes a placeholder, if there is exactly one."""
    if pool.op != "placeholder":
        return None
    writes = [u for u in pool.users if u.target is aten.copy_.default and u.args[0] is pool]
    return writes[0] if len(writes) == 1 else None


def readers(pool: Node) -> set[Node]:
    """Who reads the data of a placeholder: not its sizes, nor as the target of a write."""
    found = set()
    for user in pool.users:
        targets = user.target in (aten.copy_.default, aten.copy.default) and user.args[0] is pool
        if user.target not in _READS_SIZES and not (targets and user.args[1] is not pool):
            found.add(user)
    return found


def is_private(pool: Node, allowed: Collection[Node]) -> bool:
    """Whether every reader of a placeholder leads into `allowed` and nowhere else."""
    waiting = list(readers(pool))
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in allowed or node in seen:
            continue
        if node.op != "call_function" or not node.users:
            return False
        seen.add(node)
        waiting += list(node.users)
    return True


def every_row(graph: GraphView, like: Node) -> Node:
    """``slots`` for a pool with one state a row of the batch: ``arange(B)``, once in a graph."""
    value = like.meta["val"]
    size = value.shape[0]
    for node in graph.graph.find_nodes(op="call_function", target=aten.arange.default):
        if node.meta.get("sm12x_slots") == (size, value.device):
            return node
    first = next(n for n in graph.graph.nodes if n.op != "placeholder")
    with graph.graph.inserting_before(first):
        rows = size if isinstance(size, int) else graph.call(aten.sym_size.int, like, 0)
        node = graph.call(aten.arange.default, rows, dtype=torch.int64, device=value.device)
    node.meta["sm12x_slots"] = (size, value.device)
    return node
