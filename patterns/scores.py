"""The scores of an attention: ``softcap(scale * sum_d q*k) + masks + biases``, read from the outside in.

Between the softmax and the product of q and k stand pointwise ops, in any order that means the same: scale,
softcap, masks (added or filled), biases, casts, a subtracted maximum. Each is read as a tag; the first thing that
is not understood is the refusal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Apply, Element, Expr, Index, Number, Reduce, Var, look, step
from sm12x_compile.index_algebra.predicate import TRUE, Choice, choice_of, negate, predicate_of
from sm12x_compile.masks import MaskTerm
from sm12x_compile.match import Refusal, source

from .softmax import keeps_numbers

# A masked score this low gets no probability beside any score that a model produces.
MASKED_BELOW = -1e4
# Added to a score it must be lower: a score of -1e4 is no oddity, and the sum stays what it is if passed on as a bias.
ADDED_BELOW = -3e4
# A masked score this low swallows the score that it is added to.
ABSORBING = -1e30


@dataclass(frozen=True)
class Scores:
    """``softcap(scale * sum over `summed` of q * k)`` plus `biases` (element, factor), masked by `masks`."""

    q: Element
    k: Element
    summed: tuple[Var, ...]
    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[MaskTerm, ...] = ()
    biases: tuple[tuple[Element, float], ...] = ()
    shifts: tuple[tuple[float, Expr], ...] = ()  # what was subtracted, with the factor that followed
    product: Node | None = None
    max_subtracted: bool = False
    constant: float = 0.0  # added to all scores alike, which only a sink notices


@dataclass(frozen=True)
class _Reading:
    """What stands outside the point reached: a factor, masks, biases, a softcap."""

    factor: float = 1.0
    softcap: float = 0.0
    masks: tuple[MaskTerm, ...] = ()
    biases: tuple[tuple[Element, float], ...] = ()
    shifts: tuple[tuple[float, Expr], ...] = ()  # what was subtracted, with the factor that followed
    max_subtracted: bool = False
    constant: float = 0.0
    limit: float = math.inf

    def within(self, dtype: torch.dtype | None) -> _Reading:
        """Inside a cast to `dtype`: a number beyond its range becomes infinite on the way out."""
        return self if dtype is None else replace(self, limit=min(self.limit, torch.finfo(dtype).max))

    def drop_value(self, value: float, factor: float) -> float:
        """What a masked score is at the softmax."""
        dropped = value * factor
        return -math.inf if dropped < -self.limit else dropped


def read_scores(expr: Expr, key: Var, dtype: torch.dtype | None = None) -> Scores | Refusal:
    """Read the scores, of which the softmax is taken in `dtype`, down to the product of q and k."""
    return _read(expr, key, _Reading().within(dtype))


def read_sink(expr: Expr) -> tuple[Element, tuple[tuple[float, Expr], ...]] | Refusal:
    """The logit of a column without value, and the shifts that were subtracted from it."""
    shifts: list[tuple[float, Expr]] = []
    while isinstance(expr, Element):
        found = look(expr)
        inner = step(found)
        if isinstance(inner, Apply) and inner.op == "cast" and keeps_numbers(inner):
            expr = inner.args[0]
        elif isinstance(inner, Apply) and inner.op == "sub":
            shifts.append((1.0, _shift(inner.args[1])))
            expr = inner.args[0]
        else:
            return found, tuple(shifts)
    return Refusal("the extra column of the softmax is no tensor")


def read_terms(element: Element) -> _Reading | Refusal:
    """The masks and biases of a tensor that is added to the scores."""
    return _terms(element, _Reading(), 1.0)


def _shift(expr: Expr) -> Expr:
    """A subtracted maximum by where it comes from, so that two readings of it compare equal."""
    while isinstance(expr, Element):
        expr = look(expr)
        inner = step(expr)
        if not (isinstance(inner, Apply) and inner.op == "cast"):
            break
        expr = inner.args[0]
    return expr


def _is_row_maximum(shift: Expr, scores: Expr, key: Var) -> bool:
    """Whether `shift` is the greatest of `scores` along the key (or that and a sink, whichever is greater)."""
    found = _shift(shift)
    inner = step(found) if isinstance(found, Element) else found
    if isinstance(inner, Apply) and inner.op == "maximum":
        return any(_is_row_maximum(a, scores, key) for a in inner.args)
    if not (isinstance(inner, Reduce) and inner.kind == "max"):
        return False
    body = inner.body
    here = {key: Index.of(inner.var)}
    while isinstance(body, Element) and isinstance(scores, Element):
        if body == scores.subs(here):
            return True
        deeper = step(scores)
        if not isinstance(deeper, Element):
            return look(body) == look(scores).subs(here)
        scores = deeper
    return False


def _follows_from(node: Node, product: Node) -> bool:
    """Whether `product` is among the nodes that `node` was computed from."""
    seen, waiting = {node}, [node]
    while waiting and len(seen) < 2000:
        here = waiting.pop()
        if here is product:
            return True
        new = [n for n in here.all_input_nodes if n not in seen]
        seen.update(new)
        waiting += new
    return bool(waiting)


def _depends_on(expr: Expr, key: Var) -> bool:
    if isinstance(expr, Element):
        return key in look(expr).vars()
    if isinstance(expr, (Apply,)):
        return any(_depends_on(a, key) for a in expr.args)
    return not isinstance(expr, Number)


def _read(expr: Expr, key: Var, outside: _Reading) -> Scores | Refusal:
    node: Node | None = None
    while True:
        if isinstance(expr, Element):
            expr = look(expr)
            node = expr.node
            inner = step(expr)
            if inner is None:
                return Refusal(f"the scores come from {_name(node)}, not from a product of q and k", node)
            expr = inner
        if isinstance(expr, Reduce):
            return _product(expr, key, outside)
        if not isinstance(expr, Apply):
            return Refusal("part of the scores comes from elsewhere", node)
        op, args = expr.op, expr.args
        if op == "cast":
            if not keeps_numbers(expr):
                return Refusal(f"the scores are cast to {expr.detail}", node)
            outside = outside.within(expr.detail)
            expr = args[0]
        elif op == "neg":
            return Refusal("the scores are negated", node)
        elif op in ("mul", "div"):
            scaled = _scaled(op, args)
            if scaled is None:
                return Refusal(f"the scores are {'multiplied' if op == 'mul' else 'divided'} by a tensor", node)
            expr, factor = scaled
            outside = replace(outside, factor=outside.factor * factor)
        elif op == "tanh":
            if outside.softcap or outside.factor <= 0:
                return Refusal("tanh of the scores is no softcap", node)
            outside = replace(outside, softcap=outside.factor, factor=1.0)
            expr = args[0]
        elif op == "sub" and not outside.softcap and not _depends_on(args[1], key):
            if isinstance(shift := choice_of(args[1]), float) and not math.isfinite(shift):
                return Refusal("an infinite constant is subtracted from the scores", node)
            maximum = outside.factor > 0 and _is_row_maximum(args[1], args[0], key)
            shifts = (*outside.shifts, (outside.factor, _shift(args[1])))
            outside = replace(outside, shifts=shifts, max_subtracted=outside.max_subtracted or maximum)
            expr = args[0]
        elif op in ("add", "sub"):
            return _added(op, args, key, outside, node)
        elif op == "where":
            filled = _filled(args, outside, node)
            if isinstance(filled, Refusal):
                return filled
            expr, outside = filled
        else:
            return Refusal(f"{op} of the scores is not understood", node)


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.") if node.op == "call_function" else node.name


def _number(expr: Expr) -> float | None:
    value = choice_of(expr)
    return value if isinstance(value, float) and math.isfinite(value) else None


def _scaled(op: str, args: Sequence[Expr]) -> tuple[Expr, float] | None:
    a, b = args
    number = _number(b)
    if number:
        return a, (number if op == "mul" else 1.0 / number)
    number = _number(a) if op == "mul" else None
    return (b, number) if number else None


def _added(op: str, args: Sequence[Expr], key: Var, outside: _Reading, node: Node | None) -> Scores | Refusal:
    """One operand leads to the product, the other is a mask or a bias."""
    if outside.softcap:
        return Refusal("something is added to the scores inside the softcap", node)
    refusals = []
    for scores, other, sign in ((args[0], args[1], 1.0 if op == "add" else -1.0), (args[1], args[0], 1.0)):
        if op == "sub" and scores is args[1]:
            break
        gathered = _terms(other, outside, sign)
        if isinstance(gathered, Refusal):
            refusals.append(gathered)
            continue
        found = _read(scores, key, gathered)
        if isinstance(found, Scores):
            # What follows from the scores themselves may be as large as a mask, and cancel it.
            if isinstance(other, Element) and found.product is not None and _follows_from(other.node, found.product):
                return Refusal("what is added to the scores depends on the scores", other.node)
            return found
        refusals.append(found)
    return refusals[0]


def _terms(expr: Expr, outside: _Reading, sign: float) -> _Reading | Refusal:
    """Split an added tensor into masks (0 where kept, hugely negative elsewhere) and biases."""
    element = expr if isinstance(expr, Element) else None
    choice = choice_of(expr) if element is not None or not isinstance(expr, Apply) else None
    if isinstance(choice, float):
        if not math.isfinite(choice):
            return Refusal("an infinite constant is added to the scores")
        return replace(outside, constant=outside.constant + choice * outside.factor * sign)
    factor = outside.factor * sign
    if isinstance(choice, Choice) and element is not None:
        term = _mask_term(choice, factor, element, outside)
        if term is not None:
            return replace(outside, masks=(*outside.masks, term))
    value = expr
    while isinstance(value, Element):
        value = look(value)
        inner = step(value)
        if inner is None:
            break
        value = inner
    if isinstance(value, Apply) and value.op == "cast" and _sums(value.args[0]):
        return _terms(value.args[0], outside, sign)
    if isinstance(value, Apply) and value.op == "add":
        first = _terms(value.args[0], outside, sign)
        return first if isinstance(first, Refusal) else _terms(value.args[1], first, sign)
    if isinstance(value, Apply) and value.op == "where":
        chosen = _masked_bias(value.args, outside, sign)
        if chosen is not None:
            return chosen
    if element is None:
        return Refusal("what is added to the scores is no tensor of its own")
    return replace(outside, biases=(*outside.biases, (element, factor)))


def _masked_bias(args: Sequence[Expr], outside: _Reading, sign: float) -> _Reading | None:
    """``where(keep, bias, NEG)`` with NEG so low that it swallows the score: a mask and a bias."""
    condition, a, b = args
    when = predicate_of(condition)
    if when is None or when == TRUE or not isinstance(condition, Element):
        return None
    for bias, fill, keeps in ((a, b, True), (b, a, False)):
        value = choice_of(fill)
        dropped = outside.drop_value(value, outside.factor * sign) if isinstance(value, float) else math.nan
        if not dropped <= ABSORBING:
            continue
        term = MaskTerm(when if keeps else negate(when), dropped, condition, keeps)
        read = _terms(bias, replace(outside, masks=(*outside.masks, term)), sign)
        return None if isinstance(read, Refusal) else read
    return None


def _sums(expr: Expr) -> bool:
    inner = step(look(expr)) if isinstance(expr, Element) else expr
    return isinstance(inner, Apply) and inner.op == "add"


def _mask_term(choice: Choice, factor: float, source: Element, outside: _Reading) -> MaskTerm | None:
    keep, kept, dropped = choice.when, choice.if_true * factor, choice.if_false
    if kept != 0:
        keep, kept, dropped = negate(keep), choice.if_false * factor, choice.if_true
    dropped = outside.drop_value(dropped, factor)
    if kept != 0 or math.isnan(dropped) or dropped > ADDED_BELOW:
        return None
    return MaskTerm(keep, dropped, source)


def _filled(args: Sequence[Expr], outside: _Reading, node: Node | None) -> tuple[Expr, _Reading] | Refusal:
    """``where(drop, NEG, scores)`` or ``where(keep, scores, NEG)``."""
    if outside.softcap:
        return Refusal("the scores are masked inside the softcap", node)
    condition, a, b = args
    when = predicate_of(condition)
    for scores, fill, keeps in ((b, a, False), (a, b, True)):
        value = choice_of(fill)
        if not isinstance(value, float):
            continue
        if when == TRUE or not isinstance(condition, Element):
            return Refusal("the mask of the scores is constant", node)
        dropped = outside.drop_value(value, outside.factor)
        if math.isnan(dropped) or dropped > MASKED_BELOW:
            return Refusal(f"masked scores are set to {value:g}, which is not low enough to be a mask", node)
        if when is None:
            return Refusal("the mask of the scores is no boolean tensor", node)
        term = MaskTerm(when if keeps else negate(when), dropped, condition, keeps, filled=True)
        if outside.biases and dropped > ABSORBING:
            return Refusal("a bias is added to scores that were masked with a finite value", node)
        return scores, replace(outside, masks=(*outside.masks, term))
    return Refusal("the scores are chosen between two tensors", node)


def _product(total: Reduce, key: Var, outside: _Reading) -> Scores | Refusal:
    summed: list[Var] = []
    expr: Expr = total
    while isinstance(expr, Reduce):
        if expr.kind != "sum":
            return Refusal("the scores are a maximum, not a sum", total.node)
        summed.append(expr.var)
        expr = expr.body
        if isinstance(expr, Element):
            inner = step(look(expr))
            if inner is None:
                return Refusal("the scores are a sum of something else than products", total.node)
            expr = inner
    if not (isinstance(expr, Apply) and expr.op == "mul"):
        return Refusal("the scores are a sum of something else than products", total.node)
    (a, scale_a), (b, scale_b) = (_operand(x, (key, *summed)) for x in expr.args)
    if a is None or b is None:
        return Refusal("an operand of the scores is no tensor", total.node)
    if key in a.vars() and key not in b.vars():
        a, b = b, a
    if key in a.vars() or key not in b.vars():
        return Refusal("q and k cannot be told apart: exactly one must run along the keys", total.node)
    scale = outside.factor * scale_a * scale_b
    if outside.softcap:
        scale *= outside.softcap
    if not (scale > 0 and math.isfinite(scale)):
        return Refusal(f"the scores are scaled by {scale:g}", total.node)
    return Scores(
        a, b, tuple(summed), scale, outside.softcap, outside.masks, outside.biases, outside.shifts, total.node,
        outside.max_subtracted, outside.constant,
    )  # fmt: skip


def _operand(expr: Expr, whole: Sequence[Var]) -> tuple[Element | None, float]:
    """q or k behind constant factors and layout."""
    factor = 1.0
    while isinstance(expr, Element):
        found = source(expr, whole)
        inner = step(found)
        if isinstance(inner, Apply) and inner.op in ("mul", "div"):
            scaled = _scaled(inner.op, inner.args)
            if scaled is not None and isinstance(scaled[0], Element):
                expr, factor = scaled[0], factor * scaled[1]
                continue
        return found, factor
    return None, factor
