"""What the graph that Dynamo has traced so far knows about two tensors.

Asked by code that is being traced, through functions whose answer is a constant of the trace. Outside of Dynamo,
or where a private attribute has moved, every answer is False: no more than a longer mask follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .memory import name_of, written
from .refusal import tracers

_DEPTH = 24
# What makes a tensor of its own memory. Anything else may be a view of its first argument.
_FRESH = frozenset(
    {
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "zeros",
        "ones",
        "empty",
        "full",
        "arange",
        "one_hot",
        "linear",
        "matmul",
        "mm",
        "bmm",
        "sum",
        "mean",
        "any",
        "all",
        "amax",
        "amin",
        "max",
        "min",
        "topk",
        "sort",
        "argsort",
        "softmax",
        "sigmoid",
        "silu",
        "gelu",
        "where",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "greater",
        "less",
        "not_equal",
        "add",
        "sub",
        "mul",
        "truediv",
        "div",
        "clone",
        "scatter",
        "and_",
        "or_",
        "invert",
        "bitwise_and",
        "bitwise_or",
        "logical_and",
        "logical_or",
        "logical_not",
        "relu",
        "layer_norm",
        "tensor",
        "histc",
        "bincount",
        "cumsum",
        "stack",
        "cat",
        "masked_fill",
        "exp",
        "log",
        "rsqrt",
        "pow",
        "neg",
    }
)


class _Comparison:
    """Two expressions node by node: the nodes that there are twice, and the operands that they share."""

    def __init__(self) -> None:
        self.twice: set[Node] = set()
        self.shared: set[Node] = set()

    def equal(self, a: Any, b: Any, depth: int = _DEPTH) -> bool:
        a, b = self._copied(a), self._copied(b)
        if isinstance(a, Node) and a is b:
            self.shared.add(a)
            return True
        if not isinstance(a, Node) or not isinstance(b, Node):
            if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
                return len(a) == len(b) and all(self.equal(x, y, depth) for x, y in zip(a, b, strict=True))
            return type(a) is type(b) and not isinstance(a, (Node, dict)) and bool(a == b)
        if depth == 0 or a.op != b.op or a.target != b.target or not name_of(a) or _is_random(a) or written(a):
            return False
        self.twice |= {a, b}
        return (
            self.equal(a.args, b.args, depth - 1)
            and a.kwargs.keys() == b.kwargs.keys()
            and all(self.equal(a.kwargs[k], b.kwargs[k], depth - 1) for k in a.kwargs)
        )

    def _copied(self, x: Any) -> Any:
        """What a node is a copy of: the same values, if nobody writes them between the two."""
        while name_of(x) == "clone" and isinstance(x.args[0], Node):
            self.twice.add(x)
            x = x.args[0]
        return x

    def undisturbed(self, start: int | None = None) -> bool:
        """Whether no shared operand is written after the first node that reads it (and since `start`)."""
        missing = set(self.twice)
        bases = {base_of(n) for n in self.shared | self.twice}
        graph = next(iter(bases)).graph
        left = len(graph.nodes) - start if start is not None else 0
        for node in reversed(graph.nodes):
            if not missing and left <= 0:
                return True
            missing.discard(node)
            left -= 1
            if any(_may_touch(base_of(x), bases) for x in written(node)):
                return False
        return True


def _may_touch(written: Any, bases: set[Node]) -> bool:
    # Two inputs may share memory.
    return written in bases or (written.op == "placeholder" and any(b.op == "placeholder" for b in bases))


@torch._dynamo.assume_constant_result
def _same(start: int) -> bool:
    nodes = _locals_of(same_value.__code__, "a", "b")
    comparison = _Comparison()
    return nodes is not None and comparison.equal(nodes[0], nodes[1]) and comparison.undisturbed(start)


def same_value(a: Tensor, b: Tensor, start: int) -> bool:
    """Whether two tensors are the same expression of the same values, unwritten since the graph had `start` nodes."""
    return _same(start)


@torch._dynamo.assume_constant_result
def _implied(index: int) -> bool:
    nodes = _locals_of(implies_hit.__code__, "mask", "hits")
    if nodes is None:
        return False
    mask = _bool_of(nodes[0])
    whole = _sum_over_the_rest(_bool_of(nodes[1]))
    if whole is None or name_of(mask) != "getitem":
        return False
    at = mask.args[1]
    at = at[0] if isinstance(at, tuple) and len(at) == 1 else at
    if at != index or not isinstance(mask.args[0], Node):
        return False
    comparison = _Comparison()
    comparison.twice = {nodes[0], nodes[1], mask}
    total = _bool_of(nodes[1])
    while total is not whole and isinstance(total, Node) and total.args:  # the reduction read M first
        comparison.twice.add(total)
        total = total.args[0]
    return comparison.equal(mask.args[0], whole) and comparison.undisturbed()


def implies_hit(mask: Tensor, hits: Tensor, index: int) -> bool:
    """Whether a True in `mask` implies ``hits[index]``: hits counts mask's tensor, of which mask is row `index`."""
    return _implied(index)


@torch._dynamo.assume_constant_result
def _bound() -> int:
    nodes = _locals_of(index_bound.__code__, "values")
    return -1 if nodes is None else _size_indexed(nodes[0])


def index_bound(values: Tensor) -> int:
    """n if integers are known to lie in [0, n): topk, sort or argmax gave them; -1 if nothing is known."""
    return _bound()


def _locals_of(code: Any, *names: str) -> list[Node] | None:
    for tracer in tracers():
        if tracer.f_code is code:
            try:
                return [tracer.symbolic_locals[name].realize().as_proxy().node for name in names]
            except (AttributeError, KeyError, NotImplementedError):
                return None
    return None


def _is_random(node: Node) -> bool:
    name = name_of(node)
    return name.startswith(("rand", "empty", "new_empty", "bernoulli", "multinomial", "normal")) or "dropout" in name


def base_of(node: Node) -> Node:
    """The tensor whose memory a node may be a view of."""
    for _ in range(1000):
        if node.op not in ("call_function", "call_method") or (name_of(node) in _FRESH and not written(node)):
            return node
        inner = node.args[0] if node.args else None
        if not isinstance(inner, Node):
            return node
        node = inner
    return node


def _bool_of(node: Any) -> Any:
    """The tensor whose elements differ from 0 where the node is True."""
    while isinstance(node, Node):
        name = name_of(node)
        differs = name in ("ne", "not_equal") and node.args[1] == 0
        if differs or name in ("bool", "clone") or (name == "to" and node.args[1:] == (torch.bool,)):
            node = node.args[0]
        else:
            break
    return node


def _sum_over_the_rest(hits: Any) -> Any:
    """M if ``hits[e]`` is True whenever any element of ``M[e]`` differs from 0."""
    if name_of(hits) in ("gt", "greater") and hits.args[1] == 0:
        hits, positive = hits.args[0], True
    else:
        positive = False
    name = name_of(hits)
    if name not in ("sum", "any", "count_nonzero") or not isinstance(hits.args[0], Node):
        return None
    whole = hits.args[0]
    value, result = whole.meta.get("example_value"), hits.meta.get("example_value")
    if not isinstance(value, Tensor) or not isinstance(result, Tensor) or result.shape != value.shape[:1]:
        return None
    dims = hits.args[1] if len(hits.args) > 1 else hits.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or {d % value.ndim for d in dims} != set(range(1, value.ndim)):
        return None
    if name == "sum" and not (positive or value.dtype == torch.bool) and not _is_one_hot(whole):
        return None
    if name == "sum" and value.dtype != torch.bool and not _is_one_hot(whole):
        return None
    return _bool_of(whole)


def _is_one_hot(node: Any) -> bool:
    while name_of(node) in ("permute", "transpose", "contiguous", "to", "long", "int", "movedim", "clone"):
        node = node.args[0]
    return name_of(node) == "one_hot"


def _size_indexed(node: Any) -> int:
    for _ in range(_DEPTH):
        name = name_of(node)
        if name in ("argmax", "argmin", "argsort"):
            return _size_along(node, {"argsort": -1}.get(name))
        if name == "getitem" and name_of(node.args[0]) in ("topk", "sort", "max", "min") and node.args[1] == 1:
            inner = node.args[0]
            return _size_along(inner, -1, place=2 if name_of(inner) == "topk" else 1)
        if name in ("view", "reshape", "flatten", "squeeze", "unsqueeze", "to", "long", "int", "contiguous",
                    "getitem", "transpose", "permute", "t", "detach", "clone", "ravel"):  # fmt: skip
            node = node.args[0]
            continue
        return -1
    return -1


def _size_along(node: Node, default: int | None, place: int = 1) -> int:
    """The size of a node's operand along its argument `dim`."""
    if not isinstance(node.args[0], Node):
        return -1
    value = node.args[0].meta.get("example_value")
    dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", default)
    if not isinstance(value, Tensor) or not isinstance(dim, (int, type(None))) or isinstance(dim, bool):
        return -1
    size = value.numel() if dim is None else value.shape[dim]
    return size if isinstance(size, int) else -1


@torch._dynamo.assume_constant_result
def now() -> int:
    """The length of the graph so far."""
    for tracer in tracers():
        return len(tracer.output.graph.nodes)
    return 0


@torch._dynamo.assume_constant_result
def _unwritten(start: int) -> bool:
    nodes = _locals_of(unwritten_since.__code__, "x")
    if nodes is None:
        return False
    comparison = _Comparison()
    comparison.shared = {nodes[0]}
    return comparison.undisturbed(start)


def unwritten_since(x: Tensor, start: int) -> bool:
    """Whether nothing has written the memory of `x` since the graph had `start` nodes."""
    return _unwritten(start)
