"""The state that a recurrence of linear attention carries: where it begins, and how it goes from token to token.

A state ``[B, H, K, V]`` (or ``[B, H, V, K]``; the batch may be left out) is handed on by

* decays: products with what is the same for all columns; an exponential may differ from column to column;
* updates: sums with something of its shape;
* products with a square matrix (``S (I - beta k k^T)``), which a sum follows.

What only reads a state (``S * k`` before a sum over K) leads to no update and is told apart by that.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Size
from sm12x_compile.index_algebra.expr import shape_of
from sm12x_compile.smooth import LAYOUT, words

aten = torch.ops.aten
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.full.default}
_COPIES = words("clone _to_copy copy alias contiguous to lift_fresh_copy")
_SCATTERS = words("select_scatter slice_scatter copy")
_NONNEGATIVE = words("sigmoid exp exp2 softmax _softmax relu square abs")
_MASKED = words("masked_fill masked_fill_ fill fill_ pad constant_pad_nd empty_like new_empty full_like new_full")
_SUMS = words("add sub addcmul baddbmm")  # a sum with its first operand


def op_name(node: Node) -> str:
    target = node.target
    if target is operator.getitem:
        return "getitem"
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else ""


def shape(node: Node) -> tuple[Size, ...] | None:
    """The sizes of a tensor; None for anything else."""
    return shape_of(node) if isinstance(node.meta.get("val"), torch.Tensor) else None


def initial_state(anchor: Node) -> Node | None:
    """The state that begins at `anchor`, its first decay or zeros; None where none begins."""
    size = shape(anchor)
    if size is None or len(size) not in (3, 4):
        return None
    if anchor.target in _ZEROS:
        users = {op_name(u) for u in anchor.users}
        # A buffer for the output is written, not read.
        return anchor if users and not users <= _SCATTERS and is_zero(anchor) else None
    decayed = _decayed(anchor)
    state = None if decayed is None else _before_products(decayed)
    return None if state is None or is_zero(state) or _is_update(state) else state


def is_zero(node: Node) -> bool:
    """Whether a tensor is made of zeros."""
    while op_name(node) in _COPIES and node.target is not aten.copy.default and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target in _ZEROS and not (node.target is aten.full.default and node.args[1])


def follow(state: Node) -> tuple[Node | None, bool]:
    """The last state that is carried, None without an update; and whether an exponential decays it on the way."""
    size, node, final, decays = shape(state), state, None, False
    while True:
        steps = [u for u in node.users if _carries(u, node, size)]
        if not steps:
            return final, decays
        # Chunks as long as K make products that read the state as large as it.
        step = next((u for u in steps if u.target is not aten.matmul.default), steps[0])
        decays = decays or (step.target is aten.mul.Tensor and _is_exponential(_other(step, node)))
        node = step
        if op_name(node) in _SUMS:
            final = node


def known_nonnegative(x: Node) -> bool:
    """Whether a tensor is nonnegative by how it is made."""
    while op_name(x) in LAYOUT - _MASKED and isinstance(x.args[0], Node) and len(x.all_input_nodes) == 1:
        x = x.args[0]
    if op_name(x) in ("mul", "add") and not x.kwargs:
        return all(known_nonnegative(a) if isinstance(a, Node) else _is_at_least(a, 0) for a in x.args)
    if op_name(x) in ("rsub", "sub") and len(x.args) == 2 and not x.kwargs:  # 1 - sigmoid
        of, less = x.args if op_name(x) == "sub" else x.args[::-1]
        return isinstance(less, Node) and op_name(less) == "sigmoid" and _is_at_least(of, 1)
    return op_name(x) in _NONNEGATIVE


def _is_at_least(x: Any, bound: float) -> bool:
    return isinstance(x, (int, float)) and x >= bound


def _carries(user: Node, node: Node, size: Any) -> bool:
    """Whether a user hands the state `node` on."""
    if shape(user) != size or not user.users:
        return False
    name = op_name(user)
    if name in _SUMS:
        return user.args[0] is node or (name == "add" and user.args[1] is node)
    handed_on = (
        (name in _COPIES and user.args[0] is node)
        or _decayed(user) is node
        or (user.target is aten.matmul.default and _is_square(_other(user, node)))
    )
    return handed_on and any(_carries(u, user, size) for u in user.users)


def _other(user: Node, node: Node) -> Node | None:
    """The other one of two operands."""
    others = [a for a in user.args[:2] if isinstance(a, Node) and a is not node]
    return others[0] if len(others) == 1 else None


def _is_square(node: Node | None) -> bool:
    size = shape(node) if node is not None else None
    return size is not None and len(size) >= 2 and size[-1] == size[-2]


def _decayed(node: Node) -> Node | None:
    """The state in ``state * decay``; None where it is not that."""
    if node.target is not aten.mul.Tensor:
        return None
    size = shape(node)
    for state, decay in (node.args, node.args[::-1]):
        if not isinstance(state, Node) or not isinstance(decay, Node):
            continue
        if shape(state) == size != shape(decay) and (_is_exponential(decay) or _is_a_number_a_row(decay)):
            return state
    return None


def _is_exponential(node: Node | None) -> bool:
    while node is not None and op_name(node) in LAYOUT and isinstance(node.args[0], Node):
        node = node.args[0]
    return node is not None and node.target in (aten.exp.default, aten.exp2.default)


def _is_a_number_a_row(node: Node) -> bool:
    size = shape(node)
    return size is not None and len(size) >= 3 and size[-1] == 1


def _before_products(node: Node) -> Node:
    """The state that stands in products with square matrices; the node itself where there are none."""
    while node.target is aten.matmul.default:
        states = [a for a in node.args if isinstance(a, Node) and shape(a) == shape(node)]
        # Of two square ones, the matrix is a difference.
        states = [a for a in states if len(states) == 1 or op_name(a) not in ("sub", "rsub", "add")]
        if len(states) != 1 or not _is_square(_other(node, states[0])):
            break
        node = states[0]
    return node


def _is_update(state: Node) -> bool:
    """Whether a state is a decayed one with something added."""
    waiting, seen = [state], 0
    while waiting and seen < 8:
        node, seen = _before_products(waiting.pop()), seen + 1
        if op_name(node) in _COPIES and isinstance(node.args[0], Node):
            waiting.append(node.args[0])
        elif op_name(node) in _SUMS:
            waiting += [a for a in node.args if isinstance(a, Node) and shape(a) == shape(state)]
        elif _decayed(node) is not None:
            return True
    return False
