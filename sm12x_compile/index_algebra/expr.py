"""Elements of tensors, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

from torch.fx import Node

from .index import Index, Size, Var, size_of


@dataclass(frozen=True)
class Element:
    """Element `index` of the tensor that `node` computes."""

    node: Node
    index: tuple[Index, ...]

    def subs(self, mapping: Mapping[Var, Index]) -> Element:
        return Element(self.node, tuple(ix.subs(mapping) for ix in self.index))

    def vars(self) -> set[Var]:
        return set().union(*(ix.vars() for ix in self.index))

    def __repr__(self) -> str:
        return f"{self.node.name}[{', '.join(map(repr, self.index))}]"


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: int | float | bool

    def __repr__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Position:
    """An integer that follows from the indices alone (`arange`)."""

    index: Index

    def __repr__(self) -> str:
        return f"<{self.index}>"


@dataclass(frozen=True)
class Apply:
    """A pointwise function of other elements; `detail` is a dtype or a constant that belongs to the function."""

    op: str
    args: tuple[Expr, ...]
    node: Node
    detail: Any = None

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(repr, self.args))})"


@dataclass(frozen=True)
class Reduce:
    """`kind` ("sum", "max") over all values of `var` in `body`."""

    kind: str
    var: Var
    body: Expr
    node: Node

    def __repr__(self) -> str:
        return f"{self.kind}_{self.var}({self.body})"


@dataclass(frozen=True)
class Cases:
    """One of several elements, by where an index falls: ``low <= index < high`` (cat, slice_scatter, pad).

    Pieces are tried in order; the last one's range may be the whole dimension.
    """

    index: Index
    pieces: tuple[tuple[Size, Size, Expr], ...]

    def __repr__(self) -> str:
        return " | ".join(f"{e} if {a}<={self.index}<{b}" for a, b, e in self.pieces)


Expr = Union[Element, Number, Position, Apply, Reduce, Cases]  # noqa: UP007
Rule = Callable[[Node, tuple[Index, ...]], "Expr | None"]

MEANING: dict[Any, Rule] = {}
"""What an op's element is made of, by overload. Layout rules live in `layout.LAYOUT`."""


def args_of(node: Node) -> tuple[Any, ...]:
    """The positional arguments. fx types them as a union of all that an argument may be; the op decides."""
    return node.args


def operand(node: Node) -> Node:
    """The first argument, for ops where it is the tensor that they work on."""
    return args_of(node)[0]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by position or by name, or left out."""
    return args_of(node)[position] if len(node.args) > position else node.kwargs.get(name, default)


def shape_of(node: Node) -> tuple[Size, ...]:
    return tuple(size_of(s) for s in node.meta["val"].shape)


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a meaning for overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            MEANING[target] = function
        return function

    return register


def broadcast(x: Any, index: tuple[Index, ...]) -> Expr:
    """The element of an operand that is broadcast to `index`; numbers are themselves."""
    if not isinstance(x, Node):
        return Number(x)
    value = x.meta.get("val")
    if not hasattr(value, "shape"):
        return Position(Index(None, size_of(value))) if not isinstance(value, float) else Number(value)
    shape = shape_of(x)
    offset = len(index) - len(shape)
    return Element(x, tuple(Index() if s == 1 else index[offset + k] for k, s in enumerate(shape)))


def step(element: Element) -> Expr | None:
    """One step back: what this element is made of, or None where the algebra does not look inside.

    A layout op answers with an `Element` (or `Cases`) of its input; anything else as `Expr` says.
    """
    from .layout import layout_step

    moved = layout_step(element)
    if moved is not None:
        return moved
    key = "get_attr" if element.node.op == "get_attr" else element.node.target
    meaning = MEANING.get(key)
    return meaning(element.node, element.index) if meaning is not None else None
