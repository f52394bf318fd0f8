"""Trace a kernel that is plain PyTorch into the graph, where Inductor can fuse it."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from sm12x_compile.graph_view import GraphView, is_view
from sm12x_compile.marks import moved
from sm12x_compile.ops import OPS
from sm12x_compile.registry import Kernel

aten = torch.ops.aten


class Splicer:
    """Inlines kernels; equal nodes that several calls need (a mask, say) are shared."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.view = GraphView(gm)
        self._traces: dict[Any, GraphModule] = {}
        self._shared: dict[Any, Node] = {}
        self._serial = count()
        self._new: list[Node] = []

    def inline(self, node: Node, kernel: Kernel) -> list[Node]:
        """Replace a call of a semantic op by the body of the kernel; returns the nodes that are new."""
        self._new.clear()
        self._before = node  # a call inside a kernel stands before what the kernel computes later
        bound = OPS[kernel.op].bind(node)
        inputs = {k: v for k, v in bound.items() if isinstance(v, Node)}
        body = self._trace(kernel, bound, inputs)
        with self.gm.graph.inserting_before(node):
            share = not any(_is_mutable(inner) for inner in body.graph.nodes)
            before = set(self._shared.values())
            result = self._body(body, inputs, share)
            if any(_base(r) in before for r in _results(result)):
                # An equal call was inlined already: two results of the user's must not share memory.
                result = self._body(body, inputs, share=False)
        if isinstance(result, Node):
            moved(node, result)
            self.view.replace(node, result)
        else:
            for pick in list(node.users):  # an op with several results is read through getitem
                moved(pick, result[pick.args[1]])  # type: ignore[index]
                self.view.replace(pick, result[pick.args[1]])  # type: ignore[index]
                self.gm.graph.erase_node(pick)
        self.gm.graph.erase_node(node)
        return list(self._new)

    def _body(self, body: GraphModule, inputs: dict[str, Node], share: bool) -> Node | tuple[Node, ...]:
        replacement: dict[Node, Any] = dict(
            zip(body.graph.find_nodes(op="placeholder"), inputs.values(), strict=True)
        )
        for inner in body.graph.nodes:
            if inner.op == "output":
                found = torch.fx.node.map_arg(inner.args[0], lambda n: replacement[n])
                return tuple(found) if isinstance(found, (list, tuple)) else found  # type: ignore[return-value, arg-type]
            if inner.op != "placeholder":
                replacement[inner] = self._copy(body, inner, replacement, share)
        raise AssertionError("a traced kernel has an output")

    def _copy(self, body: GraphModule, inner: Node, replacement: dict[Node, Any], share: bool) -> Node:
        args, kwargs = torch.fx.node.map_arg((inner.args, inner.kwargs), lambda n: replacement[n])
        if inner.op == "get_attr":
            name = f"_sm12x_{next(self._serial)}_{inner.target}"
            value = getattr(body, str(inner.target))
            if isinstance(value, torch.Tensor):  # a buffer, or AOTAutograd would not know it
                self.gm.register_buffer(name, value, persistent=False)
            else:
                setattr(self.gm, name, value)
            copied = self.gm.graph.get_attr(name)
            copied.meta["val"] = inner.meta.get("val")
            return copied
        folded = _folded(inner.target, args)
        if folded is not None:
            return folded
        key = (inner.target, repr((args, kwargs)))
        if share and key in self._shared and self._shared[key] < self._before:
            return self._shared[key]
        copied = self.gm.graph.create_node(inner.op, inner.target, args, kwargs)
        copied.meta["val"] = inner.meta.get("val")
        self._new.append(copied)
        target = inner.target
        if share and isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in target.tags:
            self._shared[key] = copied
        return copied

    def _trace(self, kernel: Kernel, bound: dict[str, Any], inputs: dict[str, Node]) -> GraphModule:
        values = {k: v.meta["val"] for k, v in inputs.items()}
        key = (kernel.name, *((k, _key(values[k]) if k in values else repr(v)) for k, v in bound.items()))
        if key in self._traces:
            return self._traces[key]
        rest = {k: v for k, v in bound.items() if k not in inputs}

        def run(*tensors: Any) -> Any:
            return kernel.run(**dict(zip(inputs, tensors, strict=True)), **rest)

        fakes = list(values.values())
        mode = next(f.fake_mode for f in fakes if isinstance(f, torch._subclasses.FakeTensor))
        with mode, torch.no_grad():
            body = make_fx(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
        self._traces[key] = body
        return body


def _folded(target: Any, args: tuple[Any, ...]) -> Node | None:
    """``stack(parts)[n]`` is a part: nothing needs to be stacked for it."""
    if target is not aten.select.int or args[1] != 0 or not isinstance(args[2], int):
        return None
    whole = args[0]
    if whole.target is not aten.stack.default or (len(whole.args) > 1 and whole.args[1] != 0) or whole.kwargs:
        return None
    part: Node = whole.args[0][args[2]]
    return part


def _is_mutable(node: Node) -> bool:
    """Whether a node writes: then what it is given is not the same when it comes again."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _results(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _base(result: Any) -> Any:
    """The node whose memory the result is."""
    while isinstance(result, Node) and is_view(result):
        result = result.args[0]
    return result


def _key(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device} {tuple(map(str, value.shape))} {tuple(map(str, value.stride()))}"
    return f"{type(value).__name__} {value}"
