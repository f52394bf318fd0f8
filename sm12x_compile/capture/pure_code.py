"""Which Python code is pure tensor code, and where the syntax of a function comes from.

What stands here decides by lists of what is known to have no effect but its result; anything else is refused.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from typing import Any

import torch

from sm12x_compile.smooth import words

# A number larger than this could stand for a size that no experiment reaches.
LARGEST_NUMBER = 256

BUILTINS = words(
    "range len zip enumerate min max abs sum int float bool tuple list dict map reversed sorted isinstance slice "
    "round divmod pow any all str AssertionError ValueError TypeError RuntimeError NotImplementedError"
)
_CONTAINER_METHODS = words("append extend insert items keys values get copy index count format join pop")
_TENSOR_METHODS = words(
    "size dim numel type float double half bfloat16 long int bool to new_zeros new_empty new_full new_ones stride "
    "is_contiguous contiguous element_size expand_as view_as type_as reshape_as unflatten ndimension nelement"
)
FORBIDDEN = words("item tolist numpy set_ resize_ requires_grad_ data backward cuda cpu grad")
TRUSTED = ("torch", "math", "einops", "operator")
TORCH_NAMES = words("einsum finfo Size is_tensor promote_types broadcast_shapes tensor normalize")
STATEMENTS = (
    ast.FunctionDef, ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.While, ast.If, ast.Expr,
    ast.Pass, ast.Assert, ast.Raise, ast.Break, ast.Continue,
)  # fmt: skip
REFUSED_EXPRESSIONS = (ast.Await, ast.Yield, ast.YieldFrom)


class Opaque(Exception):
    """The function is not pure tensor code, or its source is not at hand; the message says what stands against it."""


def definition(function: types.FunctionType) -> ast.FunctionDef:
    """The syntax of a function, from its source.

    Raises:
        Opaque: there is no source, or it is that of something else.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError, IndentationError):
        raise Opaque("its source is not at hand") from None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise Opaque("its source is not a single function")
    found = tree.body[0]
    if found.name != function.__code__.co_name or _parameters(found) != _code_parameters(function.__code__):
        raise Opaque("its source is that of another function")
    return found


def _parameters(tree: ast.FunctionDef) -> list[str]:
    a = tree.args
    rest = [x.arg for x in (a.vararg, a.kwarg) if x]
    return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)] + rest


def _code_parameters(code: types.CodeType) -> list[str]:
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return list(code.co_varnames[:count])


def assigned(tree: ast.FunctionDef) -> set[str]:
    """Names of arguments and locals, also those of functions and comprehensions inside."""
    found = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    found |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found | {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n is not tree}


def is_filled(cell: types.CellType) -> bool:
    """Whether a closure's variable has a value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def is_constant(value: Any) -> bool:
    """Whether a value cannot change: numbers, texts, dtypes, and tuples of them."""
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.memory_format))


def is_trusted(value: Any) -> bool:
    """Whether a module or function is torch's, or one of those known to be like it."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return name is not None and name.split(".")[0] in (*TRUSTED, "_operator")


def is_method(name: str) -> bool:
    """Whether a method of this name only computes: a tensor's, or a container's."""
    return name in _TENSOR_METHODS or name in _CONTAINER_METHODS or is_operator(name.rstrip("_"))


def is_operator(name: str) -> bool:
    """Whether ATen has an operator of this name that stays on the device."""
    return name not in FORBIDDEN and hasattr(torch.ops.aten, name)


def is_small_power(node: ast.BinOp) -> bool:
    right = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
    return isinstance(right, ast.Constant) and isinstance(right.value, (int, float)) and abs(right.value) <= 16


def asks_for_export(function: types.FunctionType) -> bool:
    """Whether a function without arguments asks torch if the code is being exported, and nothing else."""
    code = function.__code__
    names = set(code.co_names)
    return (
        not _code_parameters(code) and "is_exporting" in names
        and names <= {"torch", "compiler", "is_exporting", "Exception", "_dynamo"}
    )  # fmt: skip
