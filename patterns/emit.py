"""Lay out the operands of an attention, call ``sm12x::attention``, and lay its result out as the user had it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Index, Size, Var, known_nonnegative, same_size
from sm12x_compile.index_algebra.expr import shape_of
from sm12x_compile.index_algebra.index import Datum, add, mul
from sm12x_compile.index_algebra.predicate import Holds, substitute
from sm12x_compile.masks import StructuredMask
from sm12x_compile.match import CannotArrange, GraphView

from .roles import Problem, Roles

aten = torch.ops.aten


def emit_attention(
    graph: GraphView, roles: Roles, mask: StructuredMask, empty_rows: str
) -> tuple[Node, Node]:
    """Add the call at the insertion point.

    Returns:
        The call of ``sm12x::attention`` and its result in the layout of ``problem.node``.

    Raises:
        CannotArrange: an operand is no view of its source.
    """
    roles, mask = cut_to_length(roles, mask, empty_rows)
    problem = roles.problem
    batch, heads, query, key = roles.batch, roles.heads, roles.queries, (problem.key,)
    q = graph.arrange(problem.q, [batch, heads, query, problem.summed])
    k = graph.arrange(problem.k, [batch, roles.kv_head, key, problem.summed])
    v = graph.arrange(problem.value, [batch, roles.kv_head, key, roles.feature])
    extra = shared_arguments(graph, roles, mask, empty_rows, (q, k, v))
    call = graph.call(torch.ops.sm12x.attention.default, q, k, v, problem.scale, **extra)
    return call, restore(graph, call, problem, [batch, heads, query, roles.feature])


def shared_arguments(
    graph: GraphView, roles: Roles, mask: StructuredMask, empty_rows: str, operands: tuple[Node, ...]
) -> dict[str, Any]:
    """What every attention-like op takes beside its operands: masks, softcap, sinks, dtypes.

    Raises:
        CannotArrange: no view expresses a mask, or the dtypes of the operands differ.
    """
    problem = roles.problem
    batch, heads, query, key = roles.batch, roles.heads, roles.queries, (problem.key,)
    dtype = operands[-1].meta["val"].dtype
    out_dtype = problem.node.meta["val"].dtype
    if len({x.meta["val"].dtype for x in operands}) != 1:
        raise CannotArrange("q, k and v have different dtypes")
    if not dtype.is_floating_point:
        raise CannotArrange(f"{dtype} is not a floating point dtype")
    extra: dict[str, Any] = {}
    if mask.causal:
        extra["causal"] = True
    for name in ("window_left", "window_right", "chunk"):
        if getattr(mask, name) is not None:
            extra[name] = getattr(mask, name)
    if mask.causal or mask.window_left is not None or mask.window_right is not None or mask.chunk is not None:
        offset, shift = _runtime_index(graph, mask.offset, batch)
        if offset is not None:
            extra["q_offset"] = offset
        if shift != 0:
            extra["q_shift"] = graph.size(shift)
    if mask.kv_len is not None:
        length, more = _runtime_index(graph, mask.kv_len, batch)
        if length is None:
            device = operands[0].meta["val"].device
            length = graph.call(aten.full.default, [], graph.size(more), dtype=torch.int64, device=device)
        elif more != 0:
            length = graph.call(aten.add.Tensor, length, graph.size(more))
        extra["kv_len"] = length
    for pad in mask.padding:
        extra["key_padding"] = _padding(graph, pad, [batch, key], extra.get("key_padding"))
    if mask.segments is not None:
        extra["q_segments"] = graph.arrange(mask.segments[0], [batch, query], expand=False)
        extra["k_segments"] = graph.arrange(mask.segments[1], [batch, key], expand=False)
    bias = _bias(graph, problem, mask, [batch, heads, query, key])
    if bias is not None:
        extra["bias"] = bias
    if problem.softcap:
        extra["softcap"] = problem.softcap
    if problem.sink is not None:
        extra["sinks"] = graph.arrange(problem.sink, [heads])
    if empty_rows != "zero":
        extra["empty_rows"] = empty_rows
    if out_dtype != dtype:
        extra["out_dtype"] = out_dtype
    return extra


def describe(roles: Roles, mask: StructuredMask) -> dict[str, Any]:
    """The tags of a site."""
    problem = roles.problem
    tags: dict[str, Any] = {"form": problem.form, "mask": mask.describe(), "scale": round(problem.scale, 6)}
    if mask.window_left is not None:
        tags["window"] = mask.window_left + 1
    if mask.chunk is not None:
        tags["chunk"] = mask.chunk
    if roles.groups != 1:
        tags["groups"] = roles.groups
    if problem.sink is not None:
        tags["sinks"] = True
    if problem.softcap:
        tags["softcap"] = problem.softcap
    if problem.biases:
        tags["bias"] = True
    return tags


def cut_to_length(roles: Roles, mask: StructuredMask, empty_rows: str) -> tuple[Roles, StructuredMask]:
    """A length known while compiling is a slice of the cache, not a mask."""
    if mask.kv_len is None or not mask.kv_len.is_const or not _may_cut(empty_rows, mask):
        return roles, mask
    problem = roles.problem
    shorter = Var("t", mask.kv_len.const)
    cut = {problem.key: Index.of(shorter)}
    return replace(roles, problem=replace(problem.subs(cut), key=shorter)), _shortened(mask, cut)


def _may_cut(empty_rows: str, mask: StructuredMask) -> bool:
    """Whether leaving out the keys behind the length is the same as masking them."""
    assert mask.kv_len is not None
    spreads = empty_rows == "mean" and (mask.padding or mask.segments or mask.dense)
    return not spreads and known_nonnegative(add(mask.kv_len.const, -1))


def _shortened(mask: StructuredMask, cut: dict[Var, Index]) -> StructuredMask:
    return replace(
        mask,
        kv_len=None,
        padding=tuple(Holds(h.element.subs(cut), h.expected) for h in mask.padding),
        segments=(mask.segments[0], mask.segments[1].subs(cut)) if mask.segments else None,
        dense=tuple(
            replace(m, keep=substitute(m.keep, cut), source=m.source.subs(cut))
            for m in mask.dense
        ),
    )


def _runtime_index(graph: GraphView, index: Index, batch: tuple[Var, ...]) -> tuple[Node | None, Size]:
    """An offset as an int64 tensor (0-d or ``[B]``) and the part of it known while compiling."""
    total: Node | None = None
    for atom in index.terms:
        assert isinstance(atom, Datum)
        per_batch = bool(atom.element.vars())
        part = graph.arrange(atom.element, [batch] if per_batch else [])
        if part.meta["val"].dtype != torch.int64:
            part = graph.call(aten._to_copy.default, part, dtype=torch.int64)
        total = part if total is None else graph.call(aten.add.Tensor, total, part)
    return total, index.const


def _padding(graph: GraphView, pad: Holds, groups: list[tuple[Var, ...]], before: Node | None) -> Node:
    node = graph.arrange(pad.element, groups, expand=False)
    if not pad.expected:
        node = graph.call(aten.logical_not.default, node)
    return node if before is None else graph.call(aten.logical_and.default, before, node)


def _bias(
    graph: GraphView, problem: Problem, mask: StructuredMask, groups: list[tuple[Var, ...]]
) -> Node | None:
    """Biases and unproved masks as one tensor, float if anything is added, else bool."""
    added: Node | None = None
    for element, factor in problem.biases:
        part = graph.arrange(element, groups, expand=False)
        if not part.meta["val"].dtype.is_floating_point:
            raise CannotArrange("a bias of the scores is not floating point")
        if factor != 1.0:
            part = graph.call(aten.mul.Tensor, part, factor)
        added = part if added is None else graph.call(aten.add.Tensor, added, part)
    keep: Node | None = None
    for term in mask.dense:
        part = graph.arrange(term.source, groups, expand=False)
        if part.meta["val"].dtype == torch.bool:
            if not term.source_keeps:
                part = graph.call(aten.logical_not.default, part)
            if math.isfinite(term.drop_value) and not term.as_bool:
                wide = torch.float64 if problem.q.node.meta["val"].dtype == torch.float64 else torch.float32
                zero = graph.call(aten.zeros.default, [], dtype=wide, device=part.meta["val"].device)
                low = max(term.drop_value, torch.finfo(wide).min)
                part = graph.call(aten.where.ScalarOther, part, zero, low)
        elif term.drop_value == -math.inf:
            # 0 where kept; what stands elsewhere may be finite here and infinite only at the softmax.
            part = graph.call(aten.eq.Scalar, part, 0)
        if part.meta["val"].dtype == torch.bool:
            keep = part if keep is None else graph.call(aten.logical_and.default, keep, part)
        else:
            added = part if added is None else graph.call(aten.add.Tensor, added, part)
    if added is None or keep is None:
        return added if keep is None else keep
    return graph.call(aten.where.ScalarOther, keep, added, -math.inf)


def restore(graph: GraphView, call: Node, problem: Problem, groups: list[tuple[Var, ...]]) -> Node:
    """From ``[B, Hq, S, Dv]`` to the layout of the node that is replaced."""
    order = [v for group in groups for v in group]
    dims = [tuple(_slowest_first(ix)) for ix in problem.out]
    present = [v for dim in dims for v in dim]
    if sorted(map(id, present)) != sorted(map(id, order)):
        raise CannotArrange("the result is not laid out by its indices")
    if set(dims) == set(groups) and len(set(dims)) == len(dims) == len(groups):
        moves = [groups.index(dim) for dim in dims]  # whole dimensions change places
        return call if moves == sorted(moves) else graph.call(aten.permute.default, call, moves)
    node = call
    if not _same_shape(node, [v.extent for v in order]):
        node = graph.call(aten.view.default, node, [graph.size(v.extent) for v in order])
    moves = [order.index(v) for v in present]
    if moves != sorted(moves):
        node = graph.call(aten.permute.default, node, moves)
    target = shape_of(problem.node)
    if not _same_shape(node, list(target)):
        node = graph.call(aten.reshape.default, node, [graph.size(s) for s in target])
    return node


def _same_shape(node: Node, sizes: list[Size]) -> bool:
    shape = shape_of(node)
    return len(shape) == len(sizes) and all(same_size(a, b) for a, b in zip(shape, sizes, strict=True))


def _slowest_first(ix: Index) -> list[Var]:
    """The variables of a mixed-radix index; refuses one that does not enumerate its dimension."""
    left = dict(ix.terms)
    found: list[Var] = []
    stride: Size = 1
    while left:
        atom = next((a for a, c in left.items() if same_size(c, stride)), None)
        if not isinstance(atom, Var):
            raise CannotArrange(f"result index {ix} is not dense")
        found.append(atom)
        stride = mul(stride, atom.extent)
        del left[atom]
    return found[::-1]
