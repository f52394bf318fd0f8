"""Weights that are stored as MXFP4 and decoded in the forward pass.

The equation (OCP Microscaling Formats v1.0, 2023)::

    W[.., n, k] = e2m1(nibble k mod 2 of packed[.., n, k div 2]) * 2^(scales[.., n, k div 32] - 127)

`mark_packed` finds tensors of which each element is that. The index algebra says which byte and which scale an
element comes from; what these two become is tabulated (`fp4_table.py`). Where it holds, readers get the tensor through
``sm12x::either(dense, claim)``, whose claim is laid out from one ``sm12x::mxfp4_weight(packed, scales)``; patterns look
through it and take the packed weight. What no pattern took is given back by `unmark`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sm12x_compile.index_algebra import Datum, Element, Index, Var
from sm12x_compile.index_algebra.expr import args_of, shape_of
from sm12x_compile.index_algebra.index import flatten
from sm12x_compile.match import CannotArrange, GraphView, Refusal

from .fp4_table import NVFP4, Decoding, Undecodable, compare, is_bytes

aten = torch.ops.aten
EITHER = torch.ops.sm12x.either.default
WEIGHT = torch.ops.sm12x.mxfp4_weight.default
_FLOATS = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
_GATHERS = {aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.embedding.default}


@dataclass(frozen=True)
class Packed:
    """A tensor of which each element is one code with its scale.

    Attributes:
        node: the tensor.
        packed, scales: where its bytes are: elements over `lead` and the rest.
        lead: row of the packed weight, as a function of the variables.
        column: which column of the row.
        dims: the variables of each of the node's dims.
    """

    node: Node
    packed: Element
    scales: Element
    lead: tuple[Index, ...]
    column: Index
    dims: tuple[tuple[Var, ...], ...]
    tags: dict[str, Any] = field(default_factory=dict)


def mark_packed(graph: GraphView) -> list[Refusal]:
    """Put claims on all packed weights of a graph; returns what nearly was one."""
    weights: dict[Any, Node] = {}
    refusals: list[Refusal] = []
    for node, leaves in _candidates(graph):
        found = read_packed(node, leaves)
        if isinstance(found, Refusal):
            refusals.append(found)
        if not isinstance(found, Packed):
            continue
        try:
            with graph.graph.inserting_after(node):
                _claim(graph, found, weights)
        except CannotArrange as why:
            refusals.append(Refusal(f"no view expresses the packed weight: {why}", node, found.tags))
    return refusals + _held_tables(graph)


def _held_tables(graph: GraphView) -> list[Refusal]:
    """Codes that are looked up in a table which the module holds: nobody knows what it holds at the next call."""
    tables = [n for n in graph.graph.find_nodes(op="placeholder") if _dtype(n) in _FLOATS]
    reason = (
        "four-bit codes are looked up in a buffer, which may change between calls; make the table in forward, as "
        "torch.tensor([...]), so that its values are known"
    )
    return [
        Refusal(reason, user)
        for table in tables
        for shape in (table.meta["val"].shape,)
        if len(shape) == 1 and isinstance(shape[0], int) and shape[0] in (8, 16)  # to ask a symbol would be a guard
        for user in table.users
        if user.target in _GATHERS and _from_bytes(user)
    ]


def _from_bytes(node: Node, depth: int = 12) -> bool:
    if depth == 0 or node.op == "placeholder":
        return node.op == "placeholder" and is_bytes(node)
    return any(_from_bytes(n, depth - 1) for n in node.all_input_nodes)


def unmark(graph: GraphView) -> list[Node]:
    """Give readers that no pattern replaced their dense weight back; returns these weights."""
    left = []
    for node in graph.graph.find_nodes(op="call_function", target=EITHER):
        dense = args_of(node)[0]
        if node.users:
            left.append(dense)
            node.replace_all_uses_with(dense)
        graph.graph.erase_node(node)
    return left


def _candidates(graph: GraphView) -> Iterator[tuple[Node, list[Node]]]:
    """Floating-point tensors that are computed from bytes and constants alone, where these computations end."""
    leaves: dict[Node, set[Node]] = {}
    constants: set[Node] = set()
    order: list[Node] = []
    if not any(map(is_bytes, graph.graph.find_nodes(op="placeholder"))):
        return
    for node in list(graph.graph.nodes):
        if node.op == "placeholder" and is_bytes(node):
            leaves[node] = {node}
        elif node.op in ("get_attr", "call_function") and all(n in constants for n in node.all_input_nodes):
            constants.add(node)
        elif node.op == "call_function":
            inputs = [n for n in node.all_input_nodes if n not in constants]
            if node.target in _GATHERS and _dtype(node) not in _FLOATS:  # bytes of the rows that the run decides
                inputs = [n for n in inputs if n in leaves or _dtype(n) not in (torch.int64, torch.int32)]
            if inputs and all(n in leaves for n in inputs):
                leaves[node] = set().union(*(leaves[n] for n in inputs))
                order.append(node)
    for node in order:
        value = node.meta["val"]
        ends = any(user not in leaves for user in node.users)
        if ends and _dtype(node) in _FLOATS and value.dim() >= 2:
            yield node, sorted(leaves[node], key=lambda n: -n.meta["val"].numel())


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


# ---------------------------------------------------------------- reading


def read_packed(node: Node, leaves: list[Node]) -> Packed | Refusal | None:
    """What a tensor computed from the bytes `leaves` (largest first) is; None if nothing like a packed weight."""
    if len(leaves) == 1 and _is_twice(node, leaves[0]):
        return Refusal(_other_scales(node), node)
    if len(leaves) != 2 or any(not isinstance(s, int) for n in (node, *leaves) for s in n.meta["val"].shape):
        return None
    refusal: Refusal | None = None
    by_place = False
    for index, dims, column, g, j in _splits(node):
        decoding = Decoding(leaves[0], leaves[1])
        try:
            low, high = (decoding.value(Element(node, index).subs({_SIDE: Index(None, c)})) for c in (0, 1))
        except Undecodable as why:
            if refusal is None or (by_place and not why.positional):
                refusal, by_place = Refusal(why.reason, why.node), why.positional
            continue
        except RecursionError:
            return Refusal("it is decoded in too many pieces", node)
        if len(decoding.reads) < 2:
            return None
        packed, scales = (decoding.reads[n] for n in leaves)
        lead = _rows(packed, g * 16 + j)
        if lead is None:
            refusal = refusal or Refusal("the two codes of a byte are not neighbours along one dimension", node)
            continue
        if scales.node.meta["val"].dtype in _E4M3:
            return Refusal(NVFP4, node)
        scale_lead = _rows(scales, g)
        if scale_lead is None:
            return Refusal("a scale does not belong to 32 neighbours, the block of MXFP4", node)
        if flatten(*lead) != flatten(*scale_lead) or math.prod(lead[1]) != math.prod(scale_lead[1]):
            return Refusal("codes and scales are taken from different rows", node)
        reason, tags = compare(low, high)
        if reason is not None:
            return Refusal(reason, node)
        return Packed(node, packed, scales, lead[0], column, dims, tags)
    return refusal if _is_twice(node, leaves[0]) else None


_SIDE = Var("c", 2)


def _splits(
    node: Node,
) -> Iterator[tuple[tuple[Index, ...], tuple[tuple[Var, ...], ...], Index, Index, Index]]:
    """Ways in which a tensor's dims may hold the columns ``32 g + 2 j + c``, the last dims first.

    Yields the index of an element, the variables of each dim, the column over these variables, g and j.
    """
    shape = node.meta["val"].shape
    j = Var("j", 16)
    side = Index.of(_SIDE)
    for dim in reversed(range(len(shape))):
        for width in (1, 2, 3):
            sizes = tuple(shape[dim : dim + width])
            if len(sizes) < width:
                continue
            total = 1
            for s in sizes:
                total *= s
            if total % 32 or total == 0:
                continue
            g = Var("g", total // 32)
            at = Index() if total == 32 else Index.of(g)
            blocks = () if total == 32 else (g,)
            column: tuple[Index, ...]
            inner: tuple[tuple[Var, ...], ...]
            whole = at * 32 + Index.of(j) * 2 + side
            if width == 1:
                every = Var("k", total)
                column, inner = (whole,), ((every,),)
                whole = Index.of(every)
            elif width == 2 and sizes[1] == 32:
                column, inner = (at, Index.of(j) * 2 + side), (blocks, (j, _SIDE))
            elif width == 2 and sizes[1] == 2:
                column, inner = (at * 16 + Index.of(j), side), ((*blocks, j), (_SIDE,))
            elif width == 3 and sizes[1:] == (16, 2):
                column, inner = (at, Index.of(j), side), (blocks, (j,), (_SIDE,))
            else:
                continue
            others = [Var("abcdefnm"[k % 8], s) for k, s in enumerate(shape)]
            free = [Index() if s == 1 else Index.of(v) for v, s in zip(others, shape, strict=True)]
            index = (*free[:dim], *column, *free[dim + width :])
            single = [() if s == 1 else (v,) for v, s in zip(others, shape, strict=True)]
            yield index, (*single[:dim], *inner, *single[dim + width :]), whole, at, Index.of(j)


def _rows(element: Element, position: Index) -> tuple[tuple[Index, ...], tuple[Any, ...]] | None:
    """The leading indices (and sizes) of an element whose others run over `position` of a row."""
    shape = shape_of(element.node)
    for k in reversed(range(len(shape) + 1)):
        if flatten(element.index[k:], shape[k:]) == position and not _uses(element.index[:k], position):
            # All of a row, not a part: positions begin at its start and have its length.
            extent = 1
            for s in shape[k:]:
                extent *= s  # type: ignore[assignment, operator]
            span = position.bounds()
            if span is not None and span[0] == 0 and span[1] == extent - 1:
                return element.index[:k], shape[:k]
    return None


def _uses(index: tuple[Index, ...], position: Index) -> bool:
    return any(ix.vars() & position.vars() for ix in index)


def _is_twice(node: Node, packed: Node) -> bool:
    """Whether there are two numbers for each byte: then it looks like four bits."""
    return bool(node.meta["val"].numel() == 2 * packed.meta["val"].numel())


_E4M3 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz}


def _other_scales(node: Node) -> str:
    """What scales codes that no byte scales."""
    waiting = [(n, 6) for user in node.users for n in user.all_input_nodes if n is not node]
    while waiting:
        at, depth = waiting.pop()
        value = at.meta.get("val")
        if isinstance(value, Tensor) and value.dtype in _E4M3:
            return NVFP4
        waiting += [(n, depth - 1) for n in at.all_input_nodes if depth]
    return "its four-bit codes have no E8M0 scales: integers or a table of numbers, not MXFP4"


# ---------------------------------------------------------------- claims


def _claim(graph: GraphView, found: Packed, weights: dict[Any, Node]) -> None:
    """Let the readers of a dense weight see what it is."""
    dtype = found.node.meta["val"].dtype
    key = (found.packed.node, found.scales.node, len(found.lead), dtype)
    if key not in weights:
        bytes_ = (found.packed.node, found.scales.node)
        latest = max(bytes_)
        while latest.next.op == "placeholder":
            latest = latest.next
        with graph.graph.inserting_before(latest.next):
            weights[key] = _weight(graph, found, dtype)
            weights[key].meta[TAGS] = found.tags
    element = Element(weights[key], (*found.lead, found.column))
    with graph.graph.inserting_before(found.node.next):
        claim = graph.arrange(_gathered(graph, element), found.dims)
        either = graph.call(EITHER, found.node, claim)
    for name in ("stack_trace", "nn_module_stack"):
        if name in found.node.meta:
            either.meta[name] = found.node.meta[name]
    graph.replace(found.node, either)


TAGS = "sm12x_mxfp4_tags"


def _weight(graph: GraphView, found: Packed, dtype: torch.dtype) -> Node:
    """The whole weight ``[.., n, k]`` from its bytes, each laid out as ``[.., n, bytes of a row]``."""
    rows = [int(s) for s in shape_of(found.packed.node)[: len(found.lead)]]
    laid_out = []
    for node in (found.packed.node, found.scales.node):
        value = node.meta["val"]
        count = 1
        for s in rows:
            count *= s
        shape = [*rows, value.numel() // max(1, count)]
        if list(value.shape) != shape:
            node = graph.call(aten.reshape.default, node, shape)
        if value.dtype != torch.uint8:
            node = graph.call(aten.view.dtype, node, torch.uint8)
        laid_out.append(node)
    return graph.call(WEIGHT, *laid_out, dtype)


def _gathered(graph: GraphView, element: Element) -> Element:
    """The element with a row that the run decides made a gather of rows."""
    places = [k for k, ix in enumerate(element.index) if ix.has_datum()]
    if not places:
        return element
    at = places[0]
    ((atom, c),) = list(element.index[at].terms.items())[:1]
    if len(places) > 1 or element.index[at] != Index.of(atom) or not isinstance(atom, Datum) or c != 1:
        raise CannotArrange("rows are gathered in a way that is not understood")
    variables = sorted(atom.element.vars(), key=lambda v: v.serial)
    ids = graph.arrange(atom.element, [(v,) for v in variables])
    rows = graph.call(aten.index.Tensor, element.node, [*[None] * at, ids])
    return Element(rows, (*element.index[:at], *map(Index.of, variables), *element.index[at + 1 :]))


__all__ = ["EITHER", "TAGS", "WEIGHT", "Packed", "mark_packed", "read_packed", "unmark"]
