"""Where a graph waits for the GPU: a value that the host needs and the device computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..match import source_of
from ..normalize import example_value

aten = torch.ops.aten
_MASKED_WRITES = (aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default)


def host_syncs(gm: GraphModule) -> list[str]:
    """Every operation that reads the device's memory on the host, with the user's line, in order.

    Either its result lies on the CPU and an operand on the GPU (``.cpu()``), or a size or number of its result is not
    known before it has run (``nonzero()``, ``item()``, ``x[mask]``).
    """
    known: set[Any] = set()
    found: list[str] = []
    for node in gm.graph.nodes:
        new = _unbacked(node) - known
        known |= new
        if node.op not in ("call_function", "call_method") or not _reads_cuda(node):
            continue
        if new or _moves_to_host(node) or _counts_a_mask(node):
            place = source_of(node)
            found.append(f"{_name(node)} at {place}" if place else _name(node))
    return list(dict.fromkeys(found))


def _reads_cuda(node: Node) -> bool:
    return any(_on(example_value(x), "cuda") for x in node.all_input_nodes)


def _on(value: Any, device: str) -> bool:
    return any(isinstance(v, torch.Tensor) and v.device.type == device for v in pytree.tree_leaves(value))


def _moves_to_host(node: Node) -> bool:
    return _on(example_value(node), "cpu")


def _counts_a_mask(node: Node) -> bool:
    """``x[mask] = values``: which value goes where depends on how many elements the mask has before it."""
    if node.target not in _MASKED_WRITES:
        return False
    indices, values = node.args[1], node.args[2]
    masks = [x for x in pytree.tree_leaves(indices) if isinstance(x, Node)]
    value = example_value(values) if isinstance(values, Node) else None
    return (
        any(getattr(example_value(x), "dtype", None) in (torch.bool, torch.uint8) for x in masks)
        and isinstance(value, torch.Tensor)
        and value.dim() > 0
    )


def _unbacked(node: Node) -> set[Any]:
    symbols: set[Any] = set()
    for leaf in pytree.tree_leaves(example_value(node)):
        if isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
            symbols |= set(free_unbacked_symbols(leaf))
    return symbols


def _name(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.name().removesuffix(".default")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
