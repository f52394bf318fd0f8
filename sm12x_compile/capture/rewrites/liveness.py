"""Which names a block assigns, and which are still read afterwards."""

from __future__ import annotations

import ast
from collections.abc import Iterable

Names = frozenset[str]


def loads(*nodes: ast.AST | None) -> Names:
    """Names that are read anywhere inside, nested functions included."""
    found = set()
    for node in nodes:
        if node is not None:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return frozenset(found)


def targets(node: ast.AST) -> Names:
    """Names that an assignment target binds."""
    return frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def assigned(statements: Iterable[ast.stmt]) -> Names:
    """Names that a block binds, leaving out what nested functions bind for themselves."""
    found: set[str] = set()
    for statement in statements:
        stack: list[ast.AST] = [statement]
        while stack:
            node = stack.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
                continue
            if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
                continue
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {(a.asname or a.name).split(".")[0] for a in node.names}
            stack += ast.iter_child_nodes(node)
    return frozenset(found)


def live_before(
    statements: list[ast.stmt], after: Names, on_continue: Names = frozenset(), on_break: Names = frozenset()
) -> Names:
    """Names that may be read from the beginning of a block on, given those that are after it."""
    live = after
    for s in reversed(statements):
        if isinstance(s, ast.Assign):
            bound = frozenset(t.id for t in s.targets if isinstance(t, ast.Name))
            for t in s.targets:
                if isinstance(t, (ast.Tuple, ast.List)):
                    bound |= frozenset(e.id for e in t.elts if isinstance(e, ast.Name))
            live = (live - bound) | loads(s.value, *s.targets)
        elif isinstance(s, ast.AugAssign):
            live = live | loads(s.value, s.target) | targets(s.target)
        elif isinstance(s, ast.If):
            branches = [live_before(b, live, on_continue, on_break) for b in (s.body, s.orelse)]
            live = loads(s.test) | branches[0] | branches[1]
        elif isinstance(s, (ast.For, ast.While)):
            out = live_before(s.orelse, live, on_continue, on_break)
            bound = targets(s.target) if isinstance(s, ast.For) else frozenset()
            head = out
            for _ in range(2):
                head = head | (live_before(s.body, head, head, live) - bound)
            live = head | loads(s.iter if isinstance(s, ast.For) else s.test)
        elif isinstance(s, ast.Return):
            live = loads(s.value)
        elif isinstance(s, ast.Continue):
            live = on_continue
        elif isinstance(s, ast.Break):
            live = on_break
        else:  # whatever it binds may also stay as it was
            live = live | loads(s) | on_continue | on_break if _jumps(s) else live | loads(s)
    return live


def _jumps(s: ast.stmt) -> bool:
    return any(isinstance(n, (ast.Continue, ast.Break)) for n in ast.walk(s))
