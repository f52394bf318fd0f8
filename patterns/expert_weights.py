"""The experts' matrices as operands of ``sm12x::moe``: one tensor for all experts, gate and up joined where they lie
side by side, in the layout in which they are stored. Views only, but for experts that own their tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Element, Index, Size, Var, same_size
from sm12x_compile.index_algebra.expr import shape_of
from sm12x_compile.index_algebra.index import mul
from sm12x_compile.match import GraphView, Refusal

from .choice import Choice
from .choice_rows import roll, rolled_choices, same_choices, same_counts
from .experts import Block, Expert
from .products import rename
from .routed import Unreadable

aten = torch.ops.aten


@dataclass(frozen=True)
class Matrix:
    """One weight or bias of all experts: `parts` is a single element over ``Weights.expert``, or one an expert."""

    parts: tuple[Element, ...]

    def subs(self, mapping: dict[Var, Index]) -> Matrix:
        return Matrix(tuple(p.subs(mapping) for p in self.parts))


@dataclass(frozen=True)
class Weights:
    """All weights of a block over common variables: expert, feature, inner, width."""

    expert: Var
    inner: Var
    width: Var
    w2: Matrix
    gate: Matrix
    up: Matrix | None
    w2_bias: Matrix | None
    gate_bias: Matrix | None
    up_bias: Matrix | None

    @property
    def stacked(self) -> bool:
        return len(self.w2.parts) > 1 or len(self.gate.parts) > 1


_NAMES = ("w2", "gate", "up", "w2_bias", "gate_bias", "up_bias")


def gather_experts(block: Block) -> tuple[Weights, tuple[Choice, ...]]:
    """The weights that all terms of a block agree on, and the choices of all of them.

    Raises:
        Unreadable: the terms are not experts of one kind.
    """
    first = block.experts[0]
    inner, width = first.inner, first.width
    common = [_with_variables(e, inner, width) for e in block.experts]
    for e in common[1:]:
        if e.x != first.x or e.casts != first.casts:
            raise Unreadable(Refusal("the experts work on different inputs", block.node))
        if _kind(e) != _kind(first) or any(
            (getattr(e, n) is None) != (getattr(first, n) is None) for n in _NAMES
        ):
            raise Unreadable(Refusal("the experts differ in their activation or their biases", block.node))
    numbered = [e for e in common if e.slot is not None and e.slot.is_const]
    if numbered and len(numbered) == len(common):
        return _unrolled(block, common, inner, width)
    if numbered:
        raise Unreadable
    expert = Var("e", _extent(common[0]))
    general = [_over(e, expert) for e in common]
    if any(getattr(e, n) != getattr(general[0], n) for e in general[1:] for n in _NAMES):
        raise Unreadable(Refusal("the sum runs over experts of several blocks", block.node))
    choices = rolled_choices(block.reader, tuple(c for e in common for c in e.choices))
    found = general[0]
    matrices = {n: _matrix(getattr(found, n)) for n in _NAMES}
    return Weights(expert, inner, width, **matrices), choices  # type: ignore[arg-type]


def _matrix(element: Element | None) -> Matrix | None:
    return None if element is None else Matrix((element,))


def _kind(e: Expert) -> tuple[object, ...]:
    return e.activation.name, e.activation.alpha, e.activation.limit, e.weight_on


def _with_variables(e: Expert, inner: Var, width: Var) -> Expert:
    named = {e.inner: Index.of(inner), e.width: Index.of(width)}
    if not same_size(e.inner.extent, inner.extent) or not same_size(e.width.extent, width.extent):
        raise Unreadable
    changed = {n: v.subs(named) for n in (*_NAMES, "x", "given") if (v := getattr(e, n)) is not None}
    return replace(e, **changed)


def _extent(e: Expert) -> Size:
    """How many experts the weights hold."""
    assert e.slot is not None
    if (var := e.slot.var) is not None:
        return var.extent
    places = [k for k, ix in enumerate(e.w2.index) if ix == e.slot]
    return shape_of(e.w2.node)[places[0]] if places else 0


def _over(e: Expert, expert: Var) -> Expert:
    """An expert's weights with its slot as the variable `expert`."""
    slot = e.slot
    assert slot is not None

    def general(element: Element | None) -> Element | None:
        if element is None:
            return None
        if (var := slot.var) is not None:
            if not same_size(var.extent, expert.extent):
                raise Unreadable(Refusal("the sum runs over all experts here and over some there", element.node))
            return element.subs({var: Index.of(expert)})
        places = [k for k, ix in enumerate(element.index) if ix.has_datum()]
        if len(places) != 1 or not same_size(shape_of(element.node)[places[0]], expert.extent):
            raise Unreadable(Refusal("the experts' matrices differ in how many experts they hold", element.node))
        return Element(element.node, tuple(Index.of(expert) if ix.has_datum() else ix for ix in element.index))

    changed: dict[str, Any] = {n: general(getattr(e, n)) for n in _NAMES}
    return replace(e, **changed)


def _unrolled(block: Block, common: list[Expert], inner: Var, width: Var) -> tuple[Weights, tuple[Choice, ...]]:
    """A loop over experts, rolled up again: the copies are one expression at e = 0, 1, 2, ..."""
    ordered = _one_a_number(common)
    if [_number(e) for e in ordered] != list(range(len(ordered))):
        raise Unreadable(Refusal("the loop over the experts does not take each of 0, 1, 2, ... once", block.node))
    if any(not same_choices(block.reader, ordered[0].choices, e.choices) for e in ordered[1:]):
        ordered = _looked_up(block, ordered)
    if any(not same_choices(block.reader, ordered[0].choices, e.choices) for e in ordered[1:]):
        why = Refusal("the experts of the loop are weighted by different routings", block.node)
        raise Unreadable(why, partial=True)  # in the midst of what is added for one expert
    if len(ordered) == 1:
        raise Unreadable(Refusal("a loop over one expert is no mixture", block.node), partial=True)
    expert = Var("e", len(ordered))

    def rolled(name: str) -> Matrix | None:
        parts = [getattr(e, name) for e in ordered]
        return None if parts[0] is None else _rolled(parts, expert, block.node)

    matrices = {n: rolled(n) for n in _NAMES}
    choices = rolled_choices(block.reader, ordered[0].choices)
    return Weights(expert, inner, width, **matrices), choices  # type: ignore[arg-type]


def _number(e: Expert) -> int:
    assert e.slot is not None and isinstance(e.slot.const, int)
    return e.slot.const


def _one_a_number(common: list[Expert]) -> list[Expert]:
    """The experts in the order of their numbers; one that was added for each of its choices is one expert."""
    found: dict[int, Expert] = {}
    for e in common:
        known = found.setdefault(_number(e), e)
        if known is e:
            continue
        if any(getattr(known, n) != getattr(e, n) for n in _NAMES) or "input" in (known.weight_on, e.weight_on):
            return common
        found[_number(e)] = replace(known, choices=(*known.choices, *e.choices))
    return [found[n] for n in sorted(found)]


def _looked_up(block: Block, ordered: list[Expert]) -> list[Expert]:
    """Experts whose weights were looked up by their number, as ``scores[:, 3]``: looked up by the choice."""
    first, number = ordered[0].choices, Var("e", len(ordered))
    if any(len(e.choices) != len(first) for e in ordered):
        return ordered
    choices: list[tuple[Choice, ...]] = [() for _ in ordered]
    for k, wanted in enumerate(first):
        each = [e.choices[k] for e in ordered]
        if any(not same_counts(c, wanted) or len(c.factors) != len(wanted.factors) for c in each):
            return ordered
        named = [{v: Index.of(w) for v, w in zip(c.vars, wanted.vars, strict=True)} for c in each]
        copies = [[rename(f, names) for f in c.factors] for c, names in zip(each, named, strict=True)]
        rolled = [roll(block.reader, list(parts), number) for parts in zip(*copies, strict=True)]
        if any(r is None for r in rolled):
            return ordered
        factors = tuple(rename(r, {number: wanted.ids}) for r in rolled if r is not None)
        for n, (c, names) in enumerate(zip(each, named, strict=True)):
            choices[n] += (replace(c, vars=wanted.vars, ids=c.ids.subs(names), factors=factors),)
    return [replace(e, choices=found) for e, found in zip(ordered, choices, strict=True)]


def _rolled(parts: list[Element], expert: Var, node: Node) -> Matrix:
    first = parts[0]
    if all(p.node is first.node for p in parts) and len(parts) > 1:
        places = [
            k for k in range(len(first.index))
            if all(p.index[k].is_const and p.index[k].const == e for e, p in enumerate(parts))
        ]  # fmt: skip
        for k in places:
            index = (*first.index[:k], Index.of(expert), *first.index[k + 1 :])
            if same_size(shape_of(first.node)[k], expert.extent) and all(
                (*p.index[:k], Index.of(expert), *p.index[k + 1 :]) == index for p in parts
            ):
                return Matrix((Element(first.node, index),))
        if places:
            why = Refusal("the loop leaves out some of the experts that the weights hold", node)
            raise Unreadable(why, partial=True)
    if any(p.node.meta["val"].dtype != first.node.meta["val"].dtype for p in parts):
        raise Unreadable(Refusal("the experts' weights have different dtypes", node))
    return Matrix(tuple(parts))


# ---------------------------------------------------------------- layout


@dataclass(frozen=True)
class Joined:
    """Gate and up as the op wants them; `up` and `up_bias` only where they can't be one view with the gate."""

    rows: Var
    gate: Matrix
    up: Matrix | None
    gate_bias: Matrix | None
    up_bias: Matrix | None
    interleaved: bool


def join_gate_and_up(w: Weights) -> Joined:
    """One view over gate and up where they lie side by side: in halves, gate first, or row by row."""
    apart = Joined(w.inner, w.gate, w.up, w.gate_bias, w.up_bias, False)
    if w.up is None or (w.gate_bias is None) != (w.up_bias is None):
        return apart
    rows = Var("n", mul(w.inner.extent, 2))
    for interleaved in (False, True):
        gate = _join(w.gate, w.up, w.inner, rows, interleaved)
        bias = None
        if w.gate_bias is not None and w.up_bias is not None:
            bias = _join(w.gate_bias, w.up_bias, w.inner, rows, interleaved)
        if gate is not None and (bias is not None or w.gate_bias is None):
            return Joined(rows, gate, None, bias, None, interleaved)
    return apart


def _join(gate: Matrix, up: Matrix, inner: Var, rows: Var, interleaved: bool) -> Matrix | None:
    joined = [_join_part(g, u, inner, rows, interleaved) for g, u in zip(gate.parts, up.parts, strict=True)]
    return None if any(j is None for j in joined) else Matrix(tuple(j for j in joined if j is not None))


def _join_part(gate: Element, up: Element, inner: Var, rows: Var, interleaved: bool) -> Element | None:
    if gate.node is not up.node:
        return None
    places = [k for k, ix in enumerate(gate.index) if inner in ix.vars()]
    if len(places) != 1 or any(gate.index[k] != up.index[k] for k in range(len(gate.index)) if k != places[0]):
        return None
    place = places[0]
    g, u = gate.index[place], up.index[place]
    step: Size = 2 if interleaved else 1
    start = g - Index.of(inner) * step
    if start.terms or u - g != Index(None, 1 if interleaved else inner.extent):
        return None
    return Element(gate.node, (*gate.index[:place], Index.of(rows) + start.const, *gate.index[place + 1 :]))


def is_transposed(matrix: Matrix, rows: Var, columns: Var) -> bool:
    """Whether a matrix ``[E, rows, columns]`` is stored the other way round."""
    index = matrix.parts[0].index
    where = {v: k for k, ix in enumerate(index) for v in ix.vars()}
    return rows in where and columns in where and where[columns] < where[rows]


def lay_out(graph: GraphView, matrix: Matrix | None, expert: Var, dims: tuple[Var, ...]) -> Node | None:
    """A matrix or bias as a node ``[E, *dims]``."""
    if matrix is None:
        return None
    if len(matrix.parts) == 1:
        return graph.arrange(matrix.parts[0], [(expert,), *((d,) for d in dims)])
    parts = [graph.arrange(p, [(d,) for d in dims]) for p in matrix.parts]
    return graph.call(aten.stack.default, parts)
