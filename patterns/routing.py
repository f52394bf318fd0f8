"""The choice of the experts → ``sm12x::moe_route``.

    score   = softmax | sigmoid | sqrt(softplus) of the logits, in fp32
    ids     = the K experts with the largest score (+ correction bias), from the best groups only
    weights = score[ids] [/ (their sum + eps)] [* scaling]

Read backwards from a recognised ``sm12x::moe``: from its ids to the top-k that chose them, from its weights to the
scores of what was chosen. A choice among rounded scores is another choice, so scores in bf16 are left as they are;
top-k of the logits themselves is the same choice as of their softmax.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import (
    Apply,
    Datum,
    Element,
    Expr,
    Index,
    Number,
    Position,
    Reduce,
    Size,
    Var,
    same_size,
)
from sm12x_compile.index_algebra.expr import args_of, argument, operand, shape_of
from sm12x_compile.index_algebra.index import divide_exactly
from sm12x_compile.match import CannotArrange, GraphView, Refusal, Rewrite, refine
from sm12x_compile.registry import register_pattern

from .choice import chooser, unchosen
from .routed import FLOATS, Reader, Unreadable

aten = torch.ops.aten

_WIDE = {torch.float32, torch.float64}


@dataclass(frozen=True)
class Scores:
    """What top-k chooses from: scores of the logits, or (`score` None) the logits themselves."""

    logits: Element
    score: str | None
    bias: Element | None = None
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    own: Element | None = None  # an element of the scores, before bias and groups


@dataclass(frozen=True)
class Shares:
    """How the weights follow from the scores of what was chosen."""

    renormalise: bool
    scaling: float
    eps: float


class _Routing:
    def __init__(self, call: Node, reader: Reader, tokens: Var, choice: Var) -> None:
        self.moe, self.reader, self.tokens, self.choice = call, reader, tokens, choice
        ids, self.weights = args_of(call)[1:3]
        self.place = (_at(tokens), _at(choice))
        found = chooser(reader.index_of(Element(ids, self.place)) or Index())
        if found is None or found[0].target is not aten.topk.default:
            raise Unreadable
        self.topk, self.ids = found
        self.rank = len(self.ids.index)
        last = argument(self.topk, 2, "dim", -1) % self.rank == self.rank - 1
        if not last or not argument(self.topk, 3, "largest", True):
            raise Unreadable(Refusal("experts are not chosen as the largest of the last dimension", self.topk))
        if self.ids.index[-1] != self.place[1] or not same_size(args_of(self.topk)[1], choice.extent):
            raise Unreadable(Refusal("the experts that are used are not all that top-k chose", self.topk))
        self.row = self.ids.index[:-1]
        self.experts = Var("e", shape_of(operand(self.topk))[-1])
        # The weights as the user made them, before they were laid out for the experts.
        for seen in reader.trail(Element(self.weights, self.place)):
            if seen.index == self.ids.index:
                self.weights = seen.node

    # ------------------------------------------------------------ scores

    def scores(self) -> Scores:
        e = Index.of(self.experts)
        element = Element(operand(self.topk), (*self.row, e))
        made = self.reader.meaning(element)
        if isinstance(made, Apply) and made.op == "where":
            return self._grouped(made)
        return self._biased(element)

    def _biased(self, element: Element) -> Scores:
        made = self.reader.meaning(element)
        if isinstance(made, Apply) and made.op == "add" and made.node.target is aten.add.Tensor:
            for a, b in (made.args, made.args[::-1]):
                if isinstance(a, Element) and isinstance(b, Element) and b.vars() <= {self.experts}:
                    found = self._scored(a)
                    if found.score is None:
                        break
                    return replace(found, bias=b)
            raise Unreadable(Refusal("what is added to the scores is not one number for each expert", made.node))
        return self._scored(element)

    def _scored(self, element: Element) -> Scores:
        at = self.reader.resolve(element)
        node = at.node
        name: str | None = None
        inside: Expr | None = None
        if node.target is aten.softmax.int:
            if argument(node, 1, "dim") % len(at.index) != len(at.index) - 1 or at.index[-1] != Index.of(self.experts):
                raise Unreadable(Refusal("the softmax of the scores does not run over the experts", node))
            name, inside = "softmax", Element(operand(node), at.index)
        elif node.target is aten.sigmoid.default:
            name, inside = "sigmoid", Element(operand(node), at.index)
        elif node.target is aten.sqrt.default:
            before = self.reader.resolve(Element(operand(node), at.index))
            if before.node.target is aten.softplus.default and len(before.node.args) == 1:
                name, inside = "sqrt_softplus", Element(operand(before.node), before.index)
        if name is not None and node.meta["val"].dtype not in _WIDE:
            reason = "the scores are rounded before the choice; compute them with dtype=torch.float32 for one launch"
            raise Unreadable(Refusal(reason, node))
        if inside is None:
            if node.target is not aten.linear.default and isinstance(self.reader.meaning(at), Apply):
                raise Unreadable(Refusal("experts are chosen by a score that is not known", node))
            return Scores(at, None, own=at)
        logits = self._widened(inside)
        if logits.node.meta["val"].dtype.itemsize > node.meta["val"].dtype.itemsize:
            raise Unreadable(Refusal("the scores are computed in a narrower dtype than the logits", node))
        return Scores(logits, name, own=at)

    def _widened(self, expr: Expr) -> Element:
        """The logits before a cast that changes no value."""
        assert isinstance(expr, Element)
        made = self.reader.meaning(expr)
        if isinstance(made, Apply) and made.op == "cast" and isinstance(made.args[0], Element) and made.detail in _WIDE:
            inner = made.args[0].node.meta["val"].dtype
            if inner in FLOATS and inner.itemsize <= made.detail.itemsize:
                return made.args[0]
        return expr

    # ------------------------------------------------------------ groups

    def _grouped(self, made: Apply) -> Scores:
        """``where(group not chosen, -inf, score)``"""
        condition, fill, base = made.args
        node = made.node
        low = self._number(fill)
        if low is None or not isinstance(base, Element):
            raise Unreadable(Refusal("experts outside of the chosen groups are not filled with a number", node))
        found = self._biased(base)
        if low != -torch.inf and not (low == 0 and found.bias is None and found.score is not None):
            raise Unreadable(Refusal("experts outside of the chosen groups may still win; fill them with -inf", node))
        for groups in _divisors(self.experts.extent):
            size = divide_exactly(self.experts.extent, groups)
            assert size is not None
            picks = unchosen(self.reader, condition, Index.of(self.experts).div(size))
            if picks is None or len(picks) != 1 or picks[0].factors:
                continue
            call = chooser(picks[0].ids)
            if call is None or call[0].target is not aten.topk.default:
                break
            count = args_of(call[0])[1]
            if len(picks[0].vars) != 1 or not same_size(picks[0].vars[0].extent, count):
                raise Unreadable(Refusal("the groups that are used are not all that top-k chose", node))
            how = self._group_score(call[0], call[1], base, groups, size)
            return replace(found, n_group=groups, topk_group=count, group_score=how)
        raise Unreadable(Refusal("the mask of the scores is no choice of whole groups", node))

    def _group_score(self, topk: Node, ids: Element, base: Element, groups: int, size: Size) -> str:
        """How a group is scored: by its two best experts together, or by its best."""
        group, member = Var("g", groups), Var("m", size)
        rank = len(shape_of(operand(topk)))
        if argument(topk, 2, "dim", -1) % rank != rank - 1 or not argument(topk, 3, "largest", True):
            raise Unreadable(Refusal("groups are not chosen as the largest of the last dimension", topk))
        score = self.reader.meaning(Element(operand(topk), (*ids.index[:-1], _at(group))))
        expected = self.reader.resolve(base.subs({self.experts: _at(group) * size + _at(member)}))
        if (
            isinstance(score, Reduce) and score.kind == "max" and isinstance(score.body, Element)
            and self.reader.resolve(score.body.subs({score.var: _at(member)})) == expected
        ):  # fmt: skip
            return "max"
        if isinstance(score, Reduce) and score.kind == "sum" and isinstance(score.body, Element):
            best = self.reader.resolve(score.body)
            whole = operand(best.node) if best.node.target is operator.getitem and args_of(best.node)[1] == 0 else None
            if (
                isinstance(whole, Node) and whole.target is aten.topk.default and args_of(whole)[1] == 2
                and argument(whole, 2, "dim", -1) % len(best.index) == len(best.index) - 1
                and argument(whole, 3, "largest", True)
                and self.reader.resolve(Element(operand(whole), (*best.index[:-1], _at(member)))) == expected
                and score.var.extent == 2
            ):  # fmt: skip
                return "top2_sum"
        raise Unreadable(Refusal("groups are scored neither by their best nor by their two best experts", topk))

    # ------------------------------------------------------------ weights

    def shares(self, scores: Scores) -> Shares:
        expr: Expr = Element(args_of(self.moe)[2], self.place)
        scaling = 1.0
        while True:
            made = self.reader.meaning(expr) if isinstance(expr, Element) else expr
            if isinstance(made, Apply) and made.op == "cast" and made.detail in FLOATS:
                expr = made.args[0]
                continue
            number = self._number(made.args[1]) if isinstance(made, Apply) and made.op in ("mul", "div") else None
            if number is None or not isinstance(made, Apply):
                break
            scaling = scaling * number if made.op == "mul" else scaling / number
            expr = made.args[0]
        if isinstance(made, Apply) and made.op == "div" and isinstance(made.args[0], Element):
            eps = self._sum_and_eps(made.args[0], made.args[1], scores)
            self._check_chosen(made.args[0], scores)
            return Shares(True, scaling, eps)
        if scores.score is None:
            self._check_softmax_of_chosen(expr)
            return Shares(True, scaling, 0.0)
        self._check_chosen(expr, scores)
        return Shares(False, scaling, 0.0)

    def _sum_and_eps(self, above: Element, below: Expr, scores: Scores) -> float:
        """The denominator is the sum of the numerators over the choices, plus eps."""
        made = self.reader.meaning(below) if isinstance(below, Element) else below
        eps = 0.0
        if isinstance(made, Apply) and made.op == "add":
            number = self._number(made.args[1])
            if number is not None:
                eps, made = float(number), made.args[0]
                made = self.reader.meaning(made) if isinstance(made, Element) else made
        if isinstance(made, Reduce) and made.kind == "sum" and isinstance(made.body, Element):
            here = self.reader.resolve(made.body.subs({made.var: self.place[1]}))
            if same_size(made.var.extent, self.choice.extent) and here == self.reader.resolve(above):
                return eps
        raise Unreadable(Refusal("the routing weights are divided by something else than their sum", self.weights))

    def _check_chosen(self, expr: Expr, scores: Scores) -> None:
        """Whether `expr` is the score of the j-th expert that was chosen."""
        while isinstance(expr, Element):
            made = self.reader.meaning(expr)
            if not (isinstance(made, Apply) and made.op == "cast" and made.detail in FLOATS):
                break
            expr = made.args[0]
        if isinstance(expr, Element) and scores.score is not None and scores.own is not None:
            element = self.reader.resolve(expr)
            if element.node.target is operator.getitem and args_of(element.node) == (self.topk, 0):
                if scores.bias is None and element.index == self.ids.index:
                    return
            elif element.index[-1:] == (Index.of(Datum(self.ids)),):
                at = scores.own.subs({self.experts: element.index[-1]})
                if self.reader.resolve(Element(at.node, at.index)) == element:
                    return
        raise Unreadable(Refusal("the routing weights are not the scores of the chosen experts", self.weights))

    def _check_softmax_of_chosen(self, expr: Expr) -> None:
        element = self.reader.resolve(expr) if isinstance(expr, Element) else None
        if element is not None and element.node.target is aten.softmax.int:
            node = element.node
            inside: Expr = Element(operand(node), element.index)
            last = argument(node, 1, "dim") % len(element.index) == len(element.index) - 1
            made = self.reader.meaning(inside)  # type: ignore[arg-type]
            if isinstance(made, Apply) and made.op == "cast" and made.detail in FLOATS:
                inside = made.args[0]
            if last and isinstance(inside, Element):
                chosen = self.reader.resolve(inside)
                values = chosen.node.target is operator.getitem and args_of(chosen.node) == (self.topk, 0)
                if (values and chosen.index == self.ids.index) or self._is_gathered_logit(chosen):
                    return
        reason = "experts are chosen by logits, and their weights are no softmax of the chosen ones"
        raise Unreadable(Refusal(reason, self.weights))

    def _is_gathered_logit(self, chosen: Element) -> bool:
        at = self.reader.resolve(Element(operand(self.topk), (*self.row, Index.of(Datum(self.ids)))))
        return chosen == at

    def _number(self, expr: Expr) -> float | None:
        made = self.reader.meaning(expr) if isinstance(expr, Element) else expr
        if isinstance(made, Apply) and made.op == "cast":
            return self._number(made.args[0])
        if isinstance(made, Position) and made.index.is_const and isinstance(made.index.const, int):
            return float(made.index.const)
        return made.value if isinstance(made, Number) else None


def _at(var: Var) -> Index:
    """A dimension's index: the algebra knows that of a dimension of size 1."""
    return Index() if var.extent == 1 else Index.of(var)


def _divisors(size: Size) -> list[int]:
    return [g for g in range(2, size + 1) if size % g == 0] + [1] if isinstance(size, int) else []


@register_pattern("moe_route", anchors=[torch.ops.sm12x.moe.default], merit=-1)
def moe_route(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
    """Recognise how the experts of a recognised block were chosen."""
    tokens, top_k = shape_of(args_of(anchor)[1])
    reader = Reader(anchor)
    t, j = Var("t", tokens), Var("j", top_k)
    try:
        routing = _Routing(anchor, reader, t, j)
        scores = routing.scores()
        shares = routing.shares(scores)
    except Unreadable as why:
        return why.refusal
    tags: dict[str, Any] = {"score": scores.score or "softmax", "top_k": top_k, "experts": routing.experts.extent}
    tags |= {"renormalise": True} if shares.renormalise else {}
    tags |= {"groups": scores.n_group, "topk_group": scores.topk_group} if scores.n_group > 1 else {}
    tags |= {"correction_bias": True} if scores.bias is not None else {}
    tags |= {"scaling": shares.scaling} if shares.scaling != 1.0 else {}
    chosen = [u for u in routing.topk.users if u.target is operator.getitem]
    values = [u for u in chosen if args_of(u)[1] == 0]
    if any(not _only_reaches(v, {routing.weights}) for v in values):
        return Refusal("the scores that top-k found are read elsewhere, too", values[0], tags)
    in_order = argument(routing.topk, 4, "sorted", True)
    if not in_order and any(not _only_reaches(v, {routing.weights, anchor}) for v in chosen):
        return Refusal("the choices are in no given order (sorted=False) and read elsewhere, too", routing.topk, tags)
    try:
        with graph.graph.inserting_before(max(chosen).next):
            return _rewritten(graph, routing, scores, shares, chosen, tags)
    except CannotArrange as why:
        return Refusal(f"no view expresses an operand of the routing: {why}", anchor, tags)


def _only_reaches(node: Node, ends: set[Node]) -> bool:
    """Whether all that is computed from a value ends in one of these, or nowhere."""
    if node in ends:
        return True
    writes = node.target is aten.copy_.default
    return node.op == "call_function" and not writes and all(_only_reaches(u, ends) for u in node.users)


def _rewritten(
    graph: GraphView, routing: _Routing, scores: Scores, shares: Shares, chosen: list[Node], tags: dict[str, Any]
) -> Rewrite:
    def placed(element: Element, groups: list[tuple[Var, ...]]) -> Node:
        split = refine([element])
        parts = [tuple(p for v in g for p in (split[v].terms if v in split else (v,))) for g in groups]
        return graph.arrange(element.subs(split), parts)  # type: ignore[arg-type]

    logits = placed(scores.logits, [(routing.tokens,), (routing.experts,)])
    extra: dict[str, Any] = {"score": scores.score or "softmax", "eps": shares.eps}
    if scores.bias is not None:
        extra["correction_bias"] = placed(scores.bias, [(routing.experts,)])
    if scores.n_group > 1:
        extra |= dict(n_group=scores.n_group, topk_group=scores.topk_group, group_score=scores.group_score)
    if shares.renormalise:
        extra["renormalise"] = True
    if shares.scaling != 1.0:
        extra["scaling"] = shares.scaling
    extra["out_dtype"] = routing.weights.meta["val"].dtype
    call = graph.call(torch.ops.sm12x.moe_route.default, logits, args_of(routing.topk)[1], **extra)
    ids, weights = graph.call(operator.getitem, call, 0), graph.call(operator.getitem, call, 1)

    def shaped(node: Node, like: Node) -> Node:
        shape = [graph.size(s) for s in shape_of(like)]
        return node if len(shape) == 2 else graph.call(aten.view.default, node, shape)

    for old in chosen:
        if args_of(old)[1] == 1:
            graph.replace(old, shaped(ids, old))
    return Rewrite(routing.weights, call, shaped(weights, routing.weights), tags)
