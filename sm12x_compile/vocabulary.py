"""One op, one name: synonyms that the normal form would otherwise keep apart."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .index_algebra import same_size, size_of
from .index_algebra.expr import operand

aten = torch.ops.aten

_SYNONYMS = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "concat": "cat", "concatenate": "cat", "absolute": "abs", "clip": "clamp", "linalg_matmul": "matmul",
}  # fmt: skip

_RENAMED = {
    getattr(getattr(aten, old), overload): getattr(getattr(aten, new), overload)
    for old, new in _SYNONYMS.items()
    for overload in getattr(aten, old).overloads()
    if overload in getattr(aten, new).overloads()
}
_RENAMED[aten.special_softmax.default] = aten.softmax.int
_RENAMED[aten.special_logsumexp.default] = aten.logsumexp.default
_RENAMED[aten.special_log_softmax.default] = aten.log_softmax.int


def unify(normal: GraphModule) -> None:
    """Rename synonyms in place; the values do not change."""
    for node in list(normal.graph.nodes):
        if node.op != "call_function":
            continue
        target = _RENAMED.get(node.target)
        if target is not None:
            node.target = target
        elif node.target is aten.type_as.default:
            _cast(node)
        elif node.target is aten.copy.default:
            _written_whole(node)
        elif node.target is aten.tile.default:
            rank = node.args[0].meta["val"].dim()
            if len(node.args[1]) <= rank:
                node.target = aten.repeat.default
                node.args = (node.args[0], [1] * (rank - len(node.args[1])) + list(node.args[1]))


def _written_whole(node: Node) -> None:
    """A tensor written over whole with one like it: nobody reads what it held before."""
    target, source = node.args[:2]
    if not isinstance(target, Node) or not isinstance(source, Node):
        return
    old, new = target.meta["val"], source.meta["val"]
    if (old.dtype, old.device, old.layout, new.layout) != (new.dtype, new.device, torch.strided, torch.strided):
        return
    sizes = [*zip(old.shape, new.shape, strict=False), *zip(old.stride(), new.stride(), strict=False)]
    if old.dim() == new.dim() and all(same_size(size_of(a), size_of(b)) for a, b in sizes):
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _cast(node: Node) -> None:
    source, result = operand(node), node.meta["val"]
    if source.meta["val"].device != result.device:
        return
    if source.meta["val"].dtype == result.dtype:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
        return
    node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": result.dtype}
