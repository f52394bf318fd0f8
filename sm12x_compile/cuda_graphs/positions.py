"""Positions that the host counts, given to the attention ops as tensors.

The ops take a query's position as a tensor (``q_offset``) and as a number (``q_shift``). A number that changes from
call to call would be a constant of a recording. `host_values` makes tensors of ints that reach tensors, so a number
that is no size becomes one here, before a kernel is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
        given = _by_name(call)
        shift = given.get("q_shift")
        if isinstance(shift, Node) and not free_symbols(shift.meta["val"]) & sizes:
            _move(gm, call, given, shift)


def _by_name(call: Node) -> dict[str, Any]:
    assert isinstance(call.target, torch._ops.OpOverload)
    names = [argument.name for argument in call.target._schema.arguments]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def _move(gm: GraphModule, call: Node, given: dict[str, Any], shift: Node) -> None:
    q: torch.Tensor = call.all_input_nodes[0].meta["val"]
    offset = given.get("q_offset")
    with gm.graph.inserting_before(call):
        tensor = gm.graph.call_function(
            aten.full.default, ([], shift), {"dtype": torch.int64, "device": q.device, "pin_memory": False}
        )
        tensor.meta["val"] = q.new_empty((), dtype=torch.int64)
        if isinstance(offset, Node):
            whole = gm.graph.call_function(aten.add.Tensor, (offset, tensor))
            whole.meta["val"] = offset.meta["val"].new_empty(offset.meta["val"].shape)
            tensor = whole
    named = {**{name: value for name, value in given.items() if name != "q_shift"}, "q_offset": tensor}
    operands = 3  # stay where they are: q, k and v, or what the op has in their place
    call.args, call.kwargs = call.args[:operands], dict(list(named.items())[operands:])
