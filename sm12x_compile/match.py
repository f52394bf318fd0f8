"""What a pattern works with: a view of the graph, and the two answers it can give.

A pattern reads the graph through the index algebra and answers with a `Rewrite` or a `Refusal`. `GraphView` lays
a tensor out again from an index map (`arrange`), so that a pattern never cares how the user arranged it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .index_algebra import Element, FloorDiv, Index, Mod, Size, Var, look, same_size, size_of
from .index_algebra.index import add, divide_exactly, known_nonnegative, mul

aten = torch.ops.aten


@dataclass(frozen=True)
class Refusal:
    """The first condition that failed: a near-miss, for the report.

    Attributes:
        reason: one sentence a user can act on.
        node: where it failed.
        tags: what had been read before.
    """

    reason: str
    node: Node | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewrite:
    """Replace `node` by `value`, the result of a call of the semantic op.

    Attributes:
        node: the node whose value is replaced.
        call: the call of the semantic op (``torch.ops.sm12x...``), or of any op for a pattern of one's own.
        value: `call`, laid out as `node` was.
        tags: what was read off the subgraph, for the report.
    """

    node: Node
    call: Node
    value: Node
    tags: Mapping[str, Any] = field(default_factory=dict)


class CannotArrange(Exception):
    """An index map that views cannot express."""


class GraphView:
    """A graph in normal form, while a pattern looks at it and adds nodes before an insertion point."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.graph = gm.graph
        self._order: dict[Node, int] = {}

    # ------------------------------------------------------------ reading

    def only_user(self, node: Node) -> Node | None:
        """The one node that reads this value, if there is exactly one."""
        users = list(node.users)
        return users[0] if len(users) == 1 else None

    # ------------------------------------------------------------ writing

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Append a call at the insertion point, with the fake value that it computes."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.value(node)
        return node

    def value(self, node: Node) -> Any:
        """The fake value that a call computes from those of its arguments."""
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.fake_mode, torch.no_grad():
            return node.target(*args, **kwargs)

    @cached_property
    def fake_mode(self) -> Any:
        values = (n.meta.get("val") for n in self.graph.nodes)
        found = next((v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor)), None)
        return found or nullcontext()

    def replace(self, node: Node, value: Node) -> None:
        """Let `value` take the place of `node` for its readers, which may find it in other strides.

        Views that no longer fit become reshapes; what the graph returns keeps the strides that it had.
        """
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)
        changed = [(value, node.meta["val"])]
        while changed:
            here, before = changed.pop()
            if _same_strides(here.meta["val"], before):
                continue
            for user in list(here.users):
                if user.op == "output":
                    self._restride(here, before, user)
                elif user.op == "call_function" and user.target is not aten.copy_.default:
                    old = user.meta["val"]
                    try:
                        new = self.value(user)
                    except (RuntimeError, ValueError):
                        if user.target is not aten.view.default:
                            raise
                        user.target = aten.reshape.default
                        new = self.value(user)
                    user.meta["val"] = new
                    changed.append((user, old))

    def _restride(self, node: Node, before: torch.Tensor, output: Node) -> None:
        """A copy of `node` in the strides of `before`, for the graph's output alone."""
        order = sorted(range(before.dim()), key=lambda k: (-_hint(before.stride(k)), k))
        with self.graph.inserting_before(output):
            dense = self.call(aten.permute.default, node, order)
            dense = self.call(aten.clone.default, dense, memory_format=torch.contiguous_format)
            result = self.call(aten.permute.default, dense, [order.index(k) for k in range(len(order))])
        output.replace_input_with(node, result)

    def size(self, value: Size) -> int | Node:
        """A size as an argument: an int, or a node that computes it.

        Raises:
            CannotArrange: no node of the graph holds a symbol of it.
        """
        if isinstance(value, int):
            return value
        known = self._symbol_nodes()
        for expr, node in known.items():
            if same_size(expr, value):
                return node
        missing = [symbol for symbol in value.free_symbols if symbol not in known]
        if missing:
            raise CannotArrange(f"no tensor in the graph has the size {value}")
        return self._computed(value, known)

    def _computed(self, value: sympy.Expr, known: dict[Any, Node]) -> Node:
        """Nodes that compute a symbolic size from those of its symbols."""
        before = set(self.graph.nodes)
        tracer = torch.fx.proxy.GraphAppendingTracer(self.graph)
        proxies = {symbol: torch.fx.Proxy(known[symbol], tracer) for symbol in value.free_symbols}
        try:
            result = sympy_interp(PythonReferenceAnalysis, proxies, value)
        except Exception as error:
            raise CannotArrange(f"size {value} cannot be computed ({error})") from error
        for node in self.graph.nodes:
            if node not in before:
                args = torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args)
        return result.node

    def _symbol_nodes(self) -> dict[Any, Node]:
        """Symbols and symbolic sizes that placeholders hold, as nodes."""
        found: dict[Any, Node] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                found.setdefault(value.node.expr, node)
        for node in self.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr not in found:
                        found[size.node.expr] = self.call(aten.sym_size.int, node, dim)
        return found

    def arrange(
        self, element: Element, groups: Sequence[Sequence[Var]], *, expand: bool = True
    ) -> Node:
        """Lay a tensor out again: dim k of the result runs over the variables of ``groups[k]``, row-major.

        ``result[groups] == element`` for every value of the variables. Variables that the element does not
        depend on are broadcast: expanded if `expand`, else left at size 1 (only for groups that are wholly so).

        Raises:
            CannotArrange: the index map is not a strided view of the tensor.
        """
        node, present = self._carve(element)
        wanted = [v for group in groups for v in group]
        if set(present) - set(wanted):
            raise CannotArrange(f"{element} depends on more than {wanted}")
        order = [present.index(v) for v in wanted if v in present]
        if order != list(range(len(order))):
            node = self.call(aten.permute.default, node, order)
        missing = [k for k, v in enumerate(wanted) if v not in present]
        for k in missing:
            node = self.call(aten.unsqueeze.default, node, k)
        if expand and any(wanted[k].extent != 1 for k in missing):
            sizes = [-1 if v in present else self.size(v.extent) for v in wanted]
            node = self.call(aten.expand.default, node, sizes)
        absent = set(missing)
        return self._merge(node, groups, absent if not expand else set())

    def _merge(self, node: Node, groups: Sequence[Sequence[Var]], absent: set[int]) -> Node:
        if all(len(g) == 1 for g in groups):
            return node
        sizes: list[int | Node] = []
        position = 0
        for group in groups:
            places = range(position, position + len(group))
            gone = [p in absent for p in places]
            if any(gone) and not all(gone):
                # Part of the group is broadcast: only that part must be expanded before merging.
                full: list[int | Node] = [-1] * len(node.meta["val"].shape)
                for p, v in zip(places, group, strict=True):
                    if p in absent:
                        full[p] = self.size(v.extent)
                node = self.call(aten.expand.default, node, full)
                gone = [False]
            size: Size = 1
            if not (gone and all(gone)):
                for v in group:
                    size = mul(size, v.extent)
            sizes.append(self.size(size))
            position += len(group)
        return self.call(aten.reshape.default, node, sizes)

    def _carve(self, element: Element) -> tuple[Node, list[Var]]:
        """Slice and split the dims of the source until each is one variable."""
        node, found = element.node, []
        dim = 0
        for ix in element.index:
            node, names, dim = self._carve_dim(node, dim, ix)
            found += names
        if len(set(found)) != len(found):
            raise CannotArrange(f"{element} uses an index twice")
        return node, found

    def _carve_dim(self, node: Node, dim: int, ix: Index) -> tuple[Node, list[Var], int]:
        """Carve one source dim at position `dim`; returns the node, its variables, and the next position."""
        names: list[Var] = []
        terms = list(ix.terms.items())
        if not all(isinstance(a, Var) for a, _ in terms):
            raise CannotArrange(f"index {ix} is not affine")
        const = ix.const
        while True:
            size = size_of(node.meta["val"].shape[dim])
            if not terms:
                node = self.call(aten.select.int, node, dim, self.size(const))
                return node, names, dim
            largest = max(range(len(terms)), key=lambda k: _Order(terms[k][1]))
            var, stride = terms.pop(largest)
            assert isinstance(var, Var)
            if stride == 1:
                if terms:
                    raise CannotArrange(f"index {ix} overlaps")
                node = self._narrow(node, dim, const, var.extent)
                return node, [*names, var], dim + 1
            blocks = divide_exactly(size, stride)
            start, inner = _split_const(const, stride)
            rest = Index(dict(terms), inner)
            if not rest.within(0, stride):
                raise CannotArrange(f"index {ix} overlaps")
            if blocks is None:
                end = mul(add(start, var.extent), stride)
                if not known_nonnegative(add(size, mul(end, -1))):
                    raise CannotArrange(f"index {ix} leaves its dimension")
                node = self._narrow(node, dim, 0, end)
                blocks = add(start, var.extent)
            shape = [self.size(size_of(s)) for s in node.meta["val"].shape]
            shape[dim : dim + 1] = [self.size(blocks), self.size(stride)]
            node = self.call(aten.view.default, node, shape)
            node = self._narrow(node, dim, start, var.extent)
            names.append(var)
            dim, const = dim + 1, inner

    def _narrow(self, node: Node, dim: int, start: Size, length: Size) -> Node:
        size = size_of(node.meta["val"].shape[dim])
        if start == 0 and same_size(size, length):
            return node
        return self.call(aten.slice.Tensor, node, dim, self.size(start), self.size(add(start, length)))


def _hint(size: Any) -> int:
    return size.node.hint or 0 if isinstance(size, torch.SymInt) else int(size)


def _same_strides(a: Any, b: Any) -> bool:
    """Whether two results are laid out alike; strides of dimensions of size 1 do not count."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return True
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(_hint(size) == 1 or _hint(x) == _hint(y) for size, x, y in pairs)


class _Order:
    """Orders strides; symbolic ones by what is known of their difference."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def __lt__(self, other: _Order) -> bool:
        return not same_size(self.size, other.size) and known_nonnegative(add(other.size, mul(self.size, -1)))


def _split_const(const: Size, stride: Size) -> tuple[Size, Size]:
    if isinstance(const, int) and isinstance(stride, int):
        return const // stride, const % stride
    exact = divide_exactly(const, stride)
    return (exact, 0) if exact is not None else (0, const)


# ---------------------------------------------------------------- refining variables


def refine(elements: Sequence[Element]) -> dict[Var, Index]:
    """Split variables until every index is affine: ``h div 4`` asks for ``h = 4 * hi + lo``.

    Returns:
        A substitution for the variables that had to be split (possibly several times).
    """
    mapping: dict[Var, Index] = {}
    for _ in range(8):
        asked = next((a for e in elements for ix in e.index for a in _divisions(ix.subs(mapping))), None)
        if asked is None:
            break
        var = asked.x.var
        parts = divide_exactly(var.extent, asked.k) if var is not None else None
        if var is None or parts is None:
            break
        split = Index.of(Var(var.name, parts)) * asked.k + Index.of(Var(var.name + "'", asked.k))
        mapping = {v: ix.subs({var: split}) for v, ix in mapping.items()}
        mapping.setdefault(var, split)
    return mapping


def source(element: Element, whole: Collection[Var] = ()) -> Element:
    """Where an operand comes from, as far back as views alone can lay it out again.

    Stops before a gather whose index only the run knows, and before a variable of `whole` (one that is summed
    over, and must stay one dimension) falls apart into quotient and remainder.
    """

    def accept(e: Element) -> bool:
        return not any(ix.has_datum() or any(a.x.vars() & set(whole) for a in _divisions(ix)) for ix in e.index)

    return look(element, accept)


def _divisions(ix: Index) -> list[FloorDiv | Mod]:
    found: list[FloorDiv | Mod] = []
    for atom in ix.terms:
        if isinstance(atom, (FloorDiv, Mod)):
            found += _divisions(atom.x) or [atom]
    return found


# ---------------------------------------------------------------- where in the user's code


def module_of(node: Node) -> str:
    """Path of the user's module that a node came from, e.g. ``model.layers.3.self_attn``."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    for noise in ("L['self'].", "L['self']", "L['fn'].", "L['fn']"):
        path = path.replace(noise, "")
    return path.replace("L['", "").replace("']", "").replace("._modules['", ".").lstrip(".")


def source_of(node: Node) -> str:
    """The user's innermost file and line that a node came from, torch's own files left out."""
    trace = node.meta.get("stack_trace") or ""
    best = ""
    for line in trace.splitlines():
        line = line.strip()
        if line.startswith('File "') and "/torch/nn/functional" not in line and "/torch/nn/modules" not in line:
            path, _, rest = line[6:].partition('", line ')
            best = f"{path}:{rest.split(',')[0]}"
    return best
