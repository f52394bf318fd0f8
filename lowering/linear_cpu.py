"""Linear layers of one row on a CPU: the products of blocks of the weight's rows, which all threads share.

PyTorch gives a product with one row to a library that computes it on one thread (MKL: 1.3 ms for 25 MB on two cores,
as long as on one). A batch of products is shared out, by Inductor's own loop or by the library.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from sm12x_compile.arch import Arch
from sm12x_compile.match import module_of, source_of
from sm12x_compile.options import Options
from sm12x_compile.report import Site

aten = torch.ops.aten
PATTERN, KERNEL = "linear", "aten.row_linear"
LARGE = 1 << 20  # elements of a weight from which the threads' start is small beside the reading
BLOCKS = 16


def share_linears(gm: GraphModule, options: Options, arch: Arch) -> list[Site]:
    """Replace the linear layers of one row in place.

    Args:
        gm: a normal form, lowered.
        options: ``patterns`` and ``kernels`` allow or deny.
        arch: the device at hand.

    Returns:
        A site for each layer.
    """
    wanted = options.wants_pattern(PATTERN) and options.wants_kernel(KERNEL)
    if arch.is_cuda or torch.get_num_threads() < 2 or not wanted:
        return []
    layers = [n for n in gm.graph.find_nodes(op="call_function", target=aten.linear.default) if _is_large_row(n)]
    return [_share(gm, layer) for layer in layers]


def _is_large_row(node: Node) -> bool:
    x, w = (_value(a) for a in node.args[:2])
    if not all(isinstance(s, int) for s in (*x.shape, *w.shape)) or w.dim() != 2 or x.numel() != x.shape[-1]:
        return False
    plain = x.device.type == "cpu" and x.dtype == w.dtype == torch.float32 and w.is_contiguous()
    return plain and w.numel() >= LARGE and w.shape[0] % BLOCKS == 0


def _share(gm: GraphModule, layer: Node) -> Site:
    x, w, *rest = layer.args
    bias = rest[0] if rest else layer.kwargs.get("bias")
    rows, inner = _value(w).shape
    with gm.graph.inserting_before(layer):
        blocks = _call(gm, layer, aten.view.default, w, [BLOCKS, rows // BLOCKS, inner])
        column = _call(gm, layer, aten.reshape.default, x, [1, inner, 1])
        column = _call(gm, layer, aten.expand.default, column, [BLOCKS, inner, 1])
        result = _call(gm, layer, aten.bmm.default, blocks, column)
        result = _call(gm, layer, aten.view.default, result, list(_value(layer).shape))
        if bias is not None:
            result = _call(gm, layer, aten.add.Tensor, result, bias)
    layer.replace_all_uses_with(result)
    gm.graph.erase_node(layer)
    tags = {"inner": inner, "outputs": rows, "bias": bias is not None}
    return Site(PATTERN, "aten::linear", module_of(result), source_of(result), tags, KERNEL)


def _call(gm: GraphModule, layer: Node, target: torch._ops.OpOverload, *args: Any) -> Node:
    """A call where the layer stands, with its fake result."""
    node = gm.graph.call_function(target, args)
    node.meta = {k: v for k, v in layer.meta.items() if k != "val"}
    node.meta["val"] = target(*torch.fx.node.map_arg(args, _value))
    return node


def _value(node: Any) -> Any:
    return node.meta["val"]
