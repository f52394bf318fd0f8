"""Who shares whose memory, and what a graph node writes.

``y = a if c else b`` gives y the memory of one of the two; ``x[n]`` with a number n is a view. In a graph of fixed
shape both are copies, which is the same thing as long as nobody writes the copy or what it stands for while the other
is still read. That is known when the graph is whole, so it is checked before the graph is compiled.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .refusal import frame, originals, restart_without, tracers

IN_PLACE = frozenset(
    {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
     operator.iand, operator.ior, operator.ixor, operator.ipow, operator.imod, operator.imatmul,
     operator.ilshift, operator.irshift}
)  # fmt: skip
_TRAINED = ("running_mean", "running_var")  # what normalisation over a batch keeps count in


def name_of(node: Any) -> str:
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def written(node: Node) -> list[Node]:
    """The operands that a node of Dynamo's graph writes."""
    if node.op not in ("call_function", "call_method"):
        return []
    first = [x for x in node.args[:1] if isinstance(x, Node)]
    if node.target in IN_PLACE:
        return first
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        given = {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}
        found = [given.get(a.name) for a in arguments if a.is_write]
        return [x for x in pytree.tree_leaves(found) if isinstance(x, Node)]
    found = [node.kwargs.get("out"), *(node.kwargs.get(name) for name in _TRAINED)]
    if _asks_to_write(node):
        found += [*first, node.kwargs.get("input")]
    name = name_of(node)
    if getattr(node.target, "__module__", None) != "_operator" and name.endswith("_") and not name.endswith("__"):
        found += first  # neither and_ nor or_ of Python's operators
    return [x for x in pytree.tree_leaves(found) if isinstance(x, Node)]


def _asks_to_write(node: Node) -> bool:
    """``inplace=True``, however it is passed."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if not callable(node.target) or True not in node.args[1:]:
        return False
    try:
        names = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):
        return False
    return "inplace" in names and dict(zip(names, node.args, strict=False)).get("inplace") is True


def memory_of(node: Node) -> frozenset[int]:
    """The storages of a node's value; those of views are the same."""
    found = set()
    for leaf in pytree.tree_leaves(node.meta.get("example_value")):
        if isinstance(leaf, Tensor):
            try:
                found.add(leaf.untyped_storage()._cdata)
            except (RuntimeError, NotImplementedError):
                continue
    return frozenset(found)


class Copy:
    """A node that is a copy where the author's code has one of `sources`, or a view of it; and who made it."""

    def __init__(self, node: Node, sources: list[Node], code: CodeType, line: int) -> None:
        self.node, self.sources, self.code, self.line = node, sources, code, line


def stands_for(copy: Tensor, *sources: Tensor) -> None:
    """Say that `copy` is one of `sources`, or a view of it, in the author's code."""
    _stands_for()


@torch._dynamo.assume_constant_result
def _stands_for() -> None:
    nodes: list[Node] = []
    for tracer in tracers():
        if tracer.f_code is stands_for.__code__:
            held = tracer.symbolic_locals
            try:
                tensors = [held["copy"], *held["sources"].realize().items]
                nodes = [value.realize().as_proxy().node for value in tensors]
            except (AttributeError, KeyError, NotImplementedError):
                restart_without("a copy stands for a view, and who shares its memory can't be told")
        original = originals.get(tracer.f_code)
        if original is not None:
            output = tracer.output
            if not hasattr(output, "_sm12x_copies"):
                output._sm12x_copies = []
            line = int(tracer.lineno or original.co_firstlineno)
            output._sm12x_copies.append(Copy(nodes[0], nodes[1:], original, line))
            return


def refuse_shared(output: Any, graph: Graph) -> None:
    """Trace the frame again without a rewritten function one of whose copies would have to be the original.

    Args:
        output: Dynamo's output graph, to which the trace has attached its copies.
        graph: the whole graph.

    Raises:
        UnspecializeRestartAnalysis: there is such a copy.
    """
    found = next(_mistaken(graph, getattr(output, "_sm12x_copies", [])), None)
    if found is not None:
        reason = "a name may stand for either of two tensors, or for a view, and one of them is written afterwards"
        frame.give_up(found.code, found.line, reason)
        raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason=f"sm12x: {reason}")


def _mistaken(graph: Graph, copies: list[Copy]) -> Iterator[Copy]:
    """Copies that are written while what they may share memory with is still read, or the other way round."""
    place = {node: k for k, node in enumerate(graph.nodes)}
    copies = [c for c in copies if c.node in place]
    if not copies:
        return
    last_read: dict[int, float] = {}
    for node, k in place.items():
        for x in node.all_input_nodes:
            last_read.update({m: max(k, last_read.get(m, 0)) for m in memory_of(x)})
    for node in place:
        if node.op in ("placeholder", "get_attr"):  # the caller reads it afterwards
            last_read.update({m: float("inf") for m in memory_of(node)})
    for node, k in place.items():
        for target in written(node):
            for memory in memory_of(target):
                for copy, other in _shared_with(memory, [c for c in copies if place[c.node] < k]):
                    if last_read.get(other, 0) > k:
                        yield copy


def _shared_with(memory: int, copies: list[Copy]) -> Iterator[tuple[Copy, int]]:
    """Other memory that may be `memory` in the author's code, and the copy that says so."""
    seen, left = {memory}, [memory]
    while left:
        here = left.pop()
        for copy in copies:
            of_copy = memory_of(copy.node)
            of_sources = frozenset().union(*map(memory_of, copy.sources))
            near = (of_sources if here in of_copy else frozenset()) | (of_copy if here in of_sources else frozenset())
            for other in near - seen:
                seen.add(other)
                left.append(other)
                yield copy, other
