"""The two ways into an attention: `scaled_dot_product_attention`, and a softmax with what stands around it.

Both read the graph into a `Problem`: where q, k and v come from, the scale, the masks and biases. Every family
that is attention starts from it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Element, Index, Var, same_size
from sm12x_compile.index_algebra.expr import broadcast, shape_of
from sm12x_compile.index_algebra.index import divide_exactly
from sm12x_compile.index_algebra.predicate import AtMostZero, predicate_of
from sm12x_compile.masks import MaskTerm
from sm12x_compile.match import Refusal, source

from .roles import Problem
from .scores import read_scores, read_sink, read_terms
from .softmax import WeightedSum, find_weighted_sum, fresh_index

aten = torch.ops.aten

ANCHORS = (
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    aten._safe_softmax.default,
    aten.exp.default,
)


def read_problem(anchor: Node) -> Problem | Refusal | None:
    """The attention around an anchor; None if it does not look like one."""
    sdpa = anchor.target is aten.scaled_dot_product_attention.default
    problem = _from_sdpa(anchor) if sdpa else _from_softmax(anchor)
    if isinstance(problem, Problem) and any(0 in shape_of(e.node) for e in (problem.q, problem.k, problem.value)):
        return Refusal("an operand is empty", problem.node)  # kernels divide by sizes: SDPA of torch 2.11 dies of it
    return problem


def _from_softmax(anchor: Node) -> Problem | Refusal | None:
    found = find_weighted_sum(anchor)
    if not isinstance(found, WeightedSum):
        # A softmax that meets no values is a router or a loss, unless something before it looks like attention.
        return found if isinstance(found, Refusal) and _looks_like_attention(anchor) else None
    scores = read_scores(found.scores, found.key, found.dtype)
    if isinstance(scores, Refusal):
        return scores if _looks_like_attention(anchor) else None
    sinks: list[Element] = []
    for column in found.sinks:
        sink = read_sink(column)
        if isinstance(sink, Refusal):
            return sink
        if sink[1] != scores.shifts:
            return Refusal("the extra column of the softmax is shifted differently from the scores", anchor)
        sinks.append(sink[0])
    if sinks and scores.constant:
        return Refusal("a constant is added to the scores and not to the extra column of the softmax", anchor)
    if len(sinks) > 1:
        return Refusal("the softmax has several columns without values", anchor)
    return Problem(
        node=found.node, out=found.out, key=found.key, q=scores.q, k=scores.k, value=found.value,
        summed=scores.summed, scale=scores.scale, softcap=scores.softcap, masks=scores.masks,
        biases=scores.biases, sink=sinks[0] if sinks else None, rows=found.rows, form=found.form,
        stable=found.stable or scores.max_subtracted,
    )  # fmt: skip


def _looks_like_attention(anchor: Node) -> bool:
    """Whether a product of two computed tensors feeds the anchor within a few pointwise steps."""
    seen: list[Node] = [anchor]
    products = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default)
    stops = (aten.linear.default, aten.softmax.int)
    for node in seen:
        for before in node.all_input_nodes:
            if before.target in products:
                return True
            if len(seen) < 24 and before.op == "call_function" and before not in seen and before.target not in stops:
                seen.append(before)
    return False


def _from_sdpa(node: Node) -> Problem | Refusal:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    a: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v = a["query"], a["key"], a["value"]
    if a.get("dropout_p", 0.0):
        return Refusal("dropout is active; call model.eval()", node)
    if len(shape_of(q)) < 2 or len({len(shape_of(x)) for x in (q, k, v)}) != 1:
        return Refusal("q, k and v have different ranks", node)
    out = fresh_index(node)
    keys = shape_of(k)[-2]
    mask = a.get("attn_mask")
    if mask is not None and not isinstance(keys, int) and shape_of(mask)[-1] != 1:
        keys = shape_of(mask)[-1]  # the same size under the name that the mask's positions use
    key, summed = Var("t", keys), Var("d", shape_of(q)[-1])
    t, d = Index.of(key), Index.of(summed)
    batch, row, column = out[:-2], out[-2], out[-1]
    heads = batch
    if a.get("enable_gqa") and len(batch) and not same_size(shape_of(q)[-3], shape_of(k)[-3]):
        groups = divide_exactly(shape_of(q)[-3], shape_of(k)[-3])
        if groups is None:
            return Refusal("the query heads are no multiple of the KV heads", node)
        heads = (*batch[:-1], batch[-1].div(groups))

    def at(x: Node, lead: tuple[Index, ...], *tail: Index) -> Element:
        shape = shape_of(x)
        return Element(x, (*(Index() if s == 1 else ix for ix, s in zip(lead, shape, strict=False)), *tail))

    masks: list[MaskTerm] = []
    biases: list[tuple[Element, float]] = []
    if a.get("is_causal"):
        # The element of q stands in as the source: a causal mask is always explained.
        masks.append(MaskTerm(AtMostZero(t - row), -math.inf, at(q, batch, row, d)))
    if mask is not None:
        index = (*batch, row, t)
        element = broadcast(mask, index)
        assert isinstance(element, Element)
        if mask.meta["val"].dtype == torch.bool:
            keep = predicate_of(element)
            if keep is None:
                return Refusal("the mask is no boolean tensor", mask)
            masks.append(MaskTerm(keep, -math.inf, element))
        else:
            read = read_terms(element)
            if isinstance(read, Refusal):
                return read
            masks += read.masks
            biases += read.biases
    head_dim = shape_of(q)[-1]
    scale = a.get("scale")
    if scale is None:
        if not isinstance(head_dim, int):
            return Refusal("the head dim is symbolic", node)
        scale = 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    if not isinstance(scale, (int, float)) or scale <= 0:
        return Refusal("the scale is not a positive constant", node)
    return Problem(
        node=node, out=out, key=key, q=source(at(q, batch, row, d), (key, summed)),
        k=source(at(k, heads, t, d), (key, summed)),
        value=at(v, heads, t, column), summed=(summed,), scale=float(scale), softcap=0.0, masks=tuple(masks),
        biases=tuple(biases), sink=None, rows=row, form="sdpa", stable=True,
    )  # fmt: skip
