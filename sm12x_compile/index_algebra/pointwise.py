"""Pointwise ops, constants and positions: what an element is computed from, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .expr import MEANING, Apply, Element, Expr, Number, Position, argument, broadcast, operand, rule, shape_of
from .index import Index, size_of
from .layout import Indices
from .predicate import Choice, as_index, choice_of

aten = torch.ops.aten


def _apply(op: str, count: int) -> Callable[[Node, Indices], Expr | None]:
    def meaning(node: Node, index: Indices) -> Expr | None:
        if node.kwargs.get("rounding_mode") is not None:
            return None
        args = [broadcast(a, index) for a in node.args[:count]]
        alpha = argument(node, 2, "alpha", 1) if op in ("add", "sub") else 1
        if alpha != 1:
            args[1] = Apply("mul", (args[1], Number(alpha)), node)
        return Apply(op, tuple(args), node)

    return meaning


_BINARY: dict[str, tuple[Any, ...]] = {
    "add": (aten.add.Tensor, aten.add.Scalar),
    "sub": (aten.sub.Tensor, aten.sub.Scalar),
    "mul": (aten.mul.Tensor, aten.mul.Scalar),
    "div": (aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor),
    "floordiv": (aten.floor_divide.default,),
    "pow": (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor),
    "maximum": (aten.maximum.default,),
    "minimum": (aten.minimum.default,),
    "le": (aten.le.Tensor, aten.le.Scalar),
    "lt": (aten.lt.Tensor, aten.lt.Scalar),
    "ge": (aten.ge.Tensor, aten.ge.Scalar),
    "gt": (aten.gt.Tensor, aten.gt.Scalar),
    "eq": (aten.eq.Tensor, aten.eq.Scalar),
    "ne": (aten.ne.Tensor, aten.ne.Scalar),
    "and": (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default),
    "or": (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default),
    "xor": (aten.bitwise_xor.Tensor, aten.logical_xor.default, aten.__xor__.Tensor),
}  # fmt: skip
_UNARY: dict[str, tuple[Any, ...]] = {
    "neg": (aten.neg.default,),
    "not": (aten.logical_not.default, aten.bitwise_not.default),
    "exp": (aten.exp.default,),
    "log": (aten.log.default,),
    "tanh": (aten.tanh.default,),
    "abs": (aten.abs.default,),
    "sqrt": (aten.sqrt.default,),
    "rsqrt": (aten.rsqrt.default,),
}
for _count, _table in ((2, _BINARY), (1, _UNARY)):
    for _op, _overloads in _table.items():
        for _overload in _overloads:
            MEANING[_overload] = _apply(_op, _count)


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(node: Node, index: Indices) -> Expr | None:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    return Apply("sub", (broadcast(node.args[1], index), broadcast(node.args[0], index)), node)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(node: Node, index: Indices) -> Expr | None:
    return Apply("where", tuple(broadcast(a, index) for a in node.args[:3]), node)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(node: Node, index: Indices) -> Expr | None:
    x, mask, value = (broadcast(a, index) for a in node.args[:3])
    return Apply("where", (mask, value, x), node)


@rule(aten._to_copy.default)
def _cast(node: Node, index: Indices) -> Expr | None:
    if operand(node).meta["val"].device != node.meta["val"].device:
        return None
    return Apply("cast", (Element(operand(node), index),), node, node.meta["val"].dtype)


@rule(aten.copy.default)
def _copy(node: Node, index: Indices) -> Expr | None:
    return Apply("cast", (broadcast(node.args[1], index),), node, node.meta["val"].dtype)


@rule(aten.tril.default, aten.triu.default)
def _triangle(node: Node, index: Indices) -> Expr | None:
    diagonal = argument(node, 1, "diagonal", 0)
    below = Position(index[-1] - index[-2])
    op = "le" if node.target is aten.tril.default else "ge"
    keep = Apply(op, (below, Position(Index(None, size_of(diagonal)))), node)
    zero = Number(False if node.meta["val"].dtype == torch.bool else 0)
    return Apply("where", (keep, Element(operand(node), index), zero), node)


def _number(value: Any, dtype: torch.dtype) -> Number:
    return Number(bool(value) if dtype == torch.bool else value)


@rule(aten.full.default, aten.full_like.default, aten.new_full.default, aten.fill.Scalar, aten.scalar_tensor.default)
def _full(node: Node, index: Indices) -> Expr | None:
    position = 2 if node.target is aten.new_full.default else 0 if node.target is aten.scalar_tensor.default else 1
    value = argument(node, position, "fill_value")
    if isinstance(value, Node):
        return broadcast(value, index)
    return _number(value, node.meta["val"].dtype)


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(node: Node, index: Indices) -> Expr | None:
    return _number(0, node.meta["val"].dtype)


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(node: Node, index: Indices) -> Expr | None:
    return _number(1, node.meta["val"].dtype)


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(node: Node, index: Indices) -> Expr | None:
    if node.meta["val"].dtype.is_floating_point:
        return None
    start = size_of(node.args[0]) if len(node.args) > 1 else 0
    stride = size_of(node.args[2]) if len(node.args) > 2 else 1
    return Position(index[0] * stride + start)


@rule("get_attr")
def _constant(node: Node, index: Indices) -> Expr | None:
    """A one-element tensor constant of the graph (`torch.tensor(8.0)` in the user's code)."""
    assert node.graph.owning_module is not None
    value = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(value, torch.Tensor) or isinstance(value, torch._subclasses.FakeTensor):
        return None
    return Number(value.item()) if value.numel() == 1 else None


# ---------------------------------------------------------------- positions as masks compute them


@rule(aten.diff.default)
def _diff(node: Node, index: Indices) -> Expr | None:
    """``x[i] - x[i-1]`` where x is a position and the prepended element continues it."""
    x, prepend, append = operand(node), argument(node, 3, "prepend"), argument(node, 4, "append")
    if argument(node, 1, "n", 1) != 1 or append is not None or prepend is None:
        return None
    dim = argument(node, 2, "dim", -1) % len(index)
    if shape_of(prepend)[dim] != 1 or (v := index[dim].var) is None:
        return None
    here = as_index(Element(x, index))
    first = as_index(Element(x, (*index[:dim], Index(), *index[dim + 1 :])))
    before = as_index(Element(prepend, (*index[:dim], Index(), *index[dim + 1 :])))
    if here is None or first is None or before is None:
        return None
    inner = here - here.subs({v: index[dim] - 1})
    if not inner.is_const or not isinstance(inner.const, int) or inner != first - before:
        return None
    return Number(inner.const)


@rule(aten.cumsum.default)
def _cumsum(node: Node, index: Indices) -> Expr | None:
    """The running sum of a constant is a position."""
    constant = choice_of(Element(operand(node), index))
    if constant is None or isinstance(constant, Choice) or not constant.is_integer():
        return None
    return Position(index[argument(node, 1, "dim") % len(index)] * int(constant) + int(constant))
