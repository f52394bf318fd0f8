"""What stands between the two matrices of an expert: gate and up, and the function that joins them.

    silu(g) * u      gelu(g) * u      relu(g)^2 [* u]      silu(g), gelu(g) alone
    g * sigmoid(alpha * g) * (u + 1)                       gpt-oss; SiLU where alpha is 1 and nothing is added
    with g = min(g, limit), u = clamp(u, -limit, limit)    where the model clamps

Read from the factors of a product, in any order and with any casts between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from sm12x_compile.index_algebra import Apply, Element, Expr, Number, Var
from sm12x_compile.index_algebra.expr import args_of, argument, operand
from sm12x_compile.match import Refusal

from .routed import FLOATS, Reader, Unreadable

aten = torch.ops.aten

_CLAMPS = {aten.clamp.default, aten.clamp_max.default, aten.clamp_min.default, aten.hardtanh.default}


@dataclass(frozen=True)
class Activation:
    """``name(gate) * up``; `up` is None for experts without a gate, whose only projection is `gate`."""

    name: str
    gate: Expr
    up: Expr | None
    alpha: float = 1.0
    limit: float | None = None


@dataclass(frozen=True)
class _Factor:
    """One factor of the product: ``kind(expr)``."""

    kind: str
    expr: Expr
    alpha: float = 1.0


def read_activation(
    reader: Reader, hidden: tuple[Expr, ...], inner: Var, node: Node
) -> tuple[Activation, tuple[Expr, ...]]:
    """Read a product of factors that run over `inner`; what does not (a routing weight) comes back beside it.

    Raises:
        Unreadable: it is none of the forms above; the refusal names the op.
    """
    factors: list[_Factor] = []
    for expr in hidden:
        factors += _factors(reader, expr, inner)
    scalars = tuple(f.expr for f in factors if f.kind == "scalar")
    factors = [f for f in factors if f.kind != "scalar"]
    found = _joined(reader, factors)
    if found is None:
        kinds = ", ".join(sorted(f.kind for f in factors))
        reason = f"between the experts' matrices stands a product of ({kinds}), which is no known activation"
        raise Unreadable(Refusal(reason, node))
    return _unclamped(reader, found, node), scalars


def _joined(reader: Reader, factors: list[_Factor]) -> Activation | None:
    kinds = sorted(f.kind for f in factors)
    of = {f.kind: f for f in factors}
    if len(factors) == 1 and factors[0].kind in ("silu", "gelu", "gelu_tanh", "relu2"):
        return Activation(factors[0].kind, factors[0].expr, None)
    if kinds == ["relu", "relu"] and _same(reader, factors[0].expr, factors[1].expr):
        return Activation("relu2", factors[0].expr, None)
    if kinds in (["plain", "silu"], ["gelu", "plain"], ["gelu_tanh", "plain"], ["plain", "relu2"]):
        (name,) = (k for k in kinds if k != "plain")
        return Activation(name, of[name].expr, of["plain"].expr)
    if kinds == ["plain", "relu", "relu"]:
        a, b = (f.expr for f in factors if f.kind == "relu")
        return Activation("relu2", a, of["plain"].expr) if _same(reader, a, b) else None
    if "sigmoid" not in of:
        return None
    gated = of["sigmoid"]
    others = [f for f in factors if f.kind == "plain"]
    gates = [f for f in others if _same(reader, f.expr, gated.expr)]
    if len(gates) != 1 or kinds.count("sigmoid") != 1:
        return None
    rest = [f for f in factors if f is not gates[0] and f is not gated]
    if gated.alpha == 1.0 and len(rest) <= 1 and all(f.kind == "plain" for f in rest):
        return Activation("silu", gated.expr, rest[0].expr if rest else None)
    if len(rest) == 1 and rest[0].kind == "plus_one":
        return Activation("swiglu_oai", gated.expr, rest[0].expr, gated.alpha)
    return None


def _factors(reader: Reader, expr: Expr, inner: Var) -> list[_Factor]:
    value = expr
    while True:
        made = reader.meaning(value) if isinstance(value, Element) else value
        if isinstance(made, Apply) and made.op == "cast" and made.detail in FLOATS:
            value = made.args[0]
        elif (guarded := reader.behind_guard(made)) is not None:
            value = guarded
        else:
            break
    if isinstance(made, Apply) and made.op == "mul":
        erf = _gelu_by_hand(reader, made)
        if erf is not None:
            return [erf]
        return [f for a in made.args for f in _factors(reader, a, inner)]
    if isinstance(made, Apply) and made.op == "add":
        for a, b in (made.args, made.args[::-1]):
            if _number(reader, b) == 1:
                return [_Factor("plus_one", a)]
    if isinstance(made, Apply) and made.op == "pow" and _number(reader, made.args[1]) == 2:
        inside = _factors(reader, made.args[0], inner)
        return inside + inside
    if isinstance(value, Element):
        element = reader.resolve(value)
        named = _named(reader, element, inner)
        if named is not None:
            return named
    if not reader.depends(value, inner):
        return [_Factor("scalar", value)]
    return [_Factor("plain", value)]


def _named(reader: Reader, element: Element, inner: Var) -> list[_Factor] | None:
    node = element.node
    if node.op != "call_function" or not node.args:
        return None
    before = Element(operand(node), element.index) if isinstance(node.args[0], Node) else None
    if before is None:
        return None
    target = node.target
    if target is aten.silu.default:
        return [_Factor("silu", before)]
    if target is aten.gelu.default:
        tanh = argument(node, 1, "approximate", "none") == "tanh"
        return [_Factor("gelu_tanh" if tanh else "gelu", before)]
    if target is aten.relu.default:
        return [_Factor("relu", before)]
    if target is aten.square.default:
        inside = _factors(reader, before, inner)
        return inside + inside
    if target is aten.sigmoid.default:
        return [_sigmoid(reader, before)]
    return None


def _sigmoid(reader: Reader, inside: Element) -> _Factor:
    """``sigmoid(alpha * g)``"""
    made = reader.meaning(inside)
    if isinstance(made, Apply) and made.op == "mul":
        for a, b in (made.args, made.args[::-1]):
            alpha = _number(reader, b)
            if alpha is not None:
                return _Factor("sigmoid", a, float(alpha))
    return _Factor("sigmoid", inside)


def _gelu_by_hand(reader: Reader, product: Apply) -> _Factor | None:
    """``0.5 * g * (1 + erf(g / sqrt(2)))``"""
    parts = _flat(reader, product)
    half = [p for p in parts if _number(reader, p) == 0.5]
    rest = [p for p in parts if _number(reader, p) is None]
    if len(half) != 1 or len(rest) != 2:
        return None
    for g, bracket in (rest, rest[::-1]):
        total = reader.meaning(bracket) if isinstance(bracket, Element) else bracket
        if not (isinstance(total, Apply) and total.op == "add"):
            continue
        for one, erf in (total.args, total.args[::-1]):
            if _number(reader, one) != 1 or not isinstance(erf, Element):
                continue
            element = reader.resolve(erf)
            if element.node.target is aten.erf.default:
                inside = reader.meaning(Element(operand(element.node), element.index))
                if _is_scaled(reader, inside, g, math.sqrt(0.5)):
                    return _Factor("gelu", g)
    return None


def _is_scaled(reader: Reader, value: Expr | None, of: Expr, factor: float) -> bool:
    if not isinstance(value, Apply) or value.op not in ("mul", "div"):
        return False
    number = _number(reader, value.args[1])
    if number is None or not number:
        return False
    scale = number if value.op == "mul" else 1 / number
    return math.isclose(scale, factor, rel_tol=1e-6) and _same(reader, value.args[0], of)


def _flat(reader: Reader, expr: Expr) -> list[Expr]:
    made = reader.meaning(expr) if isinstance(expr, Element) else expr
    if isinstance(made, Apply) and made.op == "mul":
        return [x for a in made.args for x in _flat(reader, a)]
    return [expr]


def _number(reader: Reader, expr: Expr) -> float | None:
    made = reader.meaning(expr) if isinstance(expr, Element) else expr
    return made.value if isinstance(made, Number) else None


def _same(reader: Reader, a: Expr, b: Expr) -> bool:
    return a == b or _settled(reader, a) == _settled(reader, b)


def _settled(reader: Reader, expr: Expr) -> Expr:
    """An expression without moves and casts on top."""
    while True:
        if isinstance(expr, Element):
            made = reader.meaning(expr)
            if not (isinstance(made, Apply) and made.op == "cast" and made.detail in FLOATS):
                return reader.resolve(expr)
            expr = made.args[0]
        elif isinstance(expr, Apply) and expr.op == "cast" and expr.detail in FLOATS:
            expr = expr.args[0]
        else:
            return expr


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
            settled = _settled(reader, element)
            if settled == element or not isinstance(settled, Element) or settled.node.target not in _CLAMPS:
                break
            expr = settled
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
