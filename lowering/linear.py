"""Linear layers of one row, side by side in one kernel: most of the time of a decode step of one sequence.

No pattern is needed: `aten.linear` says what it is. On a CUDA device, layers that read the same row (query, key and
value; gate and up) become one call of our Triton kernel, which reads each weight once. All others stay with Inductor.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sm12x_compile.arch import Arch
from sm12x_compile.graph_view import is_view
from sm12x_compile.match import module_of, source_of
from sm12x_compile.normalize import written_arguments
from sm12x_compile.options import Options
from sm12x_compile.report import Floor, Site

from .triton.arguments import DTYPES, gpu_refusal
from .triton.row_linear import MAX_LAYERS, row_linear

aten = torch.ops.aten
PATTERN, KERNEL = "linear", "triton.row_linear"
_MAY_DO_NOTHING = (aten._to_copy, aten.to, aten.clone, aten.contiguous, aten.dropout)


def join_linears(gm: GraphModule, options: Options, arch: Arch) -> list[Site]:
    """Replace the linear layers of one row in place.

    Args:
        gm: a normal form, lowered.
        options: ``patterns`` and ``kernels`` allow or deny.
        arch: the device at hand.

    Returns:
        A site for each kernel call.
    """
    if gpu_refusal(arch) or not options.wants_pattern(PATTERN) or not options.wants_kernel(KERNEL):
        return []
    place = {node: k for k, node in enumerate(gm.graph.nodes)}
    written = {x for node in gm.graph.nodes for x in written_arguments(node)}
    groups: dict[Any, list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        if _is_row(node) and _weights_are_inputs(node, written):
            groups.setdefault((node.args[0], _bias(node) is None), []).append(node)
    sites = []
    for layers in groups.values():
        for first in range(0, len(layers), MAX_LAYERS):
            sites.append(_join(gm, sorted(layers[first : first + MAX_LAYERS], key=place.__getitem__), arch))
    return sites


def _bias(node: Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _is_row(node: Node) -> bool:
    x, w = node.args[0].meta["val"], node.args[1].meta["val"]  # type: ignore[union-attr]
    bias = _bias(node)
    sizes = (*x.shape, *w.shape)
    if not all(isinstance(s, int) for s in sizes) or x.numel() != x.shape[-1] or w.numel() == 0:
        return False
    dtypes = {x.dtype, w.dtype, *([bias.meta["val"].dtype] if bias is not None else [])}
    dense = x.is_contiguous() and w.is_contiguous()
    return len(dtypes) == 1 and x.dtype in DTYPES and x.device.type == "cuda" and dense


def _weights_are_inputs(node: Node, written: set[Node]) -> bool:
    """They are loaded before the kernel before has ended: nothing in the graph may have made them."""
    return all(
        w.op in ("placeholder", "get_attr") and w not in written
        for w in (node.args[1], _bias(node))
        if isinstance(w, Node)
    )


def _is_computed(x: Node) -> bool:
    """Whether a kernel of the graph runs before x can be read. Copies and casts may turn out to be none."""
    while is_view(x) or getattr(x.target, "overloadpacket", None) in _MAY_DO_NOTHING:
        x = x.args[0]  # type: ignore[assignment]
    return x.op == "call_function"


def _join(gm: GraphModule, layers: Sequence[Node], arch: Arch) -> Site:
    first = layers[0]
    x: Any = first.args[0]
    weights = [node.args[1] for node in layers]
    biases = [_bias(node) for node in layers if _bias(node) is not None]
    with gm.graph.inserting_before(first):
        call = gm.graph.call_function(row_linear._opoverload, (x, weights, biases, _is_computed(x)))
        call.meta = {k: v for k, v in first.meta.items() if k != "val"}
        call.meta["val"] = [node.meta["val"] for node in layers]
        for k, node in enumerate(layers):
            result = gm.graph.call_function(operator.getitem, (call, k))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
    for node in layers:
        gm.graph.erase_node(node)
    outputs = [w.meta["val"].shape[0] for w in weights]  # type: ignore[union-attr]
    inner, size = x.meta["val"].shape[-1], x.meta["val"].element_size()
    moved = float(sum(outputs) * inner * size)
    floor = Floor(moved, moved, moved / arch.bandwidth * 1e6) if arch.bandwidth else None
    tags = {"layers": len(layers), "inner": inner, "outputs": sum(outputs), "bias": bool(biases)}
    return Site(PATTERN, row_linear._opoverload.name(), module_of(first), source_of(first), tags, KERNEL, floor=floor)
