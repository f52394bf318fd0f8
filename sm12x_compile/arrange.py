"""Lay a tensor out again from an index map, with views alone.

An element such as ``qkv[b, s, 192*h + 64 + d]`` says where ``k[b, h, s, d]`` lives; this file finds the slices,
splits and permutation that bring the tensor into that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from .index_algebra import Element, Index, Size, Var, known_nonnegative, same_size, size_of
from .index_algebra.index import add, divide_exactly, mul

if TYPE_CHECKING:
    from .graph_view import GraphView

aten = torch.ops.aten


class CannotArrange(Exception):
    """An index map that views cannot express."""


def arrange(graph: GraphView, element: Element, groups: Sequence[Sequence[Var]], *, expand: bool = True) -> Node:
    """Lay a tensor out again: dim k of the result runs over the variables of ``groups[k]``, row-major.

    ``result[groups] == element`` for every value of the variables. An empty group is a dimension of size 1.
    Variables that the element does not depend on are broadcast: expanded if `expand`, else left at size 1 where
    a whole group is so.

    Raises:
        CannotArrange: the index map is not a strided view of the tensor.
    """
    node, slots = _carve(graph, element)
    wanted: list[Var | None] = [v for group in groups for v in (group or (None,))]
    if {v for v in slots if v is not None} - set(wanted):
        raise CannotArrange(f"{element} depends on more than {wanted}")
    # Dimensions of size 1 serve empty groups; those left over go.
    spare = max(0, slots.count(None) - wanted.count(None))
    for dim in reversed(range(len(slots))):
        if spare and slots[dim] is None:
            node = graph.call(aten.select.int, node, dim, 0)
            del slots[dim]
            spare -= 1
    units = [k for k, v in enumerate(slots) if v is None]
    order: list[int] = []
    absent: list[int] = []
    for k, v in enumerate(wanted):
        if v is None and units:
            order.append(units.pop(0))
        elif v is not None and v in slots:
            order.append(slots.index(v))
        else:
            absent.append(k)
    if order != sorted(order):
        node = graph.call(aten.permute.default, node, order)
    for k in absent:
        node = graph.call(aten.unsqueeze.default, node, k)
    return _merge(graph, node, groups, wanted, set(absent), expand)


def _merge(
    graph: GraphView, node: Node, groups: Sequence[Sequence[Var]], wanted: list[Var | None], absent: set[int],
    expand: bool,
) -> Node:  # fmt: skip
    """Expand what is broadcast and join the variables of each group."""
    full: list[int | Node] = []
    merged: list[int | Node] = []
    position = 0
    for group in groups:
        places = range(position, position + max(1, len(group)))
        gone = [p in absent and wanted[p] is not None for p in places]
        # A group that is broadcast only in part must be expanded before it is joined.
        grow = expand or not all(gone)
        size: Size = 1
        for p, v in zip(places, group, strict=False):
            full.append(graph.size(v.extent) if p in absent and grow else -1)
            size = mul(size, v.extent) if grow else size
        if not group:
            full.append(-1)
        merged.append(graph.size(size) if len(group) != 1 else -1)
        position = places.stop
    if any(n != -1 for n in full):
        node = graph.call(aten.expand.default, node, full)
    if any(len(group) > 1 for group in groups):
        shape = [graph.size(size_of(s)) for s in node.meta["val"].shape]
        firsts, position = [], 0
        for group in groups:
            firsts.append(position)
            position += max(1, len(group))
        sizes = [m if m != -1 else shape[f] for m, f in zip(merged, firsts, strict=True)]
        node = graph.call(aten.reshape.default, node, sizes)
    return node


def _carve(graph: GraphView, element: Element) -> tuple[Node, list[Var | None]]:
    """Slice and split the dims of the source until each is one variable, or of size 1."""
    node = element.node
    slots: list[Var | None] = []
    for ix in element.index:
        node, names = _carve_dim(graph, node, len(slots), ix)
        slots += names
    names = [v for v in slots if v is not None]
    if len(set(names)) != len(names):
        raise CannotArrange(f"{element} uses an index twice")
    return node, slots


def _carve_dim(graph: GraphView, node: Node, dim: int, ix: Index) -> tuple[Node, list[Var | None]]:
    """Carve one source dim, which stands at position `dim`; returns the variables of what it became."""
    slots: list[Var | None] = []
    terms = list(ix.terms.items())
    const = ix.const
    while True:
        size = size_of(node.meta["val"].shape[dim])
        if not terms:
            return narrow(graph, node, dim, const, 1), [*slots, None]
        largest = max(range(len(terms)), key=lambda k: _Order(terms[k][1]))
        var, stride = terms.pop(largest)
        if not isinstance(var, Var):
            raise CannotArrange(f"index {ix} is not affine")
        if stride == 1:
            if terms:
                raise CannotArrange(f"index {ix} overlaps")
            return narrow(graph, node, dim, const, var.extent), [*slots, var]
        blocks = divide_exactly(size, stride)
        start, inner = _split_const(const, stride)
        if not Index(dict(terms), inner).within(0, stride):
            raise CannotArrange(f"index {ix} overlaps")
        if blocks is None:
            blocks = add(start, var.extent)
            end = mul(blocks, stride)
            if not known_nonnegative(add(size, mul(end, -1))):
                raise CannotArrange(f"index {ix} leaves its dimension")
            node = narrow(graph, node, dim, 0, end)
        shape = [graph.size(size_of(s)) for s in node.meta["val"].shape]
        shape[dim : dim + 1] = [graph.size(blocks), graph.size(stride)]
        node = graph.call(aten.view.default, node, shape)
        node = narrow(graph, node, dim, start, var.extent)
        slots.append(var)
        dim, const = dim + 1, inner


def narrow(graph: GraphView, node: Node, dim: int, start: Size, length: Size) -> Node:
    """``node.narrow(dim, start, length)``, or the node itself where that is all of it."""
    if start == 0 and same_size(size_of(node.meta["val"].shape[dim]), length):
        return node
    return graph.call(aten.slice.Tensor, node, dim, graph.size(start), graph.size(add(start, length)))


class _Order:
    """Orders strides; symbolic ones by what is known of their difference."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def __lt__(self, other: _Order) -> bool:
        return not same_size(self.size, other.size) and known_nonnegative(add(other.size, mul(self.size, -1)))


def _split_const(const: Size, stride: Size) -> tuple[Size, Size]:
    if isinstance(const, int) and isinstance(stride, int):
        return const // stride, const % stride
    exact = divide_exactly(const, stride)
    return (exact, 0) if exact is not None else (0, const)
