"""Experts whose matrices are MXFP4: the packed bytes and scales as operands of ``sm12x::moe``.

Views of the user's bytes, unless gate and up, or the experts, are tensors of their own: these are joined once, as a
prepared weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from sm12x_compile.hoist import JOIN
from sm12x_compile.index_algebra import Element, Index, Var
from sm12x_compile.index_algebra.expr import shape_of
from sm12x_compile.match import GraphView, Refusal

from .dequantise import TAGS, WEIGHT
from .expert_weights import Joined, Matrix, Weights
from .routed import Unreadable

aten = torch.ops.aten


@dataclass(frozen=True)
class PackedExperts:
    """Matrices with the variables of their rows and of the columns along which they are packed."""

    w13: tuple[Matrix, Var]
    w2: tuple[Matrix, Var]
    w3: tuple[Matrix, Var] | None

    def lay_out(
        self, graph: GraphView, expert: Var, biases: dict[str, Node | None]
    ) -> tuple[Node, Node, dict[str, Any]]:
        """w13 and w2, and the op's further arguments; biases of gate and up become one as well."""
        w13, w13_scale = _laid_out(graph, *self.w13, expert)
        w2, w2_scale = _laid_out(graph, *self.w2, expert)
        more: dict[str, Any] = {"format": "mxfp4"}
        if self.w3 is not None:
            w3, w3_scale = _laid_out(graph, *self.w3, expert)
            w13, w13_scale = (graph.call(JOIN, list(pair), 1, False) for pair in ((w13, w3), (w13_scale, w3_scale)))
            gate, up = biases["w13_bias"], biases["w3_bias"]
            if gate is not None and up is not None:
                more |= {"w13_bias": graph.call(aten.cat.default, [gate, up], 1), "w3_bias": None}
        return w13, w2, more | {"w13_scale": w13_scale, "w2_scale": w2_scale}


def packed_experts(
    node: Node, w: Weights, joined: Joined, dims: list[tuple[Var, Var]], tags: dict[str, Any]
) -> PackedExperts | None:
    """The experts' matrices as packed ones; None if none is packed.

    Raises:
        Unreadable: some are and some are not, or not along the dimension that is summed over.
    """
    matrices = [m for m in (joined.gate, w.w2, joined.up) if m is not None]
    are_packed = [p.node.target is WEIGHT for m in matrices for p in m.parts]
    if not any(are_packed):
        return None
    tags["format"] = "mxfp4"
    if not all(are_packed):
        raise Unreadable(Refusal("some matrices of the experts are MXFP4 and some are not", node, tags))
    for m, (_, column) in zip((joined.gate, w.w2, joined.up), dims, strict=True):
        for p in () if m is None else m.parts:
            tags |= p.node.meta.get(TAGS, {})
            if p.index[-1] != Index.of(column):
                reason = "the blocks of 32 do not lie along the dimension that is summed over"
                raise Unreadable(Refusal(reason, node, tags))
    if (joined.gate_bias is None) != (joined.up_bias is None) and joined.up is not None:
        raise Unreadable(Refusal("only one of gate and up has a bias", node, tags))
    rows = [d[0] for d in dims]
    w3 = None if joined.up is None else (joined.up, rows[2])
    return PackedExperts((joined.gate, rows[0]), (w.w2, rows[1]), w3)


def _laid_out(graph: GraphView, matrix: Matrix, rows: Var, expert: Var) -> tuple[Node, Node]:
    """Bytes ``[E, rows, K / 2]`` and scales ``[E, rows, K / 32]``."""
    both = []
    for operand in (0, 1):
        parts = []
        for p in matrix.parts:
            source = p.node.args[operand]
            assert isinstance(source, Node)
            column = Var("y", shape_of(source)[-1])
            at = Index() if column.extent == 1 else Index.of(column)
            last = () if column.extent == 1 else (column,)
            groups = [(expert,), (rows,), last] if len(matrix.parts) == 1 else [(rows,), last]
            parts.append(graph.arrange(Element(source, (*p.index[:-1], at)), groups))
        both.append(parts[0] if len(matrix.parts) == 1 else graph.call(JOIN, parts, 0, True))
    return both[0], both[1]
