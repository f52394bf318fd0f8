"""Find functions that may compute a known family, and let Dynamo trace our form of them; undo it.

Modules are scanned when the package is imported, and again when a frame is about to be compiled: only those that
have changed. What is substituted asks first whether our backend compiles (`scope.py`); everybody else gets an
unsubstituted copy of the function.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .captured import (
    Candidate,
    candidates,
    captured_call,
    fact,
    forget,
    parameters_of,
    plan_for,
)
from .fingerprint import read
from .library import FEATURE
from .pure_code import Opaque
from .scope import compiling_for_us

logger = logging.getLogger("sm12x_compile")
_FEWEST_ARGUMENTS = 5  # q, k, v, g, beta
_DECAY = {"exp", "exp2"}
_LEFT_ALONE = ("torch", "sm12x_compile", "sympy", "numpy", "triton", "torchgen")

_seen_functions: dict[int, types.FunctionType] = {}
_seen_modules: dict[str, tuple[int, int]] = {}
_substituted: list[types.FunctionType] = []


def install() -> None:
    """Scan what is loaded, and keep scanning before each compilation."""
    scan()
    _listen()


def uninstall() -> None:
    """Give Dynamo the original functions back; graphs that are compiled keep what they captured."""
    handler = _handler()
    if handler is not None:
        plain = [c for c in handler.start_callbacks if c is not _before_compiling]
        handler.start_callbacks = plain
    for function in _substituted:
        _withdraw(function)
    _substituted.clear()
    _seen_functions.clear()
    _seen_modules.clear()
    forget()


def installed() -> list[types.FunctionType]:
    """The functions that are substituted while our backend compiles (if an experiment agrees)."""
    return list(_substituted)


# ---------------------------------------------------------------- finding


def scan() -> None:
    """Consider every function of the modules that are new or have grown since the last time."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in _LEFT_ALONE or name in sys.stdlib_module_names or module is None:
            continue
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        state = (id(module), len(names))
        if _seen_modules.get(name) != state or name == "__main__":
            _seen_modules[name] = state
            _consider(list(names.values()))


def _consider(values: Iterable[Any], depth: int = 0) -> None:
    for value in values:
        if not isinstance(value, types.FunctionType) or id(value) in _seen_functions:
            continue
        _seen_functions[id(value)] = value  # kept alive: the id stays its own
        if value.__module__ and value.__module__.split(".")[0] in _LEFT_ALONE:
            continue
        if depth < 4:  # a decorator holds the function that it wraps
            inner = [getattr(value, "__wrapped__", None), *_cells(value)]
            _consider(inner, depth + 1)
        if _may_decay(value):
            _substitute(value)


def _cells(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            continue
    return found


def _may_decay(function: types.FunctionType) -> bool:
    """A first look at the bytecode alone: enough arguments, and an exponential in it or in a helper."""
    code = function.__code__
    if code.co_argcount + code.co_kwonlyargcount < _FEWEST_ARGUMENTS or "self" in code.co_varnames[:1]:
        return False
    if _names(code) & _DECAY:
        return True
    helpers = (function.__globals__.get(name) for name in code.co_names)
    return any(isinstance(h, types.FunctionType) and _names(h.__code__) & _DECAY for h in helpers)


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _before_compiling(args: Any) -> None:
    try:
        scan()
        _consider(_of_frame())
    except Exception:
        logger.warning("sm12x could not look for functions to capture", exc_info=True)


def _of_frame() -> list[Any]:
    """Functions that the frame about to be compiled sees beside its module's: those in its closure and locals.

    Dynamo's own frame holds them; where a torch version names them otherwise, they are not found.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_compile" and frame.f_code.co_filename.endswith("convert_frame.py"):
            held = frame.f_locals
            cells = held.get("closure") or ()
            values = [c.cell_contents for c in cells if isinstance(c, types.CellType) and _filled(c)]
            values += list((held.get("globals") or {}).values())
            local = held.get("locals")
            return values + (list(local.values()) if isinstance(local, dict) else [])
        frame = frame.f_back  # type: ignore[assignment]
    return []


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------- substituting


def _substitute(function: types.FunctionType) -> None:
    signature = parameters_of(function)
    if signature is None:
        return
    try:
        meaning = read(function)
    except Opaque as reason:
        logger.debug("%s is not captured: %s", function.__qualname__, reason)
        return
    except Exception:
        logger.debug("%s is not captured", function.__qualname__, exc_info=True)
        return
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    candidates.append(Candidate(meaning, copy))
    traced = _traced(len(candidates) - 1, copy, *signature, meaning.reads_keywords)
    try:
        torch.compiler.substitute_in_graph(function, skip_signature_check=True)(traced)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:  # somebody else has substituted it
        logger.debug("%s is not captured: %s", function.__qualname__, error)
        return
    _substituted.append(function)


def _traced(
    candidate: int, original: Callable[..., Any], names: tuple[str, ...], defaults: dict[str, Any], more: bool,
    reads_keywords: bool,
) -> Callable[..., Any]:  # fmt: skip
    """What Dynamo traces in place of a function."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        if compiling_for_us(FEATURE):
            bound = _bind(names, defaults, more and not reads_keywords, args, kwargs)
            if bound is not None:
                plan = plan_for(candidate, tuple([(n, _describe(bound[n])) for n in names]))
                if plan >= 0:
                    tensors = [bound[n] for n in names if isinstance(bound[n], Tensor)]
                    if _fits(plan, tensors):
                        o, state = captured_call(plan, *tensors)
                        result = fact(plan, "result")
                        return (o, state) if result == 0 else (o, None) if result == 1 else o
        return original(*args, **kwargs)

    return traced


# The functions below are traced by Dynamo as well.


def _bind(
    names: tuple[str, ...], defaults: dict[str, Any], more: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Arguments by parameter; None where the original should say what is wrong, or might need a gradient."""
    if len(args) > len(names):
        return None
    bound = dict(defaults)
    for k in range(len(args)):
        bound[names[k]] = args[k]
    for name in kwargs:
        if name in names:
            bound[name] = kwargs[name]
        elif not more:
            return None
    for name in names:
        if name not in bound:
            return None
        value = bound[name]
        if isinstance(value, Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                return None
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            return None
    return bound


def _describe(value: Any) -> Any:
    return ("tensor", value.ndim, value.dtype) if isinstance(value, Tensor) else value


def _fits(plan: int, tensors: list[Tensor]) -> bool:
    q, v = tensors[fact(plan, "q")], tensors[fact(plan, "v")]
    heads = fact(plan, "heads")
    if not fact(plan, "grouped") and q.shape[heads] != v.shape[heads]:
        return False
    if v.shape[heads] % q.shape[heads] != 0:
        return False
    multiple = fact(plan, "multiple")
    return multiple == 1 or v.shape[fact(plan, "time")] % multiple == 0


# ---------------------------------------------------------------- Dynamo's tables


class _Lasting(list):  # type: ignore[type-arg]
    """Callbacks of Dynamo's: `torch._dynamo.reset` clears them all but ours."""

    def clear(self) -> None:
        super().clear()
        self.append(_before_compiling)


def _handler() -> Any:
    """Dynamo's callbacks; None where a torch version keeps them otherwise (then later functions are not found)."""
    handler = getattr(torch._dynamo, "callback_handler", None)
    return handler if isinstance(getattr(handler, "start_callbacks", None), list) else None


def _listen() -> None:
    handler = _handler()
    if handler is not None and _before_compiling not in handler.start_callbacks:
        handler.start_callbacks = _Lasting([*handler.start_callbacks, _before_compiling])


def _withdraw(function: types.FunctionType) -> None:
    """Take out what `substitute_in_graph` has put into Dynamo's tables; there is no public way."""
    from torch._dynamo import trace_rules
    from torch._dynamo.variables import PolyfilledFunctionVariable
    from torch._dynamo.variables.builder import VariableBuilder

    handlers = PolyfilledFunctionVariable._get_polyfill_handlers()
    wrapped = handlers.pop(function, None)
    for held in (function, wrapped):
        if held is None:
            continue
        handlers.pop(held, None)
        VariableBuilder._id_dispatch().pop(id(held), None)
        trace_rules._polyfilled_function_ids.remove(id(held))
        trace_rules.get_torch_obj_rule_map().pop(held, None)
