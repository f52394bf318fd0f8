"""What stands between the two matrices of an expert: gate and up, and the function that joins them.

    act(g) * u      act(g) alone                           act: silu, gelu (erf or tanh), relu, relu squared
    g * sigmoid(alpha * g) * (u + 1)                       gpt-oss
    with g = min(g, limit), u = clamp(u, -limit, limit)    where the model clamps

A function of one or two numbers has no end of spellings, so it is not matched but tabulated (`function_table.py`)
and compared with these. Routing weights that stand in the product come back beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Apply, Element, Expr, Number, Var
from sm12x_compile.index_algebra.expr import args_of, argument, operand
from sm12x_compile.match import Refusal

from .function_table import Formula, NotTabulated, factor_between, read_formula, settled
from .routed import FLOATS, Reader, Unreadable

aten = torch.ops.aten

_CLAMPS = {aten.clamp.default, aten.clamp_max.default, aten.clamp_min.default, aten.hardtanh.default}
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Activation:
    """``name(gate) * up``; `up` is None for experts without a gate, whose only projection is `gate`."""

    name: str
    gate: Expr
    up: Expr | None
    alpha: float = 1.0
    limit: float | None = None


def read_activation(
    reader: Reader, hidden: tuple[Expr, ...], inner: Var, node: Node, is_projection: Callable[[Expr], bool]
) -> tuple[Activation, tuple[Expr, ...]]:
    """Read a product of factors that run over `inner`; what does not (a routing weight) comes back beside it.

    Raises:
        Unreadable: it is none of the forms above; with a refusal if it is computed from a projection.
    """

    def refused(reason: str, leaves: Sequence[Expr]) -> Unreadable:
        return Unreadable(Refusal(reason, node) if any(is_projection(leaf) for leaf in leaves) else None)

    parts = [p for expr in hidden for p in _parts(reader, expr)]
    varying = [p for p in parts if reader.depends(p, inner)]
    scalars = [p for p in parts if not reader.depends(p, inner)]
    try:
        formula = read_formula(reader, varying, inner)
    except NotTabulated as why:
        raise refused(f"between the experts' matrices stands {why}", why.leaves) from None
    for found in _candidates(formula):
        factor = factor_between(formula, found.name, found.alpha, swapped=found.gate is not formula.leaves[0])
        if factor is not None:
            scalars += [Number(factor)] if factor != 1.0 else []
            return _unclamped(reader, found, node), tuple(scalars)
    reason = (
        "between the experts' matrices stands a function of the first one's result that is none of silu, gelu, relu "
        "and relu squared, times up or alone, or gpt-oss's SwiGLU"
    )
    raise refused(reason, formula.leaves)


def _candidates(formula: Formula) -> Iterator[Activation]:
    """All that a function of one or two projections may be."""
    if len(formula.leaves) == 1:
        for name in _ACTIVATIONS:
            yield Activation(name, formula.leaves[0], None)
    if len(formula.leaves) == 2:
        for gate, up in (formula.leaves, formula.leaves[::-1]):
            for name in _ACTIVATIONS:
                yield Activation(name, gate, up)
            for alpha in formula.numbers:
                yield Activation("swiglu_oai", gate, up, alpha)


def _parts(reader: Reader, expr: Expr) -> list[Expr]:
    """The factors of a product, past casts and rows that belong to no expert."""
    made = reader.meaning(expr) if isinstance(expr, Element) else expr
    if isinstance(made, Apply):
        if made.op == "mul":
            return [p for a in made.args for p in _parts(reader, a)]
        if made.op == "cast" and made.detail in FLOATS:
            return _parts(reader, made.args[0])
        if (guarded := reader.behind_guard(made)) is not None:
            return _parts(reader, guarded)
    return [expr]


# ---------------------------------------------------------------- clamps


def _unclamped(reader: Reader, act: Activation, node: Node) -> Activation:
    gate, low, high = _clamp(reader, act.gate)
    if low is not None:
        raise Unreadable(Refusal("the gate is clamped from below, too; only an upper limit is known", node))
    if act.up is None:
        if high is not None:
            raise Unreadable(Refusal("an expert without a gate is clamped before its activation", node))
        return replace(act, gate=gate)
    up, lowest, highest = _clamp(reader, act.up)
    if (lowest, highest) != ((None, None) if high is None else (-high, high)):
        reason = "gate and up are clamped at different limits; one limit for both, -limit..limit for up, is known"
        raise Unreadable(Refusal(reason, node))
    return replace(act, gate=gate, up=up, limit=high)


def _clamp(reader: Reader, expr: Expr) -> tuple[Expr, float | None, float | None]:
    """What is clamped, from where, to where."""
    low: float | None = None
    high: float | None = None
    while isinstance(expr, Element):
        element = reader.resolve(expr)
        node = element.node
        if node.target not in _CLAMPS:
            inside = settled(reader, element)
            if inside == element or not isinstance(inside, Element) or inside.node.target not in _CLAMPS:
                break
            expr = inside
            continue
        at_least, at_most = _limits(node)
        for limit in (at_least, at_most):
            if isinstance(limit, Node):
                return expr, low, high
        low = at_least if low is None or (at_least is not None and at_least > low) else low
        high = at_most if high is None or (at_most is not None and at_most < high) else high
        expr = Element(operand(node), element.index)
    return expr, low, high


def _limits(node: Node) -> tuple[float | None, float | None]:
    if node.target is aten.clamp_max.default:
        return None, args_of(node)[1]
    if node.target is aten.clamp_min.default:
        return args_of(node)[1], None
    if node.target is aten.hardtanh.default:
        return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return argument(node, 1, "min"), argument(node, 2, "max")
