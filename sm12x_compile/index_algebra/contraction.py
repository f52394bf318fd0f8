"""Contractions as sums over an index: ``out[i, j] = sum_l a[i, l] * b[l, j]``, whatever they are called."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from .expr import Apply, Element, Expr, Number, Reduce, args_of, argument, broadcast, operand, rule, shape_of
from .index import Index, Var
from .layout import Indices

aten = torch.ops.aten


def _product_sum(node: Node, summed: Var, a: Expr, b: Expr) -> Expr:
    return Reduce("sum", summed, Apply("mul", (a, b), node), node)


def _batched(node: Node, index: Indices, batch: Indices, tail: Indices) -> Element:
    """Element of a matmul operand: `tail` after its batch dims, broadcast to those of the output."""
    shape = shape_of(node)
    rank = len(shape) - len(tail)
    lead = batch[len(batch) - rank :]
    return Element(node, (*(Index() if s == 1 else ix for ix, s in zip(lead, shape[:rank], strict=True)), *tail))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default)
def _matmul(node: Node, index: Indices) -> Expr | None:
    a, b = args_of(node)[:2]
    rank_a, rank_b = len(shape_of(a)), len(shape_of(b))
    summed = Var("l", shape_of(a)[-1])
    l = Index.of(summed)
    columns = index[len(index) - 1 :] if rank_b > 1 else ()
    rows = index[len(index) - 1 - len(columns) : len(index) - len(columns)] if rank_a > 1 else ()
    batch = index[: len(index) - len(rows) - len(columns)]
    left = _batched(a, index, batch, (*rows, l)) if rank_a > 1 else Element(a, (l,))
    right = _batched(b, index, batch, (l, *columns)) if rank_b > 1 else Element(b, (l,))
    return _product_sum(node, summed, left, right)


@rule(aten.linear.default)
def _linear(node: Node, index: Indices) -> Expr | None:
    x, weight = args_of(node)[:2]
    bias = argument(node, 2, "bias")
    if len(shape_of(weight)) != 2:
        return None
    summed = Var("l", shape_of(weight)[1])
    l = Index.of(summed)
    total = _product_sum(node, summed, Element(x, (*index[:-1], l)), Element(weight, (index[-1], l)))
    return total if bias is None else Apply("add", (total, Element(bias, (index[-1],))), node)


@rule(aten.baddbmm.default, aten.addmm.default)
def _addmm(node: Node, index: Indices) -> Expr | None:
    added, a, b = args_of(node)[:3]
    beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
    summed = Var("l", shape_of(a)[-1])
    l = Index.of(summed)
    batch = index[:-2]
    total = _product_sum(
        node, summed, Element(a, (*batch, index[-2], l)), Element(b, (*batch, l, index[-1]))
    )
    if alpha != 1:
        total = Apply("mul", (total, Number(alpha)), node)
    if beta == 0:
        return total
    bias: Expr = broadcast(added, index)
    if beta != 1:
        bias = Apply("mul", (bias, Number(beta)), node)
    return Apply("add", (total, bias), node)


@rule(aten.inner.default)
def _inner(node: Node, index: Indices) -> Expr | None:
    a, b = args_of(node)[:2]
    rank_a = len(shape_of(a))
    if rank_a == 0 or len(shape_of(b)) == 0:
        return None
    summed = Var("l", shape_of(a)[-1])
    l = Index.of(summed)
    return _product_sum(node, summed, Element(a, (*index[: rank_a - 1], l)), Element(b, (*index[rank_a - 1 :], l)))


@rule(aten.tensordot.default)
def _tensordot(node: Node, index: Indices) -> Expr | None:
    a, b, dims_a, dims_b = args_of(node)[:4]
    if len(dims_a) != 1:
        return None
    rank_a, rank_b = len(shape_of(a)), len(shape_of(b))
    dim_a, dim_b = dims_a[0] % rank_a, dims_b[0] % rank_b
    summed = Var("l", shape_of(a)[dim_a])
    l = Index.of(summed)
    free_a, free_b = index[: rank_a - 1], index[rank_a - 1 :]
    left = Element(a, (*free_a[:dim_a], l, *free_a[dim_a:]))
    return _product_sum(node, summed, left, Element(b, (*free_b[:dim_b], l, *free_b[dim_b:])))


@rule(aten.einsum.default)
def _einsum(node: Node, index: Indices) -> Expr | None:
    equation, operands = args_of(node)[:2]
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(names) != len(operands):
        return None
    ranks = [len(shape_of(o)) for o in operands]
    extra = [r - len(n.replace("...", "")) for r, n in zip(ranks, names, strict=True)]
    dots = max(0, *extra)
    if not arrow:
        letters = sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1)
        output = ("..." if "..." in inputs else "") + "".join(letters)
    # An ellipsis stands for digits, so that it is a run of ordinary letters aligned at its end.
    spell = [n.replace("...", "".join(map(str, range(dots - e, dots)))) for n, e in zip(names, extra, strict=True)]
    out = output.replace("...", "".join(map(str, range(dots))))
    where: dict[str, Index] = dict(zip(out, index, strict=True))
    summed: list[Var] = []
    for tensor, letters_ in zip(operands, spell, strict=True):
        for letter, size in zip(letters_, shape_of(tensor), strict=True):
            if letter not in where:
                summed.append(Var(letter, size))
                where[letter] = Index.of(summed[-1])
    elements: list[Expr] = []
    for tensor, letters_ in zip(operands, spell, strict=True):
        sized = zip(letters_, shape_of(tensor), strict=True)
        elements.append(Element(tensor, tuple(Index() if s == 1 else where[c] for c, s in sized)))
    body: Expr = elements[0]
    for element in elements[1:]:
        body = Apply("mul", (body, element), node)
    for var in summed:
        body = Reduce("sum", var, body, node)
    return body


@rule(aten.sum.dim_IntList, aten.amax.default)
def _reduce(node: Node, index: Indices) -> Expr | None:
    dims, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    kind = "sum" if node.target is aten.sum.dim_IntList else "max"
    return reduction(node, index, operand(node), dims, keep, kind)


@rule(operator.getitem)
def _max_value(node: Node, index: Indices) -> Expr | None:
    whole, which = args_of(node)
    if not isinstance(whole, Node) or whole.target is not aten.max.dim or which != 0:
        return None
    source, dim = args_of(whole)[:2]
    return reduction(node, index, source, [dim], argument(whole, 2, "keepdim", False), "max")


def reduction(node: Node, index: Indices, source: Node, dims: Any, keep: bool, kind: str) -> Expr | None:
    shape = shape_of(source)
    which = {d % len(shape) for d in (dims or range(len(shape)))} if shape else set()
    left = iter(index)
    full: list[Index] = []
    summed: list[Var] = []
    for k, size in enumerate(shape):
        if k in which:
            summed.append(Var("l", size))
            full.append(Index() if size == 1 else Index.of(summed[-1]))
            if keep:
                next(left)
        else:
            full.append(next(left))
    body: Expr = Element(source, tuple(full))
    for var in summed:
        body = Reduce(kind, var, body, node)
    return body
