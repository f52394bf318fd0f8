"""The statements of a function, each given the predicate under which it runs.

What the data decide is not known before the function is traced, so nothing is decided here: a branch becomes code
that runs one side, if Python knows which, and otherwise both, with every write under its condition and every name
that is still read chosen by `torch.where`. Statements for which that is impossible are preceded by one that refuses.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from typing import Any

from .conditions import Conditions, is_plain
from .expressions import RUNTIME, Change, Expressions, helper, index_value, is_computed, load, predicate
from .liveness import Names, assigned, live_before, loads, targets
from .noise import Noise

_IN_PLACE = {
    ast.Add: "iadd", ast.Sub: "isub", ast.Mult: "imul", ast.Div: "itruediv", ast.FloorDiv: "ifloordiv",
    ast.Mod: "imod", ast.Pow: "ipow", ast.MatMult: "imatmul", ast.BitAnd: "iand", ast.BitOr: "ior",
    ast.BitXor: "ixor", ast.LShift: "ilshift", ast.RShift: "irshift",
}  # fmt: skip
_NEVER = (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await, ast.NamedExpr)
_PLAIN_LOOPS = frozenset(["range", "enumerate", "zip", "reversed"])


class Untouchable(Exception):
    """The function has a construct around which nothing is rewritten."""


def rewrite_function(function: ast.FunctionDef, names: Mapping[str, Any]) -> tuple[ast.FunctionDef, list[Change]]:
    """A function's rewritten form, and what was done in which lines.

    Args:
        function: its syntax tree, which is changed.
        names: the globals of its module, with which called functions are looked up.

    Raises:
        Untouchable: it has a construct that rules rewriting out.
    """
    return _Function(function, names).rewrite()


class _Function:
    def __init__(self, function: ast.FunctionDef, names: Mapping[str, Any]) -> None:
        for node in ast.walk(function):
            if isinstance(node, _NEVER):
                raise Untouchable(f"{type(node).__name__.lower()} in line {getattr(node, 'lineno', 0)}")
        self.function = function
        arguments = function.args
        self.parameters = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
        self.parameters |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
        local = frozenset(self.parameters) | assigned(function.body)
        self.noise = Noise(function.body, names, local)
        self.expressions = Expressions(names, local)
        self.conditions = Conditions(self.expressions, self.fresh)
        self.merged: set[str] = set()
        self.count = 0

    def fresh(self, letter: str) -> str:
        self.count += 1
        return f"{RUNTIME}_{letter}{self.count}"

    def note(self, node: ast.AST, what: str) -> None:
        self.expressions.note(node, what)

    def rewrite(self) -> tuple[ast.FunctionDef, list[Change]]:
        body = self.block(self.single_return(self.function.body), None, frozenset())
        start: list[ast.stmt] = [
            ast.ImportFrom("sm12x_compile.capture", [ast.alias("runtime", RUNTIME)], 0),
            *(_assign(n, _unbound(), self.function) for n in sorted(self.merged - self.parameters)),
        ]
        for statement in start:
            ast.copy_location(statement, self.function.body[0])
        self.function.body = [*start, *body]
        return self.function, self.expressions.changes

    # Control flow that leaves a block is turned into branches.

    def single_return(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """``if c: return a`` before other statements becomes a branch with an else."""
        if not any(isinstance(s, ast.If) and _leaves([s], ast.Return) for s in body):
            return body
        name = self.fresh("r")
        out = self._returning(body, name)
        return [*out, _located(ast.Return(load(name)), body[-1])]

    def _returning(self, body: list[ast.stmt], name: str) -> list[ast.stmt]:
        for k, s in enumerate(body):
            if isinstance(s, ast.If) and (_leaves(s.body, ast.Return) or _leaves(s.orelse, ast.Return)):
                rest = body[k + 1 :]
                sides = [b if _ends(b, ast.Return) else [*b, *self.again(rest)] for b in (s.body, s.orelse)]
                new = ast.If(s.test, *[self._returning(side, name) for side in sides])
                return [*body[:k], ast.copy_location(new, s)]
        last = body[-1] if body else None
        if isinstance(last, ast.Return):
            value = last.value or ast.Constant(None)
            return [*body[:-1], _assign(name, value, last)]
        if isinstance(last, ast.Raise):
            return body
        return [*body, _assign(name, ast.Constant(None), last or self.function)]

    def again(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Statements once more, to be rewritten by themselves: they may come to stand under two conditions."""
        copies = [copy.deepcopy(s) for s in body]
        for old, new in ((o, n) for a, b in zip(body, copies, strict=True)
                         for o, n in zip(ast.walk(a), ast.walk(b), strict=True)):  # fmt: skip
            if isinstance(old, ast.stmt) and isinstance(new, ast.stmt) and old in self.noise.dropped:
                self.noise.dropped[new] = self.noise.dropped[old]
        return copies

    def no_continue(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """``if c: continue`` before other statements becomes a branch with an else."""
        for k, s in enumerate(body):
            if isinstance(s, ast.Continue):
                return body[:k]
            if isinstance(s, ast.If) and (_leaves(s.body, ast.Continue) or _leaves(s.orelse, ast.Continue)):
                rest = body[k + 1 :]
                sides = []
                for side in (s.body, s.orelse):
                    side = side[:-1] if _ends(side, ast.Continue) else [*side, *self.again(rest)]
                    sides.append(self.no_continue(side))
                new = ast.If(s.test, sides[0] or [_located(ast.Pass(), s)], sides[1])
                return [*body[:k], ast.copy_location(new, s)]
        return body

    # Statements.

    def block(self, body: list[ast.stmt], under: str | None, after: Names) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for k, s in enumerate(body):
            live = live_before(body[k + 1 :], after, after, after)
            for new in self.statement(s, under, live):
                out.append(ast.copy_location(new, s) if not hasattr(new, "lineno") else new)
        return out or [_located(ast.Pass(), self.function)]

    def statement(self, s: ast.stmt, under: str | None, live: Names) -> list[ast.stmt]:
        if s in self.noise.dropped:
            self.note(s, f"{self.noise.dropped[s]} left out")
            return []
        if isinstance(s, (ast.Assign, ast.AnnAssign)):
            return self.assign(s, under, live)
        if isinstance(s, ast.AugAssign):
            return self.augment(s, under)
        if isinstance(s, ast.If):
            return self.branch(s, under, live)
        if isinstance(s, ast.For):
            return self.loop(s, under, live)
        if isinstance(s, ast.While):
            self.note(s, "loop while a condition holds")
            s.test = helper("certainly", self.expressions.of(s.test, under))
            s.body = self.block(s.body, under, live | loads(s))
            return [s]
        if isinstance(s, ast.With):
            for entry in s.items:
                entry.context_expr = self.expressions.of(entry.context_expr, under)
            s.body = self.block(s.body, under, live)
            return [s]
        if isinstance(s, ast.Try):
            # What it catches is raised while the graph is traced, by the same operations as in the author's code.
            inside = live | loads(*s.handlers, *s.orelse, *s.finalbody)
            s.body = self.block(s.body, under, inside)
            for handler in s.handlers:
                handler.body = self.block(handler.body, under, live | loads(*s.finalbody))
            s.orelse = self.block(s.orelse, under, live | loads(*s.finalbody)) if s.orelse else []
            s.finalbody = self.block(s.finalbody, under, live) if s.finalbody else []
            return [s]
        if isinstance(s, ast.Expr):
            plain = isinstance(s.value, ast.Constant)
            s.value = self.expressions.of(s.value, under)
            if plain or _is_runtime_call(s.value, "method"):
                return [s]
            return [*self.certain(under, "a call whose result is not used may have an effect", s), s]
        if isinstance(s, ast.Return):
            if s.value is not None and not isinstance(s.value, ast.Constant):
                value = self.expressions.of(s.value, under)
                s.value = helper("escaping", value, ast.Constant("is returned"))
            return [*self.certain(under, "the function returns", s), s]
        if isinstance(s, ast.Pass):
            return [s]
        if isinstance(s, (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.ClassDef)):
            return [s]
        said = {ast.Raise: "an error is raised", ast.Assert: "an assertion is made", ast.Break: "the loop ends",
                ast.Continue: "the loop goes on"}.get(type(s), f"a {type(s).__name__.lower()} statement")  # fmt: skip
        return [*self.certain(under, said, s), s]

    def certain(self, under: str | None, what: str, s: ast.stmt) -> list[ast.stmt]:
        if under is None:
            return []
        return [_located(ast.Expr(helper("certain", load(under), ast.Constant(what))), s)]

    def assign(self, s: ast.Assign | ast.AnnAssign, under: str | None, live: Names) -> list[ast.stmt]:
        if s.value is None:
            return []
        places: list[ast.expr] = list(s.targets) if isinstance(s, ast.Assign) else [s.target]
        to_names = all(isinstance(t, ast.Name) for t in places)
        if isinstance(s.value, ast.IfExp) and not is_plain(s.value.test) and to_names:
            taken, other = (_located(ast.Assign(places, v), s) for v in (s.value.body, s.value.orelse))
            return self.branch(ast.copy_location(ast.If(s.value.test, [taken], [other]), s), under, live)
        value = self.expressions.of(s.value, under)
        if all(isinstance(t, (ast.Name, ast.Tuple, ast.List)) and _only_names(t) for t in places):
            return [_located(ast.Assign(places, value), s)]
        held = self.fresh("v")
        out = [_assign(held, value, s)]
        for t in places:
            out += self._store(t, load(held), under, s)
        return out

    def _store(self, t: ast.expr, value: ast.expr, under: str | None, s: ast.stmt) -> list[ast.stmt]:
        if isinstance(t, ast.Subscript):
            owner = self.expressions.of(t.value, under)
            if under is None and not is_computed(t.slice):
                value = helper("escaping", value, ast.Constant("is stored"))
                new = ast.Assign([ast.Subscript(owner, t.slice, ast.Store())], value)
                return [_located(new, s)]
            self.note(s, "assignment to selected elements")
            index = index_value(self.expressions.of(t.slice, under))
            return [_located(ast.Expr(helper("setitem", owner, index, value, predicate(under))), s)]
        if isinstance(t, ast.Attribute):
            t.value = self.expressions.of(t.value, under)
            new = ast.Assign([t], helper("escaping", value, ast.Constant("is stored in an attribute")))
            return [*self.certain(under, "an attribute is set", s), _located(new, s)]
        return [_located(ast.Assign([t], value), s)]

    def augment(self, s: ast.AugAssign, under: str | None) -> list[ast.stmt]:
        value = self.expressions.of(s.value, under)
        operation = _IN_PLACE[type(s.op)]
        if isinstance(s.target, ast.Name):
            name = s.target.id
            new = helper("augmented", _operator(operation), load(name), value, predicate(under))
            return [_assign(name, new, s)]
        if isinstance(s.target, ast.Subscript) and (under is not None or is_computed(s.target.slice)):
            owner, at = self.fresh("o"), self.fresh("i")
            self.note(s, "assignment to selected elements")
            # An item of a tensor is a view or a copy; either way the result is what is then assigned.
            functions = _operator(operation), _operator(operation[1:])
            changed = helper("changed_item", *functions, load(owner), load(at), value)
            return [
                _assign(owner, self.expressions.of(s.target.value, under), s),
                _assign(at, index_value(self.expressions.of(s.target.slice, under)), s),
                _located(ast.Expr(helper("setitem", load(owner), load(at), changed, predicate(under))), s),
            ]
        s.value = helper("escaping", value, ast.Constant("is stored"))
        if under is None or not isinstance(s.target, ast.Attribute):
            return [*self.certain(under, "an attribute or item is set", s), s]
        held = ast.Attribute(copy.deepcopy(s.target.value), s.target.attr, ast.Load())
        written = helper("augmented_tensor", _operator(operation), held, copy.deepcopy(s.value), load(under))
        surely = ast.Compare(load(under), [ast.Is()], [ast.Constant(None)])
        return [_located(ast.If(surely, [s], [_located(ast.Expr(written), s)]), s)]

    def branch(self, s: ast.If, under: str | None, live: Names) -> list[ast.stmt]:
        if is_plain(s.test):
            s.test = self.expressions.of(s.test, under)
            s.body = self.block(s.body, under, live)
            s.orelse = self.block(s.orelse, under, live) if s.orelse else []
            return [s]
        t, start, inner = self.fresh("t"), self.fresh("m"), self.fresh("p")
        first, second = assigned(s.body), assigned(s.orelse)
        merged = sorted((first | second) & live)
        restored = sorted(first & (live_before(s.orelse, live, live, live) | live))
        self.merged |= {*merged, *restored}
        before = {n: self.fresh("o") for n in sorted({*merged, *restored})}
        out = self.conditions.compute(s.test, t, under)
        out += [_assign(start, helper("mark", load(t)), s)]
        out += [_assign(before[n], load(n), s) for n in before]
        out += [self._side("may", t, inner, load(t), under, self.block(s.body, inner, live), s)]
        then = {n: self.fresh("a") for n in merged}
        out += [_assign(then[n], load(n), s) for n in merged]
        if s.orelse or restored:
            other = [_assign(n, load(before[n]), s) for n in restored]
            other += self.block(s.orelse, inner, live) if s.orelse else []
            out += [self._side("may_not", t, inner, helper("not_", load(t)), under, other, s)]
        out += [_assign(n, helper("select", load(t), load(then[n]), load(n)), s) for n in merged]
        out += [_located(ast.Expr(helper("check", load(start))), s)]
        self.note(s, "branch on a tensor")
        return out

    def _side(
        self, when: str, t: str, inner: str, test: ast.expr, under: str | None, body: list[ast.stmt], s: ast.stmt
    ) -> ast.stmt:
        enter = _assign(inner, helper("under", predicate(under), test), s)
        return _located(ast.If(helper(when, load(t)), [enter, *body], []), s)

    def loop(self, s: ast.For, under: str | None, live: Names) -> list[ast.stmt]:
        iterable = self.expressions.of(s.iter, under)
        body = self.no_continue(s.body) or [_located(ast.Pass(), s)]
        carried_to = live | live_before(body, live, live, live) | loads(*s.orelse)
        if _is_plain_loop(s.iter):
            s.iter, s.body = iterable, self.block(body, under, carried_to)
            return [s]
        indexed = _indexed_by(s, body)
        items, start, here, inner = (self.fresh(c) for c in "lmcp")
        carried = sorted((assigned(body) - targets(s.target)) & carried_to)
        self.merged |= set(carried)
        before = {n: self.fresh("o") for n in carried}
        inside = [_assign(inner, helper("under", predicate(under), load(here)), s)]
        if targets(s.target) & live:
            inside += self.certain(here, "the loop's variable is read behind the loop,", s)
        inside += [_assign(before[n], load(n), s) for n in carried]
        inside += self.block(body, inner, carried_to)
        inside += [_assign(n, helper("select", load(here), load(n), load(before[n])), s) for n in carried]
        target = ast.Tuple([ast.Name(here, ast.Store()), s.target], ast.Store())
        orelse = self.block(s.orelse, under, live) if s.orelse else []
        self.note(s, "loop over hits")
        return [
            _assign(items, helper("loop", iterable, ast.Tuple(indexed, ast.Load())), s),
            _assign(start, helper("mark_loop", load(items)), s),
            _located(ast.For(target, load(items), inside, orelse), s),
            _located(ast.Expr(helper("check", load(start))), s),
        ]


def _indexed_by(s: ast.For, body: list[ast.stmt]) -> list[ast.expr]:
    """Containers that the loop's variable indexes, if the body leaves them alone."""
    variables = set(targets(s.target))
    for statement in body:
        if isinstance(statement, ast.Assign) and loads(statement.value) - {"int"} <= variables:
            variables |= {n for t in statement.targets for n in targets(t)}
    changed = assigned(body)
    found: dict[str, ast.expr] = {}
    for node in (n for statement in body for n in ast.walk(statement)):
        if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load) or not _is_chain(node.value):
            continue
        by_variable = loads(node.slice) and loads(node.slice) - {"int"} <= variables
        if by_variable and not isinstance(node.slice, (ast.Tuple, ast.Slice)) \
                and not loads(node.value) & (changed | variables):  # fmt: skip
            found.setdefault(ast.dump(node.value), node.value)
    return [ast.parse(ast.unparse(e), mode="eval").body for e in found.values()]


def _is_chain(e: ast.expr) -> bool:
    while isinstance(e, ast.Attribute):
        e = e.value
    return isinstance(e, ast.Name)


def _is_plain_loop(e: ast.expr) -> bool:
    if not isinstance(e, ast.Call):
        return False
    if isinstance(e.func, ast.Name):
        return e.func.id in _PLAIN_LOOPS
    return isinstance(e.func, ast.Attribute) and e.func.attr in ("items", "values", "keys") and not e.args


def _ends(body: list[ast.stmt], kind: type[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], kind)


def _leaves(body: list[ast.stmt], kind: type[ast.stmt]) -> bool:
    """Whether a block may leave by its last statement."""
    last = body[-1] if body else None
    if isinstance(last, ast.If):
        return _leaves(last.body, kind) or _leaves(last.orelse, kind)
    return isinstance(last, kind)


def _only_names(t: ast.expr) -> bool:
    return not any(isinstance(n, (ast.Subscript, ast.Attribute)) for n in ast.walk(t))


def _is_runtime_call(e: ast.expr, name: str) -> bool:
    return isinstance(e, ast.Call) and ast.unparse(e.func) == f"{RUNTIME}.{name}"


def _operator(name: str) -> ast.expr:
    name = {"and": "and_", "or": "or_"}.get(name, name)
    return ast.Attribute(ast.Attribute(load(RUNTIME), "operators", ast.Load()), name, ast.Load())


def _unbound() -> ast.expr:
    return ast.Attribute(load(RUNTIME), "UNBOUND", ast.Load())


def _assign(name: str, value: ast.expr, where: ast.AST) -> ast.stmt:
    return _located(ast.Assign([ast.Name(name, ast.Store())], value), where)


def _located(node: ast.stmt, where: ast.AST) -> ast.stmt:
    return ast.copy_location(node, where)
