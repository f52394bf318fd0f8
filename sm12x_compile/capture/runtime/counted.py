"""Conditions on ints that the traced frame counts up.

Dynamo would decide such a condition now, for the count of this call, and compile again where it turns. But both sides
may well end in the same shapes (a window that is not full yet is written at a position, a full one is shifted), so it
becomes a condition that is known when the graph runs. Where a surrounding condition decides it, it is no condition.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from .refusal import frame, originals, restart_without, tracers


def symbols_of(x: Any) -> Any:
    """The expression of a SymInt or SymBool; None of anything else."""
    node = getattr(x, "node", None)
    return getattr(node, "expr", None) if isinstance(x, (torch.SymInt, torch.SymBool)) else None


def depends_on_count(expression: Any, output: Any) -> bool:
    """Whether a symbol in the expression is an int that the frame counts up."""
    from ..counters import counted_in

    root = output.root_tx.f_code
    names = counted_in(originals.get(root, root))
    sources = output.shape_env.var_to_sources
    found = (s.name for symbol in expression.free_symbols for s in sources.get(symbol, ()))
    return bool(names) and any((name() if callable(name) else name) in names for name in found)


def held_by(code: Any, name: str) -> Any:
    """The SymBool in a local name of the traced function with this code, and its tracer; (None, None) otherwise."""
    for tracer in tracers():
        if tracer.f_code is code:
            value = tracer.symbolic_locals.get(name)
            value = value.realize() if value is not None else None
            return getattr(value, "sym_num", None), tracer
    return None, None


def author_of() -> Any:
    """The author's code of the innermost rewritten function that is being traced."""
    for t in tracers():
        original = originals.get(t.f_code)
        if original is not None:
            return original
    return None


@torch._dynamo.assume_constant_result
def _fact(certain: tuple[int, ...]) -> int:
    """0: no condition on a count. 1, -1: true or false wherever it is asked. n > 1: the number of a new fact."""
    x, tracer = held_by(condition.__code__, "x")
    expression = symbols_of(x)
    if expression is None or not isinstance(expression, sympy.logic.boolalg.Boolean):
        return 0
    author = author_of()
    if author is None or author in frame.plain or not depends_on_count(expression, tracer.output):
        return 0
    frame.counted.add(author)
    facts = tracer.output.__dict__.setdefault("_sm12x_facts", [None, None])
    held = [facts[k] if k > 0 else sympy.Not(facts[-k]) for k in certain]
    for answer, question in ((1, expression), (-1, sympy.Not(expression))):
        if any(_implies(fact, question) for fact in held):
            return answer
    facts.append(expression)
    return len(facts) - 1


def _implies(fact: Any, question: Any) -> bool:
    """Whether a bound on whole numbers follows from another: n < 8 implies n + 1 <= 8."""
    a, b = _at_least_zero(fact), _at_least_zero(question)
    if a is None or b is None:
        return False
    slack = sympy.expand(b - a)
    return bool(slack.is_Integer and slack >= 0)


def _at_least_zero(relation: Any) -> Any:
    """A relation of whole numbers as an expression that is not negative where it holds; None if it is no bound."""
    kinds = {sympy.Ge: (1, 0), sympy.Gt: (1, 1), sympy.Le: (-1, 0), sympy.Lt: (-1, 1)}
    sign, strict = kinds.get(type(relation), (0, 0))
    if not sign or not (relation.lhs - relation.rhs).is_integer:
        return None
    return sympy.expand(sign * (relation.lhs - relation.rhs) - strict)


@torch._dynamo.assume_constant_result
def _device() -> str:
    """Where the graph computes."""
    for tracer in tracers():
        values = [n.meta.get("example_value") for n in tracer.output.graph.nodes]
        found = {str(v.device) for v in values if isinstance(v, torch.Tensor)} - {"cpu"}
        if len(found) > 1:
            restart_without("a condition on a count, and the graph computes on several devices")
        return found.pop() if found else "cpu"
    return "cpu"


def condition(x: Any, certain: tuple[int, ...]) -> Any:
    """None if `x` is no condition on a count; True or False if those in `certain` decide it; else tensor and fact."""
    fact = _fact(certain)
    if fact == 0:
        return None
    if fact < 2:
        return fact > 0
    flag = torch.full((), torch.sym_ite(x, 1, 0), dtype=torch.int64, device=_device())
    return flag != 0, fact
