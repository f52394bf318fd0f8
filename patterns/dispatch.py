"""Who chose an expert, where that stands before the experts: inputs that are zero, or places in a buffer, for the rest.

Every expert works on all tokens, ``expert_e(dispatch[t, e] * x[t])``. If its result is weighted by who chose it as
well, the dispatch says nothing new. If it is not, the dispatch is the choice: what an expert without biases makes of
zero is zero, and a weight in it is one on the input.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Apply, Cases, Element, Expr, Index, Reduce, Size, Var, same_size
from sm12x_compile.match import Refusal

from .activation import read_activation
from .choice import Choice, are_distinct, at_choice, find_choices, is_nonnegative
from .choice_rows import same_choices
from .products import Term
from .routed import Reader, Unreadable

CAPACITY = (
    "the experts work on a buffer with so many places for each, and tokens that find no place are dropped, so this is "
    "another sum; without a capacity, weigh every expert's result by who chose it"
)


class ChosenBefore(Unreadable):
    """Something did choose the experts before them, but not as the op wants it."""


def says_chosen(reader: Reader, weight: Expr, slot: Index | None, choices: tuple[Choice, ...]) -> bool:
    """Whether a factor of the experts' input is one for the tokens that chose the expert: the others are weighed
    by zero. It may be whether their weight is zero: what an expert gives to them does not matter, either."""
    if slot is None or slot.has_datum():
        return False
    found = find_choices(reader, weight, slot)
    if found is not None:
        once = all(not c.factors and (c.any or are_distinct(c)) for c in found)
        return once and len(found) == 1 and covered(list(choices), found)
    compared = _compared_with_zero(reader, weight)
    found = None if compared is None else find_choices(reader, compared[0], slot)
    if compared is None or found is None or any(c.any for c in found):
        return False
    found = [at_choice_all(c, slot) for c in found]
    signed = compared[1] or all(is_nonnegative(reader, f) for c in found for f in c.factors)
    return signed and same_choices(reader, choices, tuple(found))


def _compared_with_zero(reader: Reader, expr: Expr) -> tuple[Expr, bool] | None:
    """What an expression is the ``!= 0`` or ``> 0`` of, and whether numbers below zero count."""
    made = reader.meaning(expr) if isinstance(expr, Element) else expr
    while isinstance(made, Apply) and made.op == "cast":
        if made.detail == torch.bool:
            return made.args[0], True
        made = reader.meaning(made.args[0]) if isinstance(made.args[0], Element) else made.args[0]
    if isinstance(made, Apply) and made.op in ("gt", "ne") and reader.is_zero(made.args[1]):
        return made.args[0], made.op == "ne"
    return None


def chosen_before(
    reader: Reader, slot: Index | None, weights: tuple[Expr, ...], node: Node
) -> tuple[Index, tuple[Choice, ...], tuple[Expr, ...]]:
    """Who chose an expert, read from the factors of its input: ``sum over j of [ids[t, j] == e] * p[t, j]``.

    An activation of zero is zero, so an expert whose input is zero adds nothing; but it is not linear, so each
    expert must have been chosen once at most.
    """
    for f in weights:
        for candidate in [slot] if slot is not None else numbers(reader, f):
            picks = find_choices(reader, f, candidate)
            if picks is None:
                continue
            if len(picks) != 1 or not are_distinct(picks[0]):
                reason = "an expert that is chosen twice gets one input weighed by both; choose with topk"
                raise ChosenBefore(Refusal(reason, node))
            others = list(weights)
            others.remove(f)
            pick = at_choice_all(replace(picks[0], any=False), candidate)
            return candidate, (replace(pick, factors=()),), (*pick.factors, *others)
    raise Unreadable


def refuse_capacity(reader: Reader, term: Term, main: Element, own: list[Var]) -> None:
    """Say so where experts work on numbered places, ``sum over e, c of dispatch[t, e, c] * expert_e(row[e, c])``."""
    places = [v for v in term.vars if v not in own]
    for inner in own if len(own) == 2 and len(places) == 1 else []:
        hidden = tuple(f for f in term.factors if reader.depends(f, inner))
        combine = [f for f in term.factors if f not in hidden and reader.depends(f, places[0])]
        if not combine or not all(reader.depends(f, places[0]) for f in hidden):
            continue
        try:
            read_activation(reader, hidden, inner, main.node, lambda leaf: False)
        except Unreadable:
            continue
        raise Unreadable(Refusal(CAPACITY, main.node))


def covered(picks: list[Choice], again: list[Choice]) -> bool:
    """Whether each choice in `picks` is one in `again`."""
    return all(any(_is_among(pick, other) for other in again) for pick in picks)


def _is_among(pick: Choice, other: Choice) -> bool:
    """Whether a choice is one of another sum over choices: of the same ids, which begin alike and may end later."""
    if len(pick.vars) != len(other.vars):
        return False
    pairs = list(zip(other.vars, pick.vars, strict=True))
    if other.ids.subs({v: Index.of(w) for v, w in pairs}) != pick.ids:
        return False
    return all(same_size(v.extent, w.extent) or _is_less(w.extent, v.extent) for v, w in pairs)


def _is_less(a: Size, b: Size) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a < b


def at_choice_all(choice: Choice, slot: Index) -> Choice:
    """A choice whose weights are looked up by the choice, not by the expert's variable."""
    return replace(choice, factors=tuple(at_choice(f, slot, choice.ids) for f in choice.factors))


def numbers(reader: Reader, expr: Expr, depth: int = 12) -> list[Index]:
    """Numbers that an expression compares integers with, or columns that it takes: candidates for an expert's slot."""
    if depth == 0:
        return []
    if isinstance(expr, Element):
        element = reader.resolve(expr)
        made = reader.meaning(element)
        consts = [ix for ix in element.index if ix.is_const and isinstance(ix.const, int)]
        if made is None or isinstance(made, (Element, Cases)):
            return consts
        return numbers(reader, made, depth - 1) + consts
    if isinstance(expr, Apply):
        inside = [n for a in expr.args for n in numbers(reader, a, depth - 1)]
        if expr.op in ("eq", "ne"):
            compared = [reader.index_of(a) for a in expr.args]
            return [ix for ix in compared if ix is not None and ix.is_const] + inside
        return inside
    return numbers(reader, expr.body, depth - 1) if isinstance(expr, Reduce) else []
