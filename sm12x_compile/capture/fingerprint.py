"""What a Python function means, without the names it was written with.

`read` accepts a function only if it is *pure tensor code*: it calls torch, arithmetic and other such functions,
writes nothing but its own locals, and its control flow asks sizes, flags and None. For such a function it gives

* a fingerprint: the hash of its syntax without names of locals, docstrings, annotations and formatting, with the
  fingerprints of its helpers in place of their names; equal for pasted and renamed copies;
* a copy that reports every decision of its control flow, so that an experiment (`experiment.py`) knows which sizes
  the function tells apart.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .pure_code import (
    BUILTINS,
    FORBIDDEN,
    LARGEST_NUMBER,
    REFUSED_EXPRESSIONS,
    STATEMENTS,
    TORCH_NAMES,
    TRUSTED,
    Opaque,
    asks_for_export,
    assigned,
    definition,
    is_constant,
    is_filled,
    is_method,
    is_operator,
    is_small_power,
    is_trusted,
)
from .watcher import Watcher


@dataclass(frozen=True)
class Meaning:
    """A function that `read` has understood.

    Attributes:
        fingerprint: equal for functions that differ in names and formatting alone.
        watched: builds a copy of the function that reports its decisions to a `Watcher`.
        numbers: every number in its text and in that of its helpers.
        reads_keywords: whether it reads its ``**kwargs``.
    """

    function: types.FunctionType
    fingerprint: str
    watched: Callable[[Watcher], Callable[..., Any]]
    numbers: frozenset[float]
    reads_keywords: bool


def read(function: types.FunctionType) -> Meaning:
    """Understand a function.

    Raises:
        Opaque: it is not pure tensor code.
    """
    return _Reader(function, ()).meaning()


class _Reader(ast.NodeTransformer):
    """Checks one function, collects what its fingerprint is made of, and inserts the watching calls."""

    def __init__(self, function: types.FunctionType, above: tuple[types.FunctionType, ...]) -> None:
        if function in above or len(above) > 4:
            raise Opaque("it is recursive")
        self.function = function
        self.above = (*above, function)
        self.helpers: dict[str, Meaning] = {}
        self.namespace: dict[str, Any] = {}
        self.numbers: set[float] = set()
        self.places = 0
        self.tree = definition(function)
        self.cells = {
            name: cell.cell_contents
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            if is_filled(cell)
        }
        self.locals = assigned(self.tree)
        self.functions = {
            n.name for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)
        } | {
            target.id
            for n in ast.walk(self.tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda)
            for target in n.targets if isinstance(target, ast.Name)
        }  # fmt: skip

    def meaning(self) -> Meaning:
        for value in (*(self.function.__defaults__ or ()), *(self.function.__kwdefaults__ or {}).values()):
            if not is_constant(value):
                raise Opaque("a default of its arguments is an object")
            self._number(value)
        normal = ast.dump(_Nameless(self).visit(definition(self.function)))
        keywords = self.tree.args.kwarg
        reads_keywords = keywords is not None and any(
            isinstance(n, ast.Name) and n.id == keywords.arg for n in ast.walk(self.tree)
        )
        body = ast.fix_missing_locations(self.visit(self.tree))
        defaults = repr((self.function.__defaults__, self.function.__kwdefaults__))
        numbers = frozenset(self.numbers).union(*(h.numbers for h in self.helpers.values()))
        code = compile(ast.Module([body], []), self.function.__code__.co_filename, "exec")
        digest = hashlib.sha256(f"{normal}{defaults}".encode()).hexdigest()

        def watched(watcher: Watcher) -> Callable[..., Any]:
            namespace: dict[str, Any] = {"__builtins__": builtins, **self.namespace}
            namespace |= {name: h.watched(watcher) for name, h in self.helpers.items()}
            namespace["__truth__"] = lambda place, value: watcher.truth((digest, place), value)
            namespace["__compare__"] = lambda place, *rest: watcher.compare((digest, place), *rest)
            exec(code, namespace)
            made = namespace[body.name]
            made.__defaults__, made.__kwdefaults__ = self.function.__defaults__, self.function.__kwdefaults__
            return made  # type: ignore[no-any-return]

        return Meaning(self.function, digest, watched, numbers, reads_keywords)

    # ------------------------------------------------------------ what is allowed

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt) and not isinstance(node, (*STATEMENTS, ast.Import, ast.ImportFrom)):
            raise Opaque(f"it contains a {type(node).__name__.lower()} statement")
        if isinstance(node, REFUSED_EXPRESSIONS):
            raise Opaque("it is a generator or a coroutine")
        return super().visit(node)

    def visit_Import(self, node: ast.Import) -> ast.AST:
        if any(alias.name.split(".")[0] not in TRUSTED for alias in node.names):
            raise Opaque("it imports a module")
        raise Opaque("it imports while it runs")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        raise Opaque("it imports while it runs")

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        self._number(node.value)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if all(
            isinstance(n, (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)) for n in ast.walk(node)
        ):
            if isinstance(node.op, ast.Pow) and not is_small_power(node):
                raise Opaque("a number in it is larger than any experiment")
            self._number(eval(compile(ast.Expression(node), "<number>", "eval"), {"__builtins__": {}}))
        return self.generic_visit(node)

    def _number(self, value: Any) -> None:
        if isinstance(value, tuple):
            for part in value:
                self._number(part)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if LARGEST_NUMBER < abs(value) < float("inf"):
                raise Opaque(f"{value} in it is larger than any experiment")
            self.numbers.add(value)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if not isinstance(node.ctx, ast.Load):
            raise Opaque("it writes an attribute")
        if node.attr in FORBIDDEN or node.attr.startswith("__"):
            raise Opaque(f"it uses .{node.attr}")
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.locals:
            return node
        if isinstance(node.ctx, ast.Store):
            raise Opaque(f"it writes the global {node.id}")
        value = self.resolve(node.id)
        if isinstance(value, types.FunctionType) and not is_trusted(value):
            if node.id not in self.helpers:
                if asks_for_export(value):
                    self.namespace[node.id] = _no  # a graph for our backend is never an exported one
                    return node
                self.helpers[node.id] = _Reader(value, self.above).meaning()
        elif is_constant(value) or is_trusted(value) or (node.id in BUILTINS and value is getattr(builtins, node.id)):
            self._number(value)
            self.namespace[node.id] = value
        else:
            raise Opaque(f"it reads {node.id}, which is more than a number, a function or torch")
        return node

    def resolve(self, name: str) -> Any:
        for scope in (self.cells, self.function.__globals__, vars(builtins)):
            if name in scope:
                return scope[name]
        raise Opaque(f"it reads {name}, which is not defined")

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        if isinstance(function, ast.Name):
            if function.id in self.locals and function.id not in self.functions:
                raise Opaque(f"it calls {function.id}, which it was given")
            if function.id not in self.locals:
                self._check_callable(self.resolve(function.id), function.id)
        elif isinstance(function, ast.Attribute):
            known, value = self._chain(function)
            if known:
                self._check_callable(value, function.attr)
            elif not is_method(function.attr):
                raise Opaque(f"it calls .{function.attr}()")
        elif not isinstance(function, ast.Lambda):
            raise Opaque("it calls the result of an expression")
        return self.generic_visit(node)

    def _chain(self, node: ast.expr) -> tuple[bool, Any]:
        """The object that ``torch.linalg.solve_triangular`` names, if its root is a global."""
        if isinstance(node, ast.Name) and node.id not in self.locals:
            return True, self.resolve(node.id)
        if isinstance(node, ast.Attribute):
            known, value = self._chain(node.value)
            if known and isinstance(value, types.ModuleType):
                if not is_trusted(value) or not hasattr(value, node.attr):
                    raise Opaque(f"it uses {node.attr} of a module that is not torch's")
                return True, getattr(value, node.attr)
        return False, None

    def _check_callable(self, value: Any, name: str) -> None:
        if isinstance(value, types.FunctionType) and not is_trusted(value):
            return  # visit_Name reads it
        if name in BUILTINS and value is getattr(builtins, name, None):
            return
        root = (getattr(value, "__module__", None) or "torch").split(".")[0]
        if root == "torch" or (isinstance(value, types.BuiltinFunctionType) and root not in TRUSTED):
            name = getattr(value, "__name__", name)
            name = name.removeprefix("linalg_")
            if name not in TORCH_NAMES and not is_operator(name) and not is_operator(f"linalg_{name}"):
                raise Opaque(f"it calls {name}, which is no tensor operator")
        elif root not in TRUSTED:
            raise Opaque(f"it calls {name}, which is not known")

    # ------------------------------------------------------------ what is watched

    def _watch(self, node: ast.expr) -> ast.expr:
        return _call("__truth__", ast.Constant(self._place()), node)

    def _place(self) -> int:
        self.places += 1
        return self.places

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if len(node.ops) != 1:
            raise Opaque("it chains comparisons")
        kind = type(node.ops[0]).__name__
        # lambda: both sides are evaluated once.
        left, right = ast.Name("__left__", ast.Load()), ast.Name("__right__", ast.Load())
        arguments = ast.arguments([], [ast.arg("__left__"), ast.arg("__right__")], None, [], [], None, [])
        watched = _call(
            "__compare__", ast.Constant(self._place()), ast.Constant(kind), left, right,
            ast.Compare(left, node.ops, [right]),
        )  # fmt: skip
        return ast.Call(ast.Lambda(arguments, watched), [self.visit(node.left), self.visit(node.comparators[0])], [])

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        node.test = self._watch(node.test)
        return node

    visit_IfExp = visit_While = visit_Assert = visit_If  # type: ignore[assignment]

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        node.values = [self._watch(v) for v in node.values]
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        self.generic_visit(node)
        node.ifs = [self._watch(v) for v in node.ifs]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node is not self.tree and (node.decorator_list or node.args.defaults or node.args.kw_defaults):
            raise Opaque("a function inside it has defaults or decorators")
        node.decorator_list = []
        node.returns = None
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None
        if node is self.tree:  # they are set on the compiled function
            node.args.defaults = [ast.Constant(None) for _ in node.args.defaults]
            node.args.kw_defaults = [d and ast.Constant(None) for d in node.args.kw_defaults]
        node.body = [self.visit(s) for s in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.Pass()
        return self.visit(ast.Assign([node.target], node.value))


class _Nameless(ast.NodeTransformer):
    """Syntax with numbers for locals and meanings for what is global."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader
        self.numbers: dict[str, str] = {}

    def _local(self, name: str) -> str:
        return self.numbers.setdefault(name, f"local{len(self.numbers)}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list, node.returns = [], None
        node.args.defaults, node.args.kw_defaults = [], []
        node.name = self._local(node.name)
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(node.body) > 1:
            node.body = node.body[1:]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self._local(node.arg))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return None if node.value is None else self.visit(ast.Assign([node.target], node.value))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.reader.locals:
            return ast.Name(self._local(node.id), node.ctx)
        value = self.reader.resolve(node.id)
        if isinstance(value, types.FunctionType) and not is_trusted(value):
            if asks_for_export(value):
                return ast.Constant(False)
            return ast.Name(_Reader(value, self.reader.above).meaning().fingerprint, node.ctx)
        return ast.Constant(value) if is_constant(value) else ast.Name(getattr(value, "__name__", node.id), node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        known, value = self.reader._chain(node)
        if known and getattr(value, "__module__", None) is not None:
            return ast.Name(f"{value.__module__}.{getattr(value, '__qualname__', node.attr)}", node.ctx)
        return self.generic_visit(node)


def _no() -> bool:
    return False


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])
