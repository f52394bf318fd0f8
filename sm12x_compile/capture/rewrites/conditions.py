"""What stands behind ``if``: evaluated in Python's order, without asking a tensor for its truth."""

from __future__ import annotations

import ast
from collections.abc import Callable

from .expressions import Expressions, helper, load, predicate

_ZERO_TESTS = {ast.Gt: False, ast.NotEq: False, ast.Eq: True}


def is_plain(test: ast.expr) -> bool:
    """Whether a condition can't depend on tensor values, by its form alone."""
    if isinstance(test, ast.Constant):
        return True
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return is_plain(test.operand)
    if isinstance(test, ast.BoolOp):
        return all(is_plain(v) for v in test.values)
    if isinstance(test, ast.Compare):
        return all(isinstance(op, (ast.Is, ast.IsNot)) for op in test.ops)
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name):
        return test.func.id in ("isinstance", "hasattr", "callable", "issubclass")
    return False


class Conditions:
    def __init__(self, expressions: Expressions, fresh: Callable[[str], str]) -> None:
        self.expressions, self.fresh = expressions, fresh

    def compute(self, test: ast.expr, into: str, under: str | None) -> list[ast.stmt]:
        """Statements that leave True, False or a predicate in the name `into`."""
        if isinstance(test, ast.BoolOp):
            combine, goes_on = ("and_", "may") if isinstance(test.op, ast.And) else ("or_", "may_not")
            out = self.compute(test.values[0], into, under)
            for value in test.values[1:]:
                part = self.fresh("t")
                then = self.compute(value, part, under)
                then.append(_assign(into, helper(combine, load(into), load(part)), value))
                out.append(ast.copy_location(ast.If(helper(goes_on, load(into)), then, []), value))
            return out
        if isinstance(test, ast.Compare) and len(test.ops) > 1:
            operands = [test.left, *test.comparators]
            out = []
            if len(test.ops) == 2:  # the first two are always evaluated, in this order
                for k in range(2):
                    if not isinstance(operands[k], (ast.Name, ast.Constant)):
                        held = self.fresh("h")
                        out.append(_assign(held, self.expressions.of(operands[k], under), test))
                        operands[k] = load(held)
            if all(isinstance(e, (ast.Name, ast.Constant)) for e in operands[1:-1]):
                pairs = zip(operands, test.ops, operands[1:], strict=False)
                parts: list[ast.expr] = [ast.copy_location(ast.Compare(a, [op], [b]), test) for a, op, b in pairs]
                return [*out, *self.compute(ast.copy_location(ast.BoolOp(ast.And(), parts), test), into, under)]
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            out = self.compute(test.operand, into, under)
            return [*out, _assign(into, helper("not_", load(into)), test)]
        return [_assign(into, self._one(test, under), test)]

    def _one(self, test: ast.expr, under: str | None) -> ast.expr:
        inner = _unwrapped(test)
        if isinstance(inner, ast.Call) and _is_bare_method(inner, "any"):
            assert isinstance(inner.func, ast.Attribute)
            return helper("any_test", self.expressions.of(inner.func.value, under))
        if isinstance(inner, ast.Compare) and len(inner.ops) == 1 and type(inner.ops[0]) in _ZERO_TESTS:
            left, right = _unwrapped(inner.left), inner.comparators[0]
            if isinstance(right, ast.Constant) and right.value == 0 and type(right.value) is int \
                    and isinstance(left, ast.Call) and _is_bare_method(left, "sum"):  # fmt: skip
                assert isinstance(left.func, ast.Attribute)
                counted = self.expressions.of(left.func.value, under)
                symbol = {ast.Gt: ">", ast.NotEq: "!=", ast.Eq: "=="}[type(inner.ops[0])]
                return helper("sum_test", counted, ast.Constant(symbol))
        return helper("test", self.expressions.of(test, under), predicate(under))


def _unwrapped(e: ast.expr) -> ast.expr:
    """An expression without ``.item()`` and ``bool()`` around it, which a condition implies."""
    while isinstance(e, ast.Call) and not e.keywords:
        if isinstance(e.func, ast.Attribute) and e.func.attr == "item" and not e.args:
            e = e.func.value
        elif isinstance(e.func, ast.Name) and e.func.id == "bool" and len(e.args) == 1:
            e = e.args[0]
        else:
            break
    return e


def _is_bare_method(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == name and not call.args and not call.keywords


def _assign(name: str, value: ast.expr, where: ast.AST) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), where)
