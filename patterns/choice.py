"""Which tokens an expert gets: ``sum over j of [ids[t, j] == e] * p[t, j]``, in any of its spellings.

A comparison, `one_hot`, a `scatter` of the weights into ``[T, E]``, a sum, `any` or a masked fill over these: all
are the same indicator times a weight. So is a function of scores of which all but the chosen ones are filled with
what it maps to zero: sigmoid or softmax, and -inf. Where a spelling is the sum only if no expert is chosen twice,
that is proved from the op that chose (top-k gives distinct indices) or the match is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Apply, Datum, Element, Expr, Index, Number, Reduce, Size, Var, same_size
from sm12x_compile.index_algebra.expr import args_of, argument, operand, shape_of
from sm12x_compile.match import Refusal

from .products import rename
from .routed import FLOATS, Reader, Unreadable

aten = torch.ops.aten

CHOOSERS = {
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable,
    aten.max.dim, aten.argmax.default,
}  # fmt: skip
_SCATTERS = {aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two}


@dataclass(frozen=True)
class Choice:
    """``sum over vars of [ids == slot] * product of factors``; with `any`, whether there is such a choice."""

    vars: tuple[Var, ...]
    ids: Index
    factors: tuple[Expr, ...]
    node: Node
    any: bool = False


def find_choices(reader: Reader, expr: Expr, slot: Index) -> list[Choice] | None:
    """The indicators of `slot` in an expression that is linear in them; None if there is none."""
    if isinstance(expr, Element):
        element = reader.resolve(expr)
        found = _scattered(reader, element, slot) or _of_filled_scores(reader, element, slot)
        if found is not None:
            return found
        made = reader.meaning(expr)
        return None if made is None or isinstance(made, Element) else find_choices(reader, made, slot)
    if isinstance(expr, Reduce):
        inner = find_choices(reader, expr.body, slot)
        if inner is None or expr.kind not in ("sum", "any", "max"):
            return None
        if expr.kind != "sum" and any(c.factors for c in inner):
            return None
        return [replace(c, vars=(*c.vars, expr.var), any=c.any or expr.kind != "sum") for c in inner]
    return _of_apply(reader, expr, slot) if isinstance(expr, Apply) else None


def _of_apply(reader: Reader, expr: Apply, slot: Index) -> list[Choice] | None:
    op, args = expr.op, expr.args
    if op == "eq":
        return _comparison(reader, expr, slot)
    if op == "cast":
        found = find_choices(reader, args[0], slot)
        if found is not None and expr.detail == torch.bool:
            return _whether(found)
        return found if expr.detail in FLOATS or not any(c.factors for c in found or []) else None
    if op == "mul":
        for a, b in (args, args[::-1]):
            found = find_choices(reader, a, slot)
            if found is not None:
                found = _summed(found)
                if found is None or find_choices(reader, b, slot) is not None:
                    return None
                return [replace(c, factors=(*c.factors, b)) for c in found]
        return None
    if op == "div":
        found = _summed(find_choices(reader, args[0], slot))
        if found is None:
            return None
        return [
            replace(c, factors=(Apply("div", (_product(c.factors, expr.node), args[1]), expr.node),)) for c in found
        ]
    if op == "add":
        both = [find_choices(reader, a, slot) for a in args if not _is_zero(reader, a)]
        return None if any(f is None for f in both) else [c for f in both for c in f or []]
    if op == "where":
        return _masked(reader, args, slot)
    if op in ("gt", "ne") and isinstance(args[1], Number) and args[1].value == 0:
        # How often an expert was chosen, compared with zero.
        inner = find_choices(reader, args[0], slot)
        return None if inner is None else _whether(inner)
    return None


def _whether(picks: list[Choice]) -> list[Choice] | None:
    """Whether an expert was chosen at all."""
    if any(c.factors for c in picks):
        return None
    if len(picks) == 1 and not picks[0].vars:
        return picks  # an indicator is one or zero as it is
    return [replace(c, any=True) for c in picks]


def _summed(picks: list[Choice] | None) -> list[Choice] | None:
    """Choices that may be multiplied: where no expert is chosen twice, ``any`` is the sum."""
    if picks is None or not any(c.any for c in picks):
        return picks
    return [replace(picks[0], any=False)] if len(picks) == 1 and are_distinct(picks[0]) else None


def _product(factors: tuple[Expr, ...], node: Node) -> Expr:
    product: Expr = factors[0] if factors else Number(1)
    for factor in factors[1:]:
        product = Apply("mul", (product, factor), node)
    return product


def _kept(
    reader: Reader, args: tuple[Expr, ...], slot: Index, is_nothing: Callable[[Reader, Expr], bool]
) -> tuple[Expr, list[Choice] | None]:
    """What ``where(condition, a, b)`` keeps where one side is nothing, and who chose it (None if it is otherwise)."""
    condition, a, b = args
    if is_nothing(reader, b):
        return a, _summed(find_choices(reader, condition, slot))
    return b, _summed(unchosen(reader, condition, slot)) if is_nothing(reader, a) else None


def _masked(reader: Reader, args: tuple[Expr, ...], slot: Index) -> list[Choice] | None:
    kept, picks = _kept(reader, args, slot, _is_zero)
    if picks is None:
        return None
    return picks if _is_one(kept) else [replace(c, factors=(*c.factors, kept)) for c in picks]


def unchosen(reader: Reader, condition: Expr, slot: Index) -> list[Choice] | None:
    """The indicator whose negation a condition is."""
    value = reader.meaning(condition) if isinstance(condition, Element) else condition
    if not isinstance(value, Apply):
        return None
    if value.op == "not":
        return find_choices(reader, value.args[0], slot)
    return _comparison(reader, value, slot) if value.op == "ne" else None


def _comparison(reader: Reader, expr: Apply, slot: Index) -> list[Choice] | None:
    a, b = (reader.index_of(x) for x in expr.args)
    if a is None or b is None:
        return None
    if not a.has_datum():
        a, b = b, a
    return [Choice((), a, (), expr.node)] if b == slot and a.has_datum() else None


def _of_filled_scores(reader: Reader, element: Element, slot: Index) -> list[Choice] | None:
    """``sigmoid`` or ``softmax`` of scores that are -inf for all experts but the chosen ones."""
    node, index = element.node, element.index
    if node.target not in (aten.sigmoid.default, aten.softmax.int):
        return None
    dims = [k for k, ix in enumerate(index) if ix == slot]
    if node.target is aten.softmax.int:
        dims = [d for d in dims if d == argument(node, 1, "dim") % len(index)]
    for dim in dims:
        every = Var("e", shape_of(node)[dim])
        scores = Element(operand(node), (*index[:dim], Index.of(every), *index[dim + 1 :]))
        found = _filled(reader, scores, Index.of(every))
        if found is None or not are_distinct(found) or len(found.factors) != 1:
            continue
        name = "sigmoid" if node.target is aten.sigmoid.default else "softmax"
        # A softmax runs over the choices of the scatter, all of them.
        if name == "softmax" and (len(found.vars) != 1 or argument(node, 2, "dtype") is not None):
            continue
        factor = Apply(name, found.factors, node)
        return [replace(found, factors=(factor,))]
    return None


def _filled(reader: Reader, scores: Expr, slot: Index) -> Choice | None:
    """Scores of the chosen experts where all others are -inf: the choice, and the scores as its only factor."""
    made = reader.meaning(scores) if isinstance(scores, Element) else scores
    if isinstance(made, Apply) and made.op == "cast" and made.detail in FLOATS:
        found = _filled(reader, made.args[0], slot)
        if found is None:
            return None
        return replace(found, factors=(Apply("cast", found.factors, made.node, made.detail),))
    if isinstance(scores, Element):
        scattered = _scattered(reader, reader.resolve(scores), slot, filled=True)
        if scattered is not None:
            return scattered[0]
    if not (isinstance(made, Apply) and made.op == "where"):
        return None
    kept, picks = _kept(reader, made.args, slot, _is_lowest)
    if picks is None or len(picks) != 1 or picks[0].factors:
        return None
    return replace(picks[0], factors=(at_choice(kept, slot, picks[0].ids),))


def at_choice(expr: Expr, slot: Index, ids: Index) -> Expr:
    """What is looked up by an expert's variable, looked up by the choice; a loop's numbers stay as they are."""
    return expr if slot.var is None else rename(expr, {slot.var: ids})


def _scattered(reader: Reader, element: Element, slot: Index, filled: bool = False) -> list[Choice] | None:
    """``zeros.scatter(dim, ids, p)``; or, if `filled`, ``full(-inf).scatter(dim, ids, scores)``."""
    node, index = element.node, element.index
    if node.target not in _SCATTERS:
        return None
    base, dim, ids = args_of(node)[:3]
    source = args_of(node)[3]
    dim %= len(index)
    if index[dim] != slot or not (_is_lowest if filled else _is_zero)(reader, Element(base, index)):
        return None
    if filled and node.target is not aten.scatter.src:
        return None
    if isinstance(source, Node) and any(
        not same_size(x, y) for x, y in zip(shape_of(source), shape_of(ids), strict=True)
    ):
        return None
    rows, whole = shape_of(ids), shape_of(base)
    if any(k != dim and not same_size(rows[k], whole[k]) for k in range(len(index))):
        return None
    choice = Var("j", rows[dim])
    where = (*index[:dim], Index.of(choice), *index[dim + 1 :])
    pick = reader.index_of(Element(ids, where))
    if pick is None or not pick.has_datum():
        return None
    if node.target is aten.scatter_reduce.two and args_of(node)[4] != "sum":
        return None
    factors: tuple[Expr, ...] = (Element(source, where),) if isinstance(source, Node) else (Number(source),)
    if factors == (Number(1),):
        factors = ()
    if not isinstance(source, Node) and not isinstance(source, (int, float)):
        return None
    found = Choice((choice,), pick, factors, node)
    if node.target in (aten.scatter.src, aten.scatter.value) and not are_distinct(found):
        reason = "weights scattered over an expert that is chosen twice overwrite each other; use scatter_add"
        raise Unreadable(Refusal(reason, node))
    return [found]


# ---------------------------------------------------------------- what is known of the ids


def chooser(ids: Index) -> tuple[Node, Element] | None:
    """The top-k, arg-max or sort whose indices `ids` are, and their element."""
    if len(ids.terms) != 1 or ids.const != 0:
        return None
    ((atom, c),) = ids.terms.items()
    if c != 1 or not isinstance(atom, Datum):
        return None
    element = atom.element
    node = element.node
    if node.target is operator.getitem and args_of(node)[1] == 1:
        call = operand(node)
        if isinstance(call, Node) and call.target in (aten.topk.default, aten.sort.default, aten.max.dim):
            return call, element
    if node.target in (aten.argmax.default, aten.argsort.default):
        return node, element
    return None


def are_distinct(choice: Choice) -> bool:
    """Whether no expert is chosen twice for one token, as the variables of the choice run."""
    if all(v.extent == 1 for v in choice.vars):
        return True
    found = chooser(choice.ids)
    if found is None or len(choice.vars) != 1:
        return False
    call, element = found
    if call.target in (aten.max.dim, aten.argmax.default):
        return same_size(choice.vars[0].extent, 1)
    position = 2 if call.target is aten.topk.default else 1
    dim = argument(call, position, "dim", -1) % len(element.index)
    moving = [k for k, ix in enumerate(element.index) if choice.vars[0] in ix.vars()]
    # Any index that is one-to-one in the variable will do; affine ones are.
    return moving == [dim] and set(element.index[dim].terms) == {choice.vars[0]}


def chosen_from(ids: Index) -> Size | None:
    """How many entries the dimension has whose indices `ids` are."""
    found = chooser(ids)
    if found is None:
        return None
    shape = shape_of(operand(found[0]))
    dim = argument(found[0], 2 if found[0].target is aten.topk.default else 1, "dim", -1)
    return None if dim is None else shape[dim % len(shape)]


def are_in_range(choice: Choice, experts: Size) -> bool:
    """Whether the ids are the indices of a dimension with that many entries, so none lies outside."""
    size = chosen_from(choice.ids)
    return size is not None and same_size(size, experts)


def _is_one(expr: Expr) -> bool:
    return isinstance(expr, Number) and expr.value == 1


def _is_zero(reader: Reader, expr: Expr) -> bool:
    return reader.is_zero(expr)


def _is_lowest(reader: Reader, expr: Expr) -> bool:
    """Whether a constant is so low that softmax and sigmoid give zero for it."""
    made = reader.meaning(expr) if isinstance(expr, Element) else expr
    while isinstance(made, Apply) and made.op == "cast" and made.detail in FLOATS:
        inner = made.args[0]
        made = reader.meaning(inner) if isinstance(inner, Element) else inner
    return isinstance(made, Number) and made.value <= -1e9


_POSITIVE = {aten.softmax.int, aten.sigmoid.default, aten.exp.default, aten.relu.default}


def is_nonnegative(reader: Reader, expr: Expr) -> bool:
    """Whether a number cannot be below zero, by the ops that made it."""
    if isinstance(expr, Element):
        element = reader.resolve(expr)
        node = element.node
        if node.target in _POSITIVE:
            return True
        if node.target is operator.getitem and args_of(node)[1] == 0 and operand(node).target in CHOOSERS:
            return is_nonnegative(reader, Element(operand(operand(node)), element.index))  # some of its values
        made = reader.meaning(element)
        return made is not None and not isinstance(made, Element) and is_nonnegative(reader, made)
    if isinstance(expr, Number):
        return expr.value >= 0
    if isinstance(expr, Apply):
        return expr.op in ("cast", "mul", "div", "add") and all(is_nonnegative(reader, a) for a in expr.args)
    return isinstance(expr, Reduce) and is_nonnegative(reader, expr.body)
