"""Integers that change from call to call, as tensors on the device.

A recording holds every number that the host hands over as a constant, so CUDA graph trees record anew for each value:
a cache that counts its tokens in a Python int (Hugging Face's sliding-window caches do) gets one recording a token.
Where such an int only reaches *values* (positions, masks) and no size, it is the same computation with a 0-d tensor in
its place, which is filled before the replay. What Python computes from ints stays on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass
class Lifted:
    """A graph whose ints came to be tensors.

    Attributes:
        graph: takes the inputs at `kept`, then a 0-d int64 tensor for each of the host's values.
        kept: positions of the inputs that are left.
        ints: positions of those that are gone.
        host: from their values to the values of the new inputs, then of the results in `results`.
        values: number of new inputs.
        results: positions of results that are ints: the graph returns None there.
    """

    graph: GraphModule
    kept: list[int]
    ints: list[int]
    host: Callable[..., Sequence[int]]
    values: int
    results: list[int]


def lift(gm: GraphModule, device: torch.device) -> Lifted | None:
    """Turn the int inputs of an ATen graph into tensors, in place; None, and no change, where one reaches a size.

    Args:
        gm: functional ATen, as AOTAutograd gives it to a compiler, with ``meta["val"]``.
        device: where the new inputs lie.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    ints = [k for k, node in enumerate(placeholders) if isinstance(node.meta.get("val"), torch.SymInt)]
    numbers = {node for node in gm.graph.nodes if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool))}
    if not ints or any(_has_symbolic_size(node) for node in gm.graph.nodes):
        return None
    if any(x not in numbers for n in numbers for x in n.all_input_nodes):
        return None  # a number that comes from a tensor
    readers = [n for n in gm.graph.nodes if n not in numbers and n.op != "output" and numbers & set(n.all_input_nodes)]
    wanted = list(dict.fromkeys(x for n in readers for x in n.all_input_nodes if x in numbers))
    if not readers or any(not isinstance(x.meta["val"], torch.SymInt) for x in wanted):
        return None
    mode = next((m for n in readers if (m := getattr(n.meta.get("val"), "fake_mode", None)) is not None), None)
    if mode is None:
        return None
    with mode:
        scalar = torch.empty((), dtype=torch.int64, device=device)
    plans = [_plan(n, scalar) for n in readers]
    if not all(plans):
        return None
    output = gm.graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    results = [k for k, x in enumerate(returned) if x in numbers]
    host = _on_the_host(placeholders, numbers, [*wanted, *(returned[k] for k in results)])
    inputs: dict[Node, Node] = {}
    with gm.graph.inserting_after(placeholders[-1]):
        for x in reversed(wanted):
            inputs[x] = gm.graph.placeholder(f"{x.name}_on_device")
            inputs[x].meta["val"] = scalar
    for node, plan in zip(readers, plans, strict=True):
        assert plan is not None
        plan(node, inputs)
    output.args = (tuple(None if x in numbers else x for x in output.args[0]),)  # type: ignore[union-attr]
    if "user_visible_output_idxs" in output.meta:  # Inductor's: results whose strides the caller sees
        seen = output.meta["user_visible_output_idxs"]
        output.meta["user_visible_output_idxs"] = [k for k in seen if k not in results]
    for node in reversed(list(gm.graph.nodes)):
        if node in numbers and not node.users:
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return Lifted(gm, [k for k in range(len(placeholders)) if k not in ints], ints, host, len(wanted), results)


def _has_symbolic_size(node: Node) -> bool:
    return any(
        isinstance(s, torch.SymInt)
        for leaf in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(leaf, torch.Tensor)
        for s in (*leaf.shape, *leaf.stride(), leaf.storage_offset())
    )


def _on_the_host(placeholders: Sequence[Node], numbers: set[Node], wanted: Sequence[Node]) -> Callable[..., Any]:
    """What Python computes from the ints, as a function of them."""
    graph = Graph()
    copy: dict[Node, Node] = {}
    for node in placeholders:
        if node in numbers:
            copy[node] = graph.placeholder(node.name)
    for node in next(iter(placeholders)).graph.nodes:
        if node in numbers and node not in copy:
            copy[node] = graph.node_copy(node, lambda x: copy[x])
    graph.output([copy[x] for x in wanted])
    function: Callable[..., Any] = GraphModule(torch.nn.Module(), graph).forward  # without a module's hooks, each step
    return function


Plan = Callable[[Node, dict[Node, Node]], None]


def _plan(node: Node, scalar: torch.Tensor) -> Plan | None:
    """How a node takes tensors in place of its ints; None if it can't, or would compute something else."""
    target = node.target
    if target is prims.iota.default and isinstance(node.kwargs.get("start"), Node):
        if node.kwargs["dtype"] != torch.int64 or node.all_input_nodes != [node.kwargs["start"]]:
            return None
        return _shift_iota
    if target in (aten.full.default, aten.scalar_tensor.default):
        dtype = node.meta["val"].dtype
        is_value = target is aten.scalar_tensor.default or not pytree.tree_any(
            lambda x: isinstance(x, Node), node.args[0]
        )
        return _spread if dtype in (torch.int64, torch.int32) and is_value else None
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return None
    return _overload(node, scalar)


def _shift_iota(node: Node, inputs: dict[Node, Node]) -> None:
    graph = node.graph
    start = node.kwargs["start"]
    with graph.inserting_after(node):
        shifted = graph.call_function(aten.add.Tensor, (node, inputs[start]))  # type: ignore[index]
    shifted.meta.update(node.meta)
    node.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is not shifted)
    node.kwargs = {**node.kwargs, "start": 0}


def _spread(node: Node, inputs: dict[Node, Node]) -> None:
    """A tensor filled with the number."""
    graph, value = node.graph, node.meta["val"]
    (number,) = node.all_input_nodes
    with graph.inserting_before(node):
        new = inputs[number]
        if value.dtype != torch.int64:
            new = graph.call_function(prims.convert_element_type.default, (new, value.dtype))
            new.meta["val"] = value.new_empty(())
        new = graph.call_function(aten.expand.default, (new, list(value.shape)))
        new.meta["val"] = inputs[number].meta["val"].to(value.dtype).expand(value.shape)
        if value.dim():
            new = graph.call_function(aten.clone.default, (new,), {"memory_format": torch.contiguous_format})
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _overload(node: Node, scalar: torch.Tensor) -> Plan | None:
    """The same pointwise operator on tensors.

    Only among integers: in floating point a number and a tensor are not rounded at the same place.
    """
    values = [x.meta["val"] for x in node.all_input_nodes if isinstance(x.meta["val"], torch.Tensor)]
    if any(v.dtype.is_floating_point or v.dtype.is_complex for v in values):
        return None

    def fake(x: Any) -> Any:
        value = x.meta["val"] if isinstance(x, Node) else x
        return scalar if isinstance(value, torch.SymInt) else value

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), fake)
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    was = node.meta["val"]
    for overload in (node.target, *(getattr(packet, name) for name in packet.overloads())):
        try:
            with scalar.fake_mode:  # type: ignore[attr-defined]
                found = overload(*args, **kwargs)
        except (RuntimeError, TypeError, NotImplementedError):
            continue
        if not isinstance(found, torch.Tensor) or found.dtype.is_floating_point:
            return None
        if (found.dtype, found.shape, found.stride()) != (was.dtype, was.shape, was.stride()):
            return None
        break
    else:
        return None

    def plan(node: Node, inputs: dict[Node, Node]) -> None:
        node.target = overload
        node.args = torch.fx.node.map_arg(node.args, lambda x: inputs.get(x, x))
        node.kwargs = torch.fx.node.map_arg(node.kwargs, lambda x: inputs.get(x, x))

    return plan
