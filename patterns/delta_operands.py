"""Which nodes of a region are the operands of a gated delta rule, by their shapes and by what they cut off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.smooth import LAYOUT

from .delta_region import Region, op_name, shape

# Where batch, token and head stand in a tensor ``[..., D]``. A single token may have no dimension of its own, and
# neither need a batch of one, where the state has none: by the state's number of dimensions.
LAYOUTS = {4: ("bth", "bht", "bh"), 3: ("th", "ht", "h")}


@dataclass(frozen=True)
class Operand:
    node: Node
    layout: str


@dataclass(frozen=True)
class Reading:
    """One way to read a region as the op.

    Attributes:
        operands: q, k, v, g, beta by name.
        output: the node that is the output, and its layout.
        transposed: the state is ``[B, H, V, K]``.
        factor: the decay's operand multiplies the state as it is; else its exponential does.
        tokens: T.
    """

    operands: dict[str, Operand]
    output: Operand
    transposed: bool
    factor: bool
    tokens: Any


def readings(region: Region) -> Iterator[Reading]:
    """All readings that shapes allow; few, unless sizes coincide."""
    size = shape(region.state)
    assert size is not None
    B, H, *rest = size if len(size) == 4 else (1, *size)
    for transposed in (False, True):
        K, V = rest[::-1] if transposed else rest
        for output, tokens in _outputs(region, B, H, V):
            sizes = (LAYOUTS[len(size)], B, tokens, H, K, V)
            for nodes in _cuts(region, output.node, sizes):
                yield from _assign(region, nodes, output, transposed, sizes)


def _outputs(region: Region, B: Any, H: Any, V: Any) -> Iterator[tuple[Operand, Any]]:
    """The last node of the chain that fits some layout comes first."""
    for node in reversed(region.outputs):
        size = shape(node)
        if size is None:
            continue
        for layout in LAYOUTS[len(shape(region.state) or ())]:
            tokens = _tokens(size, layout, B, H, V)
            if tokens is not None:
                yield Operand(node, layout), tokens


def _tokens(size: Sequence[Any], layout: str, B: Any, H: Any, D: Any) -> Any:
    if len(size) != len(layout) + 1 or size[-1] != D:
        return None
    named = dict(zip(layout, size, strict=False))
    return named.get("t", 1) if named.get("b", B) == B and named["h"] == H else None


def _layouts(family: Sequence[str], size: Sequence[Any], B: Any, T: Any, heads: Any, D: Any) -> list[str]:
    """The layouts in which a shape is ``[B, T, heads, D]``; D is None for a number a head."""
    found = []
    for layout in family:
        if "t" not in layout and T != 1:
            continue
        dims = [{"b": B, "t": T, "h": heads}[x] for x in layout] + ([] if D is None else [D])
        if list(size) == dims:
            found.append(layout)
    return found


def _cuts(region: Region, output: Node, sizes: tuple[Any, ...]) -> Iterator[list[Node]]:
    """Sets of five nodes of operand shape without which no leaf reaches the region's ends.

    At first the norms and the scale of q and k stand below the cut, for the op to take over; then only what mixes
    operands does.
    """
    inside = set(region.nodes)
    ends = [output, *([region.final] if region.final is not None else [])]

    def fits(node: Node) -> bool:
        return bool(_roles(node, *sizes))

    top = _cut(region, ends, inside, fits)
    if top is None:
        return
    behind = _behind(region, top)
    lowest = {node: _lowest(region, node, set(top), ends, behind, fits) for node in top}
    normed = {node for node in top if "k" in _roles(node, *sizes)}
    mixed = [node if node in normed else lowest[node] for node in top]
    low = list(lowest.values())
    seen = []
    for nodes in (mixed, low):
        if nodes not in seen:
            seen.append(nodes)
            yield nodes


def _behind(region: Region, cut: Sequence[Node]) -> dict[Node, frozenset[Node]]:
    """Which nodes of a cut, and whether the state, each node of the region is made of."""
    behind = {node: frozenset({node}) for node in (*cut, region.state)}
    for node in region.nodes:
        if node not in behind:
            behind[node] = frozenset().union(*(behind.get(n, frozenset()) for n in node.all_input_nodes))
    return behind


def _lowest(
    region: Region, node: Node, top: set[Node], ends: list[Node], behind: dict[Node, frozenset[Node]], fits: Any
) -> Node:
    """The last node that `node` alone reaches the ends by, and back up to where it only was laid out anew or cast."""
    low, inside = node, set(region.nodes)
    grown: set[Node] = set()  # what stands behind an exponential is a decay, no longer its logarithm
    for later in region.nodes:
        if later is node or behind[later] != {node}:
            continue
        if op_name(later) in ("exp", "exp2") or any(n in grown for n in later.all_input_nodes):
            grown.add(later)
        elif fits(later) and low not in _walk(ends, (top - {node}) | {later, low}, inside, region)[0]:
            low = later
    while op_name(low) in LAYOUT and low is not node and len(low.all_input_nodes) == 1:
        (above,) = low.all_input_nodes
        if not fits(above):
            break
        low = above
    return low


def _cut(region: Region, ends: list[Node], inside: set[Node], fits: Any) -> list[Node] | None:
    """Nodes of operand shape as far up as they go."""
    above: dict[Node, bool] = {}  # whether a node of operand shape stands at or above
    top: set[Node] = set()
    data: dict[Node, bool] = {region.state: False}
    for node in (*region.leaves, *region.nodes):
        given = [n for n in node.all_input_nodes if n in above] if node in inside else []
        data[node] = (node not in inside and _is_data(node)) or any(data.get(n, False) for n in given)
        over = any(above[n] for n in given)
        if data[node] and not over and fits(node):
            top.add(node)
        above[node] = over or node in top
    for _ in range(16):
        reached, open_leaves = _walk(ends, top, inside, region)
        if not open_leaves and len(reached) <= 5:
            return reached if len(reached) == 5 else None
        if open_leaves:
            below = _lower(region, top, open_leaves, ends, inside, fits)
        else:
            below = _joining(region, set(reached), ends, inside, fits)
        if below is None:
            return None
        top = (top | {below}) - _strictly_above(below, inside)
    return None


def _walk(ends: list[Node], stop: set[Node], inside: set[Node], region: Region) -> tuple[list[Node], list[Node]]:
    """The stops reached from the ends, and the leaves with data that are reached past them."""
    reached: dict[Node, None] = {}
    leaves: dict[Node, None] = {}
    waiting, seen = list(ends), set(ends)
    while waiting:
        node = waiting.pop()
        if node is region.state:
            continue
        if node in stop:
            reached[node] = None
        elif node not in inside:
            if _is_data(node):
                leaves[node] = None
        else:
            for given in node.all_input_nodes:
                if given not in seen:
                    seen.add(given)
                    waiting.append(given)
    return list(reached), list(leaves)


def _is_data(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _lower(
    region: Region, top: set[Node], open_leaves: list[Node], ends: list[Node], inside: set[Node], fits: Any
) -> Node | None:
    """The first node of operand shape that joins an open leaf to an operand: in ``-exp(A) * softplus(a)`` A is open."""
    leaf = open_leaves[0]
    below: set[Node] = {leaf}
    for node in region.nodes:
        if not any(n in below for n in node.all_input_nodes):
            continue
        below.add(node)
        if not fits(node) or not top & _strictly_above(node, inside):
            continue
        if leaf not in _walk(ends, top | {node}, inside, region)[1]:
            return node
    return None


def _joining(region: Region, top: set[Node], ends: list[Node], inside: set[Node], fits: Any) -> Node | None:
    """The first node of operand shape that is all that becomes of several: a quotient by a norm that was clamped."""
    behind = _behind(region, list(top))
    for node in region.nodes:
        joined = behind[node]
        if len(joined) < 2 or not joined <= top or not fits(node):
            continue
        if not joined & set(_walk(ends, top | {node}, inside, region)[0]):
            return node
    return None


def _strictly_above(node: Node, inside: set[Node]) -> set[Node]:
    found: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        n = waiting.pop()
        if n not in found:
            found.add(n)
            if n in inside:
                waiting += n.all_input_nodes
    return found


def _roles(node: Node, family: Sequence[str], B: Any, T: Any, H: Any, K: Any, V: Any) -> dict[str, list[str]]:
    """What an operand of this shape could be, with the layouts in which it is."""
    size = shape(node)
    if size is None or not node.meta["val"].dtype.is_floating_point:
        return {}
    found: dict[str, list[str]] = {}
    for heads in _head_counts(size, H):
        keys = _layouts(family, size, B, T, heads, K)
        if keys:
            found["k"] = found["q"] = keys
    for role, D in (("v", V), ("beta", None)):
        layouts = _layouts(family, size, B, T, H, D)
        if layouts:
            found[role] = layouts
    g = [*_layouts(family, size, B, T, H, None), *_layouts(family, size, B, T, H, K)]
    return {**found, "g": g} if g else found


def _head_counts(size: Sequence[Any], H: Any) -> list[Any]:
    """H, and what divides it."""
    fewer = [n for n in size if isinstance(n, int) and isinstance(H, int) and 0 < n < H and H % n == 0]
    return [*dict.fromkeys(fewer), H]


def _assign(
    region: Region, nodes: list[Node], output: Operand, transposed: bool, sizes: tuple[Any, ...]
) -> Iterator[Reading]:
    roles = {node: _roles(node, *sizes) for node in nodes}
    decay = _decay_of(region, nodes)
    for order in permutations(nodes):
        named = dict(zip(("q", "k", "v", "g", "beta"), order, strict=True))
        if decay is not None and named["g"] is not decay:
            continue
        if any(role not in roles[node] for role, node in named.items()):
            continue
        if shape(named["q"]) is None or _heads(roles, named, "q", sizes) != _heads(roles, named, "k", sizes):
            continue
        for layouts in _layout_choices(sizes[0], roles, named):
            operands = {r: Operand(n, layouts[r]) for r, n in named.items()}
            yield Reading(operands, output, transposed, decay is None, sizes[2])


def _layout_choices(
    family: Sequence[str], roles: dict[Node, dict[str, list[str]]], named: dict[str, Node]
) -> Iterator[dict[str, str]]:
    """One layout for all first, then each its own."""
    options = {r: roles[n][r] for r, n in named.items()}
    for layout in family:
        if all(layout in o for o in options.values()):
            yield dict.fromkeys(options, layout)
    if len({tuple(o) for o in options.values()}) > 1:
        yield {r: o[0] for r, o in options.items()}


def _heads(roles: Any, named: dict[str, Node], role: str, sizes: tuple[Any, ...]) -> Any:
    size = shape(named[role])
    assert size is not None
    return dict(zip(roles[named[role]][role][0], size, strict=False))["h"]


def _decay_of(region: Region, nodes: list[Node]) -> Node | None:
    """The operand that alone stands behind an exponential."""
    behind = _behind(region, nodes)
    for node in region.nodes:
        if op_name(node) in ("exp", "exp2") and len(behind[node]) == 1:
            return next(iter(behind[node]))
    return None
