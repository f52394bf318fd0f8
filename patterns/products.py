"""Expressions over routed rows as sums of products.

``y[t, d] = sum over j, i of p[t, j] * w2[ids[t, j], d, i] * h[t, j, i]``: sums, products, casts, stacks and masks
that are linear in what depends on one variable are multiplied out; everything else is a factor, read by others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from sm12x_compile.index_algebra import Apply, Cases, Element, Expr, Index, Number, Position, Reduce, Var
from sm12x_compile.index_algebra.index import add

from .routed import FLOATS, Reader, Unreadable


@dataclass(frozen=True)
class Term:
    """``sum over vars of main * product of factors``; `main` is the one that depends on the feature asked about."""

    vars: tuple[Var, ...]
    main: Expr | None
    factors: tuple[Expr, ...]


def terms(reader: Reader, expr: Expr, feature: Var) -> list[Term]:
    """`expr` as a sum of products, as far as it is linear in what depends on `feature`."""
    return _Expansion(reader, feature).terms(expr)


class _Expansion:
    def __init__(self, reader: Reader, feature: Var) -> None:
        self.reader, self.feature = reader, feature
        self._early_sums = 0

    def terms(self, expr: Expr) -> list[Term]:
        """`expr` as a sum of products, as far as it is linear in what depends on the feature."""
        self.reader.burn()
        if isinstance(expr, Number):
            return [] if expr.value == 0 else [Term((), None, (expr,))]
        if not self.reader.depends(expr, self.feature):
            return [] if self.reader.is_zero(expr) else [Term((), None, (expr,))]
        if isinstance(expr, Element):
            return self._of_element(expr)
        if isinstance(expr, Reduce) and expr.kind == "sum":
            return [_summed(t, expr.var) for t in self.terms(expr.body)]
        if isinstance(expr, Cases):
            return self._pieces(expr)
        if isinstance(expr, Apply):
            return self._of_apply(expr)
        return [Term((), expr, ())]

    def _of_element(self, element: Element) -> list[Term]:
        made = self.reader.meaning(element)
        if made is None:
            return [Term((), element, ())]
        if isinstance(made, Apply) and made.op == "cast":
            # A weight that the user rounds is the rounded one; one that is widened is what it was.
            inner = made.args[0]
            leaf = isinstance(inner, Element) and self.reader.meaning(inner) is None
            if leaf and made.detail.itemsize < inner.node.meta["val"].dtype.itemsize:  # type: ignore[union-attr]
                return [Term((), element, ())]
        if isinstance(made, Cases) and all(
            isinstance(e, Element) and self.reader.meaning(e) is None for _, _, e in made.pieces
        ):
            return [Term((), element, ())]  # weights that the user put together
        return self.terms(made)

    def _of_apply(self, expr: Apply) -> list[Term]:
        opaque = [Term((), expr, ())]
        if expr.op == "cast":
            return self.terms(expr.args[0]) if expr.detail in FLOATS else opaque
        if expr.op == "add":
            return self._added(expr)
        if expr.op == "mul":
            a, b = expr.args
            if self.reader.depends(a, self.feature) and self.reader.depends(b, self.feature):
                return opaque
            if self.reader.depends(b, self.feature):
                a, b = b, a
            return [Term(t.vars, t.main, (*t.factors, b)) for t in self.terms(a)]
        if expr.op == "where":
            return self._chosen(expr)
        return opaque

    def _added(self, expr: Apply) -> list[Term]:
        """Both sides of a sum; of what comes before the anchor, biases but not the whole residual stream."""
        early = expr.node < self.reader.anchor
        self._early_sums += early
        if self._early_sums > 2:
            raise Unreadable
        a, b = (self.terms(x) for x in expr.args)
        self._early_sums -= early
        return a + b

    def _chosen(self, expr: Apply) -> list[Term]:
        """``where(c, a, 0)`` multiplies by c; ``where(c, b + a, b)`` adds that to b."""
        condition, a, b = expr.args
        if self.reader.depends(condition, self.feature):
            return [Term((), expr, ())]
        if self.reader.is_zero(b):
            return [Term(t.vars, t.main, (*t.factors, condition)) for t in self.terms(a)]
        if self.reader.is_zero(a):
            if self.reader.is_guard(condition):
                return self.terms(b)
            inverted = Apply("not", (condition,), expr.node)
            return [Term(t.vars, t.main, (*t.factors, inverted)) for t in self.terms(b)]
        sum_ = self.reader.meaning(a) if isinstance(a, Element) else a
        if isinstance(sum_, Apply) and sum_.op == "add" and isinstance(b, Element):
            for old, new in (sum_.args, sum_.args[::-1]):
                if isinstance(old, Element) and self.reader.resolve(old) == self.reader.resolve(b):
                    added = [Term(t.vars, t.main, (*t.factors, condition)) for t in self.terms(new)]
                    return self.terms(old) + added
        return [Term((), expr, ())]

    def _pieces(self, cases: Cases) -> list[Term]:
        """A stack of results, one for each value of a variable that is summed over."""
        var = cases.index.var
        if var is None or any(high != add(low, 1) or not isinstance(low, int) for low, high, _ in cases.pieces):
            return [Term((), cases, ())]
        found: list[Term] = []
        for low, _, piece in cases.pieces:
            indicator = Apply("at", (Position(Index.of(var)), Number(low)), _node_of(piece))
            found += [Term(t.vars, t.main, (*t.factors, indicator)) for t in self.terms(piece)]
        return found


def rename(expr: Expr, named: Mapping[Var, Index]) -> Expr:
    """An expression with variables replaced."""
    if isinstance(expr, Element):
        return expr.subs(named)
    if isinstance(expr, Position):
        return Position(expr.index.subs(named))
    if isinstance(expr, Apply):
        return replace(expr, args=tuple(rename(a, named) for a in expr.args))
    if isinstance(expr, Reduce):
        return replace(expr, body=rename(expr.body, named))
    if isinstance(expr, Cases):
        pieces = tuple((low, high, rename(e, named)) for low, high, e in expr.pieces)
        return Cases(expr.index.subs(named), pieces)
    return expr


def _summed(term: Term, var: Var) -> Term:
    """``sum over var of [var == n] * term`` is the term at n."""
    for f in term.factors:
        if isinstance(f, Apply) and f.op == "at" and f.args[0] == Position(Index.of(var)):
            at = {var: Index(None, f.args[1].value)}  # type: ignore[union-attr]
            main = None if term.main is None else rename(term.main, at)
            return Term(term.vars, main, tuple(rename(g, at) for g in term.factors if g is not f))
    return Term((*term.vars, var), term.main, term.factors)


def _node_of(expr: Expr) -> Node:
    if isinstance(expr, (Element, Apply, Reduce)):
        return expr.node
    raise Unreadable
