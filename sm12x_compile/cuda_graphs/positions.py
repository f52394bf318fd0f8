"""Positions that the host counts, given to the attention ops as tensors.

The ops take a query's position as a tensor (``q_offset``) and as a number (``q_shift``). A number that changes from
call to call would be a constant of a recording. `host_values` makes tensors of ints that reach tensors, so a number
that is no size becomes one here, before a kernel is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols

aten = torch.ops.aten


def positions_as_tensors(gm: GraphModule, calls: Iterable[Node]) -> None:
    """Replace ``q_shift`` by ``q_offset`` in place, where it is a symbolic number that no size depends on.

    Args:
        gm: a graph in normal form.
        calls: calls of semantic ops in it.
    """
    sizes = {
        symbol
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
        for symbol in free_symbols(node.meta["val"])
    }
    for call in calls:
        shift = call.kwargs.get("q_shift")
        if isinstance(shift, Node) and not free_symbols(shift.meta["val"]) & sizes:
            _move(gm, call, shift)


def _move(gm: GraphModule, call: Node, shift: Node) -> None:
    q: torch.Tensor = call.all_input_nodes[0].meta["val"]
    offset = call.kwargs.get("q_offset")
    with gm.graph.inserting_before(call):
        tensor = gm.graph.call_function(
            aten.full.default, ([], shift), {"dtype": torch.int64, "device": q.device, "pin_memory": False}
        )
        tensor.meta["val"] = q.new_empty((), dtype=torch.int64)
        if isinstance(offset, Node):
            whole = gm.graph.call_function(aten.add.Tensor, (offset, tensor))
            whole.meta["val"] = offset.meta["val"].new_empty(offset.meta["val"].shape)
            tensor = whole
    call.kwargs = {**{k: v for k, v in call.kwargs.items() if k != "q_shift"}, "q_offset": tensor}
