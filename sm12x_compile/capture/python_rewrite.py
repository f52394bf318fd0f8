"""From a code object to the code that Dynamo traces in its place: source, syntax tree, rewriting, compiling.

A function is only ever looked at after Dynamo has failed to trace it, so code that compiles as it is stays as it is,
and nothing is scanned in advance.
"""

from __future__ import annotations
import __future__

import ast
import dis
import inspect
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from .rewrites import rewrite_function
from .rewrites.expressions import Change
from .rewrites.function import Untouchable

_FUTURES = 0
for _feature in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _feature).compiler_flag


@dataclass(frozen=True)
class Rewritten:
    """Code that stands for another, and what was changed: first and last line, and what was done there."""

    code: CodeType
    changes: tuple[Change, ...]

    def touches(self, line: int) -> bool:
        return any(first <= line <= last for first, last, _ in self.changes)


class NotRewritable(Exception):
    """Why a function can't be rewritten, in a sentence."""


def rewrite(code: CodeType, names: Mapping[str, Any]) -> Rewritten | None:
    """The rewritten form of a function's code; None if there is nothing in it to rewrite.

    Args:
        code: of a plain function or method.
        names: the function's globals.

    Raises:
        NotRewritable: there is something, but the function can't be rewritten.
    """
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return None
    if code.co_name.startswith("<"):
        return None
    tree = _source(code)
    try:
        rewritten, changes = rewrite_function(tree, names)
    except Untouchable as reason:
        raise NotRewritable(f"its function has {reason}") from None
    if not changes:
        return None
    new = _compiled(rewritten, code)
    if (new.co_argcount, new.co_kwonlyargcount, new.co_freevars) != (
        code.co_argcount, code.co_kwonlyargcount, code.co_freevars,
    ):  # fmt: skip
        raise NotRewritable("its closure would change")
    return Rewritten(new, tuple(sorted(set(changes))))


def _source(code: CodeType) -> ast.FunctionDef:
    """The function's syntax tree with the file's line numbers, without decorators, defaults and annotations.

    Raises:
        NotRewritable: the source is not at hand, or is not that of the code.
    """
    try:
        lines, first = inspect.getsourcelines(code)
        module = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        raise NotRewritable("its source is not available") from None
    tree = module.body[0] if module.body else None
    if not isinstance(tree, ast.FunctionDef) or tree.name != code.co_name:
        raise NotRewritable("its source is not available")
    ast.increment_lineno(tree, max(first, 1) - 1)
    for node in ast.walk(tree):
        name = getattr(node, "attr", getattr(node, "id", ""))
        if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
            raise NotRewritable(f"the name {name} means something else outside of its class")
    tree.decorator_list = []
    tree.returns = None
    arguments = tree.args
    for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if a is not None:
            a.annotation = None
    arguments.defaults = [ast.copy_location(ast.Constant(None), d) for d in arguments.defaults]
    arguments.kw_defaults = [None if d is None else ast.copy_location(ast.Constant(None), d)
                             for d in arguments.kw_defaults]  # fmt: skip
    same = _compiled(tree, code)
    if _instructions(same) != _instructions(code):
        raise NotRewritable("its source is no longer that of the code that runs")
    return tree


def _instructions(code: CodeType) -> list[Any]:
    """What tells one function from another in its bytecode, whatever module it was compiled in.

    A name that its module imports is called by other instructions, so those that only prepare a call are left out.
    """
    kept = []
    for i in dis.get_instructions(code):
        if i.opname in ("PUSH_NULL", "PRECALL", "CACHE", "EXTENDED_ARG", "RESUME", "NOP"):
            continue
        jumps = i.opcode in dis.hasjrel or i.opcode in dis.hasjabs
        name = {"LOAD_METHOD": "LOAD_ATTR", "CALL_METHOD": "CALL_FUNCTION"}.get(i.opname, i.opname)
        value = None if jumps or isinstance(i.argval, CodeType) else i.argval
        kept.append((name, repr(value) if isinstance(value, (float, complex, tuple, frozenset)) else value))
    return kept


def _compiled(tree: ast.FunctionDef, like: CodeType) -> CodeType:
    """The tree's code object, with the free variables of `like`."""
    outer = ast.FunctionDef(
        name="_outer",
        args=ast.arguments(
            posonlyargs=[], args=[ast.arg(n) for n in like.co_freevars], kwonlyargs=[], kw_defaults=[], defaults=[]
        ),
        body=[tree],
        decorator_list=[],
    )  # fmt: skip
    if sys.version_info >= (3, 12):
        outer.type_params = []
    module = ast.fix_missing_locations(ast.Module([outer], []))
    for node in ast.walk(module):
        # A call that spans lines is ascribed to its last one; what is reported is the first.
        if isinstance(node, (ast.stmt, ast.expr)) and node.end_lineno != node.lineno:
            node.end_lineno, node.end_col_offset = node.lineno, node.col_offset
    whole = compile(module, like.co_filename, "exec", like.co_flags & _FUTURES, dont_inherit=True)
    for _ in range(2):
        whole = next(c for c in whole.co_consts if isinstance(c, CodeType))
    if sys.version_info >= (3, 11):
        return whole.replace(co_qualname=like.co_qualname)
    return whole
