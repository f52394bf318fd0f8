"""Rows sorted by expert, proved from the graph: permutations, their inverses, and where the groups end.

`sort` and `argsort` of a 1-D tensor give a permutation; a tensor written at the places of a permutation, and the
argsort of a permutation, are its inverse. Nothing here counts nodes or trusts a spelling.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Datum, Element, Index, Var
from sm12x_compile.index_algebra.expr import args_of, argument, operand, shape_of
from sm12x_compile.index_algebra.index import same_size
from sm12x_compile.index_algebra.predicate import as_index

aten = torch.ops.aten

_SORTS = {aten.sort.default, aten.sort.stable}
_ARGSORTS = {aten.argsort.default, aten.argsort.stable}
_EXACT = {torch.int64, torch.int32, torch.float64, torch.float32}


def equal_nodes(a: Any, b: Any, depth: int = 12) -> bool:
    """Whether two nodes hold the same value because they are the same call of a deterministic op."""
    if a is b:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal_nodes(x, y, depth) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and bool(a == b)
    if depth == 0 or a.op != "call_function" or a.target is not b.target or a.kwargs.keys() != b.kwargs.keys():
        return False
    if isinstance(a.target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in a.target.tags or a.target in _UNINITIALISED
    ):
        return False
    return equal_nodes(a.args, b.args, depth - 1) and all(
        equal_nodes(a.kwargs[k], b.kwargs[k], depth - 1) for k in a.kwargs
    )


_UNINITIALISED = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten.new_empty_strided.default,
}  # fmt: skip


def _sort_call(node: Node, result: int) -> tuple[Node, bool] | None:
    """The 1-D tensor that `node` sorts (`result` 0) or gives the sorting permutation of (1); whether descending."""
    if node.target is operator.getitem and args_of(node)[1] == result:
        call = operand(node)
        if not isinstance(call, Node) or call.target not in _SORTS:
            return None
    elif result == 1 and node.target in _ARGSORTS:
        call = node
    else:
        return None
    stable = call.target in (aten.sort.stable, aten.argsort.stable)
    source = operand(call)
    if source.meta["val"].dim() != 1:
        return None
    # `stable` is keyword-only in front of dim and descending.
    descending = argument(call, 2, "descending", False) if not stable else call.kwargs.get("descending", False)
    return source, bool(descending)


def permutation_of(node: Node) -> tuple[Node, bool] | None:
    """What a permutation sorts, and whether in descending order; None if `node` is no such permutation."""
    return _sort_call(node, 1)


def sorted_of(node: Node) -> Node | None:
    """The tensor whose values `node` holds in ascending order."""
    found = _sort_call(node, 0)
    return found[0] if found is not None and not found[1] else None


def inverse_of(node: Node) -> Node | None:
    """The permutation that `node` is the inverse of."""
    found = permutation_of(node)
    if found is not None:
        return found[0] if not found[1] and permutation_of(found[0]) is not None else None
    written = rows_written(node)
    if written is None or node.meta["val"].dim() != 1:
        return None
    perm, values = written
    row = Var("s", shape_of(node)[0])
    return perm if as_index(Element(values, (Index.of(row),))) == Index.of(row) else None


def rows_written(node: Node) -> tuple[Node, Node] | None:
    """``out[perm[s]] = values[s]`` for every row of `out`: the permutation and the values."""
    target = node.target
    if target is aten.index_put.default and not argument(node, 3, "accumulate", False):
        base, places, values = args_of(node)[:3]
        if len(places) != 1 or values.meta["val"].dim() != base.meta["val"].dim():
            return None
        place = places[0]
    elif target is aten.index_copy.default and _is_first(node):
        base, _, place, values = args_of(node)
    elif target is aten.scatter.src and _is_first(node):
        base, _, whole, values = args_of(node)
        place = rows_of_index(whole)
        if place is None or not _same_shape(whole, values) or not _same_shape(whole, base):
            return None
    else:
        return None
    if permutation_of(place) is None or not _same_shape(base, values):
        return None
    return (place, values) if same_size(shape_of(place)[0], shape_of(base)[0]) else None


def _is_first(node: Node) -> bool:
    dim = args_of(node)[1]
    return dim % operand(node).meta["val"].dim() == 0


def _same_shape(a: Node, b: Node) -> bool:
    left, right = shape_of(a), shape_of(b)
    return len(left) == len(right) and all(same_size(x, y) for x, y in zip(left, right, strict=True))


def rows_of_index(whole: Node) -> Node | None:
    """The 1-D tensor that an index ``[s, d]`` repeats along all other dimensions."""
    index = tuple(Index.of(Var("s", s)) for s in shape_of(whole))
    value = as_index(Element(whole, index))
    if value is None or len(value.terms) != 1 or value.const != 0:
        return None
    ((atom, c),) = value.terms.items()
    if c != 1 or not isinstance(atom, Datum) or atom.element.index != index[:1]:
        return None
    return atom.element.node


# ---------------------------------------------------------------- groups


def multiset(node: Node) -> Node:
    """The tensor that holds the same values as `node`, in some order."""
    while True:
        if sorted_of(node) is not None:
            node = args_of(operand(node))[0]
        elif node.target in _REORDERS or _is_exact_cast(node) or _is_permuted(node):
            node = operand(node)
        else:
            return node


def _is_exact_cast(node: Node) -> bool:
    if node.target is not aten._to_copy.default or node.meta["val"].dtype not in _EXACT:
        return False
    return not operand(node).meta["val"].dtype.is_floating_point


_REORDERS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.t.default,
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints, aten.clone.default,
    aten.contiguous.default, aten.numpy_T.default, aten.mT.default, aten.flip.default,
}  # fmt: skip


def _is_permuted(node: Node) -> bool:
    if node.target is not aten.index.Tensor:
        return False
    source, places = args_of(node)[:2]
    return (
        source.meta["val"].dim() == 1 and len(places) == 1 and permutation_of(places[0]) is not None
        and _same_shape(source, places[0])
    )  # fmt: skip


def is_ascending(node: Node) -> bool:
    """Whether a 1-D tensor is sorted: by `sort`, or by the permutation that sorts it."""
    if sorted_of(node) is not None:
        return True
    if not _is_permuted(node):
        return False
    found = permutation_of(args_of(node)[1][0])
    return found is not None and not found[1] and equal_nodes(found[0], operand(node))


def counted(counts: Node) -> tuple[Node, int] | None:
    """The tensor whose values 0..E-1 are counted by the op itself (`histc`, `bincount`), and E."""
    while counts.target is aten._to_copy.default and counts.meta["val"].dtype in _EXACT:
        counts = operand(counts)
    if counts.target is aten.histc.default:
        bins, low, high = argument(counts, 1, "bins", 100), argument(counts, 2, "min", 0), argument(counts, 3, "max", 0)
        return (operand(counts), bins) if low == 0 and high == bins - 1 and bins > 1 else None
    if counts.target is aten.bincount.default and argument(counts, 1, "weights") is None:
        return operand(counts), argument(counts, 2, "minlength", 0)
    return None


def searched(ends: Node) -> Node | None:
    """The sorted tensor in which `searchsorted` looks for where the groups 0, 1, 2, ... end."""
    if ends.target is aten._to_copy.default:
        return searched(operand(ends))
    if ends.target is not aten.searchsorted.Tensor:
        return None
    rows, wanted = args_of(ends)[:2]
    right = argument(ends, 3, "right", False) or ends.kwargs.get("side") == "right"
    if ends.kwargs.get("sorter") is not None or rows.meta["val"].dim() != 1:
        return None
    group = Var("e", shape_of(ends)[0])
    first = Index.of(group) + (0 if right else 1)
    return rows if as_index(Element(wanted, (Index.of(group),))) == first else None
