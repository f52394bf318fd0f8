"""Reads sums of products over routed rows: what one element of an experts' result is made of.

The index algebra follows one element back; this file adds what only routed rows have. A gather gives an index that
the run decides, ``w2[ids[t, j], d, i]``. Rows sorted by expert are numbered by a variable *bound* to the choice that
they came from: wherever the permutation is met again at that row it gives the choice, so sort and un-sort cancel.
A grouped matmul is then a plain sum whose weight is that of the row's expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import (
    Apply,
    Cases,
    Datum,
    Element,
    Expr,
    FloorDiv,
    Index,
    Mod,
    Number,
    Position,
    Reduce,
    Var,
    step,
)
from sm12x_compile.index_algebra.expr import args_of, argument, broadcast, operand, shape_of
from sm12x_compile.index_algebra.index import divide_exactly, same_size
from sm12x_compile.index_algebra.layout import layout_step
from sm12x_compile.index_algebra.predicate import as_index
from sm12x_compile.match import Refusal, refine

from .row_order import (
    counted,
    equal_nodes,
    inverse_of,
    is_ascending,
    multiset,
    permutation_of,
    rows_of_index,
    rows_written,
    searched,
    sorted_of,
)

aten = torch.ops.aten

FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
# An op of transformers for dtypes that PyTorch's does not take under torch.compile; it hides a loop with a sync.
_OPAQUE_GROUPED_MM = "transformers::grouped_mm_fallback"
FUEL, FUEL_A_NODE = 20_000, 60  # a block of experts may be a loop over hundreds


class Unreadable(Exception):
    """The subgraph is no sum over experts; with a refusal, it nearly was."""

    def __init__(self, refusal: Refusal | None = None, *, partial: bool = False) -> None:
        super().__init__(refusal.reason if refusal else "")
        self.refusal = refusal
        self.partial = partial  # a sum that goes on: the loop has more experts


def is_grouped_mm(node: Node) -> bool:
    """A matmul of groups of rows, ``(rows, weights, ends of the groups)``."""
    target = node.target
    return target is aten._grouped_mm.default or (
        isinstance(target, torch._ops.OpOverload) and target.name() == _OPAQUE_GROUPED_MM
    )


@dataclass(frozen=True)
class Guard:
    """Rows whose `index` compares so with `bound` were set to zero."""

    index: Index
    op: str
    bound: int
    node: Node


class Reader:
    """Follows elements back through one experts block, and remembers what it had to assume.

    Args:
        anchor: what selects the experts.
        end: the block's value, if it is known: the farther from the anchor, the longer it may take to read.
    """

    def __init__(self, anchor: Node, end: Node | None = None) -> None:
        self.anchor = anchor
        self.bound: dict[Var, tuple[Node, Index]] = {}
        self.guards: list[Guard] = []
        self.grouped = False
        self.clamped: list[Node] = []
        self._rows: dict[tuple[Node, Index], Var] = {}
        self._fuel = FUEL + FUEL_A_NODE * _nodes_between(anchor, end)

    # ------------------------------------------------------------ elements

    def resolve(self, element: Element) -> Element:
        """Where an element comes from, with sort and un-sort cancelled."""
        return list(self.trail(element))[-1]

    def trail(self, element: Element) -> Iterator[Element]:
        """The element, and what it is of every tensor that it was moved from."""
        while True:
            self.burn()
            element = Element(element.node, tuple(self.simplify(ix) for ix in element.index))
            yield element
            before = self._moved(element)
            if not isinstance(before, Element):
                return
            element = before

    def meaning(self, element: Element) -> Expr | None:
        """What an element is computed from, past all moves."""
        element = self.resolve(element)
        node, index = element.node, element.index
        if node.op == "call_function":
            if is_grouped_mm(node):
                return self._grouped_mm(node, index)
            found = self._accumulated(node, index)
            if found is not None:
                return found
            if node.target is aten.one_hot.default:
                return Apply("eq", (Element(operand(node), index[:-1]), Position(index[-1])), node)
            if node.target in (aten.any.dim, aten.any.dims):
                return _reduced(node, index, "any")
        return layout_step(element) or step(element)

    def simplify(self, ix: Index) -> Index:
        if not ix.has_datum():
            return ix
        total = Index(None, ix.const)
        for atom, c in ix.terms.items():
            if isinstance(atom, Datum):
                total = total + self._datum(atom.element) * c
            elif isinstance(atom, FloorDiv):
                total = total + self.simplify(atom.x).div(atom.k) * c
            elif isinstance(atom, Mod):
                total = total + self.simplify(atom.x).mod(atom.k) * c
            else:
                total = total + Index({atom: c})
        return total

    def index_of(self, expr: Expr) -> Index | None:
        value = as_index(expr)
        return None if value is None else self.simplify(value)

    def _datum(self, element: Element) -> Index:
        """The integer in an element: a choice, if the element undoes a permutation."""
        last = element
        for last in self.trail(element):
            if len(last.index) != 1:
                continue
            row = last.index[0].var
            if row is not None and row in self.bound:
                perm, image = self.bound[row]
                if equal_nodes(last.node, perm):
                    return image
                found, ids = permutation_of(perm), sorted_of(last.node)
                if found is not None and not found[1] and ids is not None and equal_nodes(ids, found[0]):
                    return self._datum(Element(ids, (image,)))
            inverse = inverse_of(last.node)
            if inverse is not None:
                return Index.of(self._row_of(inverse, last.index[0]))
        if last.node.target is aten.clamp.default:
            inside = self._unclamped(last)
            if inside is not None:
                return inside
        if isinstance(step(last), (Apply, Position, Number)):
            value = as_index(last)
            if value is not None and value != Index.of(Datum(last)):
                return self.simplify(value)
        return Index.of(Datum(last))

    def _unclamped(self, element: Element) -> Index | None:
        """What an integer is that was clamped to a range which it cannot leave: the place of a maximum."""
        from .choice import chosen_from

        low, high = argument(element.node, 1, "min"), argument(element.node, 2, "max")
        inside = self.index_of(Element(operand(element.node), element.index))
        size = None if inside is None else chosen_from(inside)
        if not isinstance(size, int) or (low is not None and low > 0) or (high is not None and high < size - 1):
            return None
        return inside

    def _row_of(self, perm: Node, image: Index) -> Var:
        """The row at which a permutation holds `image`."""
        key = (perm, image)
        if key not in self._rows:
            row = Var("s", shape_of(perm)[0])
            self._rows[key], self.bound[row] = row, (perm, image)
        return self._rows[key]

    def burn(self) -> None:
        self._fuel -= 1
        if self._fuel < 0:
            raise Unreadable

    # ------------------------------------------------------------ moves

    def _moved(self, element: Element) -> Expr | None:
        node, index = element.node, element.index
        if node.op != "call_function":
            return None
        written = rows_written(node)
        if written is not None:
            perm, values = written
            return Element(values, (Index.of(self._row_of(perm, index[0])), *index[1:]))
        if node.target is aten.gather.default:
            source, dim, places = args_of(node)[:3]
            pick = self.index_of(Element(places, index))
            dim %= len(index)
            return None if pick is None else Element(source, (*index[:dim], pick, *index[dim + 1 :]))
        if node.target is aten.embedding.default:
            table, places = args_of(node)[:2]
            pick = self.index_of(Element(places, index[:-1]))
            return None if pick is None else Element(table, (pick, index[-1]))
        return layout_step(element)

    # ------------------------------------------------------------ sums

    def _grouped_mm(self, node: Node, index: tuple[Index, ...]) -> Expr | None:
        rows, weight, ends = (*args_of(node), *([None] * 3))[:3]
        ends = node.kwargs.get("offs", ends)
        if argument(node, 3, "bias") is not None or ends is None or len(shape_of(weight)) != 3:
            return None
        if len(shape_of(rows)) != 2:
            return None
        row = index[0].var
        if row is None or row not in self.bound:
            raise Unreadable(Refusal("rows sorted by expert are not brought back to their tokens", node))
        perm, image = self.bound[row]
        found = permutation_of(perm)
        if found is None or found[1]:
            raise Unreadable(Refusal("the rows of a grouped matmul are not in ascending order of their experts", node))
        if not self._ends_of(ends, found[0], shape_of(weight)[0]):
            raise Unreadable(Refusal("the group ends are not the running count of the sorted experts", ends))
        self.grouped = True
        expert = self._datum(Element(found[0], (image,)))
        inner = Var("l", shape_of(rows)[1])
        l = Index.of(inner)
        body = Apply("mul", (Element(rows, (index[0], l)), Element(weight, (expert, l, index[1]))), node)
        return Reduce("sum", inner, body, node)

    def _ends_of(self, ends: Node, ids: Node, experts: Any) -> bool:
        """Whether ``ends[e]`` is how many of `ids` are at most e, for the experts 0..E-1."""
        rows = searched(ends)
        if rows is not None:
            return is_ascending(rows) and equal_nodes(multiset(rows), multiset(ids))
        while ends.target is aten._to_copy.default:
            ends = operand(ends)
        if ends.target is not aten.cumsum.default or ends.meta["val"].dim() != 1:
            return False
        counts = operand(ends)
        found = counted(counts)
        if found is not None:
            return found[1] == experts and equal_nodes(multiset(found[0]), multiset(ids))
        return self._counts(counts, ids)

    def _counts(self, counts: Node, ids: Node) -> bool:
        """``counts[e] = sum over all rows of [ids == e]``, however that is written."""
        from .choice import find_choices

        group = Var("e", shape_of(counts)[0])
        picks = find_choices(self, Element(counts, (Index.of(group),)), Index.of(group))
        if picks is None or len(picks) != 1 or picks[0].factors or picks[0].any:
            return False
        pick = picks[0]
        if len(pick.ids.terms) != 1 or pick.ids.const != 0:
            return False
        ((atom, c),) = pick.ids.terms.items()
        if c != 1 or not isinstance(atom, Datum):
            return False
        # Every element of the ids once: split into their dimensions, the rows are exactly these.
        split = refine([atom.element])
        rows = {p for v in pick.vars for p in (split[v].terms if v in split else (v,))}
        whole = [ix.var for ix in atom.element.subs(split).index]
        covers = all(
            v is not None and same_size(v.extent, s)
            for v, s in zip(whole, shape_of(atom.element.node), strict=True)
        )
        distinct = len(set(whole)) == len(whole) and set(whole) == rows
        return covers and distinct and equal_nodes(multiset(atom.element.node), multiset(ids))

    def _accumulated(self, node: Node, index: tuple[Index, ...]) -> Expr | None:
        """``out[t] = base[t] + sum over rows s with token[s] == t of values[s]``."""
        if node.target is aten.index_add.default and argument(node, 4, "alpha", 1) == 1:
            base, dim, place, values = args_of(node)[:4]
        elif node.target is aten.scatter_add.default:
            base, dim, whole, values = args_of(node)
            place = rows_of_index(whole)
            if place is None or any(
                not same_size(a, b) for a, b in zip(shape_of(whole), shape_of(values), strict=True)
            ):
                return None
        elif node.target is aten.index_put.default and argument(node, 3, "accumulate", False):
            base, places, values = args_of(node)[:3]
            if len(places) != 1:
                return None
            dim, place = 0, places[0]
            if len(shape_of(values)) != len(shape_of(base)):
                return None
        else:
            return None
        if dim % len(index) != 0 or len(shape_of(place)) != 1 or len(shape_of(values)) != len(index):
            return None
        found = self._rows_of_token(place, index[0], shape_of(base)[0])
        if found is None:
            return None
        choice, row = found
        total: Expr = Element(values, (row, *index[1:]))
        if choice.extent != 1:
            total = Reduce("sum", choice, total, node)
        return Apply("add", (broadcast(base, index), total), node)

    def _rows_of_token(self, place: Node, token: Index, tokens: Any) -> tuple[Var, Index] | None:
        """The rows that are added to a token, over a variable for its choices."""
        row = Var("s", shape_of(place)[0])
        value = self.index_of(Element(place, (Index.of(row),)))
        if value is None:
            return None
        data = _data(value)
        if not data:
            solved = _solve(value, Index.of(row), row.extent, token, tokens)
            return solved
        perm = next(iter(data)).element
        if len(data) > 1 or perm.index != (Index.of(row),) or permutation_of(perm.node) is None:
            reason = "rows are added to tokens that the run decides; experts that choose their tokens are not routed"
            raise Unreadable(Refusal(reason, place))
        image = Var("i", row.extent)
        self.bound[row] = (perm.node, Index.of(image))
        solved = _solve(self.simplify(value), Index.of(image), row.extent, token, tokens)
        if solved is None:
            return None
        choice, where = solved
        return choice, Index.of(self._row_of(perm.node, where))

    # ------------------------------------------------------------ what an expression depends on

    def depends(self, expr: Expr, var: Var) -> bool:
        if isinstance(expr, Element):
            return var in expr.vars() and var in self.resolve(expr).vars()
        if isinstance(expr, Apply):
            return any(self.depends(a, var) for a in expr.args)
        if isinstance(expr, Reduce):
            return self.depends(expr.body, var)
        if isinstance(expr, Cases):
            return var in expr.index.vars() or any(self.depends(e, var) for _, _, e in expr.pieces)
        return isinstance(expr, Position) and var in expr.index.vars()

    def is_zero(self, expr: Expr) -> bool:
        value = self.meaning(expr) if isinstance(expr, Element) else expr
        while isinstance(value, Apply) and value.op == "cast":
            inner = value.args[0]
            value = self.meaning(inner) if isinstance(inner, Element) else inner
        return isinstance(value, Number) and value.value == 0

    # ------------------------------------------------------------ rows outside of the experts

    def behind_guard(self, made: Expr | None) -> Expr | None:
        """What ``where(outside of the experts, 0, value)`` guards; None if it is no such thing."""
        if not (isinstance(made, Apply) and made.op == "where" and self.is_zero(made.args[1])):
            return None
        return made.args[2] if self.is_guard(made.args[0]) else None

    def is_guard(self, condition: Expr) -> bool:
        """Whether a condition says that an integer the run decides is outside a range; it is remembered."""
        value = self.meaning(condition) if isinstance(condition, Element) else condition
        if isinstance(value, Apply) and value.op in ("ge", "gt", "lt", "le"):
            a, b = (self.index_of(x) for x in value.args)
            if a is None or b is None or not isinstance(b.const, int) or not b.is_const or not _data(a):
                return False
            self.guards.append(Guard(a, value.op, b.const, value.node))
            return True
        if isinstance(value, Apply) and value.op == "or":
            return all(self.is_guard(a) for a in value.args)
        return False


def _reduced(node: Node, index: tuple[Index, ...], kind: str) -> Expr | None:
    from sm12x_compile.index_algebra.contraction import reduction

    dims = args_of(node)[1]
    if dims is None:
        return None
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    return reduction(node, index, operand(node), dims, argument(node, 2, "keepdim", False), kind)


def _nodes_between(anchor: Node, end: Node | None) -> int:
    count, node = 0, anchor
    while end is not None and node is not end and node.op != "output":
        count, node = count + 1, node.next
    return count


def _data(ix: Index) -> set[Datum]:
    found: set[Datum] = set()
    for atom in ix.terms:
        if isinstance(atom, Datum):
            found.add(atom)
        elif isinstance(atom, (FloorDiv, Mod)):
            found |= _data(atom.x)
    return found


def _solve(value: Index, row: Index, rows: Any, token: Index, tokens: Any) -> tuple[Var, Index] | None:
    """All rows with ``value(row) == token``, as a new variable for the choices and the row that it stands for."""
    choices = divide_exactly(rows, tokens)
    if choices is None:
        return None
    choice = Var("j", choices)
    if choices == 1:
        return (choice, token) if value == row else None
    if value == row.div(choices):
        return choice, token * choices + Index.of(choice)
    if value == row.mod(tokens):
        return choice, Index.of(choice) * tokens + token
    return None
