"""A graph in normal form, while a pattern or a lowering looks at it and adds nodes."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .arrange import CannotArrange, arrange
from .index_algebra import Element, Size, Var, same_size
from .index_algebra.expr import args_of

aten = torch.ops.aten


class GraphView:
    """Adds calls at the insertion point of the graph (``with view.graph.inserting_before(node)``)."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.graph = gm.graph
        self._read: dict[Any, Any] = {}

    def once(self, read: Callable[[Node], Any], node: Node) -> Any:
        """``read(node)``, remembered until the graph changes: families that build on one another share a reading."""
        if (read, node) not in self._read:
            self._read[read, node] = read(node)
        return self._read[read, node]

    # ------------------------------------------------------------ new nodes

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Append a call at the insertion point, with the fake value that it computes."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.value(node)
        return node

    def value(self, node: Node) -> Any:
        """The fake value that a call computes from those of its arguments."""
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        # Without Python's dispatcher `matmul` of torch 2.11 makes constants of symbolic sizes.
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    @cached_property
    def fake_mode(self) -> Any:
        values = (n.meta.get("val") for n in self.graph.nodes)
        found = next((v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor)), None)
        return found or nullcontext()

    def arrange(self, element: Element, groups: Sequence[Sequence[Var]], *, expand: bool = True) -> Node:
        """A tensor laid out so that dim k runs over the variables of ``groups[k]``; see `arrange.arrange`."""
        return arrange(self, element, groups, expand=expand)

    # ------------------------------------------------------------ sizes

    def size(self, value: Size) -> int | Node:
        """A size as an argument: an int, or a node that computes it.

        Raises:
            CannotArrange: no input of the graph tells a symbol of it.
        """
        if isinstance(value, int):
            return value
        for expr, (node, dim) in self._sizes.items():
            if same_size(expr, value):
                return node if dim is None else self.call(aten.sym_size.int, node, dim)
        proxies: dict[Any, torch.fx.Proxy] = {}
        tracer = torch.fx.proxy.GraphAppendingTracer(self.graph)
        for symbol in value.free_symbols:
            if symbol not in self._sizes:
                raise CannotArrange(f"no input of the graph tells the size {value}")
            node, dim = self._sizes[symbol]
            held = node if dim is None else self.call(aten.sym_size.int, node, dim)
            proxies[symbol] = torch.fx.Proxy(held, tracer)
        before = set(self.graph.nodes)
        try:
            result = sympy_interp(PythonReferenceAnalysis, proxies, value)
        except Exception as error:
            raise CannotArrange(f"size {value} cannot be computed ({error})") from error
        for node in self.graph.nodes:
            if node not in before:
                node.meta["val"] = self.value(node)
        return result.node

    @cached_property
    def _sizes(self) -> dict[Any, tuple[Node, int | None]]:
        """Symbolic sizes that the inputs hold: as a number, or as a dimension of a tensor."""
        found: dict[Any, tuple[Node, int | None]] = {}
        placeholders = self.graph.find_nodes(op="placeholder")
        for node in placeholders:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                found.setdefault(value.node.expr, (node, None))
        for node in placeholders:
            value = node.meta.get("val")
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (node, dim))
        return found

    # ------------------------------------------------------------ replacing

    def replace(self, node: Node, value: Node) -> None:
        """Let `value` take the place of `node` for its readers, which may find it in other strides.

        Views that no longer fit become reshapes. What the graph returns, what random numbers are drawn for, and
        what ops of others read keeps the strides that it had: a user's `.view` after the graph, the order of
        random numbers and kernels that were promised a contiguous tensor hang on them.
        """
        self._read.clear()
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)
        before = {value: node.meta["val"]}
        while (minded := self._spread(value, before)) is not None:
            self._restride(minded, before)

    def _spread(self, value: Node, before: dict[Node, Any]) -> Node | None:
        """Give every node behind `value` its new fake value.

        Returns:
            The first node whose strides changed although somebody minds.
        """
        for node, old in before.items():
            if node is not value:
                node.meta["val"] = old
        waiting = [value]
        seen: set[Node] = set()
        while waiting:
            node = heapq.heappop(waiting)  # in the order of the graph
            if node in seen or node.op != "call_function" or node.target is aten.copy_.default:
                continue
            seen.add(node)
            if node is not value:
                before.setdefault(node, node.meta["val"])
                node.meta["val"] = self._revalued(node)
            if _same_strides(node.meta["val"], before[node]):
                continue
            if any(_minds_strides(user) or self._parts_from_its_base(user) for user in node.users):
                return node
            for user in node.users:
                heapq.heappush(waiting, user)
        return None

    def _revalued(self, user: Node) -> Any:
        if user.target is aten.view.default and not self._fits(user):
            user.target = aten.reshape.default
        return self.value(user)

    def _parts_from_its_base(self, user: Node) -> bool:
        """Whether a view that the caller gets to see would have to become a copy."""
        return user.target is aten.view.default and _is_returned(user) and not self._fits(user)

    def _fits(self, view: Node) -> bool:
        """Whether the strides of its source allow a view.

        A fake tensor with dimensions of size 1 may say yes wrongly (torch 2.13), so a meta tensor is asked too.
        """
        source, shape = args_of(view)
        value = source.meta["val"]
        sizes = [_hint(s.meta["val"] if isinstance(s, Node) else s) for s in shape]
        try:
            self.value(view)
            with _disable_current_modes():
                strides = list(map(_hint, value.stride()))
                torch.empty_strided(list(map(_hint, value.shape)), strides, device="meta").view(sizes)
        except (RuntimeError, ValueError):
            return False
        return True

    def _restride(self, node: Node, before: dict[Node, Any]) -> None:
        """Copy the tensor that `node` is a view of into the strides that it had, for all its readers."""
        while is_view(node) and node.args[0] in before:
            node = node.args[0]  # type: ignore[assignment]
        old = before[node]
        order = sorted(range(old.dim()), key=lambda k: (-_hint(old.stride(k)), k))
        with self.graph.inserting_after(node):
            first = self.graph.call_function(aten.permute.default, (node, order))
        with self.graph.inserting_after(first):
            dense = self.graph.call_function(
                aten.clone.default, (first,), {"memory_format": torch.contiguous_format}
            )
        with self.graph.inserting_after(dense):
            back = [order.index(k) for k in range(len(order))]
            result = self.graph.call_function(aten.permute.default, (dense, back))
        for new in (first, dense, result):
            new.meta["val"] = self.value(new)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not first)


_READS_STRIDES = {
    aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default, aten.sym_stride.int,
    aten.sym_storage_offset.default,
}  # fmt: skip
_OURS = ("aten", "prims", "sm12x", "sm12x_kernels")


def _minds_strides(user: Node) -> bool:
    if user.op == "output":
        return True
    target = user.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return random or target in _READS_STRIDES or target.namespace not in _OURS


def is_view(node: Node) -> bool:
    """Whether a node's memory is that of its first argument."""
    target = node.target
    if target is operator.getitem:
        return isinstance(node.args[0], Node) and is_view(node.args[0])
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target is aten._unsafe_view.default)


def _is_returned(node: Node) -> bool:
    """Whether the graph returns the node or a view of it."""
    return any(user.op == "output" or (is_view(user) and _is_returned(user)) for user in node.users)


def _hint(size: Any) -> int:
    return size.node.hint or 0 if isinstance(size, torch.SymInt) else int(size)


def _same_strides(a: Any, b: Any) -> bool:
    """Whether two results are laid out alike; strides of dimensions of size 1 do not count."""
    if isinstance(a, (tuple, list)):
        return all(_same_strides(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return True
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(_hint(size) == 1 or _hint(x) == _hint(y) for size, x, y in pairs)
