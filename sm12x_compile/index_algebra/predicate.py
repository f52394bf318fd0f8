"""Values that follow from positions: integers as indices, conditions as predicates, masks as choices.

A predicate is a tree of `All` and `Any` over four kinds of atoms; `TRUE` and `FALSE` are the empty trees. What
cannot be read is not an error: it becomes `Holds`, an opaque boolean element that the run decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Union

import torch

from .expr import Apply, Element, Expr, Number, Position, step
from .index import Datum, Index, Var, add, known_nonnegative, mul
from .layout import look

aten = torch.ops.aten


@dataclass(frozen=True)
class AtMostZero:
    """``index <= 0``"""

    index: Index


@dataclass(frozen=True)
class IsZero:
    """``index == 0``, or ``index != 0`` if not `equal`."""

    index: Index
    equal: bool = True


@dataclass(frozen=True)
class Holds:
    """A boolean element that only the run knows (or its negation, if not `expected`)."""

    element: Element
    expected: bool = True


@dataclass(frozen=True)
class All:
    parts: tuple[Predicate, ...]


@dataclass(frozen=True)
class Any:
    parts: tuple[Predicate, ...]


Predicate = Union[AtMostZero, IsZero, Holds, All, Any]  # noqa: UP007
TRUE, FALSE = All(()), Any(())


@dataclass(frozen=True)
class Choice:
    """`if_true` where the predicate holds, else `if_false`: what a mask tensor is made of."""

    when: Predicate
    if_true: float
    if_false: float


def value_of(element: Expr | None) -> Expr | None:
    """Follow bare elements to what they are made of; an element with no meaning is itself."""
    while isinstance(element, Element):
        source = look(element)
        inner = step(source)
        if inner is None:
            return source
        element = inner
    return element


# ---------------------------------------------------------------- integers


def as_index(expr: Expr | None) -> Index | None:
    """An integer-valued expression as an `Index`; elements that only the run knows become `Datum` atoms."""
    value = value_of(expr)
    if isinstance(value, Position):
        return value.index
    if isinstance(value, Number):
        return Index(None, int(value.value)) if isinstance(value.value, int) else None
    if isinstance(expr, Element) and not _is_integer(expr):
        return None
    if isinstance(value, Apply):
        found = _integer_arithmetic(value)
        if found is not None:
            return found
    source = _source(expr)
    return Index.of(Datum(source)) if source is not None else None


def _is_integer(element: Element) -> bool:
    dtype = element.node.meta["val"].dtype
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _source(expr: Expr | None) -> Element | None:
    """The last element before the value: what can be read at run time."""
    if not isinstance(expr, Element):
        return None
    source = look(expr, _can_be_laid_out)
    return source if _is_integer(source) else None


def _can_be_laid_out(element: Element) -> bool:
    """Whether views alone could bring the element's tensor into the order of the indices."""
    return not any(ix.has_datum() for ix in element.index)


def _integer_arithmetic(value: Apply) -> Index | None:
    if value.op == "cast":
        return as_index(value.args[0]) if not value.detail.is_floating_point else None
    if value.op == "neg":
        x = as_index(value.args[0])
        return None if x is None else -x
    if value.op not in ("add", "sub", "mul", "floordiv"):
        return None
    a, b = as_index(value.args[0]), as_index(value.args[1])
    if a is None or b is None:
        return None
    if value.op == "add":
        return a + b
    if value.op == "sub":
        return a - b
    if value.op == "mul":
        return a * b.const if b.is_const else b * a.const if a.is_const else None
    return a.div(b.const) if b.is_const and isinstance(b.const, int) and b.const > 0 else None


# ---------------------------------------------------------------- predicates


def predicate_of(expr: Expr) -> Predicate | None:
    """The truth of a boolean expression; None if it is no element and cannot be read."""
    opaque: Element | None = None
    while isinstance(expr, Element):
        opaque = look(expr, _can_be_laid_out)
        inner = step(look(expr))
        if inner is None:
            break
        expr = inner
    read = _read(expr)
    if read is not None:
        return simplify(read)
    if opaque is not None and opaque.node.meta["val"].dtype == torch.bool:
        return Holds(opaque)
    return None


def _read(expr: Expr) -> Predicate | None:
    if isinstance(expr, Number):
        return TRUE if expr.value else FALSE
    if not isinstance(expr, Apply):
        return None
    op, args = expr.op, expr.args
    if op in ("and", "or", "not", "xor"):
        if expr.node.meta["val"].dtype != torch.bool:
            return None
        parts = [predicate_of(a) for a in args]
        known = [p for p in parts if p is not None]
        if len(known) != len(parts):
            return None
        if op == "not":
            return negate(known[0])
        if op == "xor":
            return None
        return All(tuple(known)) if op == "and" else Any(tuple(known))
    if op in ("le", "lt", "ge", "gt", "eq", "ne"):
        return _compare(op, args[0], args[1])
    if op == "cast":
        choice = choice_of(args[0])
        return _where_nonzero(choice) if choice is not None else _nonzero_index(args[0])
    if op == "where":
        choice = choice_of(expr)
        return _where_nonzero(choice) if choice is not None else None
    return None


def _nonzero_index(expr: Expr) -> Predicate | None:
    index = as_index(expr)
    return None if index is None or index.has_datum() else IsZero(index, equal=False)


def _where_nonzero(choice: Choice | float) -> Predicate:
    if not isinstance(choice, Choice):
        return TRUE if choice != 0 else FALSE
    return _pick(choice.when, choice.if_true != 0, choice.if_false != 0)


def _pick(when: Predicate, if_true: bool, if_false: bool) -> Predicate:
    if if_true == if_false:
        return TRUE if if_true else FALSE
    return when if if_true else negate(when)


_COMPARISONS = {
    "le": lambda a, b: a <= b, "lt": lambda a, b: a < b, "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip


def _compare(op: str, left: Expr, right: Expr) -> Predicate | None:
    distance = value_of(left)
    if isinstance(distance, Apply) and distance.op == "abs":
        if op in ("ge", "gt"):
            inside = _compare("lt" if op == "ge" else "le", left, right)
            return None if inside is None else negate(inside)
        signed, limit = as_index(distance.args[0]), as_index(right)
        if signed is None or limit is None or op not in ("le", "lt"):
            return None
        slack = 1 if op == "lt" else 0
        return All((AtMostZero(signed - limit + slack), AtMostZero(-signed - limit + slack)))
    if value_of(right) in (Number(0), Number(0.0)):
        left, right = _before_float(left), Number(0)  # rounding to floating point keeps the sign
    a, b = as_index(left), as_index(right)
    if a is not None and b is not None and not _says_nothing(a, b):
        if op in ("ge", "gt"):
            a, b, op = b, a, {"ge": "le", "gt": "lt"}[op]
        if op == "le":
            return AtMostZero(a - b)
        if op == "lt":
            return AtMostZero(a - b + 1)
        return IsZero(a - b, equal=op == "eq")
    x, y = choice_of(left), choice_of(right)
    if x is None or y is None:
        return None
    test = _COMPARISONS[op]
    if isinstance(x, Choice) and isinstance(y, Choice):
        return None
    if isinstance(x, Choice):
        assert not isinstance(y, Choice)
        return _pick(x.when, test(x.if_true, y), test(x.if_false, y))
    if isinstance(y, Choice):
        return _pick(y.when, test(x, y.if_true), test(x, y.if_false))
    return TRUE if test(x, y) else FALSE


def _before_float(expr: Expr) -> Expr:
    """The integer behind a cast to floating point."""
    value = value_of(expr)
    if isinstance(value, Apply) and value.op == "cast" and value.detail.is_floating_point:
        inner = value.args[0]
        if isinstance(inner, Element) and _is_integer(inner) and as_index(inner) is not None:
            return inner
    return expr


def _says_nothing(a: Index, b: Index) -> bool:
    """A lone integer of the run compared with a constant: nothing about positions, so it stays opaque."""
    lone, other = (a, b) if b.is_const else (b, a)
    return other.is_const and len(lone.terms) == 1 and all(isinstance(x, Datum) for x in lone.terms)


def negate(p: Predicate) -> Predicate:
    if isinstance(p, AtMostZero):
        return AtMostZero(-p.index + 1)
    if isinstance(p, IsZero):
        return IsZero(p.index, not p.equal)
    if isinstance(p, Holds):
        return Holds(p.element, not p.expected)
    parts = tuple(negate(q) for q in p.parts)
    return Any(parts) if isinstance(p, All) else All(parts)


def substitute(p: Predicate, mapping: Mapping[Var, Index]) -> Predicate:
    """A predicate over other variables."""
    if isinstance(p, AtMostZero):
        return AtMostZero(p.index.subs(mapping))
    if isinstance(p, IsZero):
        return IsZero(p.index.subs(mapping), p.equal)
    if isinstance(p, Holds):
        return Holds(p.element.subs(mapping), p.expected)
    return type(p)(tuple(substitute(q, mapping) for q in p.parts))


def predicate_vars(p: Predicate) -> set[Var]:
    """The variables that a predicate depends on."""
    if isinstance(p, (All, Any)):
        return {v for q in p.parts for v in predicate_vars(q)}
    return p.element.vars() if isinstance(p, Holds) else p.index.vars()


def simplify(p: Predicate) -> Predicate:
    """Decide atoms by their bounds, flatten, drop what is neutral."""
    if isinstance(p, (AtMostZero, IsZero)):
        span = p.index.bounds()
        if span is None:
            return p
        if isinstance(p, AtMostZero):
            if known_nonnegative(mul(span[1], -1)):
                return TRUE
            return FALSE if known_nonnegative(add(span[0], -1)) else p
        if p.index.is_const and isinstance(p.index.const, int):
            return TRUE if (p.index.const == 0) == p.equal else FALSE
        return p
    if isinstance(p, Holds):
        return p
    kind = All if isinstance(p, All) else Any
    neutral, absorbing = (TRUE, FALSE) if kind is All else (FALSE, TRUE)
    parts: list[Predicate] = []
    for q in map(simplify, p.parts):
        if q == absorbing:
            return absorbing
        for r in q.parts if isinstance(q, kind) else (q,):
            if r != neutral and r not in parts:
                parts.append(r)
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


# ---------------------------------------------------------------- choices


def choice_of(expr: Expr) -> Choice | float | None:
    """An expression with at most two values, told apart by a predicate (`where(keep, 0, -inf)`, `(1 - m) * -1e9`)."""
    value = value_of(expr)
    if isinstance(value, Number):
        return float(value.value) if not isinstance(value.value, complex) else None
    boolean = isinstance(expr, Element) and expr.node.meta["val"].dtype == torch.bool
    if boolean:
        when = predicate_of(expr)
        return None if when is None else _as_choice(when)
    if not isinstance(value, Apply):
        return None
    if value.op == "cast":
        inner = choice_of(value.args[0])
        return _rounded(inner, value.detail) if inner is not None else None
    if value.op == "where":
        when = predicate_of(value.args[0])
        a, b = choice_of(value.args[1]), choice_of(value.args[2])
        if when is None or a is None or b is None:
            return None
        if isinstance(a, Choice) or isinstance(b, Choice):
            return _nested(when, a, b)
        if when in (TRUE, FALSE):
            return a if when == TRUE else b
        return Choice(when, a, b)
    if value.op in _ARITHMETIC:
        parts = [choice_of(a) for a in value.args]
        known = [p for p in parts if p is not None]
        return _arithmetic(value.op, known) if len(known) == len(parts) else None
    return None


def _as_choice(when: Predicate) -> Choice | float:
    return 1.0 if when == TRUE else 0.0 if when == FALSE else Choice(when, 1.0, 0.0)


def _nested(when: Predicate, a: Choice | float, b: Choice | float) -> Choice | None:
    """``where(c, NEG, where(keep, 0, NEG))``: two tests, still two values."""
    if isinstance(b, Choice) and not isinstance(a, Choice):
        if a == b.if_false:
            return Choice(simplify(All((negate(when), b.when))), b.if_true, b.if_false)
        if a == b.if_true:
            return Choice(simplify(Any((when, b.when))), b.if_true, b.if_false)
    if isinstance(a, Choice) and not isinstance(b, Choice):
        return _nested(negate(when), b, a)
    return None


def _rounded(choice: Choice | float, dtype: torch.dtype) -> Choice | float:
    if not isinstance(choice, Choice):
        return float(torch.tensor(choice, dtype=torch.float64).to(dtype).item())
    pair = torch.tensor([choice.if_true, choice.if_false], dtype=torch.float64).to(dtype)
    return Choice(choice.when, float(pair[0]), float(pair[1]))


_ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b if b else math.nan, "neg": lambda a: -a,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "rsqrt": lambda a: 1 / math.sqrt(a) if a > 0 else math.nan,
    "pow": lambda a, b: a**b if a > 0 else math.nan,
    "log": lambda a: math.log(a) if a > 0 else (-math.inf if a == 0 else math.nan),
}  # fmt: skip


def _arithmetic(op: str, parts: list[Choice | float]) -> Choice | float | None:
    choices = [p for p in parts if isinstance(p, Choice)]
    if len({c.when for c in choices}) > 1:
        return None
    function = _ARITHMETIC[op]
    if not choices:
        return function(*parts)
    a = function(*(p.if_true if isinstance(p, Choice) else p for p in parts))
    b = function(*(p.if_false if isinstance(p, Choice) else p for p in parts))
    return None if math.isnan(a) or math.isnan(b) else Choice(choices[0].when, a, b)
