"""Rename everything a source file names itself: functions, classes, arguments, locals, attributes of self."""

from __future__ import annotations

import ast


def renamed(source: str, keep: frozenset[str]) -> str:
    """The same program under other names; imports and the names in `keep` stay."""
    tree = ast.parse(source)
    tree.body = [n for n in tree.body if not (isinstance(n, ast.ImportFrom) and n.level)]
    names = _own_names(tree) - keep
    attributes = _own_attributes(tree) - keep
    tree = ast.fix_missing_locations(_Renamer(names, attributes).visit(tree))
    return ast.unparse(tree)


def _own_names(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    methods = _methods(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node not in methods:
            names.add(node.name)
    return names


def _methods(tree: ast.AST) -> list[ast.FunctionDef]:
    classes = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef)]
    return [f for c in classes for f in c.body if isinstance(f, ast.FunctionDef)]


def _own_attributes(tree: ast.AST) -> set[str]:
    found = {f.name for f in _methods(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
        elif _registers_buffer(node):
            assert isinstance(node, ast.Call) and isinstance(node.args[0], ast.Constant)
            found.add(str(node.args[0].value))
    return found - _PROTOCOL


_PROTOCOL = frozenset({"__init__", "forward"})


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _registers_buffer(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "register_buffer"
    )


class _Renamer(ast.NodeTransformer):
    def __init__(self, names: set[str], attributes: set[str]) -> None:
        self.methods: list[ast.FunctionDef] = []
        self.names = {name: f"x{i}_" for i, name in enumerate(sorted(names))}
        self.attributes = {name: f"y{i}_" for i, name in enumerate(sorted(attributes))}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        self.generic_visit(node)
        node.arg = self.names.get(node.arg, node.arg)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.name = (self.attributes if node in self.methods else self.names).get(node.name, node.name)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.methods += _methods(node)
        self.generic_visit(node)
        node.name = self.names.get(node.name, node.name)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if _is_self(node.value):
            node.attr = self.attributes.get(node.attr, node.attr)
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if _registers_buffer(node):
            name = node.args[0]
            assert isinstance(name, ast.Constant)
            name.value = self.attributes[str(name.value)]
        elif isinstance(node.func, ast.Name) and node.func.id in self.names:
            for argument in node.keywords:
                argument.arg = self.names.get(argument.arg or "", argument.arg)
        self.generic_visit(node)
        return node
