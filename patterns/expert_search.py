"""Where a block of experts begins and ends: anchors that select experts, and the values behind them to ask about."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.fx import Node

from sm12x_compile.graph_view import is_view
from sm12x_compile.index_algebra import Apply, Element, Expr, Reduce
from sm12x_compile.index_algebra.expr import args_of, operand
from sm12x_compile.match import Refusal

from .choice import CHOOSERS, Choice
from .expert_weights import Weights
from .experts import Block
from .routed import FLOATS, Unreadable, is_grouped_mm

aten = torch.ops.aten

_GATHERS = {aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.embedding.default}
ANCHORS = [
    aten._grouped_mm.default, *_GATHERS, aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar, aten.one_hot.default,
    aten.scatter.src, aten.scatter.value, aten.scatter_add.default,
]  # fmt: skip
_PRODUCTS = {
    aten.bmm.default, aten.matmul.default, aten.mm.default, aten.mv.default, aten.einsum.default,
    aten.linear.default, aten.baddbmm.default, aten.addmm.default,
}  # fmt: skip
_ENDS = {
    aten.sum.dim_IntList, aten.add.Tensor, aten.mul.Tensor, aten.where.self, aten.where.ScalarOther,
    aten.masked_fill.Scalar,
    aten.index_add.default, aten.scatter_add.default, aten.index_put.default, aten.index_copy.default,
    aten.scatter.src, aten._to_copy.default, *_PRODUCTS,
}  # fmt: skip
# No block of experts holds these: behind them the graph is about something else.
_FOREIGN = {
    aten.scaled_dot_product_attention.default, aten.softmax.int, aten.log_softmax.int, aten.layer_norm.default,
    aten.rms_norm.default, aten.rsqrt.default, aten.mean.dim, aten.logsumexp.default, aten.conv1d.default,
    aten.topk.default, aten.cross_entropy_loss.default,
}  # fmt: skip
_STEPS = 2_000
_PATIENCE, _TRIES = 3, 30


class Found(NamedTuple):
    block: Block
    weights: Weights
    choices: tuple[Choice, ...]


def selects_experts(anchor: Node) -> bool:
    """Cheap first question: does this gather, comparison or scatter look like a choice of experts?"""
    if is_grouped_mm(anchor):
        return True
    if anchor.target in _GATHERS:
        if _picks_scores(anchor):
            return False
        picks = args_of(anchor)[2 if anchor.target in (aten.gather.default, aten.index_select.default) else 1]
        places = [p for p in (picks if isinstance(picks, (list, tuple)) else [picks]) if p is not None]
        return any(_is_chosen(p) for p in places) or _feeds_product(anchor)
    number = args_of(anchor)[2] if "scatter" in str(anchor.target) else operand(anchor)
    value = number.meta.get("val") if isinstance(number, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)


def _is_chosen(places: Node, depth: int = 10) -> bool:
    """Whether indices come from a top-k, a sort or an arg-max."""
    if depth == 0 or not isinstance(places, Node) or places.op != "call_function":
        return False
    if places.target in CHOOSERS or (places.target is operator.getitem and operand(places).target in CHOOSERS):
        return True
    return any(_is_chosen(a, depth - 1) for a in places.args if isinstance(a, Node))


def _picks_scores(gather: Node) -> bool:
    """Whether a gather takes the scores of what top-k chose: the router's own, which selects no weights."""
    if gather.target is not aten.gather.default:
        return False
    source, dim, places = args_of(gather)[:3]
    call = operand(places) if places.target is operator.getitem else None
    whole = source.meta["val"].shape
    return (
        isinstance(call, Node) and call.target is aten.topk.default and dim % len(whole) == len(whole) - 1
        and operand(call).meta["val"].shape == whole
    )  # fmt: skip


def _feeds_product(node: Node, depth: int = 6) -> bool:
    """Whether gathered weights go into a contraction."""
    for user in node.users:
        if user.target in _PRODUCTS:
            return True
        if user.target is aten.mul.Tensor and any(u.target is aten.sum.dim_IntList for u in user.users):
            return True
        moved = is_view(user) or user.target in (aten.clone.default, aten._to_copy.default)
        if moved and depth and _feeds_product(user, depth - 1):
            return True
    return False


# ---------------------------------------------------------------- the walk


def search(anchor: Node, read: Callable[[Node], Found]) -> Found | Refusal | None:
    """The farthest value behind the anchor that is a whole sum over experts."""
    best: Found | None = None
    refusal: Refusal | None = None
    patience, tries = _PATIENCE, _TRIES
    for run in _runs(anchor):
        found, why = _last_of(run, read)
        if best is not None and found is not None and _weighs_by_result(found, best.block.node):
            break  # as a norm does: to take it along, the experts would be computed twice
        best, refusal = found or best, why or refusal  # of refusals the last, which saw the most
        patience = _PATIENCE if found else patience - (best is not None)
        tries -= 1
        if patience == 0 or tries == 0:
            break
    return best or refusal


def _weighs_by_result(found: Found, result: Node) -> bool:
    """Whether weights of a sum over experts are computed from the result of these experts."""
    waiting = [n for choice in found.choices for f in choice.factors for n in _nodes_of(f)]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is result:
            return True
        if node not in seen and result < node:
            seen.add(node)
            waiting += node.all_input_nodes
    return False


def _nodes_of(expr: Expr) -> list[Node]:
    if isinstance(expr, Element):
        return [expr.node]
    if isinstance(expr, Apply):
        return [n for a in expr.args for n in _nodes_of(a)]
    return _nodes_of(expr.body) if isinstance(expr, Reduce) else []


def _runs(anchor: Node) -> Iterator[list[Node]]:
    """The values that may be the end, along the last reader of each; sums of sums (perhaps a loop) together."""
    run: list[Node] = []
    for node in _path(anchor):
        if node.target not in _ENDS or not _may_end(node):
            continue
        if run and node.target not in _LOOPS:
            yield run
            run = []
        run.append(node)
        if node.target not in _LOOPS:
            yield run
            run = []
    if run:
        yield run


_LOOPS = {aten.add.Tensor, aten.where.self, aten.where.ScalarOther, aten.index_add.default, aten.index_put.default}


def _path(anchor: Node) -> list[Node]:
    path: list[Node] = []
    node = anchor
    while len(path) < _STEPS:
        readers = [u for u in node.users if u.op == "call_function" and not u.meta.get(_DEAD)]
        if not readers:
            break
        node = max(readers)
        if node.target in _FOREIGN and (node.target is not aten.softmax.int or (path and _has_product(path))):
            break
        path.append(node)
    return [] if anchor.meta.get(_DEAD) else path


def _has_product(path: list[Node]) -> bool:
    """Whether experts were met; before them, scores of which some are -inf go through a softmax."""
    return any(node.target in _PRODUCTS for node in path)


def _may_end(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in FLOATS and value.dim() >= 2


def _last_of(run: list[Node], read: Callable[[Node], Found]) -> tuple[Found | None, Refusal | None]:
    """The last value of a run that reads as a whole sum. As a loop adds expert after expert, all values up to the
    last are sums over some of them, so the end is found by doubling and halving."""
    refusal: Refusal | None = None
    answers: dict[int, Found | bool] = {}

    def grows(k: int) -> bool:
        nonlocal refusal
        if k not in answers:
            answers[k] = False
            if not run[k].meta.get(_TRIED):
                try:
                    answers[k] = read(run[k])
                except Unreadable as why:
                    refusal = refusal or why.refusal
                    answers[k] = why.partial
                    run[k].meta[_TRIED] = not why.partial
                except RecursionError:
                    refusal = refusal or Refusal(_TOO_DEEP, run[k])
                    run[k].meta[_TRIED] = True
        return answers[k] is not False

    low = 0
    while low < len(run) and low < 4 and not grows(low):
        low += 1
    if low == len(run) or not grows(low):
        return None, refusal
    width = 1
    while low + width < len(run) and grows(low + width):
        low, width = low + width, 2 * width
    high = min(low + width, len(run))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if grows(middle) else (low, middle)
    found = [answers[k] for k in sorted(answers) if isinstance(answers[k], Found)]
    return (found[-1] if found else None), refusal  # type: ignore[return-value]


_TOO_DEEP = "this loop over experts is too long to be read; stack their weights in one tensor and multiply by group"
_TRIED, _DEAD = "sm12x_moe_tried", "sm12x_moe_dead"


def mark_dead(node: Node) -> None:
    """Remember what nobody reads any more once `node` is replaced: no anchor in there is asked again."""
    waiting = [node]
    node.meta[_DEAD] = True
    while waiting:
        for before in waiting.pop().all_input_nodes:
            unread = before.op == "call_function" and all(u.meta.get(_DEAD) for u in before.users)
            if unread and not before.meta.get(_DEAD):
                before.meta[_DEAD] = True
                waiting.append(before)
