"""Layout ops as exact index maps: element `index` of the output is element f(index) of an input."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .. import ops  # noqa: F401  (defines ours)
from .expr import Cases, Element, Expr, Number, Rule, args_of, argument, broadcast, operand, shape_of
from .index import Index, Size, Var, add, flatten, known_nonnegative, mul, same_size, size_of, unflatten

aten = torch.ops.aten
Indices = tuple[Index, ...]

LAYOUT: dict[Any, Rule] = {}


def layout(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for target in targets:
            LAYOUT[target] = function
        return function

    return register


def layout_step(element: Element) -> Expr | None:
    """One layout op back, or None if the node is no layout op (or one whose index map cannot be decided)."""
    found = LAYOUT.get(element.node.target)
    return found(element.node, element.index) if found is not None else None


def look(element: Element, accept: Callable[[Element], bool] | None = None) -> Element:
    """Where an element comes from: through every layout op whose answer is a single element.

    With `accept`, the farthest element that it accepts (or the one asked about).
    """
    best = element
    while True:
        before = layout_step(element)
        if not isinstance(before, Element):
            return best
        element = before
        if accept is None or accept(element):
            best = element


def _dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _with(index: Indices, dim: int, new: Index) -> Indices:
    return (*index[:dim], new, *index[dim + 1 :])


def reshape_index(index: Indices, out_shape: tuple[Size, ...], in_shape: tuple[Size, ...]) -> Indices:
    """The index into `in_shape` of the element at `index` of its reshape to `out_shape`.

    Works segment by segment (the shortest runs of dims with equal products), so symbolic sizes stay apart.
    """
    result: list[Index] = []
    i = j = 0
    while i < len(in_shape) or j < len(out_shape):
        i0, j0 = i, j
        a: Size = 1
        b: Size = 1
        first = True
        while first or not same_size(a, b):
            first = False
            if j < len(out_shape) and (i >= len(in_shape) or (i > i0 and _smaller(b, a))):
                b, j = mul(b, out_shape[j]), j + 1
            elif i < len(in_shape) and (j >= len(out_shape) or j > j0):
                a, i = mul(a, in_shape[i]), i + 1
            elif i < len(in_shape):
                a, i = mul(a, in_shape[i]), i + 1
                if j < len(out_shape):
                    b, j = mul(b, out_shape[j]), j + 1
            else:
                break
        result += unflatten(flatten(index[j0:j], out_shape[j0:j]), in_shape[i0:i])
    return tuple(Index() if s == 1 else ix for ix, s in zip(result, in_shape, strict=True))


def _smaller(a: Size, b: Size) -> bool:
    """Whether a is the smaller one; for symbolic sizes, whether it still lacks a factor of b."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return known_nonnegative(add(b, mul(a, -1)))


@layout(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(node: Node, index: Indices) -> Expr | None:
    source = operand(node)
    return Element(source, reshape_index(index, shape_of(node), shape_of(source)))


@layout(
    aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    aten.contiguous.default, aten.lift_fresh.default,
)  # fmt: skip
def _same(node: Node, index: Indices) -> Expr | None:
    return Element(operand(node), index)


@layout(aten._to_copy.default)
def _to_copy(node: Node, index: Indices) -> Expr | None:
    new, old = node.meta["val"], operand(node).meta["val"]
    return Element(operand(node), index) if new.dtype == old.dtype and new.device == old.device else None


@layout(aten.copy.default)
def _copy(node: Node, index: Indices) -> Expr | None:
    target, source = args_of(node)[:2]
    if not isinstance(source, Node) or source.meta["val"].dtype != target.meta["val"].dtype:
        return None
    return broadcast(source, index)


@layout(torch.ops.sm12x.either.default)
def _either(node: Node, index: Indices) -> Expr | None:
    return Element(args_of(node)[1], index)


@layout(aten.transpose.int)
def _transpose(node: Node, index: Indices) -> Expr | None:
    moved = list(index)
    a, b = (_dim(d, len(index)) for d in args_of(node)[1:3])
    moved[a], moved[b] = moved[b], moved[a]
    return Element(operand(node), tuple(moved))


@layout(aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default)
def _t(node: Node, index: Indices) -> Expr | None:
    if node.target in (aten.mT.default, aten.adjoint.default):
        if node.meta["val"].is_complex():
            return None
        return Element(operand(node), (*index[:-2], index[-1], index[-2]))
    return Element(operand(node), tuple(reversed(index)))


@layout(aten.permute.default)
def _permute(node: Node, index: Indices) -> Expr | None:
    moved = list(index)
    for out, dim in enumerate(args_of(node)[1]):
        moved[_dim(dim, len(index))] = index[out]
    return Element(operand(node), tuple(moved))


@layout(aten.unsqueeze.default)
def _unsqueeze(node: Node, index: Indices) -> Expr | None:
    dim = _dim(args_of(node)[1], len(index))
    return Element(operand(node), index[:dim] + index[dim + 1 :])


@layout(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(node: Node, index: Indices) -> Expr | None:
    shape = shape_of(operand(node))
    dims = argument(node, 1, "dim", list(range(len(shape))))
    dims = [_dim(d, len(shape)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    left = iter(index)
    full = tuple(Index() if k in dims and s == 1 else next(left) for k, s in enumerate(shape))
    return Element(operand(node), full)


@layout(aten.expand.default, aten.broadcast_to.default)
def _expand(node: Node, index: Indices) -> Expr | None:
    return broadcast(operand(node), index)


@layout(aten.repeat.default)
def _repeat(node: Node, index: Indices) -> Expr | None:
    shape = shape_of(operand(node))
    index = index[len(index) - len(shape) :]
    return Element(operand(node), tuple(ix.mod(s) for ix, s in zip(index, shape, strict=True)))


@layout(aten.repeat_interleave.self_int)
def _repeat_interleave(node: Node, index: Indices) -> Expr | None:
    source, repeats = args_of(node)[:2]
    dim = argument(node, 2, "dim")
    if dim is None or not isinstance(repeats, int):
        return None
    dim = _dim(dim, len(index))
    return Element(source, _with(index, dim, index[dim].div(repeats)))


def _start(value: Any, size: Size) -> Size | None:
    """The start of a slice as a position from the front, where it is known to lie inside."""
    start: Size = 0 if value is None else size_of(value)
    if known_nonnegative(mul(start, -1)) and start != 0:
        start = add(start, size)
        return start if known_nonnegative(start) else (0 if isinstance(start, int) else None)
    if known_nonnegative(start) and known_nonnegative(add(size, mul(start, -1))):
        return start
    return None


@layout(aten.slice.Tensor)
def _slice(node: Node, index: Indices) -> Expr | None:
    dim = _dim(argument(node, 1, "dim", 0), len(index))
    start = _start(argument(node, 2, "start"), shape_of(operand(node))[dim])
    if start is None:
        return None
    stride = size_of(argument(node, 4, "step", 1))
    return Element(operand(node), _with(index, dim, index[dim] * stride + start))


@layout(aten.narrow.default)
def _narrow(node: Node, index: Indices) -> Expr | None:
    source, dim, first = args_of(node)[:3]
    dim = _dim(dim, len(index))
    start = _start(first, shape_of(source)[dim])
    return None if start is None else Element(source, _with(index, dim, index[dim] + start))


@layout(aten.select.int)
def _select(node: Node, index: Indices) -> Expr | None:
    source, dim, at = args_of(node)
    shape = shape_of(source)
    dim, position = _dim(dim, len(shape)), size_of(at)
    if known_nonnegative(add(mul(position, -1), -1)):
        position = add(position, shape[dim])
    elif not known_nonnegative(position):
        return None
    return Element(source, (*index[:dim], Index(None, position), *index[dim:]))


@layout(aten.flip.default)
def _flip(node: Node, index: Indices) -> Expr | None:
    shape = shape_of(node)
    dims = {_dim(d, len(index)) for d in args_of(node)[1]}
    flipped = (-ix + add(s, -1) if k in dims else ix for k, (ix, s) in enumerate(zip(index, shape, strict=True)))
    return Element(operand(node), tuple(flipped))


_PIECES = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default}


@layout(operator.getitem)
def _piece(node: Node, index: Indices) -> Expr | None:
    whole, number = args_of(node)
    if not isinstance(whole, Node) or whole.target not in _PIECES or not isinstance(number, int):
        return None
    source = operand(whole)
    if whole.target is aten.unbind.int:
        dim = _dim(argument(whole, 1, "dim", 0), len(shape_of(source)))
        return Element(source, (*index[:dim], Index(None, number), *index[dim:]))
    dim = _dim(argument(whole, 2, "dim", 0), len(index))
    start: Size = 0
    for earlier in whole.meta["val"][:number]:
        start = add(start, size_of(earlier.shape[dim]))
    return Element(source, _with(index, dim, index[dim] + start))


def _decide(index: Index, pieces: list[tuple[Size, Size, Expr]]) -> Expr:
    """The piece that holds the index, if bounds tell; else those that may."""
    possible: list[tuple[Size, Size, Expr]] = []
    for low, high, expr in pieces:
        if index.outside(low, high):
            continue
        if index.within(low, high) and not possible:
            return expr
        possible.append((low, high, expr))
    return possible[0][2] if len(possible) == 1 and len(pieces) > 1 else Cases(index, tuple(possible))


@layout(aten.cat.default)
def _cat(node: Node, index: Indices) -> Expr | None:
    parts = [p for p in args_of(node)[0] if p.meta["val"].dim() == len(index)]  # an empty 1-D tensor is skipped
    if any(p.meta["val"].dtype != node.meta["val"].dtype for p in parts):
        return None
    dim = _dim(argument(node, 1, "dim", 0), len(index))
    pieces: list[tuple[Size, Size, Expr]] = []
    start: Size = 0
    for part in parts:
        stop = add(start, shape_of(part)[dim])
        pieces.append((start, stop, Element(part, _with(index, dim, index[dim] - start))))
        start = stop
    return pieces[0][2] if len(pieces) == 1 else _decide(index[dim], pieces)


@layout(aten.stack.default)
def _stack(node: Node, index: Indices) -> Expr | None:
    if any(p.meta["val"].dtype != node.meta["val"].dtype for p in args_of(node)[0]):
        return None
    dim = _dim(argument(node, 1, "dim", 0), len(index))
    rest = index[:dim] + index[dim + 1 :]
    return _decide(index[dim], [(k, k + 1, Element(p, rest)) for k, p in enumerate(args_of(node)[0])])


@layout(aten.slice_scatter.default)
def _slice_scatter(node: Node, index: Indices) -> Expr | None:
    base, source = args_of(node)[:2]
    dim = _dim(argument(node, 2, "dim", 0), len(index))
    size = shape_of(node)[dim]
    start, stride = _start(argument(node, 3, "start"), size), argument(node, 5, "step", 1)
    if start is None or base.meta["val"].dtype != source.meta["val"].dtype:
        return None
    if stride != 1:
        # Every stride-th element, from the first one to the end of the dimension.
        if not all(isinstance(n, int) for n in (start, stride, size)) or not start < stride:  # type: ignore[operator]
            return None
        if shape_of(source)[dim] != -(-(size - start) // stride):  # type: ignore[operator]
            return None
        strided = Element(source, _with(index, dim, index[dim].div(stride)))
        return _decide(index[dim].mod(stride), [(start, add(start, 1), strided), (0, stride, Element(base, index))])
    stop = add(start, shape_of(source)[dim])
    inside = Element(source, _with(index, dim, index[dim] - start))
    return _decide(index[dim], [(start, stop, inside), (0, size, Element(base, index))])


@layout(aten.select_scatter.default)
def _select_scatter(node: Node, index: Indices) -> Expr | None:
    base, source, dim, position = args_of(node)
    dim = _dim(dim, len(index))
    if not isinstance(position, int) or base.meta["val"].dtype != source.meta["val"].dtype:
        return None
    size = shape_of(node)[dim]
    start = add(position, size) if position < 0 else position
    inside = Element(source, index[:dim] + index[dim + 1 :])
    return _decide(index[dim], [(start, add(start, 1), inside), (0, size, Element(base, index))])


@layout(aten.pad.default, aten.constant_pad_nd.default)
def _pad(node: Node, index: Indices) -> Expr | None:
    source, pads = args_of(node)[:2]
    constant = node.target is aten.constant_pad_nd.default
    value = argument(node, 2, "value", 0) if constant else argument(node, 3, "value", None)
    if not constant and argument(node, 2, "mode", "constant") != "constant":
        return None
    shape = shape_of(source)
    inner, outer = list(index), None
    for k in range(len(pads) // 2):
        dim, low = len(index) - 1 - k, size_of(pads[2 * k])
        if low == 0 and size_of(pads[2 * k + 1]) == 0:
            continue
        inner[dim] = index[dim] - low
        if not index[dim].within(low, add(low, shape[dim])):
            if outer is not None:
                return None
            outer = (index[dim], low, add(low, shape[dim]), shape_of(node)[dim])
    inside = Element(source, tuple(inner))
    if outer is None:
        return inside
    ix, low, high, size = outer
    return _decide(ix, [(low, high, inside), (0, size, Number(value or 0))])


def _index_value(node: Node, index: Indices) -> Index | None:
    """The value of an integer index tensor's element as an index: a position, or what the run holds there."""
    from .predicate import as_index

    if node.meta["val"].dtype not in (torch.int64, torch.int32):
        return None
    return as_index(broadcast(node, index))


@layout(aten.index.Tensor)
def _gather(node: Node, index: Indices) -> Expr | None:
    source, picks = args_of(node)[:2]
    tensors = [(k, p) for k, p in enumerate(picks) if p is not None]
    ranks = [p.meta["val"].dim() for _, p in tensors]
    width, first = max(ranks), tensors[0][0]
    together = tensors[-1][0] - first == len(tensors) - 1
    at = first if together else 0
    picked, rest = index[at : at + width], list(index[:at] + index[at + width :])
    shape = shape_of(source)
    full: list[Index] = []
    for k in range(len(shape)):
        pick = picks[k] if k < len(picks) else None
        if pick is None:
            full.append(rest.pop(0))
            continue
        value = _index_value(pick, picked)
        if value is None:
            return None
        if isinstance(value.const, int) and value.is_const and value.const < 0:
            value = value + shape[k]
        elif not value.has_datum() and not value.within(0, shape[k]):
            return None
        full.append(value)
    return Element(source, tuple(full))


@layout(aten.index_select.default)
def _index_select(node: Node, index: Indices) -> Expr | None:
    source, dim, pick = args_of(node)
    dim = _dim(dim, len(index))
    value = _index_value(pick, (index[dim],)) if pick.meta["val"].dim() == 1 else None
    return None if value is None else Element(source, _with(index, dim, value))


def fresh(shape: tuple[Size, ...], names: str = "ijklmnop") -> tuple[Var, ...]:
    """One variable a dimension."""
    return tuple(Var(n, s) for n, s in zip(names, shape, strict=False))


@layout(aten.unfold.default)
def _unfold(node: Node, index: Indices) -> Expr | None:
    source, dim, _, stride = args_of(node)
    dim = _dim(dim, len(shape_of(source)))
    *rest, inside = index
    return Element(source, _with(tuple(rest), dim, rest[dim] * size_of(stride) + inside))


@layout(aten.roll.default)
def _roll(node: Node, index: Indices) -> Expr | None:
    source, shifts = args_of(node)[:2]
    dims = argument(node, 2, "dims", [])
    if len(shifts) != 1 or len(dims) != 1:
        return None
    dim, shape = _dim(dims[0], len(index)), shape_of(source)
    size, shift = shape[dim], shifts[0]
    if not isinstance(size, int) or not isinstance(shift, int) or size == 0:
        return None
    shift %= size
    moved = [Element(source, _with(index, dim, index[dim] + by)) for by in (-shift, size - shift)]
    return _decide(index[dim], [(shift, size, moved[0]), (0, shift, moved[1])]) if shift else moved[0]
