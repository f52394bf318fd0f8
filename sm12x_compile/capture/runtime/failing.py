"""Operations that raise an error for some values of their operands, whatever the shapes.

Under a condition that the data decide both sides are computed, so what may fail must not stand there: the author may
well have written the condition to guard it. On a GPU such a failure ends the process's use of the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from .memory import name_of

# Integers among the operands are positions, classes or counts, which may be out of range.
_BY_INDEX = frozenset(
    {
        "index_select", "gather", "take", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "index_add",
        "index_copy", "index_fill", "index_put", "index_reduce", "put", "embedding", "embedding_bag", "one_hot",
        "nll_loss", "cross_entropy", "bincount", "repeat_interleave", "tensor_split", "ctc_loss", "multi_margin_loss",
        "multilabel_margin_loss",
    }
)  # fmt: skip
_BY_VALUE = frozenset(
    {
        "multinomial", "binary_cross_entropy", "_assert_async", "_assert", "cholesky", "inverse", "inv", "solve",
        "linalg_cholesky", "linalg_inv", "linalg_solve", "linalg_eigh", "linalg_eig", "linalg_svd", "linalg_det",
        "linalg_slogdet", "linalg_qr", "svd", "pinverse", "bernoulli", "histc",
    }
)  # fmt: skip
_DIVISIONS = frozenset(
    {"floor_divide", "remainder", "fmod", "div", "divide", "floordiv", "mod", "__floordiv__", "__mod__",
     "__rfloordiv__", "__rmod__"}
)  # fmt: skip


def may_fail(node: Node) -> bool:
    """Whether values alone can make a node of Dynamo's graph raise an error.

    Rewritten code takes care that its own positions are in range, and says so by calling overloads of ATen.
    """
    if isinstance(node.target, torch._ops.OpOverload):
        return False
    name = name_of(node).rstrip("_") if not name_of(node).endswith("__") else name_of(node)
    if name in ("getitem", "setitem"):
        return len(node.args) > 1 and any(map(_is_integer, pytree.tree_leaves(node.args[1])))
    if name in _BY_INDEX:
        return any(map(_is_integer, node.all_input_nodes))
    if name in _DIVISIONS:
        return _is_integer(node) and any(_is_integer(x) for x in [*node.args[1:], *node.kwargs.values()])
    return name in _BY_VALUE


def _is_integer(x: Any) -> bool:
    """Whether x is a node whose value is a tensor of integers (not of bools)."""
    value = x.meta.get("example_value") if isinstance(x, Node) else None
    if not isinstance(value, Tensor):
        return False
    return value.dtype != torch.bool and not value.dtype.is_floating_point and not value.dtype.is_complex
