"""What a pattern answers with, and how it looks back through the index algebra.

A pattern reads the graph through the index algebra and answers with a `Rewrite` or a `Refusal`. `GraphView` lays
a tensor out again from an index map (`arrange`), so that a pattern never cares how the user arranged it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from .graph_view import CannotArrange, GraphView
from .index_algebra import Element, FloorDiv, Index, Mod, Var, look
from .index_algebra.index import divide_exactly


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
        also: further results of the call: (node, value) pairs, each node's value replaced as well.
        obsolete: writes that the call does itself (``copy_`` to an input that it mutates); they are removed.
    """

    node: Node
    call: Node
    value: Node
    tags: Mapping[str, Any] = field(default_factory=dict)
    also: Sequence[tuple[Node, Node]] = ()
    obsolete: Sequence[Node] = ()


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


_NOT_THE_USERS = ("/torch/nn/functional", "/torch/nn/modules", "/sm12x_compile/capture/runtime/")


def source_of(node: Node) -> str:
    """The user's innermost file and line that a node came from, torch's own files left out."""
    trace = node.meta.get("stack_trace") or ""
    best = ""
    for line in trace.splitlines():
        line = line.strip()
        if line.startswith('File "') and not any(place in line for place in _NOT_THE_USERS):
            path, _, rest = line[6:].partition('", line ')
            best = f"{path}:{rest.split(',')[0]}"
    return best


__all__ = ["CannotArrange", "GraphView", "Refusal", "Rewrite", "module_of", "refine", "source", "source_of"]
