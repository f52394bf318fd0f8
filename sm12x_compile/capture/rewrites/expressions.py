"""Calls and subscripts that may select rows, or read a number from a tensor."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import torch

from .noise import resolve

RUNTIME = "_sm12x"
# Methods of tensors whose result has a size, or a Python value, that the data decide.
METHODS = frozenset(["nonzero", "argwhere", "item", "tolist", "unique", "masked_select", "bincount"])
_SAID = {
    "nonzero": "positions of a mask", "argwhere": "positions of a mask", "item": "item()", "tolist": "tolist()",
    "unique": "distinct values", "masked_select": "masked selection",
}  # fmt: skip


# First and last line of what is changed, and what is done.
Change = tuple[int, int, str]


def helper(name: str, *args: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.Call:
    """A call of the runtime."""
    function = ast.Attribute(ast.Name(RUNTIME, ast.Load()), name, ast.Load())
    return ast.Call(function, list(args), keywords or [])


def load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def predicate(name: str | None) -> ast.expr:
    return ast.Constant(None) if name is None else load(name)


class Expressions(ast.NodeTransformer):
    """Rewrites one expression at a time; `under` names the predicate of the code around it.

    Nested functions, lambdas and comprehensions are functions of their own and stay.
    """

    def __init__(self, names: Mapping[str, Any], local: frozenset[str]) -> None:
        self.names, self.local = names, local
        self.under: str | None = None
        self.changes: list[Change] = []

    def note(self, node: ast.AST, what: str) -> None:
        """Remember what is done at a node; of a compound statement only the head counts."""
        head = getattr(node, "iter", None) or (getattr(node, "test", None) if isinstance(node, ast.stmt) else None)
        first = getattr(node, "lineno", 0)
        last = getattr(head if head is not None else node, "end_lineno", None)
        self.changes.append((first, last or first, what))

    def of(self, node: Any, under: str | None) -> Any:
        self.under = under
        return self.visit(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def visit_ListComp(self, node: ast.ListComp) -> ast.AST:
        return node

    def visit_SetComp(self, node: ast.SetComp) -> ast.AST:
        return node

    def visit_DictComp(self, node: ast.DictComp) -> ast.AST:
        return node

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.AST:
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.test = helper("certainly", node.test)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = resolve(node.func, self.names, self.local)
        simple = not any(isinstance(a, ast.Starred) for a in node.args)
        new: ast.expr | None = None
        if not simple:
            return node
        if function is torch.where and len(node.args) == 1 and not node.keywords:
            new, what = helper("nonzero", node.func, *node.args), "positions of a mask"
        elif function in (torch.nonzero, torch.argwhere) and node.args:
            new, what = helper("nonzero", node.func, *node.args, keywords=node.keywords), "positions of a mask"
        elif function is torch.unique and node.args:
            new, what = helper("unique", node.func, *node.args, keywords=node.keywords), "distinct values"
        elif function is torch.masked_select and node.args:
            new, what = helper("masked_select", node.func, *node.args, keywords=node.keywords), "masked selection"
        elif function is torch.bincount and node.args:
            new, what = helper("bincount", node.func, *node.args, keywords=node.keywords), "bincount"
        elif function is len and len(node.args) == 1:
            new, what = helper("length", *node.args), ""
        elif function is int and len(node.args) == 1:
            new, what = helper("to_int", *node.args), "int()"
        elif function is float and len(node.args) == 1:
            new, what = helper("to_float", *node.args), "float()"
        elif function is bool and len(node.args) == 1:
            new, what = helper("to_bool", *node.args), "bool()"
        elif isinstance(node.func, ast.Attribute):
            return self._method(node)
        if new is None:
            return node
        if what:
            self.note(node, what)
        return ast.copy_location(new, node)

    def _method(self, node: ast.Call) -> ast.AST:
        assert isinstance(node.func, ast.Attribute)
        name, owner = node.func.attr, node.func.value
        if name in METHODS:
            self.note(node, _SAID.get(name, name))
            new = helper("call_method", owner, ast.Constant(name), *node.args, keywords=node.keywords)
            return ast.copy_location(new, node)
        if name.endswith("_") and not name.endswith("__") and not name.startswith("_"):
            if isinstance(owner, ast.Call) and _is_helper(owner, "getitem"):
                owner.func.attr = "view_item"  # type: ignore[attr-defined]
            args = ast.Tuple(node.args, ast.Load())
            keywords = ast.Dict(
                [None if k.arg is None else ast.Constant(k.arg) for k in node.keywords],
                [k.value for k in node.keywords],
            )
            new = helper("method", owner, ast.Constant(name), args, keywords, predicate(self.under))
            return ast.copy_location(new, node)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):  # Dynamo swaps the operands when the left one is not a tensor
            return ast.copy_location(helper("matmul", node.left, node.right), node)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load) or not is_computed(node.slice):
            return node
        self.note(node, "selected elements")
        return ast.copy_location(helper("getitem", node.value, index_value(node.slice)), node)


def _is_helper(node: ast.Call, name: str) -> bool:
    f = node.func
    return isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == RUNTIME and f.attr == name


def is_computed(index: ast.expr) -> bool:
    """Whether an index may be anything but constants and slices of constants."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return any(not _is_constant(p) for p in parts)


def _is_constant(e: ast.expr | None) -> bool:
    if e is None or isinstance(e, ast.Constant):
        return True
    if isinstance(e, ast.UnaryOp):
        return _is_constant(e.operand)
    if isinstance(e, ast.Slice):
        return _is_constant(e.lower) and _is_constant(e.upper) and _is_constant(e.step)
    return False


def index_value(index: ast.expr) -> ast.expr:
    """An index as an expression: slices become calls of `slice`."""
    if isinstance(index, ast.Slice):
        parts = [p if p is not None else ast.Constant(None) for p in (index.lower, index.upper, index.step)]
        return ast.copy_location(helper("slice", *parts), index)
    if isinstance(index, ast.Tuple):
        return ast.copy_location(ast.Tuple([index_value(e) for e in index.elts], ast.Load()), index)
    return index
