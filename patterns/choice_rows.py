"""Choices that were written one after the other, ``ids[:, 0]``, ``ids[:, 1]``, ..., as one sum over the choices."""

from __future__ import annotations

from dataclasses import replace

from sm12x_compile.index_algebra import Apply, Datum, Element, Expr, Index, Var
from sm12x_compile.index_algebra.expr import shape_of
from sm12x_compile.index_algebra.index import same_size

from .choice import Choice
from .products import rename
from .routed import Reader


def rolled_choices(reader: Reader, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """All choices as one, if they are one expression at 0, 1, 2, ...; else as they are."""
    if len(choices) < 2 or any(c.vars or c.any or len(c.factors) != len(choices[0].factors) for c in choices):
        return choices
    var = Var("j", len(choices))
    ids = _rolled_index([c.ids for c in choices], var)
    factors = [roll(reader, list(parts), var) for parts in zip(*(c.factors for c in choices), strict=True)]
    if ids is None or var not in ids.vars() or any(f is None for f in factors):
        return choices
    return (replace(choices[0], vars=(var,), ids=ids, factors=tuple(f for f in factors if f is not None)),)


def roll(reader: Reader, parts: list[Expr], var: Var) -> Expr | None:
    elements = [reader.resolve(p) for p in parts if isinstance(p, Element)]
    if len(elements) == len(parts):
        return _rolled_element(elements, var)
    applied = [p for p in parts if isinstance(p, Apply)]
    first = applied[0] if applied else None
    if first is None or len(applied) < len(parts) or any((p.op, p.detail) != (first.op, first.detail) for p in applied):
        return first if first is not None and all(p == first for p in parts) else None
    args = [roll(reader, list(a), var) for a in zip(*(p.args for p in applied), strict=True)]
    return None if any(a is None for a in args) else replace(first, args=tuple(a for a in args if a is not None))


def _rolled_element(elements: list[Element], var: Var) -> Element | None:
    first = elements[0]
    if any(e.node is not first.node for e in elements):
        return None
    index: list[Index] = []
    for k in range(len(first.index)):
        here = [e.index[k] for e in elements]
        if all(ix == here[0] for ix in here):
            index.append(here[0])
        elif all(ix.is_const and ix.const == n for n, ix in enumerate(here)):
            if not same_size(shape_of(first.node)[k], var.extent):
                return None
            index.append(Index.of(var))
        else:
            rolled = _rolled_index(here, var)
            if rolled is None:
                return None
            index.append(rolled)
    return Element(first.node, tuple(index))


def _rolled_index(parts: list[Index], var: Var) -> Index | None:
    """Integers of a tensor at 0, 1, 2, ..., with one number added to all."""
    atoms = [next(iter(ix.terms.items())) for ix in parts if len(ix.terms) == 1]
    data = [a.element for a, c in atoms if isinstance(a, Datum) and c == 1]
    if len(data) < len(parts) or any(ix.const != parts[0].const for ix in parts):
        return None
    element = _rolled_element(data, var)
    return None if element is None else Index.of(Datum(element)) + parts[0].const


def same_choices(reader: Reader, a: tuple[Choice, ...], b: tuple[Choice, ...]) -> bool:
    """Whether two sums run over the same choices; each may have named its variables and laid out its weights itself."""
    def settled(factors: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(reader.resolve(f) if isinstance(f, Element) else f for f in factors)

    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if not same_counts(x, y) or len(x.factors) != len(y.factors):
            return False
        named = {v: Index.of(w) for v, w in zip(y.vars, x.vars, strict=True)}
        factors = tuple(rename(f, named) for f in y.factors)
        if x.ids != y.ids.subs(named) or settled(x.factors) != settled(factors):
            return False
    return True


def same_counts(a: Choice, b: Choice) -> bool:
    """Whether two choices run over as many: all of a token's, say, and not the first two of three."""
    return len(a.vars) == len(b.vars) and all(
        same_size(v.extent, w.extent) for v, w in zip(a.vars, b.vars, strict=True)
    )
