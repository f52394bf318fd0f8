"""The gated delta rule, in any spelling → ``sm12x::gated_delta_rule``.

The equation, for every batch and head, token by token (Gated Delta Networks, 2024; with a decay per channel Kimi
Linear, 2025)::

    S = diag(exp(g_t)) S;   u = beta_t (v_t - S^T k_t);   S = S + k_t u^T;   o_t = S^T (scale q_t)

Its inside has many equal forms: a single step, a loop over tokens, chunks with a triangular solve or a substitution
row by row, all unrolled by the time the graph is seen. So the inside is not read. The carried state leads to a region
(`delta_region.py`), shapes tell its operands (`delta_operands.py`), and an experiment tells whether the region is the
op, with which norm of q and k and which scale (`delta_certificate.py`).

Calls of functions that `sm12x_compile/capture/` knows stand in the graph already and are reported here. In both cases
a short step whose state is an input that is written back becomes ``sm12x::gated_delta_rule_update``, which mutates
that input in place.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Element, Index, Var
from sm12x_compile.index_algebra.expr import shape_of
from sm12x_compile.match import CannotArrange, GraphView, Refusal, Rewrite, source
from sm12x_compile.ops import gated_delta_rule as op
from sm12x_compile.registry import register_pattern

from .delta_carry import known_nonnegative
from .delta_certificate import Certificate, Uncertain, certify
from .delta_operands import Operand, Reading
from .delta_region import Region, find_region
from .state import FEW_TOKENS, every_row, is_private, write_of

aten = torch.ops.aten
_OP = torch.ops.sm12x.gated_delta_rule.default
_UPDATE = torch.ops.sm12x.gated_delta_rule_update.default
_COPIES = {aten.copy.default, aten._to_copy.default, aten.clone.default, aten.alias.default}
_ANCHORS = (
    _OP, aten.mul.Tensor, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.full.default,
)  # fmt: skip


_SIGN = "the factor that decays the state may be negative; behind a sigmoid or an exponential it could not"


@register_pattern("gated_delta_rule", anchors=_ANCHORS)
def gated_delta_rule(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
    """Recognise one recurrence where its state begins, or report a call of the op."""
    if anchor.target is _OP:
        return _captured(anchor, graph)
    region = find_region(anchor)
    if region is None:
        return None
    try:
        reading, certificate = certify(region)
    except Uncertain as reason:
        if not region.decays:  # nothing in it need be a state
            return None
        return Refusal(str(reason), anchor, {"recurrence": "decayed state"})
    if reading.factor and not known_nonnegative(reading.operands["g"].node):
        return Refusal(_SIGN, anchor, {"recurrence": "decayed state"})
    try:
        return _emit(graph, region, reading, certificate)
    except CannotArrange as reason:
        return Refusal(f"no view expresses an operand: {reason}", anchor)


def describe(call: Node) -> dict[str, Any]:
    """The tags of a site."""
    bound = op.bind(call)
    tags: dict[str, Any] = {
        "decay": "channel" if bound["g"].meta["val"].dim() == 4 else "head",
        "qk_l2norm": bound["qk_l2norm"],
        "scale": round(bound["scale"], 6),
        "state": "zeros" if bound["initial_state"] is None else "given",
    }
    groups = bound["v"].meta["val"].shape[2] // bound["q"].meta["val"].shape[2]
    if groups != 1:
        tags["groups"] = int(groups)
    return tags


# ---------------------------------------------------------------- a call that stands there


def _captured(call: Node, graph: GraphView) -> Rewrite:
    _undo_repeat(call, graph)
    tags = describe(call)
    outputs = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    if set(outputs) != {0, 1} or len(call.users) != 2:
        return Rewrite(call, call, call, tags)
    bound = op.bind(call)
    place = _pool(bound["initial_state"], outputs[1], bound["q"].meta["val"].shape[1], {call})
    if place is None or bound["cu_seqlens"] is not None:
        return Rewrite(call, call, call, tags)
    pool, write = place
    with graph.graph.inserting_before(call):
        extra = {k: bound[k] for k in ("qk_l2norm", "eps", "out_dtype") if bound[k] != _DEFAULTS[k]}
        operands = (bound[k] for k in ("q", "k", "v", "g", "beta"))
        made = graph.call(_UPDATE, *operands, pool, every_row(graph, pool), bound["scale"], **extra)
    return Rewrite(outputs[0], made, made, {**tags, "state": "in place"}, obsolete=(write,))


def _undo_repeat(call: Node, graph: GraphView) -> None:
    """Give the op the heads of q and k as they were before the caller repeated them."""
    heads = call.args[0].meta["val"].shape[2]  # type: ignore[union-attr]
    if not isinstance(heads, int) or op.bind(call)["v"].meta["val"].shape[2] != heads:
        return
    for times in (n for n in range(heads, 1, -1) if heads % n == 0):
        fewer = [_fewer_heads(x, heads, times) for x in call.args[:2] if isinstance(x, Node)]
        if any(e is None for e, _ in fewer):
            continue
        try:
            with graph.graph.inserting_before(call):
                q, k = (graph.arrange(e, [(v,) for v in dims]) for e, dims in fewer if e is not None)
        except CannotArrange:
            continue
        call.args = (q, k, *call.args[2:])
        return


def _fewer_heads(x: Node, heads: int, times: int) -> tuple[Element | None, list[Var]]:
    """An element of a tensor ``[B, T, heads, K]`` whose heads come in equal runs of `times`."""
    b, t, _, d = (Var(name, size) for name, size in zip("bthd", shape_of(x), strict=True))
    group, one = Var("h", heads // times), Var("r", times)
    index = (Index.of(b), Index.of(t), Index.of(group) * times + Index.of(one), Index.of(d))
    element = source(Element(x, index))
    return (None if one in element.vars() else element), [b, t, group, d]


_DEFAULTS = {k: p.default for k, p in op.signature.parameters.items()}


# ---------------------------------------------------------------- a region


def _emit(graph: GraphView, region: Region, reading: Reading, certificate: Certificate) -> Rewrite:
    operands = {role: operand.node for role, operand in reading.operands.items()}
    zeros = region.state.target in _ANCHORS
    given = [*operands.values(), region.state]
    order = {node: k for k, node in enumerate(graph.graph.nodes)}
    last = max(given, key=order.__getitem__)
    before = next(n for n in graph.graph.nodes if order[n] > order[last] and n.op != "placeholder")
    node = reading.output.node
    with graph.graph.inserting_before(before):
        q, k, v, g, beta = (_to_op(graph, reading.operands[r]) for r in ("q", "k", "v", "g", "beta"))
        if reading.factor:
            g = graph.call(aten.log.default, _widened(graph, g))
        extra: dict[str, Any] = {}
        if certificate.qk_l2norm != "none":
            extra = {"qk_l2norm": certificate.qk_l2norm, "eps": certificate.eps}
        dtype = node.meta["val"].dtype
        if dtype != v.meta["val"].dtype:
            extra["out_dtype"] = dtype
        place = None
        batch = "b" in reading.output.layout
        if not zeros and batch and not reading.transposed and region.final is not None:
            place = _pool(region.state, region.final, reading.tokens, set(region.nodes))
        if place is not None:
            pool, write = place
            slots = every_row(graph, pool)
            call = graph.call(_UPDATE, q, k, v, g, beta, pool, slots, certificate.scale, **extra)
            tags = {**_tags(certificate, q, v, g), "state": "in place"}
            return Rewrite(node, call, _from_op(graph, call, reading.output), tags, obsolete=(write,))
        if not zeros:
            start = region.state if batch else graph.call(aten.unsqueeze.default, region.state, 0)
            extra["initial_state"] = graph.call(aten.transpose.int, start, 2, 3) if reading.transposed else start
        call = graph.call(_OP, q, k, v, g, beta, certificate.scale, **extra)
        o = _from_op(graph, graph.call(operator.getitem, call, 0), reading.output)
        also = []
        if region.final is not None:
            final = graph.call(operator.getitem, call, 1)
            if reading.transposed:
                final = graph.call(aten.transpose.int, final, 2, 3)
            if not batch:
                final = graph.call(aten.squeeze.dim, final, 0)
            if final.meta["val"].dtype != region.final.meta["val"].dtype:
                final = graph.call(aten._to_copy.default, final, dtype=region.final.meta["val"].dtype)
            also = [(region.final, final)]
    return Rewrite(node, call, o, {**_tags(certificate, q, v, g), "state": "zeros" if zeros else "given"}, also=also)


def _tags(certificate: Certificate, q: Node, v: Node, g: Node) -> dict[str, Any]:
    tags: dict[str, Any] = {
        "decay": "channel" if g.meta["val"].dim() == 4 else "head",
        "qk_l2norm": certificate.qk_l2norm,
        "scale": round(certificate.scale, 6),
    }
    groups = v.meta["val"].shape[2] // q.meta["val"].shape[2]
    return {**tags, "groups": int(groups)} if groups != 1 else tags


def _to_op(graph: GraphView, operand: Operand) -> Node:
    x, layout = operand.node, operand.layout
    x = x if "b" in layout else graph.call(aten.unsqueeze.default, x, 0)
    if "ht" in layout:
        return graph.call(aten.transpose.int, x, 1, 2)
    return x if "t" in layout else graph.call(aten.unsqueeze.default, x, 1)


def _widened(graph: GraphView, x: Node) -> Node:
    narrow = x.meta["val"].dtype in (torch.float16, torch.bfloat16)
    return graph.call(aten._to_copy.default, x, dtype=torch.float32) if narrow else x


def _from_op(graph: GraphView, o: Node, output: Operand) -> Node:
    if "ht" in output.layout:
        o = graph.call(aten.transpose.int, o, 1, 2)
    elif "t" not in output.layout:
        o = graph.call(aten.squeeze.dim, o, 1)
    return o if "b" in output.layout else graph.call(aten.squeeze.dim, o, 0)


# ---------------------------------------------------------------- the state


def _pool(state: Node | None, final: Node, tokens: Any, inside: Collection[Node]) -> tuple[Node, Node] | None:
    """The placeholder that holds the state and its write, where an update in place is the same.

    Args:
        state, final: the initial and the final state.
        inside: nodes that the rewrite takes the place of.
    """
    if state is None or not isinstance(tokens, int) or tokens > FEW_TOKENS:
        return None
    pool = _behind(state)
    write = write_of(pool)
    if write is None or not isinstance(write.args[1], Node) or _behind(write.args[1], wide=True) is not final:
        return None
    if pool.meta["val"].shape != final.meta["val"].shape or not pool.meta["val"].dtype.is_floating_point:
        return None
    if not _leads_only_to(final, write, inside) or not is_private(pool, {*inside, write}):
        return None
    return pool, write


def _behind(node: Node, *, wide: bool = False) -> Node:
    """What a node is a copy of, casts to a wider dtype included; `wide`: to any dtype, once."""
    narrowed = False
    while node.target in _COPIES:
        source = node.args[1] if node.target is aten.copy.default else node.args[0]
        assert isinstance(source, Node)
        before, after = source.meta["val"].dtype, node.meta["val"].dtype
        if before != after and after != torch.promote_types(before, after):
            if not wide or narrowed:
                break
            narrowed = True
        elif before != after and narrowed:
            break
        node = source
    return node


def _leads_only_to(node: Node, write: Node, inside: Collection[Node]) -> bool:
    """Whether a state is read by nobody but the write and what the rewrite takes the place of."""
    while True:
        users = [u for u in node.users if u not in inside]
        if len(users) != 1:
            return False
        if users[0] is write:
            return True
        if users[0].target not in _COPIES:
            return False
        node = users[0]
