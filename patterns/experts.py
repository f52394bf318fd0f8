"""Routed experts as an equation: reads ``y[t, d]`` into the operands of ``sm12x::moe``.

    y[t, d] = sum over j of p[t, j] * (sum over i of w2[e, d, i] * h[t, j, i] + b2[e, d])      with e = ids[t, j]
    h[t, j, i] = act(sum over k of w13[e, i, k] * x[t, k] + b13[e, i])

What selects the expert is a *slot* of the weights: an index that the run holds (gathered weights, sorted rows), a
variable that is summed over beside an indicator (all experts computed, most weighted by zero), or a number (a loop
over experts that Dynamo unrolled, with weights stacked or apart).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Apply, Datum, Element, Expr, Index, Var, same_size
from sm12x_compile.index_algebra.expr import shape_of
from sm12x_compile.match import Refusal

from .activation import Activation, read_activation
from .choice import Choice, are_distinct, find_choices
from .choice_rows import same_choices
from .dispatch import ChosenBefore, at_choice_all, chosen_before, covered, numbers, refuse_capacity, says_chosen
from .products import Term, terms
from .routed import FLOATS, Reader, Unreadable

aten = torch.ops.aten


@dataclass(frozen=True)
class Expert:
    """What one term says about the experts."""

    slot: Index | None
    choices: tuple[Choice, ...]
    w2: Element
    inner: Var
    x: Element
    width: Var
    activation: Activation
    gate: Element
    up: Element | None
    weight_on: str
    w2_bias: Element | None = None
    gate_bias: Element | None = None
    up_bias: Element | None = None
    given: Element | None = None  # `x` before it was followed to where it comes from
    casts: tuple[torch.dtype, ...] = ()  # of `x`


@dataclass
class _Sum:
    """A main term and its bias, which share slot and choices."""

    slot: Index | None
    choices: tuple[Choice, ...]
    matrix: tuple[Element, Var, tuple[Expr, ...]] | None = None
    bias: Element | None = None
    inside: bool = False  # the choice stands before the experts: their input is zero where they are not chosen


@dataclass(frozen=True)
class Block:
    """All experts of one block, before they are laid out."""

    node: Node
    reader: Reader
    tokens: tuple[Var, ...]
    feature: Var
    experts: tuple[Expert, ...]


def read_block(node: Node, anchor: Node) -> Block:
    """Read the value of `node` as a sum over routed experts, which something at `anchor` selects.

    Raises:
        Unreadable: it is none, or nearly.
    """
    reader = Reader(anchor, node)
    shape = shape_of(node)
    names = "bstuvw"
    tokens = tuple(Var(names[k % 6], s) for k, s in enumerate(shape[:-1]))
    feature = Var("d", shape[-1])
    index = (*(Index() if s == 1 else Index.of(v) for v, s in zip(tokens, shape, strict=False)), Index.of(feature))
    tokens = tuple(v for v, s in zip(tokens, shape, strict=False) if s != 1)
    sums: list[_Sum] = []
    # Matrices before biases, which may be chosen by clamped ids.
    for term in sorted(terms(reader, Element(node, index), feature), key=lambda t: -len(t.vars)):
        _collect(reader, sums, term, tokens, feature)
    if all(s.matrix is None for s in sums):
        raise Unreadable  # a look-up, but no expert's
    experts = tuple(_expert(reader, s, node, set(tokens)) for s in sums)
    return Block(node, reader, tokens, feature, experts)


# ---------------------------------------------------------------- terms


def _collect(reader: Reader, sums: list[_Sum], term: Term, tokens: tuple[Var, ...], feature: Var) -> None:
    """Sort one term of the outer sum under its expert."""
    main = term.main
    if not isinstance(main, Element):
        raise Unreadable
    slot, main = _slot(reader, main)
    if main.vars() & set(tokens) - (slot.vars() if slot is not None else set()):
        raise Unreadable  # a residual, or an expert that nobody chose
    own = [v for v in term.vars if v in main.vars() and (slot is None or v not in slot.vars())]
    picked, rest = _picked(reader, term.factors, own, slot)
    if picked is not None:
        inner = [v for v in own if Index.of(v) != picked[0]]
        slot = picked[0]
    else:
        inner = own
        if slot is None:
            _collect_inside(reader, sums, term, main, own, tokens)
            return
    if len(inner) > 1:
        raise Unreadable
    hidden = tuple(f for f in rest if inner and reader.depends(f, inner[0]))
    weights = tuple(f for f in rest if f not in hidden)
    outer = tuple(v for v in term.vars if v not in inner and (slot is None or Index.of(v) != slot))
    if picked is not None:
        choices = tuple(replace(c, vars=(*outer, *c.vars), factors=(*c.factors, *weights)) for c in picked[1])
    else:
        assert slot is not None
        slot = next((s.slot for s in sums if s.slot is not None and _same_slot(reader, slot, s.slot)), slot)
        choices = (Choice(outer, slot, weights, main.node),)
    choices = tuple(at_choice_all(c, slot) for c in choices)
    _add(reader, sums, slot, choices, main, inner, hidden)


def _collect_inside(
    reader: Reader, sums: list[_Sum], term: Term, main: Element, own: list[Var], tokens: tuple[Var, ...]
) -> None:
    """An expert whose result nothing selects: its input may be zero for the tokens that did not choose it."""
    for inner in own:
        others = [v for v in own if v is not inner]
        hidden = tuple(f for f in term.factors if reader.depends(f, inner))
        if len(others) > 1 or not hidden:
            continue
        known = _Sum(Index.of(others[0]) if others else None, (), (main, inner, hidden))
        try:
            expert = _expert(reader, known, main.node, set(tokens))
        except ChosenBefore:
            raise
        except Unreadable:
            continue
        if len(hidden) != len(term.factors) or len(own) != len(term.vars):
            raise Unreadable(Refusal("routing weights stand before the experts and behind them", main.node))
        sums.append(replace(known, slot=expert.slot, choices=expert.choices, inside=True))
        return
    refuse_capacity(reader, term, main, own)
    raise Unreadable


def _add(
    reader: Reader, sums: list[_Sum], slot: Index | None, choices: tuple[Choice, ...], main: Element, inner: list[Var],
    hidden: tuple[Expr, ...],
) -> None:  # fmt: skip
    for known in sums:
        place = known.bias is None if not inner else known.matrix is None
        if place and known.slot == slot and same_choices(reader, known.choices, choices):
            break
    else:
        known = _Sum(slot, choices)
        sums.append(known)
    if inner:
        known.matrix = (main, inner[0], hidden)
    else:
        known.bias = main


def _slot(reader: Reader, weight: Element) -> tuple[Index | None, Element]:
    """The index by which a weight's expert is chosen, and the element of the tensor that holds all experts."""
    found: tuple[Index | None, Element] | None = None
    for seen in reader.trail(weight):
        data = [ix for ix in seen.index if ix.has_datum()]
        if len(data) == 1 and len(data[0].terms) == 1:
            ((atom, c),) = data[0].terms.items()
            if c == 1 and isinstance(atom, Datum):
                found = (data[0], seen)
        elif not data:
            found = (None, seen)
    if found is None:
        raise Unreadable
    return found


def _picked(
    reader: Reader, factors: tuple[Expr, ...], own: list[Var], slot: Index | None
) -> tuple[tuple[Index, list[Choice]] | None, tuple[Expr, ...]]:
    """The factor that selects the expert, what it selects, and the other factors."""
    if slot is not None:
        return None, factors
    for f in factors:
        for candidate in [Index.of(v) for v in own] + numbers(reader, f):
            if any(reader.depends(f, v) for v in own if Index.of(v) != candidate):
                continue  # it is of the experts' hidden values, which are not linear in what chose them
            picks = find_choices(reader, f, candidate)
            if picks is None:
                continue
            others = list(factors)
            others.remove(f)
            picks, others = _without_repeats(reader, picks, others, candidate)
            picks = [_counted_once(p) for p in picks]
            return (candidate, picks), tuple(others)
    return None, factors


def _without_repeats(
    reader: Reader, picks: list[Choice], others: list[Expr], slot: Index
) -> tuple[list[Choice], list[Expr]]:
    """Drop factors that say once more whether the expert was chosen."""
    left: list[Expr] = []
    for other in others:
        again = find_choices(reader, other, slot)
        if again is None:
            left.append(other)
            continue
        if picks[0].any and not again[0].any:
            picks, again = again, picks
        if any(c.factors or not (c.any or are_distinct(c)) for c in again):
            raise Unreadable
        if not covered(picks, again):
            raise Unreadable
    return picks, left


def _counted_once(pick: Choice) -> Choice:
    """``any`` is the sum where no expert is chosen twice."""
    if pick.any and not are_distinct(pick):
        reason = "an expert that is chosen twice for a token counts once here; choose with topk, or sum the weights"
        raise Unreadable(Refusal(reason, pick.node))
    return replace(pick, any=False)


# ---------------------------------------------------------------- one expert


def _expert(reader: Reader, sum_: _Sum, node: Node, tokens: set[Var]) -> Expert:
    if sum_.matrix is None:
        raise Unreadable(Refusal("the bias of the experts' result is weighted otherwise than the result", node))
    w2, inner, hidden = sum_.matrix

    def is_projection(leaf: Expr) -> bool:
        try:
            _projection(reader, leaf, inner, sum_, node, tokens)
        except Unreadable:
            return False
        return True

    activation, between = read_activation(reader, hidden, inner, w2.node, is_projection)
    choices = tuple(replace(c, factors=(*c.factors, *between)) for c in sum_.choices)
    if between and sum_.bias is not None:
        raise Unreadable(Refusal("the routing weight stands before the second bias and does not scale it", node))
    gate = _projection(reader, activation.gate, inner, sum_, node, tokens)
    up = _projection(reader, activation.up, inner, sum_, node, tokens) if activation.up is not None else None
    if up is not None:
        named = {up.width: Index.of(gate.width)}
        same_input = up.x.subs(named) == gate.x and up.casts == gate.casts and up.weights == gate.weights
        if not same_input or not same_size(up.width.extent, gate.width.extent):
            raise Unreadable(Refusal("gate and up are projections of different inputs", node))
        up = replace(up, matrix=up.matrix.subs(named))
    slot, weights = sum_.slot, gate.weights
    if not choices or sum_.inside:
        slot, choices, weights = chosen_before(reader, slot, weights, node)
        biased = sum_.bias is not None or gate.bias is not None or (up is not None and up.bias is not None)
        if biased or between or (activation.limit is not None and activation.limit < 0):
            reason = "experts whose input is zero for tokens that did not choose them have a bias, which those get, too"
            raise ChosenBefore(Refusal(reason, node))
    else:
        weights = tuple(w for w in weights if not says_chosen(reader, w, slot, choices))
    if weights and (between or any(c.factors for c in choices)):
        raise Unreadable(Refusal("routing weights stand before the experts and behind them", node))
    if weights:
        choices = tuple(replace(c, factors=weights) for c in choices)
    return Expert(
        slot, choices, w2, inner, gate.x, gate.width, activation, gate.matrix, up.matrix if up else None,
        "input" if weights else "output", sum_.bias, gate.bias, up.bias if up else None, gate.given, gate.casts,
    )  # fmt: skip


@dataclass(frozen=True)
class _Projection:
    matrix: Element
    width: Var
    x: Element
    weights: tuple[Expr, ...]
    bias: Element | None
    given: Element
    casts: tuple[torch.dtype, ...]


def _projection(
    reader: Reader, expr: Expr, inner: Var, sum_: _Sum, node: Node, tokens: set[Var]
) -> _Projection:
    """``sum over k of w[e, i, k] * x[t, k] + b[e, i]``"""
    found: _Projection | None = None
    bias: Element | None = None
    for term in terms(reader, expr, inner):
        if not isinstance(term.main, Element):
            raise Unreadable(Refusal("what the experts' activation works on is no projection of their input", node))
        slot, main = _slot(reader, term.main)
        if slot is not None and not _same_slot(reader, slot, sum_.slot):
            raise Unreadable(Refusal("the experts' matrices are chosen by different indices", main.node))
        if not term.vars and not term.factors and bias is None:
            bias = main
            continue
        if len(term.vars) != 1 or found is not None:
            raise Unreadable(Refusal("what the experts' activation works on is no projection of their input", node))
        (width,) = term.vars
        flat = [g for f in term.factors for g in _product(reader, f, {*tokens, width})]
        inputs = [f for f in flat if reader.depends(f, width)]
        weights = tuple(f for f in flat if not reader.depends(f, width))
        if len(inputs) != 1 or not isinstance(inputs[0], Element):
            raise Unreadable(Refusal("the experts' input is no tensor of the graph", node))
        given, casts = _uncast(reader, inputs[0], {*tokens, width})
        found = _Projection(main, width, reader.resolve(given), weights, None, given, casts)
    if found is None:
        raise Unreadable(Refusal("what the experts' activation works on is no projection of their input", node))
    return replace(found, bias=bias)


def _same_slot(reader: Reader, slot: Index, chosen: Index | None) -> bool:
    """Whether an index picks the expert; rows without an expert may have been given the last one's bias."""
    if slot == chosen:
        return True
    if chosen is None or not reader.grouped or len(slot.terms) != 1:
        return False
    ((atom, _),) = slot.terms.items()
    if not isinstance(atom, Datum) or atom.element.node.target not in (aten.clamp.default, aten.clamp_max.default):
        return False
    inside = reader.index_of(Element(atom.element.node.args[0], atom.element.index))  # type: ignore[arg-type]
    if inside != chosen:
        return False
    reader.clamped.append(atom.element.node)
    return True


def _product(reader: Reader, expr: Expr, known: set[Var]) -> list[Expr]:
    """The factors of the experts' input: the hidden states, and a routing weight if that is where it stands."""
    if isinstance(expr, Element):
        element = reader.resolve(expr)
        if element.vars() <= known and not any(ix.has_datum() for ix in element.index):
            return [expr]  # one tensor for all choices, however it was computed
    value = reader.meaning(expr) if isinstance(expr, Element) else expr
    if not isinstance(value, Apply):
        return [expr]
    if value.op == "mul":
        return [f for a in value.args for f in _product(reader, a, known)]
    if (guarded := reader.behind_guard(value)) is not None:
        return _product(reader, guarded, known)
    if value.op == "cast" and value.detail in FLOATS:
        inner = _product(reader, value.args[0], known)
        return inner if len(inner) > 1 else [expr]
    return [expr]


def _uncast(reader: Reader, element: Element, known: set[Var]) -> tuple[Element, tuple[torch.dtype, ...]]:
    """The experts' input before it was cast row by row, and the casts, to be done once a token."""
    casts: tuple[torch.dtype, ...] = ()
    while True:
        at = reader.resolve(element)
        if at.vars() <= known and not any(ix.has_datum() for ix in at.index):
            return element, casts
        made = reader.meaning(at)
        if (guarded := reader.behind_guard(made)) is not None:
            inner = guarded
        elif isinstance(made, Apply) and made.op == "cast" and made.detail in FLOATS:
            inner, casts = made.args[0], (made.detail, *casts)
        else:
            return element, casts
        if not isinstance(inner, Element):
            return element, casts
        element = inner
